"""Turn a method's own knob until its plan takes the wanted share of the dense latency, as measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.surgery.plan import PruningPlan

TRIES = 10  # plans that are measured to find the right one
PROPOSALS = 40  # turns of a knob for that
REPEATS = 4  # as many turns of the knob without a new plan: the method has no nearer one
CLOSE = 0.01  # relative distance from the wanted latency that ends the search
STEEP = 1.5  # power of the wanted change of latency by which a knob is turned while only one side is known
Propose = Callable[[float], PruningPlan]


class NoPlanError(MdpError):
    """A method has no plan at all near the wanted latency."""


@dataclass(frozen=True)
class Tuned:
    """A plan whose measured latency is as near to the wanted share as the method came.

    Attributes:
        plan: What stays.
        share: Its measured latency relative to the dense model beside it.
        tries: (knob, measured share) of every turn.
    """

    plan: PruningPlan
    share: float
    tries: tuple[tuple[float, float], ...]


def tune(propose: Propose, measure: Callable[[PruningPlan], float], share: float, close: float = CLOSE) -> Tuned:
    """Turn a knob until the measured share of the dense latency is ``share``, within ``close`` or as near as it gets.

    Args:
        propose: Plan for a knob; a larger knob should ask for a slower plan. The knob is a share itself, but the method
            may be wrong about latency, and need not keep to the order: what torch-pruning leaves becomes slower again
            past some ratio.
        measure: Measured share of a plan.
        share: Wanted.
        close: Relative distance that ends the search.

    Raises:
        NoPlanError: The method found no plan at any knob.
    """
    best: Tuned | None = None
    tries: list[tuple[float, float]] = []
    measured: dict[str, float] = {}
    points: dict[float, float] = {}  # measured share by knob; 0 where no plan is that fast
    new = [True]  # per feasible turn, whether its plan was a new one
    knob = share
    for _ in range(PROPOSALS):
        try:
            plan = propose(knob)
        except InfeasibleBudgetError:
            points[knob] = 0.0
            knob = _next_knob(sorted(points.items()), share, halve=True)
            continue
        new.append(plan.hash not in measured)
        if new[-1]:
            measured[plan.hash] = measure(plan)
        found = points[knob] = measured[plan.hash]
        tries.append((knob, found))
        if best is None or abs(found - share) < abs(best.share - share):
            best = Tuned(plan, found, ())
        if abs(found / share - 1) <= close or len(measured) == TRIES or not any(new[-REPEATS + 1 :]):
            break
        knob = _next_knob(sorted(points.items()), share, halve=len(tries) % 3 == 0)
    if best is None:
        raise NoPlanError(f"no plan at {share:g} of the dense latency: the smallest structures are slower")
    return replace(best, tries=tuple(tries))


def _next_knob(points: Sequence[tuple[float, float]], share: float, halve: bool) -> float:
    """Where to look next.

    Args:
        points: (knob, measured share), by knob; a share of 0 where there is no plan.
        share: Wanted.
        halve: Between two knobs, the middle instead of where a line through them would cross.
    """
    if not any(found for _, found in points):
        return points[-1][0] * 1.1
    crossings = [pair for pair in pairwise(points) if (pair[0][1] < share) != (pair[1][1] < share)]
    if crossings:
        low, high = min(crossings, key=lambda pair: min(abs(found - share) for _, found in pair))
        middle = halve or not low[1] or not high[1]
        fraction = 0.5 if middle else (share - low[1]) / (high[1] - low[1])
        return low[0] + fraction * (high[0] - low[0])
    # All are on one side. The nearest one leads on, unless going on that way was tried and led away again.
    slow = points[0][1] > share
    order = points if slow else list(reversed(points))  # the end comes first that should be nearest
    place = min(range(len(order)), key=lambda i: abs(order[i][1] - share))
    knob, found = order[place]
    if place == 0:
        return knob * (share / found) ** STEEP
    tried = order[place - 1][0]
    if place == len(order) - 1:
        return knob * knob / tried  # as far to the other side
    other = order[place + 1][0]
    return (knob + max(tried, other, key=lambda side: abs(side - knob))) / 2
