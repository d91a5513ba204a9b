"""Whole line for models of several families: what is prunable, is what comes out right, does it meet the budget?

    python benchmarks/families.py configs/resnet/resnet50_mdp.py configs/retinanet/retinanet_r50_mdp.py --out table.md

A config as MMPretrain, MMDetection or MMDetection3D (of one camera on nuScenes) ship it is named with its package,
``mmdet::yolox/yolox_s_8xb8-300e_coco.py``. Its data are generated: ``tools/create_mini_images.py imagenet
data/mini_imagenet``, ``coco data/mini_coco``, ``tools/create_mini_nuscenes.py data/nuscenes``.

Models that take only images of their data's size need it changed there as well, for example a StreamPETR at 352x128:
``--cfg-options prune.input_size="(128, 352)" importance_dataloader.dataset.pipeline.2.final_shape="(128, 352)"``.
Each config is pruned in a process of its own, as ``tools/prune.py`` does it; a finished one is not done again. Then the
exported pruned model is compared with the masked dense model and with the model reloaded from ``pruned_config.py``.
Weights are random, and batch norms have the statistics of a few frames: with those of the initialisation signals die
out within a deep network (outputs of 1e-15), and nothing that is compared says anything.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config, DictAction
from rich.console import Console
from rich.markup import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdp_mmdet3d.files import write_json

if TYPE_CHECKING:
    from mdp_mmdet3d.adapters import Adapter

ROOT = Path(__file__).resolve().parents[1]
RESULT = "family.json"
WEIGHTS = "random.pth"
SETTLING_FRAMES = 8
LOG = "family.log"
COLUMNS = (
    "input", "model", "dimensions", "blocks (removed)", "terms", "left alone", "not prunable", "dense ms", "pruned ms",
    "from budget", "= masked", "= reloaded", "ONNX = PyTorch", "seconds", "GiB",
)  # fmt: skip


STOCK = {
    "mmpretrain": """_base_ = ["{name}"]
custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)
checkpoint = None
data = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(data_root="{root}/data/mini_imagenet"))
train_dataloader = data
val_dataloader = data
test_dataloader = data
prune = dict(input_size=(224, 224))
""",
    "mmdet": """_base_ = ["{name}"]
custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)
checkpoint = None
importance_dataloader = {data!r}
prune = dict(input_size=(320, 512))
""",
    "mmdet3d": """_base_ = ["{name}"]
custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)
checkpoint = None
importance_dataloader = {data!r}
prune = dict(input_size=(480, 800), num_cams=1)
""",
}
"""A stock config by its package, with generated data and the part that every config to be pruned has."""
DATA = {
    "mmdet": "configs/_base_/datasets/coco_512x320.py",
    "mmdet3d": "configs/fcos3d/fcos3d_r101_mdp.py",
}
"""Shipped configs whose importance data a stock config of a package gets."""


def config_file(config: str, folder: Path) -> Path:
    """The config, or one in ``folder`` that goes over the stock config that is meant."""
    package, found, path = config.partition("::")
    if not found or package not in STOCK:
        return Path(config)
    data = Config.fromfile(ROOT / DATA[package]).importance_dataloader.to_dict() if package in DATA else None
    target = folder / Path(path).name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(STOCK[package].format(name=config, root=ROOT, data=data), encoding="utf-8")
    return target


def random_weights(adapter: Adapter, path: Path) -> str:
    """Write random weights whose batch norms have the statistics of the importance data; returns the path.

    And of noise, where an export is compared on it: what a norm was never given it magnifies without bounds.
    """
    import torch

    from mdp_mmdet3d.adapters import SingleGraph
    from mdp_mmdet3d.adapters.single_graph_export import TensorMode
    from mdp_mmdet3d.importance.batch_norm import reestimate_batch_norm
    from mdp_mmdet3d.runner.outputs import write_checkpoint

    model, _ = adapter.build(None)
    if isinstance(adapter, SingleGraph):
        deployed = TensorMode(adapter.deployed(model), (adapter.shape.height, adapter.shape.width))
        images = torch.cat([torch.from_numpy(frame) for frame in adapter.frames(model, SETTLING_FRAMES)])
        runs = [partial(deployed, torch.cat([images, torch.randn(images.shape)]))]
    else:
        runs = [partial(frame, model) for frame in adapter.calibration_frames(model, SETTLING_FRAMES)]
    reestimate_batch_norm(model, runs, lambda run: run())
    write_checkpoint(path, {"meta": {}, "state_dict": model.state_dict()})
    return str(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="file, or PACKAGE::PATH of a stock config")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/families"))
    parser.add_argument("--budget", default="0.6")
    parser.add_argument("--input-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="instead of the config's")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_one(
    config_path: Path,
    work_dir: Path,
    budget: str,
    input_size: tuple[int, int] | None,
    options: dict[str, Any] | None,
) -> None:
    """Prune, check, and write what was found; whatever goes wrong ends in the parent's table."""
    import dataclasses

    from mmengine.logging import MMLogger

    import mdp_mmdet3d.runner  # noqa: F401  registers the pruned model
    from mdp_mmdet3d.adapters import adapter_of
    from mdp_mmdet3d.config_file import read_config
    from mdp_mmdet3d.runner.job import COMPARED_FRAMES, PruneJob
    from mdp_mmdet3d.runner.settings import PruneSettings
    from mdp_mmdet3d.space.types import PruningSpace
    from mdp_mmdet3d.surgery.masking import mask_model
    from mdp_mmdet3d.surgery.plan import PruningPlan

    MMLogger.get_instance("mdp", log_level="WARNING")
    started = time.monotonic()
    config = read_config(config_path, options)
    settings = dataclasses.replace(PruneSettings.from_config(config.get("prune", {})), budget=budget)
    if input_size:
        settings = dataclasses.replace(settings, input_size=input_size)
    adapter = adapter_of(config, settings.input_shape, settings.adapter)
    checkpoint = config.get("checkpoint")
    if not checkpoint:  # nothing is worth anything in units of loss, and nothing to be repaired
        checkpoint = random_weights(adapter, work_dir / WEIGHTS)
        settings = dataclasses.replace(settings, importance="taylor", repair=False)
    report = PruneJob(config, settings, work_dir, checkpoint, Console(stderr=True)).run()
    seconds = time.monotonic() - started

    dense, _ = adapter.build(checkpoint)
    space, plan = PruningSpace.load(work_dir / "space.json"), PruningPlan.load(work_dir / "plan.json")
    frames = adapter.frames(dense, COMPARED_FRAMES)
    reloaded_config = read_config(work_dir / "pruned_config.py", None)
    reloader = adapter_of(reloaded_config, settings.input_shape, settings.adapter)
    reloaded, _ = reloader.build(str(work_dir / "pruned.pth"))
    masked = mask_model(copy.deepcopy(dense), plan)
    folder = work_dir / "onnx" / "pruned"
    write_json(
        work_dir / RESULT,
        {
            "input": " x ".join(map(str, settings.input_size)),
            "model": report["model"],
            "dimensions": len(space.dimensions),
            "blocks": len(space.blocks),
            "removed": len(plan.removed),
            "terms": len(space.terms),
            "left_alone": len(space.not_prunable),
            "not_prunable_share": report["not_prunable_ms"] / report["dense"]["predicted_ms"],
            "dense_ms": report["dense"]["latency_ms"],
            "pruned_ms": report["pruned"]["latency_ms"],
            "from_budget": report["pruned"]["latency_ms"] / report["budget_ms"] - 1,
            "masked": adapter.compare(masked, folder, frames),
            "reloaded": reloader.compare(reloaded, folder, frames),
            "onnx": report["differences"]["pruned"],
            "seconds": seconds,
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        },
    )


def row(result: dict[str, Any]) -> list[str]:
    """Cells of the table."""
    return [
        result["input"],
        result["model"],
        str(result["dimensions"]),
        f"{result['blocks']} ({result['removed']})",
        str(result["terms"]),
        str(result["left_alone"]),
        f"{result['not_prunable_share']:.1%}",
        f"{result['dense_ms']:.1f}",
        f"{result['pruned_ms']:.1f}",
        f"{result['from_budget']:+.1%}",
        *(f"{max(result[key].values()):.0e}" for key in ("masked", "reloaded", "onnx")),
        f"{result['seconds']:.0f}",
        f"{result['gib']:.1f}",
    ]


def table(rows: list[tuple[str, list[str] | str]]) -> str:
    """Markdown; a model that did not get through has its error in place of the cells."""
    lines = ["| config | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for name, cells in rows:
        lines.append(f"| {name} | " + (" | ".join(cells) if isinstance(cells, list) else cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse_args()
    size = tuple(args.input_size) if args.input_size else None
    if args.one:
        run_one(Path(args.configs[0]), args.work_dir, args.budget, size, args.cfg_options)
        return 0
    console, rows, failed = Console(), [], 0
    for config in (config_file(name, args.work_dir / "configs") for name in args.configs):
        work_dir = args.work_dir / config.stem
        done = work_dir / RESULT
        if not done.is_file():
            console.print(f"{config} ...")
            options = sys.argv[sys.argv.index("--cfg-options") :] if args.cfg_options else []
            options += ["--work-dir", str(work_dir), "--budget", args.budget]
            options += ["--input-size", *map(str, size)] if size else []
            work_dir.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-W", "ignore", __file__, str(config), "--one", *options]
            with (work_dir / LOG).open("w", encoding="utf-8") as log:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
            if code:
                failed += 1
                said = (work_dir / LOG).read_text(encoding="utf-8", errors="replace").strip()
                reason = said.splitlines()[-1] if said else f"exit {code}"
                console.print(f"  [red]{escape(reason)}[/red]", highlight=False)
                rows.append((config.stem, reason.replace("|", "/")))
                continue
        rows.append((config.stem, row(json.loads(done.read_text(encoding="utf-8")))))
    text = table(rows)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
