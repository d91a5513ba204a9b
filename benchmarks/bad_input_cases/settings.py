"""The ``prune`` section, budgets, configs, and latencies of another device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from .case import ROOT, Assets, Case


def sections(assets: Assets) -> Iterator[Case]:
    """Values of a wrong type or size."""
    from mdp_mmdet3d.runner.settings import PruneSettings

    for name, value in (
        ("frames", 2.5),
        ("frames", 0),
        ("frames", "16"),
        ("tolerance", -1),
        ("tolerance", "2%"),
        ("tolerance", float("nan")),
        ("refinements", -1),
        ("refinements", 1.5),
        ("time_limit_s", float("nan")),
        ("time_limit_s", float("inf")),
        ("time_limit_s", "5"),
        ("freeze", [1]),
        ("freeze", "all"),
        ("min_keep", "0.5"),
        ("min_keep", 2),
        ("channel_multiple", 8.5),
        ("channel_multiple", 0),
        ("head_width_multiple", "8"),
        ("max_options", True),
        ("input_size", [256]),
        ("input_size", [256.0, 704.0]),
        ("input_size", "256x704"),
        ("num_cams", -1),
        ("rounds", 1),
        ("rounds", 2.5),
        ("fit_networks", None),
        ("evaluate", "yes"),
        ("sampling", "dense"),
        ("precision", "fp16"),
        ("finetune", 3),
        ("finetune", {"iterations": 2.5}),
        ("adapter", "SingleGraph"),
        ("budget", [1]),
    ):
        case = f"{name} = {value!r}"
        yield Case(case, lambda n=name, v=value: PruneSettings.from_config({n: v}), (name,))
    yield Case("an unknown key", lambda: PruneSettings.from_config({"budgets": 1}), ("budgets", "budget"))


def budgets(assets: Assets) -> Iterator[Case]:
    """Budgets in all their spellings."""
    from mdp_mmdet3d.runner.settings import budget_ms

    def right(text: Any, expected_ms: float) -> Callable[[], str]:
        def run() -> str:
            found = budget_ms(text, 200.0)
            assert abs(found - expected_ms) < 1e-6, f"{found} ms"
            return f"{found:g} ms"

        return run

    for text, expected in (("5e-1", 100), ("55%", 110), ("1e2ms", 100), ("8fps", 125), (0.5, 100), (" 120 ms", 120)):
        yield Case(f"{text}", right(text, expected))
    for text in ("nan", "-3ms", "0", "1e400ms", "150%", "0%", "fast", "inf", None, "1.5"):
        yield Case(f"{text}", lambda t=text: budget_ms(t, 200.0), ("budget",))


def configs(assets: Assets) -> Iterator[Case]:
    """Config files that cannot be read."""
    from mdp_mmdet3d.config_file import read_config

    folder = assets.folder("configs")
    for name, text, names in (
        ("syntax error", "model = dict(", ("syntax_error.py",)),
        ("missing base", '_base_ = ["./none.py"]', ("missing_base.py",)),
        ("raises", "1 / 0", ("raises.py",)),
        ("unknown name", "a = b", ("unknown_name.py",)),
        ("not text", "\0", ("not_text.py",)),
    ):
        path = folder / f"{name.replace(' ', '_')}.py"
        path.write_text(text)
        yield Case(name, lambda path=path: read_config(path), names)
    yield Case("does not exist", lambda: read_config(folder / "none.py"), ("none.py",))
    mdp = ROOT / "configs" / "streampetr_mdp.py"
    yield Case("options that do not fit", lambda: read_config(mdp, {"prune.budget.x": 1}), ("--cfg-options",))


def targets(assets: Assets) -> Iterator[Case]:
    """``fps.json`` of a validation on the target."""
    from types import SimpleNamespace

    from mdp_mmdet3d.device import Device
    from mdp_mmdet3d.runner.target import target_networks

    folder = assets.folder("target")
    table = SimpleNamespace(device=Device("Orin", "onnxruntime-cpu", "1.31", 1, "float32"), networks=[])
    space = SimpleNamespace(
        model_digest="m",
        frame_terms=lambda: [SimpleNamespace(engine="image_encoder"), SimpleNamespace(engine="head")],
    )
    good = {
        "schema_version": 1,
        "latency": {"encoder_p50_ms": 10.0, "head_p50_ms": 3.0},
        "dense_latency": None,
        "deployment": {"plan_hash": None, "precision": "float32"},
        "backend": {"name": "onnxruntime", "threads": 1},
        "host": {"processor": "Orin"},
    }

    def read(**changes: Any) -> Callable[[], Any]:
        def run() -> Any:
            for path in folder.iterdir():
                path.unlink()
            (folder / "fps.json").write_text(json.dumps({**good, **changes}))
            return target_networks(folder, space, table, folder / "fps.json")[0].engines_ms

        return run

    yield Case("of the table's device", read())
    yield Case("of another device", read(host={"processor": "Xeon"}), ("device", "Xeon", "Orin"))
    yield Case("of a GPU", read(backend={"library": "tensorrt", "device": "Orin"}), ("tensorrt",))
    yield Case("with other threads", read(backend={"name": "onnxruntime", "threads": 8}), ("threads",))
    for value in (-4.0, 0.0, float("nan"), float("inf"), "x", None):
        times = {"encoder_p50_ms": value, "head_p50_ms": 3.0}
        yield Case(f"encoder takes {value} ms", read(latency=times), ("fps.json",))
    yield Case("in another precision", read(deployment={"plan_hash": None, "precision": "int8"}), ("int8",))
    yield Case("no latency", read(latency={}), ("fps.json",))
    yield Case("of a newer release", read(schema_version=7), ("schema_version",))
