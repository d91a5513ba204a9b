"""Solve a saved pruning problem: the most valuable structure within the budgets, with proof."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.solver import Formulation, ProblemStructure, PruningProblem, SolveOptions, SolveResult, solve
from mdp_mmdet3d.solver.ablation import channels_only, linear_latency, with_all_blocks
from mdp_mmdet3d.solver.certificate import audit
from mdp_mmdet3d.solver.scaling import minimum_cost

PHASES = ("lagrangian", "reduction", "labels", "scip")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", type=Path, help="problem.npz as tools/prune.py writes it")
    parser.add_argument(
        "--budget", required=True, help="share of the dense latency, e.g. 0.55, or an absolute one, e.g. 120ms"
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="budget for a further metric, in its unit; may be repeated",
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="prove the answer again with SCIP on the full linearised model, without elimination",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gap", type=float, default=1e-6, help="relative gap that counts as optimal (default 1e-6)")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds (default 600), for the audit too")
    parser.add_argument(
        "--formulation", choices=[f.value for f in Formulation], default="auto", help="model that SCIP gets"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        choices=PHASES,
        default=[],
        metavar="PHASE",
        help=f"switch phases off: {', '.join(PHASES)}",
    )
    parser.add_argument("--no-block-removal", action="store_true", help="ablation: prune counts only")
    parser.add_argument(
        "--latency-model",
        choices=("joint", "linear"),
        default="joint",
        help="ablation: linear is HALP's, blind to narrower inputs",
    )
    return parser.parse_args()


def parse_budget(text: str, problem: PruningProblem) -> float:
    """The budget in the unit of the problem's first metric."""
    metric = problem.metrics[0]
    unit = metric.rsplit("_", 1)[-1]
    match = re.fullmatch(r"([0-9.]+(?:[eE][-+]?\d+)?)\s*([a-zA-Z]*)", text.strip())
    try:
        number = float(match.group(1)) if match else float("nan")
    except ValueError:
        number = float("nan")
    if match is None or number != number or match.group(2) not in ("", unit):
        raise MdpError(f"--budget {text!r} is neither a share like 0.55 nor a number of {unit} like 120{unit}")
    if match.group(2):
        return number
    if not 0.0 < number <= 1.0:
        raise MdpError(
            f"--budget {text!r} as a share of the dense {metric} must be in (0, 1]; "
            f"for an absolute budget write {text}{unit}"
        )
    return number * problem.dense.costs[metric]


def parse_limits(texts: list[str]) -> dict[str, float]:
    """``METRIC=VALUE`` pairs."""
    limits = {}
    for text in texts:
        metric, _, value = text.partition("=")
        try:
            limits[metric] = float(value)
        except ValueError as error:
            raise MdpError(f"--limit {text!r} is not METRIC=VALUE, e.g. params=1e7") from error
    return limits


def solve_ablated(
    problem: PruningProblem, budgets: dict[str, float], args: argparse.Namespace
) -> tuple[SolveResult, ProblemStructure]:
    """The result for what the ablation leaves, and its plan for the whole problem."""
    reduced = channels_only(problem) if args.no_block_removal else problem
    if args.latency_model == "linear":
        reduced = linear_latency(reduced, reduced.dense_plan)
    options = SolveOptions(
        gap=args.gap,
        time_limit_s=args.time_limit,
        formulation=Formulation(args.formulation),
        lagrangian="lagrangian" not in args.without,
        reduction="reduction" not in args.without,
        label_search="labels" not in args.without,
        scip="scip" not in args.without,
    )
    result = solve(reduced, budgets, options)
    return result, with_all_blocks(problem, result.plan) if args.no_block_removal else result.plan


