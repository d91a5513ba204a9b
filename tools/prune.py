"""Prune a detector to a latency budget: space, importance, latency, solve, cut, export, measure.

The budget holds on this machine, or, with --latency-table F, on the device where F was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mmengine.config import DictAction
from mmengine.logging import MMLogger
from rich.console import Console

from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import writing
from mdp_mmdet3d.report.summary import print_summary, print_target_steps
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.settings import PRECISIONS, PruneSettings
from mdp_mmdet3d.shipped import config_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=config_path, help="config with a prune section, e.g. configs/streampetr_mdp.py")
    parser.add_argument("--checkpoint", help="weights of the dense model (official .pth or one of this project)")
    parser.add_argument("--budget", help="0.55 (share of the dense latency), 120ms or 8fps")
    parser.add_argument("--frames", type=int, help="frames for the importance")
    parser.add_argument(
        "--latency-table",
        type=Path,
        metavar="F",
        help="table made on the target (probe bundle or tools/profile_latency.py): prune for that "
        "device; nothing measured on this machine counts then",
    )
    parser.add_argument(
        "--target-latency",
        type=Path,
        metavar="FPS_JSON",
        help="tools/validate_fps.py --json of the last plan, run on the target: corrects predictions",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the target's table and deployment")
    parser.add_argument("--work-dir", help="default: work_dirs/<name of the config>")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    console = Console(soft_wrap=True)
    MMLogger.get_instance("mdp", log_level="WARNING")  # initialisers and data sets are talkative
    try:
        config = read_config(args.config, args.cfg_options)
        settings = PruneSettings.from_config(config.get("prune", {}))
        overrides = {k: v for k in ("budget", "frames", "precision") if (v := getattr(args, k)) is not None}
        work_dir = Path(args.work_dir or Path("work_dirs") / Path(args.config).stem)
        job = PruneJob(
            config,
            dataclasses.replace(settings, **overrides),
            work_dir,
            args.checkpoint or config.get("checkpoint"),
            console,
            args.latency_table,
            args.target_latency,
            command=shlex.join(["python", *sys.argv]),
        )
        with writing(work_dir):
            report = job.run()
        print_summary(report, console)
        if not report["measured_end_to_end"]:
            print_target_steps(report, args.config, work_dir, console)
    except MdpError as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on")
        return 130
    console.print(f"written to {work_dir}: report.html, report.json, plan.json, pruned.pth, pruned_config.py, onnx/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
