"""What tools/train.py makes of a config: optional hooks, where it goes on, loaders that cannot work; EMA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runner.train_config import add_optional_hooks, check_loaders, choose_start, latest_checkpoint


def checkpoint(path: Path) -> Path:
    torch.save({"state_dict": {}}, path)
    return path


def test_sections_become_hooks_and_go_from_the_config() -> None:
    config = Config(
        dict(
            custom_hooks=[dict(type="A")],
            ema=dict(momentum=1e-3),
            distillation=dict(teacher_config="d.py", teacher_checkpoint="d.pth", logits_weight=2.0),
        )
    )
    add_optional_hooks(config)
    assert config.custom_hooks == [
        dict(type="A"),
        dict(type="EMAHook", strict_load=True, momentum=1e-3),
        dict(type="DistillationHook", teacher_config="d.py", teacher_checkpoint="d.pth", logits_weight=2.0),
    ]
    assert "ema" not in config and "distillation" not in config
    off = Config(dict(ema=None))
    add_optional_hooks(off)
    assert not off.get("custom_hooks")


@pytest.mark.parametrize(("section", "message"), [
    (dict(ema=dict(momentun=1)), "unknown key 'momentun' in the config's ema section; did you mean 'momentum'"),
    (dict(distillation=dict(x=1)), "unknown key 'x' in the config's distillation section; known: teacher_config"),
    (dict(distillation=dict(teacher_config="a.py")), "lacks teacher_checkpoint"),
])  # fmt: skip
def test_mistakes_in_sections_are_named(section, message) -> None:
    with pytest.raises(MdpError, match=message):
        add_optional_hooks(Config(section))


def test_the_latest_complete_checkpoint_is_found(tmp_path, caplog) -> None:
    assert latest_checkpoint(tmp_path) is None
    for name in ("iter_8.pth", "iter_10.pth", "best_mAP_iter_12.pth", "pruned.pth"):
        checkpoint(tmp_path / name)
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_10.pth"
    content = (tmp_path / "iter_10.pth").read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / "iter_10.pth").write_bytes(content[:size])
        assert latest_checkpoint(tmp_path) == tmp_path / "iter_8.pth"
    (tmp_path / "last_checkpoint").touch()  # what a kill at the wrong moment leaves
    config = Config(dict(work_dir=str(tmp_path)))
    choose_start(config, "auto")
    assert config.resume and config.load_from == str(tmp_path / "iter_8.pth")


def test_resuming_without_a_checkpoint_starts_from_the_configs_weights(tmp_path) -> None:
    pruned = checkpoint(tmp_path / "pruned.pth")
    config = Config(dict(work_dir=str(tmp_path / "w"), load_from=str(pruned)))
    choose_start(config, "auto")
    assert not config.resume and config.load_from == str(pruned)
    choose_start(config, str(pruned))
    assert config.resume and config.load_from == str(pruned)
    with pytest.raises(MdpError, match=r"no\.pth does not exist"):
        choose_start(config, str(tmp_path / "no.pth"))


def test_loaders_that_cannot_work_are_refused() -> None:
    good = Config(
        dict(
            val_dataloader=dict(batch_size=1, sampler=dict(type="SceneSampler")),
            test_dataloader=None,
            default_hooks=dict(checkpoint=dict(max_keep_ckpts=2)),
        )
    )
    check_loaders(good)
    bad = copy.deepcopy(good)
    bad.val_dataloader.batch_size = 2
    with pytest.raises(MdpError, match=r"val_dataloader\.batch_size = 2"):
        check_loaders(bad)
    good.default_hooks.checkpoint.max_keep_ckpts = 1
    with pytest.raises(MdpError, match="keep 2 or more"):
        check_loaders(good)
