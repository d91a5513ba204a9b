"""Tools and settings of the latest release: comparison, report, encoder batch, tied widths, the hook, the example."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import ROOT, Assets, Case, run_tool

MINI = "configs/streampetr_mini_mdp.py"


def comparisons(assets: Assets) -> Iterator[Case]:
    """``tools/compare.py``: its command line, and what it left half-written."""
    from mdp_mmdet3d.compare.checks import tuned_plan
    from mdp_mmdet3d.compare.job import Comparison
    from mdp_mmdet3d.compare.report import summary
    from mdp_mmdet3d.compare.steps import run_step

    folder = assets.folder("compare")
    (folder / "file").write_text("x")
    for options, names in (
        (("--methods", "mdp,magic"), ("magic", "torch-pruning")),
        (("--methods", ""), ("--methods",)),
        (("--methods", "mdp,mdp"), ("mdp", "2 times")),
        (("--budgets", "0"), ("budget", "0.55")),
        (("--budgets", "fast"), ("budget", "fast")),
        (("--cores", 4096), ("--cores", "4096")),
        (("--finetune", -3), ("iterations", "-3")),
        (("--finetune", 3, "--lr", "nan"), ("lr", "nan")),
        (("--finetune", 3, "--seeds", -1), ("seed", "-1")),
        (("--checkpoint", folder / "none.pth", "--work-dir", folder / "w"), ("none.pth",)),
        (("--work-dir", folder / "file" / "w"), ("file",)),
        (("--work-dir", folder / "w", "--json", "/dev/full"), ("/dev/full",)),
        (("--work-dir", folder / "w", "--json", folder), (str(folder),)),
    ):
        shown = " ".join(str(option).replace(str(folder), "X") for option in options)
        yield Case(f"compare {shown}", lambda options=options: run_tool("compare", MINI, *options), names)
    yield Case("compare: no checkpoint", lambda: run_tool("compare", "configs/streampetr_mdp.py"), ("checkpoint",))

    def tuned(text: str) -> Callable[[], Any]:
        def run() -> Any:
            path = assets.folder("tuned") / "tuned.json"
            path.write_text(text)
            return tuned_plan(path.parent)

        return run

    for name, text in (
        ("cut off", '{"schema_version": 1, "iden'),
        ("empty", ""),
        ("a list", "[]"),
        ("of a newer release", '{"schema_version": 9}'),
        ("without its plan", '{"schema_version": 1}'),
    ):
        yield Case(
            f"compare: tuned.json {name}", tuned(text), ("tuned" if name != "without its plan" else "plan.json",)
        )

    def step(name: str, text: str, run: Callable[[Path], Any]) -> Callable[[], Any]:
        def start() -> Any:
            place = assets.folder("step")
            (place / name).write_text(text)
            return run(place)

        return start

    yield Case("compare: step.json cut off", step("step.json", '{"sche', run_step), ("step.json",))
    yield Case("compare: step.json of a newer release", step("step.json", '{"schema_version": 9}', run_step), ("step",))
    read = lambda place: summary([place / "accuracy.json"])  # noqa: E731
    yield Case("compare: accuracy.json cut off", step("accuracy.json", '{"sche', read), ("accuracy.json",))

    def other_config() -> None:
        from mdp_mmdet3d.adapters import adapter_of
        from mdp_mmdet3d.config_file import read_config
        from mdp_mmdet3d.runner.settings import PruneSettings
        from mdp_mmdet3d.runner.steps import find_space

        place = assets.folder("other_config")
        for name in ("resnet_mdp.py", "vit_mdp.py"):
            config = read_config(ROOT / "configs" / "fashion_mnist" / name)
            settings = PruneSettings.from_config(config.prune)
            adapter = adapter_of(config, settings.input_shape, settings.adapter)
            find_space(adapter, adapter.build(None)[0], settings, place / "space.json", lambda line: None)

    yield Case("compare, prune: another config in the work directory", other_config, ("other_config", "another model"))
    yield Case(
        "compare: config that cannot be read",
        lambda: Comparison(str(folder / "none.py"), None, ["mdp"], ["0.5"], folder),
        ("none.py",),
    )


def reports(assets: Assets) -> Iterator[Case]:
    """``tools/report.py`` on folders that are no finished run."""
    folder = assets.folder("report")

    def on(**files: str) -> Callable[[], str]:
        def run() -> str:
            place = assets.folder("report")
            for name, text in files.items():
                (place / f"{name}.json").write_text(text)
            return run_tool("report", place)

        return run

    yield Case("report: no folder", lambda: run_tool("report", folder / "none"), ("none",))
    yield Case("report: an empty folder", on(), ("report.json", "plan.json"))
    yield Case("report: a run that was stopped", on(space="{}"), ("report.json", "not finished"))
    full = {"plan": "{}", "space": "{}"}
    keys = ("model", "budget", "budget_ms", "solver", "widths", "removed_blocks", "plan_hash", "device")
    figures = dict.fromkeys(("predicted_ms", "fps", "params", "macs"), 1)
    whole = {"schema_version": 1, **dict.fromkeys(keys, 1), "dense": figures, "pruned": figures}
    for name, text, names in (
        ("cut off", '{"schema', ("report.json",)),
        ("a list", "[]", ("report.json",)),
        ("of a newer release", '{"schema_version": 9}', ("schema_version", "9")),
        ("without figures", '{"schema_version": 1}', ("lacks", "dense.fps")),
        ("a number for the dense model", json.dumps({**whole, "dense": 3}), ("lacks", "dense.fps")),
        ("beside a damaged space", json.dumps(whole), ("space.json",)),
    ):
        yield Case(f"report: report.json {name}", on(report=text, **full), names)
    for value in ("nan", "-1", "inf", "x"):
        yield Case(
            f"report --front-limit {value}",
            lambda value=value: run_tool("report", folder, f"--front-limit={value}"),
            ("front-limit",),
        )


def settings(assets: Assets) -> Iterator[Case]:
    """Widths, ``prune.repair``, ``prune.importance``, whole sections, the pruning hook."""
    from mdp_mmdet3d.runner.prune_hook import MDPPruneHook
    from mdp_mmdet3d.runner.settings import PruneSettings

    for section, names in (
        (dict(tie_head_widths="auto"), ("tie_head_widths", "True or False")),
        (dict(tie_head_widths=1), ("tie_head_widths", "True or False")),
        (dict(tie_head_width=True), ("tie_head_width", "did you mean")),
        (dict(embed_width=192), ("embed_width", "True or False")),
        (dict(queries=200), ("queries", "True or False")),
        (dict(repair=dict(frame=3)), ("frame", "frames")),
        (dict(repair=dict(ridge=float("nan"))), ("ridge", "finite")),
        (dict(repair=60), ("repair", "dict(frames=60)")),
        (dict(importance=dict(type="loss", frames="x")), ("importance.frames", "whole number")),
        (dict(importance=dict(type="loss", frames=64, max_frames=8)), ("max_frames", "64")),
        (dict(importance=None), ("importance", "taylor")),
        (dict(finetune={}), ("iterations", "missing")),
        (dict(finetune=dict(iterations=3, lr=2)), ("lr", "less than 1")),
        (dict(frames=0, min_keep=2), ("frames", "min_keep")),
        (None, ("prune", "dict")),
        ("0.5", ("prune", "dict")),
        ([], ("prune", "dict")),
    ):
        yield Case(f"prune = {section!r}", lambda section=section: PruneSettings.from_config(section), names)
    for arguments, names in (
        (dict(importance="fisher"), ("importance", "fisher")),
        (dict(importance=dict(type="loss", frames=1)), ("frames", "at least 4")),
        (dict(steps_each=0), ("steps_each",)),
        (dict(steps_each=2.5), ("steps_each", "2.5")),
        (dict(num_prunings="1"), ("num_prunings",)),
        (dict(begin=-1), ("begin",)),
        (dict(budget="fast"), ("budget", "fast")),
    ):
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        yield Case(f"MDPPruneHook({shown})", lambda given=arguments: MDPPruneHook(assets.work, **given), names)


def encoders(assets: Assets) -> Iterator[Case]:
    """``--encoder-batch``, and the example's detector."""
    folder = assets.folder("encoder")
    export = ("export", "configs/streampetr_mini.py", "--frames", "synthetic", "--input-size", 64, 176)
    for value in ("0", "2", "-1", "all"):
        command = (*export, "--out", folder / "o", f"--encoder-batch={value}")
        yield Case(f"export --encoder-batch {value}", lambda command=command: run_tool(*command), ("encoder",))
    package = ("package_autoware", assets.deployment, folder / "p", "--node", "0.53")
    yield Case("package --encoder-batch one", lambda: run_tool(*package, "--encoder-batch", "one"), ("encoder",))
    yield Case(
        "package --encoder-batch 1 of a native layout", lambda: run_tool(*package, "--encoder-batch", 1), ("layout",)
    )
    markers = ROOT / "examples" / "own_detector" / "markers_mdp.py"
    yield Case(
        "own_detector without PYTHONPATH", lambda: run_tool("prune", markers), ("markers_mdp.py", "own_detector")
    )
