"""Make the folder that Autoware's autoware_camera_streampetr loads from a deployment in the Autoware layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mdp_mmdet3d.errors import MdpError
from projects.streampetr.autoware import NodeSettings, package_autoware


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path, help="folder of tools/export.py --layout autoware")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16", help="of the engines the node builds")
    parser.add_argument("--confidence-threshold", type=float, default=NodeSettings.confidence_threshold)
    args = parser.parse_args()
    try:
        settings = NodeSettings(precision=args.precision, confidence_threshold=args.confidence_threshold)
        files = package_autoware(args.deployment, args.out, settings)
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
