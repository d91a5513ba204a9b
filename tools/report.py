"""Write report.html of a finished run again, or for the first time for a run of an older release."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.report.html import write_html
from mdp_mmdet3d.report.html_front import TIME_LIMIT_S


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path, help="work directory of tools/prune.py")
    parser.add_argument(
        "--front-limit",
        type=float,
        default=TIME_LIMIT_S,
        metavar="S",
        help=f"seconds that solving for other budgets may take (default {TIME_LIMIT_S:.0f}; 0 leaves them out)",
    )
    args = parser.parse_args()
    if not 0 <= args.front_limit < float("inf"):
        parser.error(f"argument --front-limit: {args.front_limit:g} must be a number of seconds of at least 0")
    return args


@command(stopped="run the same command again")
def main() -> int:
    args = parse_args()
    path = write_html(args.work_dir, front_limit_s=args.front_limit)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
