"""Files that are taken for checkpoints, and checkpoints of other makers."""

from __future__ import annotations

import collections
import datetime
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .case import ROOT, Assets, Case, load_module, run_tool


def _loader(assets: Assets) -> Callable[[Any], Callable[[], str]]:
    """Function that writes a content as checkpoint and loads it into a fresh model, whose weights must be the same."""
    from mmengine.registry import init_default_scope

    import projects.streampetr  # noqa: F401
    from projects.streampetr.checkpoint import load_checkpoint

    init_default_scope("mmdet3d")
    tiny = load_module(ROOT / "tests" / "tiny_deployment.py")
    path = assets.folder("checkpoints") / "x.pth"
    expected = torch.load(assets.checkpoint, weights_only=True)["state_dict"]
    model = tiny.build_tiny(seed=1)
    name = "img_backbone.layer1.0.conv1.weight"

    def load(content: Any) -> Callable[[], str]:
        def run() -> str:
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                torch.save(content, path)
            with torch.no_grad():
                model.img_backbone.layer1[0].conv1.weight.zero_()
            load_checkpoint(model, path)
            found = model.state_dict()[name]
            gap = (found - expected[name]).abs().max().item()
            assert gap < 0.01, f"{name} is {gap:.2g} off"
            return "weights taken"

        return run

    return load


def files(assets: Assets) -> Iterator[Case]:
    """Files that are none, and weights that are none."""
    load = _loader(assets)
    state = torch.load(assets.checkpoint, weights_only=True)["state_dict"]
    whole = assets.checkpoint.read_bytes()
    first = "img_backbone.conv1.weight"

    def changed(key: str, value: torch.Tensor) -> dict:
        return {"state_dict": {**state, key: value}}

    yield Case("as saved", load({"state_dict": state}))
    for name, content, names in (
        ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", ("git-lfs",)),
        ("web page", b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", ("web page",)),
        ("empty", b"", ("empty",)),
        ("text", b"no checkpoint at all, but some text", ("x.pth",)),
        ("truncated", whole[: len(whole) // 2], ("truncated",)),
        ("a list", [1, 2], ("list",)),
        ("no weights", {"epoch": 3, "optimizer": {}}, ("epoch",)),
        ("state_dict a list", {"state_dict": [1]}, ("state_dict", "list")),
        ("state_dict empty", {"state_dict": {}}, ("state_dict", "nothing")),
        ("conv1 NaN", changed(first, state[first] * float("nan")), (first, "NaN")),
        ("one infinite weight", changed(first, _with(state[first], float("inf"))), (first, "infinite")),
        ("running variance NaN", changed("img_backbone.bn1.running_var", torch.full((16,), float("nan"))), ("NaN",)),
        ("a tensor missing", {"state_dict": {k: v for k, v in state.items() if k != first}}, (first,)),
        ("a shape wrong", changed(first, state[first][:3]), (first,)),
        ("another pc_range", changed("pts_bbox_head.pc_range", torch.arange(6.0)), ("pc_range",)),
    ):
        yield Case(name, load(content), names)
    for name, value in (
        ("ConfigDict", _config_dict()),
        ("Path", pathlib.PurePosixPath("a")),
        ("datetime", datetime.datetime(2026, 1, 1)),
        ("defaultdict", collections.defaultdict(list, a=[1])),
    ):
        yield Case(f"meta with a {name}", load({"state_dict": state, "meta": {"x": value}}), (name, "--trust"))
    yield Case("meta with a numpy string", load({"state_dict": state, "meta": {"x": np.str_("a")}}))
    yield Case("meta a string", load({"state_dict": state, "meta": "by me"}))

    def trusted() -> str:
        path, copy = assets.work / "foreign.pth", assets.work / "copy.pth"
        torch.save({"state_dict": state, "meta": {"x": datetime.datetime(2026, 1, 1)}}, path)
        run_tool("convert_checkpoint", path, copy, "--trust")
        return load(copy.read_bytes())()

    yield Case("a pickle that is trusted", trusted)


def foreign(assets: Assets) -> Iterator[Case]:
    """Good weights under unusual names."""
    load = _loader(assets)
    state = torch.load(assets.checkpoint, weights_only=True)["state_dict"]

    def prefixed(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + key: value for key, value in state.items()}

    def cast(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}

    noise: Mapping[str, torch.Tensor] = {key: torch.zeros_like(value) for key, value in state.items()}
    for name, content in (
        ("a bare state dict", state),
        *((f"entry {key}", {key: state, "epoch": 3}) for key in ("model", "module", "model_state_dict", "net")),
        *(
            (f"prefix {p}", {"state_dict": prefixed(p)})
            for p in ("module.", "model.", "module.module.", "_orig_mod.", "architecture.", "student.", "module.model.")
        ),
        (
            "student and teacher",
            {"state_dict": {**prefixed("student."), **{f"teacher.{k}": v for k, v in noise.items()}}},
        ),
        ("averaged model (steps)", {"state_dict": {**prefixed("module."), "steps": torch.tensor(7)}}),
        ("averaged model (n_averaged)", {"state_dict": {**prefixed("module."), "n_averaged": torch.tensor(7)}}),
        ("EMA only", {"ema_state_dict": {**prefixed("module."), "steps": torch.tensor(7)}}),
        ("EMA under ema", {"ema": state}),
        ("ema_ keys beside (mmcv 1)", {"state_dict": {**state, **_ema(noise, dotted=False)}}),
        ("ema_ keys beside (dotted)", {"state_dict": {**state, **_ema(noise, dotted=True)}}),
        ("ema_ keys alone", {"state_dict": _ema(state, dotted=False)}),
        ("float16", {"state_dict": cast(torch.float16)}),
        ("bfloat16", {"state_dict": cast(torch.bfloat16)}),
        ("float64", {"state_dict": cast(torch.float64)}),
    ):
        yield Case(name, load(content))

    def averaged() -> str:
        path, copy = assets.work / "ema.pth", assets.work / "copy.pth"
        torch.save({"state_dict": {**noise, **_ema(state, dotted=False)}}, path)
        run_tool("convert_checkpoint", path, copy, "--ema")
        return load(copy.read_bytes())()

    yield Case("EMA on request", averaged)

    def colours() -> str:
        from projects.streampetr.checkpoint import fold_colour_order

        images = torch.randn(1, 3, 8, 8)
        key = "img_backbone.conv1.weight"
        swapped = fold_colour_order(state)[key]
        gap = (torch.conv2d(images.flip(1), swapped) - torch.conv2d(images, state[key])).abs().max().item()
        assert gap < 1e-4, f"differs by {gap}"
        return "equal on swapped images"

    yield Case("BGR weights for an RGB model", colours)


def _config_dict() -> Any:
    from mmengine.config import ConfigDict

    return ConfigDict(a=1)


def _with(value: torch.Tensor, number: float) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] = number
    return value


def _ema(state: Mapping[str, torch.Tensor], *, dotted: bool) -> dict[str, torch.Tensor]:
    return {"ema_" + (key if dotted else key.replace(".", "_")): value for key, value in state.items()}
