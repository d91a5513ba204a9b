"""What repair of the full-size StreamPETR costs and brings: seconds, memory, errors of the head's inputs.

    python benchmarks/repair_cost.py --json docs/results/repair_cost.json

Needs the miniature data set (``tools/create_mini_nuscenes.py data/nuscenes``). Without a checkpoint the weights are
random: time and memory are those of trained ones, and the outputs have to move towards the dense model's all the same.
Errors are those of frames that repair did not see: the next ones of the data set, and the real nuScenes frame of the
shared data.
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters import Adapter, adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.latency.structures import Structure
from mdp_mmdet3d.runner.networks import plan_of_structure
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan, keep_masks
from mdp_mmdet3d.surgery.plan import PruningPlan
from mdp_mmdet3d.surgery.repair import Frame, RepairSettings, repair
from projects.streampetr.frame import frame_inputs

SCHEMA_VERSION = 1
KEEP = 0.75  # of every dimension
REMOVED = ("*layer3.4", "*layer4.2", "*decoder.layers.4")  # two bottlenecks and a decoder layer
NECK_OUTPUT = "img_neck.fpn_convs.0.conv.weight"
Outputs = dict[str, Tensor]


def plan_for(space: PruningSpace, remove: Sequence[str]) -> PruningPlan:
    """Three quarters of every dimension, and a few blocks less."""
    widths = {d.name: min(d.options, key=lambda n, d=d: abs(n - KEEP * d.size)) for d in space.dimensions}
    for pattern in remove:
        if not any(fnmatch(b.name, pattern) for b in space.blocks):
            raise MdpError(
                f"--remove {pattern}: there is no such block, only {', '.join(b.name for b in space.blocks)}"
            )
    removed = frozenset(b.name for b in space.blocks if any(fnmatch(b.name, pattern) for pattern in remove))
    return plan_of_structure(space, Structure(widths, removed))


@torch.no_grad()
def outputs(model: nn.Module, batch: Mapping[str, Any], mask: Tensor | None = None) -> Outputs:
    """What the head takes of a frame's images, and what it makes of them from the start of a stream.

    Args:
        model: The dense or the pruned model.
        batch: Of the importance data.
        mask: Of the feature channels to return; None: all.
    """
    data = model.data_preprocessor(dict(batch), False)
    imgs = data["inputs"]["imgs"]
    frame = frame_inputs(data["data_samples"], imgs)
    frame = frame._replace(prev_exists=torch.zeros_like(frame.prev_exists))
    features = model.extract_img_feat(imgs)
    found, _ = model.run_frame(features, frame, None, last_level_only=True)
    if mask is not None:
        features = features[:, :, mask]
    return {"head's inputs": features, "class logits": found.all_cls_scores, "boxes": found.all_bbox_preds}


def errors(model: nn.Module, batches: list[Mapping[str, Any]], dense: list[Outputs]) -> dict[str, float]:
    """Root of the squared error over frames, relative to the spread of the dense model's."""
    squared: dict[str, list[float]] = {}
    for batch, expected in zip(batches, dense):
        for name, value in outputs(model, batch).items():
            wrong = float((value - expected[name]).square().sum())
            spread = float((expected[name] - expected[name].mean()).square().sum())
            total = squared.setdefault(name, [0.0, 0.0])
            total[0] += wrong
            total[1] += spread
    return {name: (wrong / spread) ** 0.5 for name, (wrong, spread) in squared.items()}


def run(
    adapter: Adapter, real: Adapter | None, settings: RepairSettings, frames: int, held_out: int, remove: Sequence[str]
) -> dict[str, Any]:
    """Cut, repair, compare."""
    options = PruneSettings.from_config(adapter.config.prune)
    dense, weights = adapter.build(adapter.config.get("checkpoint"))
    dense.eval()
    space = adapter.trace(dense, options.space_options)
    plan = plan_for(space, remove)
    pruned = apply_plan(copy.deepcopy(dense), plan).eval()
    sets = {"miniature frames behind those": list(islice(adapter.importance_batches(), frames, frames + held_out))}
    if real is not None:
        sets["real nuScenes frame"] = list(islice(real.importance_batches(), 1))
    mask = keep_masks(dense, plan).get(NECK_OUTPUT, {}).get(0)
    expected = {name: [outputs(dense, batch, mask) for batch in batches] for name, batches in sets.items()}
    before = {name: errors(pruned, batches, expected[name]) for name, batches in sets.items()}
    peak_before = _peak_gb()
    wall, cpu = time.perf_counter(), time.process_time()
    calibration: list[Frame] = adapter.calibration_frames(dense, frames)

    def on_layer(done: int, total: int) -> None:
        if done % 20 == 0 or done == total:
            print(f"{done} of {total}: {time.perf_counter() - wall:.0f} s, {_peak_gb():.1f} GB", flush=True)

    report = repair(dense, pruned, plan, calibration, settings, on_layer=on_layer).summary()
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - cpu}
    after = {name: errors(pruned, batches, expected[name]) for name, batches in sets.items()}
    return {
        "weights": weights,
        "frames": frames,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_gb": {"before": peak_before, "repair": _peak_gb()},
        "errors": {name: {"before": before[name], "after": after[name]} for name in sets},
        "refitted": report["refitted"],
        "left": report["left"],
        "median_held_out_error": report["median_held_out_error"],
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/streampetr_mdp.py")
    parser.add_argument(
        "--real", default="configs/streampetr_mdp_frame.py", help="config of the real frame; '' without"
    )
    parser.add_argument("--checkpoint")
    parser.add_argument("--frames", type=int, help="default: as the job would take")
    parser.add_argument("--held-out", type=int, default=4, help="frames to compare on")
    parser.add_argument("--remove", nargs="*", default=REMOVED, help="shell patterns of the blocks that go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    adapters = []
    for path in filter(None, (args.config, args.real)):
        config = read_config(path)
        options = PruneSettings.from_config(config.prune)
        if args.checkpoint:
            config.checkpoint = args.checkpoint
        adapters.append(adapter_of(config, options.input_shape, options.adapter))
    settings = options.repairing or RepairSettings()
    shape = adapters[0].shape
    frames = args.frames or settings.count(shape.num_cams * shape.height * shape.width)
    found = run(adapters[0], adapters[1] if args.real else None, settings, frames, args.held_out, args.remove)
    write_json(args.json, {"schema_version": SCHEMA_VERSION, **found})
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
