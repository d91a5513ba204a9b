"""Random CNNs (benchmarks/fuzz.py): what is offered is right; what tracing does not follow is left alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
LIMIT_S = 120


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(10))
def test_random_networks(seed, fuzz):
    row = fuzz.judge(fuzz.random_spec(seed), seed, LIMIT_S)
    assert row["verdict"] in ("right", "alone"), row


@pytest.mark.parametrize("spec", [[("split", 16, "none")], [("split", 16, "bn"), ("residual", 8, "bn")]])
def test_channels_that_are_split_are_no_crash(spec, fuzz):
    row = fuzz.judge(spec, 0, LIMIT_S)
    assert row["verdict"] in ("right", "alone"), row
