"""Public CIFAR-10 ResNets: their shortcuts as convolutions compute the same, and can be cut."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")

from mdp_mmdet3d.adapters import InputShape, adapter_of
from mdp_mmdet3d.adapters.single_graph_export import TensorMode
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.runner.cifar_resnet import main, with_shortcuts
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan
from tests.data_files import data_path

CONFIGS = Path(__file__).resolve().parents[2] / "configs/cifar10"
SIZE = (32, 32)


def random_state(depth: int) -> dict[str, torch.Tensor]:
    """Weights with the public names and shapes."""
    generator = torch.Generator().manual_seed(depth)
    state: dict[str, torch.Tensor] = {}

    def add(convolution: str, norm: str, outputs: int, inputs: int) -> None:
        state[f"{convolution}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
        for leaf in ("weight", "running_var"):
            state[f"{norm}.{leaf}"] = 0.5 + torch.rand(outputs, generator=generator)
        for leaf in ("bias", "running_mean"):
            state[f"{norm}.{leaf}"] = 0.1 * torch.randn(outputs, generator=generator)

    add("conv1", "bn1", 16, 3)
    for stage, width in enumerate((16, 32, 64), 1):
        for index in range((depth - 2) // 6):
            before = width // 2 if stage > 1 and index == 0 else width
            add(f"layer{stage}.{index}.conv1", f"layer{stage}.{index}.bn1", width, before)
            add(f"layer{stage}.{index}.conv2", f"layer{stage}.{index}.bn2", width, width)
    state["linear.weight"] = torch.randn(10, 64, generator=generator) / 8
    state["linear.bias"] = torch.randn(10, generator=generator)
    return state


def as_published(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Logits of the network as He et al. describe it, (B, 10)."""

    def layer(name: str, norm: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        x = nn.functional.conv2d(x, state[f"{name}.weight"], stride=stride, padding=1)
        statistics = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return nn.functional.batch_norm(x, *statistics, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = layer("conv1", "bn1", x).relu()
    names = dict.fromkeys(name.rpartition(".conv1")[0] for name in state if ".conv1" in name)
    for block in names:
        stride = 2 if block in ("layer2.0", "layer3.0") else 1
        inner = layer(f"{block}.conv1", f"{block}.bn1", x, stride).relu()
        shortcut = x[:, :, ::stride, ::stride]
        missing = (state[f"{block}.conv1.weight"].shape[0] - x.shape[1]) // 2
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, missing, missing))
        x = (layer(f"{block}.conv2", f"{block}.bn2", inner) + shortcut).relu()
    return nn.functional.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def built(depth: int, checkpoint: Path) -> tuple[object, nn.Module]:
    adapter = adapter_of(read_config(CONFIGS / f"resnet{depth}_mdp.py"), InputShape(0, *SIZE))
    model, _ = adapter.build(str(checkpoint))
    return adapter, model.eval()


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        (found,) = TensorMode(model, SIZE)(images)
    return found


@pytest.mark.parametrize("depth", [20, 56])
@pytest.mark.parametrize("public", [False, True])
def test_the_converted_network_computes_what_the_published_one_does(depth, public, tmp_path, monkeypatch, capsys):
    arrays = data_path(f"cifar10/resnet{depth}.npz") if public else tmp_path / "random.npz"
    if not public:
        np.savez(arrays, **{name: tensor.numpy() for name, tensor in random_state(depth).items()})
    monkeypatch.setattr(sys, "argv", ["cifar10", str(arrays), str(tmp_path / "net.pth")])
    assert main() == 0 and "wrote" in capsys.readouterr().out
    state = {name: torch.from_numpy(array) for name, array in np.load(arrays).items()}
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    expected = as_published(state, images)
    found = logits(built(depth, tmp_path / "net.pth")[1], images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_all_blocks_and_the_widths_of_all_stages_can_be_cut(tmp_path, random_kept):
    torch.save({"meta": {}, "state_dict": with_shortcuts(random_state(20))}, tmp_path / "net.pth")
    adapter, model = built(20, tmp_path / "net.pth")
    space = adapter.trace(model, SpaceOptions(4, 8, 8, 0.0, ()))
    assert len(space.blocks) == 9 and len(space.dimensions) == 3 + 9 and not space.not_prunable
    plan = PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(0), 0.3))
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    expected = logits(mask_model(copy.deepcopy(model), plan).eval(), images)
    found = logits(apply_plan(copy.deepcopy(model), plan).eval(), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_is_no_such_network_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileFormatError, match=r"no weights of a CIFAR-10 ResNet.*conv1"):
        with_shortcuts({"conv1.weight": torch.zeros(1)})
    whole = random_state(20)
    with pytest.raises(FileFormatError, match=r"no weights of a CIFAR-10 ResNet.*layer2"):
        with_shortcuts({name: tensor for name, tensor in whole.items() if not name.startswith("layer2.")})
    (tmp_path / "text.npz").write_bytes(b"nothing")
    np.save(tmp_path / "single.npy", np.zeros(2))
    np.savez(tmp_path / "words.npz", a=np.array(["conv1"]))
    for name, message in {
        "text.npz": "is truncated or corrupt",
        "single.npy": "is truncated or corrupt",
        "words.npz": "hold more than numbers",
        "missing.npz": "does not exist",
    }.items():
        monkeypatch.setattr(sys, "argv", ["cifar10", str(tmp_path / name), str(tmp_path / "net.pth")])
        assert main() == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "net.pth").exists()