def answer(problem: PruningProblem, result: SolveResult, plan: ProblemStructure) -> dict[str, Any]:
    """The JSON object: value and costs by the true tables, counts by name."""
    evaluation = problem.evaluate(plan)
    return {
        "problem": problem.name,
        "status": result.status.value,
        "objective": evaluation.value,
        "bound": result.bound,
        "gap": result.gap,
        "budgets": result.budgets,
        "costs": evaluation.costs,
        "minimum": result.minimum,
        "minimum_all_blocks": result.minimum_all_blocks,
        "plan": problem.counts(plan),
        "removed_blocks": problem.removed_blocks(plan),
        "seconds": result.seconds,
        "proof": result.proof,
        "states": {"total": result.states_total, "removed": result.states_removed},
        "warnings": list(result.warnings),
        "certificate": result.certificate,
        **({} if result.combinations is None else {"combinations": asdict(result.combinations)}),
    }


def describe(problem: PruningProblem, data: dict[str, Any]) -> str:
    """The same for people."""
    dense = problem.dense
    lines = [
        f"{problem.name}: {data['status']}, gap {data['gap']:.1e} ({data['proof'] or 'not proven'}), "
        f"{data['seconds']['total']:.2f} s"
    ]
    share = data["objective"] / dense.value if dense.value else 1.0
    lines.append(f"  value    {data['objective']:.9g} ({share:.4%} of dense), bound {data['bound']:.9g}")
    if "combinations" in data:
        found = data["combinations"]
        lines.append(
            f"  global dimensions: {found['total']} combinations, {found['infeasible']} over budget, "
            f"{found['dropped']} dropped by bounds, {found['solved']} solved, {found['open']} left open"
        )
    for metric, budget in data["budgets"].items():
        complete = data["minimum_all_blocks"][metric]
        lines.append(
            f"  {metric:<10} {data['costs'][metric]:.6g} of {budget:.6g}; dense {dense.costs[metric]:.6g}, "
            f"smallest {data['minimum'][metric]:.6g} "
            f"({'impossible' if complete is None else f'{complete:.6g}'} with all blocks)"
        )
    lines.append(f"  removed blocks: {', '.join(data['removed_blocks']) or 'none'}")
    cut = {
        d.name: (data["plan"][d.name], d.options[-1])
        for d in problem.dimensions
        if data["plan"][d.name] < d.options[-1]
    }
    lines += [f"  {name}: {count} of {size}" for name, (count, size) in cut.items()]
    lines += [f"  warning: {warning}" for warning in data["warnings"]]
    if "audit" in data:
        words = {True: "confirmed", False: "REFUTED", None: "not finished within the limit"}
        lines.append(
            f"  audit: {words[data['audit']['confirmed']]} by SCIP {data['audit']['scip']}, bound "
            f"{data['audit']['bound']:.9g}, {data['audit']['seconds']:.1f} s"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    problem = PruningProblem.load(args.problem)
    budgets = {problem.metrics[0]: parse_budget(args.budget, problem), **parse_limits(args.limit)}
    try:
        result, plan = solve_ablated(problem, budgets, args)
    except InfeasibleBudgetError as error:
        if args.json:
            known = [metric for metric in budgets if metric in problem.metrics]
            minimum = {metric: minimum_cost(problem, metric)[0] for metric in known}
            print(
                json.dumps(
                    {
                        "problem": problem.name,
                        "status": "infeasible",
                        "budgets": budgets,
                        "minimum": minimum,
                        "error": str(error),
                    },
                    indent=1,
                )
            )
        raise
    data = answer(problem, result, plan)
    if args.audit:
        if plan is not result.plan or args.latency_model != "joint":
            raise MdpError("--audit proves the whole problem; leave out --no-block-removal and --latency-model")
        data["audit"] = audit(problem, result, gap=args.gap, time_limit_s=args.time_limit)
    print(json.dumps(data, indent=1) if args.json else describe(problem, data))
    return 1 if args.audit and data["audit"]["confirmed"] is False else 0


@command(stopped="run the same command again")
def main() -> int:
    return run(parse_args())


if __name__ == "__main__":
    sys.exit(main())
