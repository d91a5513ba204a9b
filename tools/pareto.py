"""Exact trade-off of a finished run: re-solves its problem for many budgets, without measuring again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.errors import MissingExtraError
from mdp_mmdet3d.solver import PruningProblem, SolveOptions
from mdp_mmdet3d.solver.pareto import pareto
from mdp_mmdet3d.solver.pareto_plot import plot_front
from mdp_mmdet3d.together import appear_together


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path, help="folder with the problem.npz of tools/prune.py")
    parser.add_argument("--points", type=int, default=50, help="number of budgets (default 50)")
    parser.add_argument("--step", type=float, help="distance of budgets in the metric's unit, instead of --points")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds per budget (default 600)")
    return parser.parse_args()


@command(stopped="nothing was written")
def main() -> int:
    args = parse_args()
    problem = PruningProblem.load(args.work_dir / "problem.npz")
    front = pareto(problem, args.points, step=args.step, options=SolveOptions(time_limit_s=args.time_limit))
    with appear_together(args.work_dir, ("pareto.json", "pareto.png")) as part:
        front.save(part / "pareto.json")
        written = "pareto.json"
        try:
            plot_front(front, part / "pareto.png")
            written += " and pareto.png"
        except MissingExtraError as error:  # an optional library is no reason to lose the front
            print(f"WARNING: {error}", file=sys.stderr)
    print(f"{front.metric:>14}  of dense  importance  blocks removed  status       gap")
    for row in front.rows():
        print(
            f"{row['cost']:14.6g} {row['cost_share']:9.2%} {row['value_share']:11.4%} {row['removed_blocks']:15d}  "
            f"{row['status']:<8} {row['gap']:8.1e}"
        )
    seconds = sum(row["seconds"] for row in front.rows())
    print(f"{len(front.points)} plans, {seconds:.1f} s; wrote {written} to {args.work_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
