"""The only file that talks to SCIP: one model in, one checked status out, optionally in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.extras import check_installed
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.solver.model import MixedBinaryModel

KILL_FACTOR, KILL_MARGIN_S = 1.2, 20.0
_NO_BOUND = 1e300  # JSON has no infinity


class ScipCrashError(MdpError):
    """SCIP aborted, hung past its time limit or ended in a state that is no answer."""


class ScipStatus(str, Enum):
    """What SCIP proved."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    LIMIT = "limit"


# Strings of SCIPgetStatus as PySCIPOpt 5-6 spells them (pyscipopt/scip.pxi, Model.getStatus).
_STATUS = {
    "optimal": ScipStatus.OPTIMAL,
    "gaplimit": ScipStatus.OPTIMAL,
    "infeasible": ScipStatus.INFEASIBLE,
    "inforunbd": ScipStatus.INFEASIBLE,
    "timelimit": ScipStatus.LIMIT,
    "memlimit": ScipStatus.LIMIT,
    "nodelimit": ScipStatus.LIMIT,
    "totalnodelimit": ScipStatus.LIMIT,
    "stallnodelimit": ScipStatus.LIMIT,
    "sollimit": ScipStatus.LIMIT,
    "bestsollimit": ScipStatus.LIMIT,
    "restartlimit": ScipStatus.LIMIT,
}


@dataclass(frozen=True)
class ScipAnswer:
    """SCIP's answer to a `MixedBinaryModel`.

    Attributes:
        status: What was proved.
        binaries: 0/1 per binary of the best solution, None without one.
        bound: Upper bound of the objective.
        nodes: Branch-and-bound nodes.
        version: SCIP's version.
    """

    status: ScipStatus
    binaries: list[int] | None
    bound: float
    nodes: int
    version: str


def run_scip(
    model: MixedBinaryModel, *, time_limit_s: float, gap: float, isolate: bool = True, cutoff: float | None = None
) -> ScipAnswer:
    """Solve a model, deterministic on one thread.

    Args:
        model: What to solve.
        time_limit_s: SCIP's own limit; a child that outlives it by a margin is killed.
        gap: Relative gap at which SCIP stops.
        isolate: Use a child process, so that an abort inside SCIP cannot take this process along.
        cutoff: Only solutions with a larger objective are wanted; "infeasible" then means there is none.

    Raises:
        ScipCrashError: The child aborted or was killed, or SCIP ended with an unknown status.
        MissingExtraError: PySCIPOpt is not installed.
    """
    check_installed("pyscipopt", "solver", "the solver")
    if not isolate:
        return run_in_process(model, time_limit_s=time_limit_s, gap=gap, cutoff=cutoff)
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="mdp_scip_") as folder:
        model.save(Path(folder) / "model.npz")
        request = {"time_limit_s": time_limit_s, "gap": gap, "cutoff": cutoff}
        write_json(Path(folder) / "request.json", request)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mdp_mmdet3d.solver.scip_child", folder]
        limit = KILL_FACTOR * time_limit_s + KILL_MARGIN_S
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise ScipCrashError(
                f"SCIP ignored its time limit of {time_limit_s:.0f} s and was killed after {limit:.0f} s"
            ) from error
        answer = Path(folder) / "answer.json"
        if done.returncode or not answer.exists():
            tail = " ".join(done.stderr.split()[-40:])
            raise ScipCrashError(f"the SCIP process ended with status {done.returncode}: {tail or 'silent'}")
        data = json.loads(answer.read_text(encoding="utf-8"))
    return ScipAnswer(ScipStatus(data.pop("status")), **data)


def child_main(folder: str) -> None:
    """Entry point of the child process: solve ``model.npz``, write ``answer.json``."""
    request = json.loads((Path(folder) / "request.json").read_text(encoding="utf-8"))
    model = MixedBinaryModel.load(Path(folder) / "model.npz")
    answer = run_in_process(model, **request)
    write_json(Path(folder) / "answer.json", {**asdict(answer), "status": answer.status.value})


def run_in_process(
    model: MixedBinaryModel, *, time_limit_s: float, gap: float, cutoff: float | None = None
) -> ScipAnswer:
    """`run_scip` without a child."""
    import pyscipopt

    scip = pyscipopt.Model("mdp")
    scip.hideOutput()
    scip.setParams(
        {
            "limits/time": max(time_limit_s, 0.1),
            "limits/gap": gap,
            "numerics/feastol": 1e-9,  # a looser row would let plans break the budget by 1e-6
            "parallel/maxnthreads": 1,
            "lp/threads": 1,
        }
    )
    scip.setMaximize()
    variables = [
        scip.addVar(vtype="B", obj=weight) if index < model.binaries else scip.addVar(vtype="C", obj=weight)
        for index, weight in enumerate(model.objective.tolist())
    ]
    products: dict[int, list[int]] = {}
    for position, row in enumerate(model.q_rows.tolist()):
        products.setdefault(row, []).append(position)
    terms = [pyscipopt.scip.Term(variable) for variable in variables]
    for row in range(len(model.lower)):
        part = slice(model.row_starts[row], model.row_starts[row + 1])
        columns, coefficients = model.columns[part].tolist(), model.coefficients[part].tolist()
        content = {terms[column]: coefficient for column, coefficient in zip(columns, coefficients)}
        for position in products.get(row, ()):
            pair = pyscipopt.scip.Term(variables[model.q_left[position]], variables[model.q_right[position]])
            content[pair] = content.get(pair, 0.0) + float(model.q_coefficients[position])
        lower, upper = float(model.lower[row]), float(model.upper[row])
        scip.addCons(
            pyscipopt.scip.ExprCons(
                pyscipopt.Expr(content),
                lhs=None if np.isneginf(lower) else lower,
                rhs=None if np.isposinf(upper) else upper,
            )
        )
    if len(model.start):
        solution = scip.createPartialSol()
        for variable, value in zip(variables, model.start.tolist()):
            scip.setSolVal(solution, variable, value)
        scip.addSol(solution)
    if cutoff is not None:
        scip.setObjlimit(cutoff)
    if not len(model.q_rows):
        # The local marginals are tight already; cuts only cost time (3 to 40 times in all on the shared instances).
        scip.setSeparating(pyscipopt.SCIP_PARAMSETTING.OFF)
    scip.optimize()
    text = scip.getStatus()
    if text == "userinterrupt":
        raise KeyboardInterrupt
    if text not in _STATUS:
        raise ScipCrashError(f"SCIP ended with status {text!r}, which is no answer")
    status = _STATUS[text]
    binaries = None
    if scip.getNSols() > 0:
        best = scip.getBestSol()
        binaries = [round(scip.getSolVal(best, variable)) for variable in variables[: model.binaries]]
    elif status is ScipStatus.OPTIMAL:
        raise ScipCrashError("SCIP reports an optimum but holds no solution")
    bound = min(float(scip.getDualbound()), _NO_BOUND)
    version = f"{scip.getMajorVersion()}.{scip.getMinorVersion()}.{scip.getTechVersion()}"
    return ScipAnswer(status, binaries, bound, int(scip.getNTotalNodes()), version)
