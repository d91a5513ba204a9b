"""What a finished run left in its work directory, read and checked for ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.files import read_json
from mdp_mmdet3d.latency.predict import MeasuredNetwork
from mdp_mmdet3d.solver.build import LATENCY
from mdp_mmdet3d.solver.links import options_of
from mdp_mmdet3d.solver.problem import ProblemStructure, PruningProblem
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

REPORT_VERSION = 1
NEEDED = ("report.json", "plan.json", "space.json")
KEYS = ("model", "budget", "budget_ms", "dense", "pruned", "solver", "widths", "removed_blocks", "plan_hash", "device")
FIGURES = ("predicted_ms", "fps", "params", "macs")
SAME = 1e-6  # relative; a plan's cost and value, stored and evaluated again


@dataclass(frozen=True)
class RunFiles:
    """One run.

    Attributes:
        work_dir: Where it lies.
        report: Content of ``report.json``.
        space: What could be pruned.
        plan: What stays.
        problem: The program that the plan solves; a text where it cannot be used, saying why.
        networks: Networks measured whole, dense first; a text where there are none, saying why.
    """

    work_dir: Path
    report: Mapping[str, Any]
    space: PruningSpace
    plan: PruningPlan
    problem: PruningProblem | str
    networks: tuple[MeasuredNetwork, ...] | str

    @classmethod
    def load(cls, work_dir: str | Path) -> RunFiles:
        """Read a work directory of ``tools/prune.py``.

        Raises:
            MdpError: It is not there, or no run has finished in it.
            FileFormatError: One of its files is damaged.
            StructureMismatchError: Its files are of different runs.
        """
        folder = Path(work_dir)
        _check_finished(folder)
        report = read_json(folder / "report.json", what="report", schema_version=REPORT_VERSION)
        lacking = [key for key in KEYS if key not in report]
        lacking += [
            f"{name}.{key}"
            for name in ("dense", "pruned")
            for key in FIGURES
            if not isinstance(report.get(name), dict) or key not in report[name]
        ]
        if lacking:
            raise FileFormatError(
                f"{folder / 'report.json'} lacks {', '.join(lacking)}: it is damaged or no report of tools/prune.py; "
                "run tools/prune.py again with this --work-dir"
            )
        space = PruningSpace.load(folder / "space.json")
        plan = PruningPlan.load(folder / "plan.json")
        if plan.hash != report["plan_hash"] or set(report["widths"]) != set(space.by_name):
            raise StructureMismatchError(
                f"{folder}: report.json is of plan {report['plan_hash']} with {len(report['widths'])} dimensions, "
                f"plan.json is plan {plan.hash} and space.json has {len(space.dimensions)} dimensions: another run was "
                "started here and has not finished. Run its command again"
            )
        return cls(folder, report, space, plan, _problem(folder, report), _networks(folder, report, space))

    @property
    def widths(self) -> dict[str, int]:
        """Kept count of every dimension."""
        return {name: kept for name, (kept, _) in self.report["widths"].items()}

    @property
    def removed(self) -> frozenset[str]:
        """Removed blocks."""
        return frozenset(self.report["removed_blocks"])

    @property
    def measured(self) -> bool:
        """Whether the latency was measured end to end; reports from before targets always were."""
        return bool(self.report.get("measured_end_to_end", True))


def plan_indices(problem: PruningProblem, widths: Mapping[str, int], removed: frozenset[str]) -> ProblemStructure:
    """A structure as a plan of ``problem``.

    Args:
        problem: The program.
        widths: Kept count per dimension; one that is missing keeps its dense size.
        removed: Removed blocks.

    Raises:
        ValueError: A count is no option of the program.
    """
    options = options_of(problem, widths)
    gone: set[int] = set()
    for index, block in enumerate(problem.blocks):  # parents come before children
        if block.name in removed or block.parent in gone:
            gone.add(index)
    return ProblemStructure(options, tuple(index not in gone for index in range(len(problem.blocks))))


def _check_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise MdpError(f"{folder} is no folder; give the --work-dir of a finished run of tools/prune.py")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if len(missing) == len(NEEDED):
        raise MdpError(
            f"{folder} is no work directory of tools/prune.py: it has none of {', '.join(NEEDED)}. Give the --work-dir "
            "of a finished run, e.g. work_dirs/streampetr_mdp"
        )
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MdpError(
            f"the run in {folder} has not finished: {', '.join(missing)} {verb} missing. "
            "Run the same tools/prune.py command again; it goes on where it was stopped"
        )


def _problem(folder: Path, report: Mapping[str, Any]) -> PruningProblem | str:
    path = folder / "problem.npz"
    if not path.is_file():
        return "problem.npz is missing; the next run of tools/prune.py writes it"
    try:
        problem = PruningProblem.load(path)
    except MdpError as error:
        return f"problem.npz cannot be read: {error}"
    widths = {name: kept for name, (kept, _) in report["widths"].items()}
    try:
        found = problem.evaluate(plan_indices(problem, widths, frozenset(report["removed_blocks"])))
        claimed = report["solver"]["costs"][LATENCY], report["solver"]["objective"]
    except (KeyError, ValueError, MdpError) as error:
        return f"problem.npz is of another model or search space ({error})"
    for is_ms, says_ms in zip((found.costs[LATENCY], found.value), claimed):
        if abs(is_ms - says_ms) > SAME * max(abs(is_ms), abs(says_ms)):
            return f"problem.npz is of another run: it gives {is_ms:g} where report.json says {says_ms:g}"
    return problem


def _networks(folder: Path, report: Mapping[str, Any], space: PruningSpace) -> tuple[MeasuredNetwork, ...] | str:
    measured = report.get("measured_end_to_end", True)
    path = folder / ("whole_latency.json" if measured else "target_whole_latency.json")
    if not path.is_file():
        return f"{path.name} is missing" if measured else "no whole network was measured on the target yet"
    data = read_json(path, what="whole-network latency", schema_version=1)
    try:
        if data["identity"]["fingerprint"] != space.model_digest:
            return f"{path.name} is of another model"
        return tuple(MeasuredNetwork(p["widths"], tuple(p["removed"]), p["stages_ms"]) for p in data["points"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{path} is damaged ({error!r}); delete it and run tools/prune.py again") from error
