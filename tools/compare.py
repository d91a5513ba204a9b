"""Compare pruning methods on any config at equal measured latency: plans, accuracy, equal fine-tuning; resumable."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mmengine.logging import MMLogger
from rich.console import Console

from mdp_mmdet3d.compare.job import Comparison
from mdp_mmdet3d.compare.methods import METHODS
from mdp_mmdet3d.compare.recipe import finetune_settings
from mdp_mmdet3d.compare.report import markdown, plot
from mdp_mmdet3d.compare.tuning import CLOSE
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import atomic_path, check_target_file, write_json, writing
from mdp_mmdet3d.shipped import config_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=config_path, help="with a model, data, a metric, and a prune section")
    parser.add_argument("--methods", default="mdp,halp,uniform,magnitude", help=f"of {','.join(METHODS)}")
    parser.add_argument("--budgets", nargs="+", default=["0.7", "0.5"], help="as tools/prune.py --budget takes them")
    parser.add_argument("--checkpoint", help="trained dense weights; default: the config's")
    parser.add_argument("--finetune", type=int, metavar="N", help="iterations; default: prune.finetune; 0: none")
    parser.add_argument("--lr", type=float, help="default: that of prune.finetune, else a tenth of training's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of fine-tuning")
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/<name of the config>_compare")
    parser.add_argument(
        "--close", type=float, default=CLOSE, help="relative distance from a budget that will do; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument(
        "--cores",
        type=int,
        nargs="+",
        default=sorted(os.sched_getaffinity(0)),
        help="the first one measures; all of them evaluate and train afterwards; default: all",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    console = Console(soft_wrap=True)
    MMLogger.get_instance("mdp", log_level="WARNING")
    work_dir = args.work_dir or Path("work_dirs") / f"{Path(args.config).stem}_compare"
    try:
        job = Comparison(
            config_path=str(args.config),
            checkpoint=args.checkpoint,
            methods=args.methods.split(","),
            budgets=args.budgets,
            work_dir=work_dir,
            finetune=finetune_settings(str(args.config), args.finetune, args.lr),
            seeds=tuple(dict.fromkeys(args.seeds)),
            cores=tuple(args.cores),
            close=args.close,
            console=console,
        )
        if args.json:
            check_target_file(args.json)
        with writing(work_dir):
            report = job.run()
            for path in filter(None, (work_dir / "compare.json", args.json)):
                write_json(path, report)
            table = markdown(report)
            with atomic_path(work_dir / "compare.md") as temporary:
                temporary.write_text(table + "\n", encoding="utf-8")
            plot(report, work_dir / "compare.png")
    except MdpError as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on")
        return 130
    console.print(table, highlight=False, markup=False)
    console.print(f"written to {work_dir}: compare.json, compare.md, compare.png, plans/, steps/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
