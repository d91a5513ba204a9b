"""Which parts STAY: the pruning program and its proven optimum. Needs numpy and PySCIPOpt only."""

from mdp_mmdet3d.solver.problem import (
    Evaluation,
    InvalidProblemError,
    ProblemBlock,
    ProblemDimension,
    ProblemStructure,
    ProblemTerm,
    PruningProblem,
)
from mdp_mmdet3d.solver.result import Combinations, Formulation, SolveOptions, SolveResult, SolveStatus
from mdp_mmdet3d.solver.route import solve
from mdp_mmdet3d.solver.scaling import NoStructureError

__all__ = [
    "Combinations",
    "Evaluation",
    "Formulation",
    "InvalidProblemError",
    "NoStructureError",
    "ProblemBlock",
    "ProblemDimension",
    "ProblemStructure",
    "ProblemTerm",
    "PruningProblem",
    "SolveOptions",
    "SolveResult",
    "SolveStatus",
    "solve",
]
