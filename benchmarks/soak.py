"""Soak of a deployment with cuts, dropped cameras and bad frames: ``python benchmarks/soak.py DEPLOY_DIR``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runtime.disturbance import soak
from mdp_mmdet3d.runtime.stream import StreamRunner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path, help="folder of tools/export.py; a small model")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        result = soak(StreamRunner(args.deployment), args.frames, seed=args.seed)
    except MdpError as error:
        parser.exit(2, f"error: {error}\n")
    seconds = time.perf_counter() - start
    print(f"{result.frames} frames in {seconds:.0f} s, {result.resets} cuts, refused {result.refused}")
    print(f"{result.wrong_after_reset} of {result.resets_checked} checked cuts differ from a fresh stream")
    print("resident memory in MiB:", " ".join(f"{value:.0f}" for value in result.memory_mib))


if __name__ == "__main__":
    main()
