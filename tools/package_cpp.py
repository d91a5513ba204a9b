"""Make the working folder of NVIDIA's public C++ application for StreamPETR from a deployment and a recorded drive."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runtime.drive import load_drive
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.preprocess import preprocess
from projects.streampetr.cpp_application import package_cpp


@command(stopped="nothing was written")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path, help="folder that tools/export.py wrote")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--frames", type=Path, required=True, metavar="DRIVE", help="folder of a recorded drive")
    parser.add_argument("--num-frames", type=int, help="the first so many frames; default: all")
    parser.add_argument(
        "--memory-edited", action="store_true", help="the application's memory lengths were set to this model's"
    )
    args = parser.parse_args()
    if args.num_frames is not None and args.num_frames < 1:
        raise MdpError(f"--num-frames {args.num_frames} must be at least 1")
    manifest = DeploymentManifest.load(args.deployment)
    frames = (preprocess(frame, manifest) for frame in islice(load_drive(args.frames), args.num_frames))
    count = package_cpp(args.deployment, frames, args.out, memory_edited=args.memory_edited)
    print(f"{count} frames and two ONNX files written to {args.out}; its README.md says how to go on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
