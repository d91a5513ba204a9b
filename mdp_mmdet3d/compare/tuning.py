"""Turn a method's own knob until its plan takes the wanted share of the dense latency, as measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError
from mdp_mmdet3d.surgery.plan import PruningPlan

TRIES = 10  # plans that are measured to find the right one
PROPOSALS = 40  # turns of a knob for that
REPEATS = 4  # the same plan as often in a row: the method has no nearer one
CLOSE = 0.01  # relative distance from the wanted latency that ends the search
Propose = Callable[[float], PruningPlan]


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


def tune(propose: Propose, measure: Callable[[PruningPlan], float], share: float) -> Tuned:
    """Turn a knob until the measured share of the dense latency is ``share``, within `CLOSE` or as near as it gets.

    Args:
        propose: Plan for a knob; a larger knob asks for a slower plan. The knob is a share itself, but the method may
            be wrong about latency.
        measure: Measured share of a plan.
        share: Wanted.
    """
    best: Tuned | None = None
    tries: list[tuple[float, float]] = []
    measured: dict[str, float] = {}
    below, above = (0.0, 0.0), (math.inf, math.inf)  # knob and measured share, on either side of what is wanted
    knob = share
    for _ in range(PROPOSALS):
        try:
            plan = propose(knob)
        except InfeasibleBudgetError:
            below = (knob, 0.0)
            knob = (knob + above[0]) / 2 if above[0] < math.inf else knob * 1.1
            continue
        if plan.hash not in measured:
            measured[plan.hash] = measure(plan)
        found = measured[plan.hash]
        tries.append((knob, found))
        if best is None or abs(found / share - 1) < abs(best.share / share - 1):
            best = Tuned(plan, found, ())
        stuck = [share for _, share in tries[-REPEATS:]] == [found] * REPEATS
        if abs(found / share - 1) <= CLOSE or len(measured) == TRIES or stuck:
            break
        below, above = ((knob, found), above) if found < share else (below, (knob, found))
        if above[0] < math.inf and below[0] > 0:  # both sides are known: interpolate, and halve now and then
            fraction = 0.5 if not below[1] or len(tries) % 3 == 0 else (share - below[1]) / (above[1] - below[1])
            knob = below[0] + fraction * (above[0] - below[0])
        else:
            knob *= (share / found) ** 1.5
    if best is None:
        raise MdpError(f"no plan at {share} of the dense latency: the smallest structures are slower")
    return replace(best, tries=tuple(tries))
