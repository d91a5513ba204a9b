"""Write a miniature nuScenes (simulated, in the devkit's schema) with the info files of MMDetection3D."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, easy_spec, write_mini_nuscenes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make, e.g. data/nuscenes")
    parser.add_argument("--scenes", type=int, help="number of scenes (default 10, the official mini scenes)")
    parser.add_argument("--frames", type=int, help="key frames per scene, two per second (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", metavar="WxH", help="default 1600x900")
    parser.add_argument("--easy", action="store_true", help="five classes of cuboids close by in 176x64 images")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is not empty")
    return parser.parse_args()


def image_size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise MdpError(f"--image-size {text!r} is not of the form WIDTHxHEIGHT, e.g. 1600x900")
    return int(width), int(height)


def spec_from(args: argparse.Namespace) -> MiniNuScenesSpec:
    wanted = {name: getattr(args, name) for name in ("scenes", "frames", "seed") if getattr(args, name) is not None}
    if args.easy:
        if args.image_size:
            raise MdpError("--easy fixes the image size to 176x64; leave --image-size out")
        return easy_spec(**wanted)
    if args.image_size:
        wanted["image_size"] = image_size(args.image_size)
    return MiniNuScenesSpec(**wanted)


def main() -> int:
    args = parse_args()
    try:
        spec = spec_from(args)
        if args.workers < 1:
            raise MdpError(f"--workers {args.workers} must be at least 1")
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        started = time.monotonic()
        with Progress(TextColumn("{task.description}"), *columns) as progress:
            task = progress.add_task("key frames", total=spec.scenes * spec.frames)
            write_mini_nuscenes(
                args.out, spec, args.overwrite, step=lambda: progress.advance(task), workers=args.workers
            )
        seconds = time.monotonic() - started
    except (MdpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} is as it was", file=sys.stderr)
        return 130
    train, val = spec.split_sizes
    print(
        f"wrote {args.out}: {spec.version}, {train} + {val} scenes (train + val) of {spec.frames} key frames, "
        f"{spec.scenes * spec.frames / seconds:.2f} key frames per second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
