"""Export StreamPETR, dense or pruned, as a deployment folder: three ONNX engines, linted and compared with PyTorch."""
from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from torch import nn

from mdp_mmdet3d.deploy.bundle import write_runtime
from mdp_mmdet3d.deploy.compare import check_against_pytorch
from mdp_mmdet3d.deploy.manifest import DeploymentManifest
from mdp_mmdet3d.deploy.reduce import reduce_precision
from mdp_mmdet3d.deploy.stream import Frame
from mdp_mmdet3d.deploy.streampetr import export_streampetr
from mdp_mmdet3d.deploy.synthetic import synthetic_frames
from mdp_mmdet3d.engine.config_file import read_config
from mdp_mmdet3d.engine.inputs import RANDOM, build_dense, deployment_frames
from mdp_mmdet3d.errors import MdpError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="work directory of tools/prune.py, or a config")
    parser.add_argument("--checkpoint", help="weights; default: pruned.pth of the work directory, or random weights")
    parser.add_argument("--out", type=Path, help="default: work_dirs/<config>/export/<precision>, beside a work "
                                                 "directory's plan: <dir>/export/<precision>")
    parser.add_argument("--layout", choices=["native", "autoware"], default="native")
    parser.add_argument("--levels", choices=["last", "all"], default="last", help="decoder levels in the outputs")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--simplify", action=argparse.BooleanOptionalAction, default=True,
                        help="let onnxslim fuse nodes and merge equal ones; constants are folded in any case")
    parser.add_argument("--prev-exists", action="store_true", help="give the head an input that starts a stream")
    parser.add_argument("--frames", choices=["dataset", "synthetic"], default="dataset",
                        help="frames to compare and calibrate on: of the config's importance data, or noise")
    parser.add_argument("--num-frames", type=int, default=4)
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
    if args.num_frames < 1:
        raise MdpError(f"--num-frames must be at least 1, got {args.num_frames}")
    if args.frames == "synthetic":
        return synthetic_frames(manifest, args.num_frames)
    return deployment_frames(config, model, args.num_frames)


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
        fp32 = out if args.precision == "fp32" else out.with_name(out.name + ".fp32")
        pipeline = config.get("prune", {})
        manifest = export_streampetr(
            model, fp32, class_names=list(config.class_names),
            input_size=tuple(pipeline.get("input_size", config.get("input_size", (256, 704)))), layout=args.layout,
            levels=args.levels, prev_exists=args.prev_exists, simplify=args.simplify,
            plan_hash=plan.hash if plan else None, weights=weights, on_stage=lambda stage: print(f"export {stage}"))
        try:
            frames = frames_for(args, config, model, manifest)
            check = check_against_pytorch(model, fp32, frames)
            print(f"against PyTorch over {len(frames)} frames: logits {check['teacher_forced']['logits']:.1e}, "
                  f"boxes {check['teacher_forced']['boxes']:.1e} (teacher-forced)")
            if args.precision != "fp32":
                manifest = reduce_precision(fp32, out, args.precision, frames)
                found = manifest.checks["boxes_against_fp32"]
                print(f"{args.precision} against fp32: {found['matched_share']:.1%} of {found['boxes']} boxes found "
                      f"within {found['match_distance_m']} m, mean distance {found['mean_distance_m']:.3f} m")
                manifest = manifest.with_checks(out, fp32_against_pytorch=check)
            else:
                manifest = manifest.with_checks(out, against_pytorch=check)
        finally:
            if fp32 != out:
                shutil.rmtree(fp32, ignore_errors=True)
        runtime = write_runtime(out / "mdp_runtime.pyz")
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.glob("*.onnx")) / np.exp2(20)
    print(f"written to {out}: {', '.join(spec.file for spec in manifest.engines.values())} ({size:.0f} MiB), "
          f"deployment.json, init_memory.npz, {runtime.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
