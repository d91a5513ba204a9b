"""Ways through the solver that must all find the optimum."""

from __future__ import annotations

from dataclasses import replace

from mdp_mmdet3d.solver import Formulation, SolveOptions

SCIP_ALONE = SolveOptions(lagrangian=False, reduction=False, label_search=False, isolate=False)
ROUTES = {
    "all": SolveOptions(isolate=False),
    "labels without reduction": SolveOptions(reduction=False, isolate=False),
    "labels without Lagrangian": SolveOptions(lagrangian=False, isolate=False),
    "reduction and SCIP": SolveOptions(label_search=False, isolate=False),
    "SCIP alone, linearised": replace(SCIP_ALONE, formulation=Formulation.LINEARISED),
    "SCIP alone, folded": replace(SCIP_ALONE, formulation=Formulation.FOLDED),
}
