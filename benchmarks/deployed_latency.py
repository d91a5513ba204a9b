"""Latency of exported models, measured side by side: ``python benchmarks/deployed_latency.py DIR [DIR ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import Progress

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.measure import measure_interleaved, session_device, speedup
from mdp_mmdet3d.runtime.synthetic import synthetic_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="deployment folders; the first one is the baseline")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds after each of four loads that are not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads inside one operator")
    args = parser.parse_args()
    try:
        frames = synthetic_frames(DeploymentManifest.load(args.folders[0]), count=4)
        with Progress(transient=True) as bar:
            task = bar.add_task("rounds")
            stats = measure_interleaved(
                {str(folder): folder for folder in args.folders},
                frames,
                rounds=args.rounds,
                warmup=args.warmup,
                threads=args.threads,
                on_round=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except MdpError as error:
        parser.exit(2, f"error: {error}\n")
    baseline = next(iter(stats.values()))
    print("| deployment | median ms | min ms | p90 ms | IQR ms | encoder ms | head ms | FPS | speed-up |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, item in stats.items():
        figures = (item.median_ms, item.minimum_ms, item.p90_ms, item.spread_ms, *item.engines_ms.values())
        milliseconds = " | ".join(f"{value:.1f}" for value in figures)
        print(f"| {name} | {milliseconds} | {item.fps:.2f} | {speedup(baseline, item):.3f} |")
    print(session_device(args.threads))


if __name__ == "__main__":
    main()
