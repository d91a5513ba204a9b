"""Make the folder that a release of Autoware's autoware_camera_streampetr loads, from a deployment in its layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.command_line import command
from projects.streampetr.autoware import NodeSettings, package_autoware


@command(stopped="nothing was written")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path, help="folder of tools/export.py --layout autoware --node RELEASE")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--node", required=True, metavar="RELEASE", help="of autoware_camera_streampetr, e.g. 0.53")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16", help="of the engines the node builds")
    parser.add_argument("--confidence-threshold", type=float, default=NodeSettings.confidence_threshold)
    parser.add_argument(
        "--anchor-camera", type=int, default=NodeSettings.anchor_camera, help="slot whose image starts a frame"
    )
    parser.add_argument("--compressed", action="store_true", help="subscribe to compressed images")
    parser.add_argument("--distorted", action="store_true", help="let the node undistort the images")
    parser.add_argument(
        "--encoder-batch",
        type=int,
        metavar="N",
        help="images per run of the image encoder, as exported; 1 is for a node that runs it camera by camera",
    )
    args = parser.parse_args()
    settings = NodeSettings(
        precision=args.precision,
        confidence_threshold=args.confidence_threshold,
        anchor_camera=args.anchor_camera,
        compressed=args.compressed,
        distorted=args.distorted,
        encoder_batch=args.encoder_batch,
    )
    files = package_autoware(args.deployment, args.out, args.node, settings)
    print(f"written to {args.out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
