"""Export a detector, dense or pruned, as a deployment folder, linted and compared with PyTorch.

StreamPETR becomes three ONNX engines and a streaming runtime, any other camera detector one ONNX file that ends at the
raw outputs of its heads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

import numpy as np
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from rich.progress import Progress
from torch import nn

from mdp_mmdet3d.adapters import RANDOM, Adapter, DeployOptions, adapter_of
from mdp_mmdet3d.config_file import default_work_dir, read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.onnx.folders import check_target
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.shipped import config_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=config_path, help="work directory of tools/prune.py, or a config")
    parser.add_argument("--checkpoint", help="weights; default: pruned.pth of the work directory, or random weights")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: work_dirs/<config>/export/<precision>, beside a work directory's plan: <dir>/export/<precision>",
    )
    parser.add_argument("--layout", choices=["native", "autoware"], default="native")
    parser.add_argument(
        "--node",
        metavar="RELEASE",
        help="release of Autoware's node, e.g. 0.53: take images as it normalises them (with --layout autoware)",
    )
    parser.add_argument(
        "--camera-encoding",
        choices=["rgb8", "bgr8"],
        default="rgb8",
        help="of the camera images of a node before 0.53, which does not convert them",
    )
    parser.add_argument("--levels", choices=["last", "all"], default="last", help="decoder levels in the outputs")
    parser.add_argument("--precision", choices=["float32", "float16", "int8"], default="float32")
    parser.add_argument(
        "--simplify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let onnxslim fuse nodes and merge equal ones; constants are folded in any case",
    )
    parser.add_argument("--prev-exists", action="store_true", help="give the head an input that starts a stream")
    parser.add_argument(
        "--encoder-batch",
        type=int,
        metavar="N",
        help="images that one run of StreamPETR's image encoder takes: 1, camera by camera; default: as pruned",
    )
    parser.add_argument(
        "--frames",
        choices=["dataset", "synthetic"],
        default="dataset",
        help="frames to compare and calibrate on: of the config's importance data, or noise",
    )
    parser.add_argument("--num-frames", type=int, default=4, help="frames to compare on")
    parser.add_argument(
        "--calibration-frames", type=int, default=32, help="frames for int8's ranges, spread over the importance data"
    )
    parser.add_argument(
        "--int8-exclude", nargs="+", default=(), metavar="PATTERN", help="convolutions that stay float16: '*/layer4/*'"
    )
    parser.add_argument(
        "--int8-encoder", type=Path, metavar="F.onnx", help="image encoder with Q/DQ of another tool, taken as it is"
    )
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
        help="camera image of StreamPETR's host in pixels; default: the data set's, without one nuScenes' 900 1600",
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Adapter, nn.Module, str]:
    """Adapter, model and identity of the weights."""
    path, checkpoint = args.source, args.checkpoint
    if path.is_dir():
        path = args.source / "pruned_config.py"
        checkpoint = checkpoint or str(args.source / "pruned.pth")
    if not path.is_file():
        raise MdpError(f"{path} does not exist; give a config or the work directory of a finished tools/prune.py run")
    config = read_config(path, args.cfg_options)
    settings = PruneSettings.from_config(config.get("prune", {}))
    size = args.input_size or config.get("prune", {}).get("input_size") or config.get("input_size")
    adapter = adapter_of(config, settings.input_shape, settings.adapter)
    model, weights = adapter.build(checkpoint or config.get("checkpoint"))
    size = size or config.get("final_shape")
    if size is None:
        raise MdpError(
            f"the size of {type(model).__name__}'s network image is not in the config: give --input-size HEIGHT WIDTH"
        )
    adapter.shape = replace(adapter.shape, height=size[0], width=size[1])
    return adapter, model, weights


def main() -> int:
    args = parse_args()
    MMLogger.get_instance("mdp", log_level="WARNING")  # initialisers are talkative
    try:
        adapter, model, weights = load(args)
        if weights == RANDOM:
            print("RANDOM WEIGHTS: no checkpoint was given; latencies are real, boxes mean nothing")
        plan = getattr(model, "mdp_plan", None)
        base = args.source if args.source.is_dir() else default_work_dir(args.source, ".")
        out = args.out or base / "export" / args.precision
        check_target(out)
        with Progress(transient=True) as bar:
            task = bar.add_task("", visible=False)
            options = DeployOptions(
                precision=args.precision,
                simplify=args.simplify,
                synthetic=args.frames == "synthetic",
                num_frames=args.num_frames,
                calibration_frames=args.calibration_frames,
                exclude=tuple(args.int8_exclude),
                quantised=args.int8_encoder,
                evaluate=args.evaluate,
                source_size=tuple(args.source_size) if args.source_size else None,
                layout=args.layout,
                node=args.node,
                camera_encoding=args.camera_encoding,
                levels=args.levels,
                prev_exists=args.prev_exists,
                encoder_batch=args.encoder_batch,
                on_progress=lambda what, done, total: bar.update(
                    task, description=what, completed=done, total=total, visible=True
                ),
            )
            plan_hash = plan.hash if plan else None
            files = adapter.deploy(model, out, options, plan_hash=plan_hash, weights=weights, say=print)
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    size_mib = sum(path.stat().st_size for path in out.glob("*.onnx")) / np.exp2(20)
    print(f"written to {out}: {files}, deployment.json ({size_mib:.0f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
