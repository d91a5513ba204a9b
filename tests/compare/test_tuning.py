"""The search for a plan at a wanted measured latency, with methods that are wrong about latency."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mdp_mmdet3d.compare.tuning import CLOSE, PROPOSALS, REPEATS, TRIES, tune
from mdp_mmdet3d.errors import InfeasibleBudgetError, MdpError


def plan(width):
    return SimpleNamespace(hash=str(width), width=width)


@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("true", [lambda x: 0.2 + 0.8 * x, lambda x: x**2, lambda x: x**0.5])
def test_finds_the_wanted_share_whatever_the_method_believes(share, true):
    measured = []

    def measure(found):
        measured.append(found.hash)
        return true(found.width / 1000)

    found = tune(lambda knob: plan(min(round(knob * 1000), 1000)), measure, share)
    assert abs(found.share / share - 1) <= CLOSE
    assert found.share == true(found.plan.width / 1000)
    assert len(measured) == len(set(measured)) <= TRIES


def test_infeasible_knobs_are_left_behind():
    def propose(knob):
        if knob < 0.6:
            raise InfeasibleBudgetError("too small", knob)
        return plan(round(knob * 1000))

    found = tune(propose, lambda item: item.width / 2000, 0.4)
    assert abs(found.share / 0.4 - 1) <= CLOSE and all(knob >= 0.6 for knob, _ in found.tries)


def test_a_method_with_one_plan_stops_and_says_how_far_it_is():
    found = tune(lambda knob: plan(1), lambda item: 0.9, 0.5)
    assert found.share == 0.9 and len(found.tries) == REPEATS


def test_no_plan_at_all_is_an_error():
    asked = []

    def propose(knob):
        asked.append(knob)
        raise InfeasibleBudgetError("too small", knob)

    with pytest.raises(MdpError, match=r"no plan at 0\.5 of the dense latency"):
        tune(propose, lambda item: 1.0, 0.5)
    assert len(asked) == PROPOSALS


# What torch-pruning's plans measured by the share of channels that stay (docs/results/fashion_mnist_resnet.json), and
# between: past some ratio its plans become slower again.
LIBRARY = ((0.0, 0.99), (0.22, 0.947), (0.4, 0.738), (0.5, 0.581), (0.6, 0.49), (0.7, 0.5675), (0.96, 0.7), (1.0, 1.0))


def library(knob):
    return float(np.interp(knob, *zip(*LIBRARY)))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.58, 0.5])
def test_a_method_whose_plans_become_slower_again_is_brought_to_the_wanted_share(share):
    found = tune(lambda knob: plan(round(knob, 3)), lambda item: library(item.width), share)
    assert abs(found.share / share - 1) <= CLOSE


def test_below_the_fastest_plan_the_search_ends_near_it():
    found = tune(lambda knob: plan(round(knob, 3)), lambda item: library(item.width), 0.3)
    assert found.share < 0.52 and len({share for _, share in found.tries}) <= TRIES


def test_a_jump_between_two_plans_ends_the_search():
    found = tune(lambda knob: plan(int(knob > 0.55)), lambda item: 0.4 + 0.2 * item.width, 0.49)
    assert found.share == 0.4 and len(found.tries) < 8
