"""What a run prints where there is no terminal: whole lines, each of which says something."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from rich.console import Console

from mdp_mmdet3d.importance import loss_changes
from mdp_mmdet3d.report.summary import decimals
from mdp_mmdet3d.runner.outcome import ABOUT, Steps

RUNNER = Path(loss_changes.__file__).parents[1] / "runner"


def test_every_step_says_what_it_does():
    names = {n for path in RUNNER.glob("*.py") for n in re.findall(r'steps\("([^"]+)"\)', path.read_text())}
    assert {"model", "solve", "fine-tune"} <= names
    assert names == set(ABOUT)


def test_steps_print_name_work_and_time():
    out = io.StringIO()
    steps = Steps(Console(file=out, width=120))
    with steps("solve"):
        pass
    first, second = out.getvalue().splitlines()
    assert first == f"solve: {ABOUT['solve']}" and re.fullmatch(r"  took 0\.\d s", second)
    with steps("evaluate", "accuracy of the dense model on the test data"):
        pass
    assert out.getvalue().splitlines()[2] == "evaluate: accuracy of the dense model on the test data"
    assert list(steps.seconds) == ["solve", "evaluate"]


def test_latencies_below_a_millisecond_are_told_apart():
    found = [f"{value:.{decimals(value)}f}" for value in (0.0741, 0.1502, 1.0, 1345.6)]
    assert found == ["0.074", "0.150", "1.0", "1345.6"]


class Probe:
    """Two plans, none measured."""

    def measured(self, plan: str) -> bool:
        return False

    def change(self, plan: str) -> np.ndarray:
        return np.array([len(plan)])


def test_a_finished_bar_leaves_nothing_in_a_log(capsys):
    found = loss_changes.measure_plans(Probe(), {"a": "one", "b": "three"}, "loss changes")
    assert {key: list(value) for key, value in found.items()} == {"a": [3], "b": [5]}
    assert capsys.readouterr().out == ""
