"""Export a detector, dense or pruned, as a deployment folder, linted and compared with PyTorch.

StreamPETR becomes three ONNX engines and a streaming runtime, any other camera detector one ONNX file that ends at the
raw outputs of its heads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from rich.progress import Progress, TaskID
from torch import nn

from mdp_mmdet3d.deploy.bundle import write_runtime
from mdp_mmdet3d.deploy.compare import check_against_pytorch
from mdp_mmdet3d.deploy.manifest import DeploymentManifest
from mdp_mmdet3d.deploy.reduce import reduce_precision
from mdp_mmdet3d.deploy.single_graph import export_single_graph
from mdp_mmdet3d.deploy.stream import Frame
from mdp_mmdet3d.deploy.streampetr import export_streampetr
from mdp_mmdet3d.deploy.synthetic import synthetic_frames
from mdp_mmdet3d.engine.config_file import read_config
from mdp_mmdet3d.engine.deployed_accuracy import evaluate_deployment
from mdp_mmdet3d.engine.inputs import RANDOM, build_dense, deployment_frames
from mdp_mmdet3d.errors import MdpError

STREAMING = "StreamPETR"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="work directory of tools/prune.py, or a config")
    parser.add_argument("--checkpoint", help="weights; default: pruned.pth of the work directory, or random weights")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: work_dirs/<config>/export/<precision>, beside a work directory's plan: <dir>/export/<precision>",
    )
    parser.add_argument("--layout", choices=["native", "autoware"], default="native")
    parser.add_argument("--levels", choices=["last", "all"], default="last", help="decoder levels in the outputs")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument(
        "--simplify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let onnxslim fuse nodes and merge equal ones; constants are folded in any case",
    )
    parser.add_argument("--prev-exists", action="store_true", help="give the head an input that starts a stream")
    parser.add_argument(
        "--frames",
        choices=["dataset", "synthetic"],
        default="dataset",
        help="frames to compare and calibrate on: of the config's importance data, or noise",
    )
    parser.add_argument("--num-frames", type=int, default=4)
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="run the engines over the config's test data and write mAP and NDS into deployment.json",
    )
    parser.add_argument(
        "--input-size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="network image in pixels; default: the config's prune.input_size",
    )
    parser.add_argument(
        "--source-size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        default=(900, 1600),
        help="camera image of StreamPETR's host in pixels; default: nuScenes' 900 1600",
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Config, nn.Module, str]:
    """Config, model and identity of the weights."""
    path, checkpoint = args.source, args.checkpoint
    if path.is_dir():
        path = args.source / "pruned_config.py"
        checkpoint = checkpoint or str(args.source / "pruned.pth")
    if not path.is_file():
        raise MdpError(f"{path} does not exist; give a config or the work directory of a finished tools/prune.py run")
    config = read_config(path, args.cfg_options)
    return config, *build_dense(config, checkpoint or config.get("checkpoint"))


def frames_for(args: argparse.Namespace, config: Config, model: nn.Module, manifest: DeploymentManifest) -> list[Frame]:
    if args.frames == "synthetic":
        return synthetic_frames(manifest, args.num_frames)
    return deployment_frames(config, model, args.num_frames)


def advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def accuracy(args: argparse.Namespace, config: Config, model: nn.Module, folders: dict[str, Path]) -> dict[str, dict]:
    """Figures of the test data by precision; empty without --evaluate."""
    found = {}
    for precision, folder in folders.items() if args.evaluate else ():
        with Progress(transient=True) as bar:
            task = bar.add_task(f"evaluate {precision}", total=None)
            found[precision] = evaluate_deployment(config, model.data_preprocessor, folder, partial(advance, bar, task))
        figures = {key: value for key, value in found[precision].items() if isinstance(value, float)}
        print(
            f"{precision} on {found[precision]['frames']} frames: "
            + ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
        )
    return found


def export_stream(args: argparse.Namespace, config: Config, model: nn.Module, out: Path, common: dict) -> str:
    """Three engines of StreamPETR, checked over a stream; returns the files of the folder."""
    if args.num_frames < 1:
        raise MdpError(f"--num-frames must be at least 1, got {args.num_frames}")
    fp32 = out if args.precision == "fp32" else out.with_name(out.name + ".fp32")
    manifest = export_streampetr(
        model,
        fp32,
        class_names=list(config.class_names),
        source_size=tuple(args.source_size),
        layout=args.layout,
        levels=args.levels,
        prev_exists=args.prev_exists,
        on_stage=lambda stage: print(f"export {stage}"),
        **common,
    )
    try:
        frames = frames_for(args, config, model, manifest)
        check = check_against_pytorch(model, fp32, frames)
        print(
            f"against PyTorch over {len(frames)} frames: logits {check['teacher_forced']['logits']:.1e}, "
            f"boxes {check['teacher_forced']['boxes']:.1e}, memory {check['teacher_forced']['memory']:.1e} "
            "(teacher-forced)"
        )
        if args.precision == "fp32":
            manifest = manifest.with_checks(out, against_pytorch=check)
        else:
            manifest = reduce_precision(fp32, out, args.precision, frames)
            found = manifest.checks["boxes_against_fp32"]
            print(
                f"{args.precision} against fp32: {found['matched_share']:.1%} of {found['boxes']} boxes found "
                f"within {found['match_distance_m']} m, mean distance {found['mean_distance_m']:.3f} m"
            )
            manifest = manifest.with_checks(out, fp32_against_pytorch=check)
        if figures := accuracy(args, config, model, {"fp32": fp32, args.precision: out}):
            manifest = manifest.with_checks(out, accuracy=figures)
    finally:
        if fp32 != out:
            shutil.rmtree(fp32, ignore_errors=True)
    runtime = write_runtime(out / "mdp_runtime.pyz")
    return f"{', '.join(spec.file for spec in manifest.engines.values())}, init_memory.npz, {runtime.name}"


def export_other(args: argparse.Namespace, config: Config, model: nn.Module, out: Path, common: dict) -> str:
    """One graph of another detector; returns the files of the folder."""
    if args.evaluate:
        raise MdpError("--evaluate runs the streaming runtime, which is StreamPETR's; use tools/test.py")
    classes = config.get("class_names") or config.get("metainfo", {}).get("classes", ())
    manifest = export_single_graph(
        model,
        out,
        class_names=classes,
        precision=args.precision,
        num_cams=config.get("prune", {}).get("num_cams", 1),
        **common,
    )
    for name, check in manifest.checks.items():
        difference = max(check["difference"].values())
        print(f"{name.replace('_', ' ')} on noise: largest difference of an output {difference:.1e}")
    return ", ".join(spec.file for spec in manifest.engines.values())


def main() -> int:
    args = parse_args()
    MMLogger.get_instance("mdp", log_level="WARNING")  # initialisers are talkative
    try:
        config, model, weights = load(args)
        if weights == RANDOM:
            print("RANDOM WEIGHTS: no checkpoint was given; latencies are real, boxes mean nothing")
        plan = getattr(model, "mdp_plan", None)
        base = args.source if args.source.is_dir() else Path("work_dirs") / args.source.stem
        out = args.out or base / "export" / args.precision
        streams = type(model).__name__ == STREAMING
        size = args.input_size or config.get("prune", {}).get("input_size") or config.get("input_size")
        if size is None and streams:
            size = config.get("final_shape", (256, 704))
        if size is None:
            raise MdpError(
                f"the size of {type(model).__name__}'s network image is not in the config: "
                "give --input-size HEIGHT WIDTH"
            )
        common = {
            "input_size": tuple(size),
            "simplify": args.simplify,
            "plan_hash": plan.hash if plan else None,
            "weights": weights,
        }
        files = (export_stream if streams else export_other)(args, config, model, out, common)
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size_mib = sum(path.stat().st_size for path in out.glob("*.onnx")) / np.exp2(20)
    print(f"written to {out}: {files}, deployment.json ({size_mib:.0f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
