"""The smallest cost by SCIP, where dimensions depend on each other too widely for elimination."""

from __future__ import annotations

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.solver.ablation import channels_only, with_all_blocks
from mdp_mmdet3d.solver.formulations import SCALE, cheapest
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.solver.scip import ScipStatus, run_scip


def minimum_by_scip(
    problem: PruningProblem, metric: str, *, remove_blocks: bool, time_limit_s: float, isolate: bool = True
) -> tuple[float, ProblemStructure] | None:
    """As `scaling.minimum_cost`, by SCIP; None where masks exclude every structure.

    Raises:
        MdpError: SCIP did not finish within the limit.
    """
    reduced = problem if remove_blocks else channels_only(problem)
    unit = max((float(term.costs[metric].max()) for term in problem.terms), default=0.0) or 1.0
    form = cheapest(reduced, metric, unit / SCALE)
    answer = run_scip(form.model, time_limit_s=time_limit_s, gap=0.0, isolate=isolate)
    if answer.status is ScipStatus.INFEASIBLE:
        return None
    if answer.status is not ScipStatus.OPTIMAL or answer.binaries is None:
        raise MdpError(
            f"SCIP did not find the smallest {metric} of {problem.name!r} in {time_limit_s:.0f} s; raise time_limit_s"
        )
    plan = reduced.canonical(form.decode(answer.binaries))
    plan = plan if remove_blocks else with_all_blocks(problem, plan)
    return problem.evaluate(plan).costs[metric], plan
