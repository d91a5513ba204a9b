"""Make (or annotate) the info files that MMDetection3D and the streaming detector read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import track

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.datasets.nuscenes_infos import SPLITS, annotate_infos, create_infos
from mdp_mmdet3d.errors import MdpError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataroot", type=Path, help="nuScenes folder (with v1.0-*/, samples/, maps/)")
    parser.add_argument("--version", choices=sorted(SPLITS), help="default: the only version that is there")
    parser.add_argument(
        "--annotate",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only add scene_token, prev and next to these files of MMDetection3D's own converter",
    )
    return parser.parse_args()


def only_version(dataroot: Path) -> str:
    found = [version for version in sorted(SPLITS) if (dataroot / version).is_dir()]
    if len(found) > 1:
        raise MdpError(f"{dataroot} has several versions ({', '.join(found)}); choose one with --version")
    return found[0] if found else "v1.0-mini"


@command(stopped="run the same command again")
def main() -> int:
    args = parse_args()
    if args.annotate:
        for path in args.annotate:
            print(f"annotated {annotate_infos(path, args.dataroot)}")
        return 0
    version = args.version or only_version(args.dataroot)
    written = create_infos(args.dataroot, version, progress=lambda rows: track(rows, description="info files"))
    for split, path in written.items():
        print(f"wrote {path} ({split})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
