"""The PruningProblem format: round trip, validation that names the culprit, evaluation."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from mdp_mmdet3d.errors import FileFormatError, MdpError
from mdp_mmdet3d.solver import (
    InvalidProblemError,
    ProblemBlock,
    ProblemDimension,
    ProblemStructure,
    ProblemTerm,
    PruningProblem,
)


def problem_with(array, *, value=None, options=(1, 2), block=None, blocks=(), dimensions=(0,)):
    return PruningProblem(
        "example",
        ("latency_ms",),
        (ProblemDimension("conv.out", options),),
        blocks,
        (ProblemTerm("conv", dimensions, block, {"latency_ms": np.array(array)}, value),),
    )


@pytest.mark.parametrize("seed", range(30))
def test_saving_and_loading_gives_the_same_problem(seed, random_problem, tmp_path):
    problem = random_problem(seed)
    problem.save(tmp_path / "problem.npz")
    loaded = PruningProblem.load(tmp_path / "problem.npz")
    assert (loaded.name, loaded.metrics, loaded.dimensions, loaded.blocks) == (
        problem.name,
        problem.metrics,
        problem.dimensions,
        problem.blocks,
    )
    for one, other in zip(loaded.terms, problem.terms, strict=True):
        assert (one.name, one.dimensions, one.block) == (other.name, other.dimensions, other.block)
        assert (one.value is None) == (other.value is None)
        for metric in problem.metrics:
            np.testing.assert_array_equal(one.costs[metric], other.costs[metric])


@pytest.mark.parametrize("seed", range(20))
def test_evaluation_counts_only_terms_of_kept_blocks(seed, random_problem, brute_force):
    problem = random_problem(seed)
    table = brute_force(problem)
    for index in np.random.default_rng(seed).integers(0, len(table.plans), 20):
        evaluation = problem.evaluate(table.plans[index])
        assert evaluation.value == pytest.approx(table.values[index], rel=1e-12)
        assert list(evaluation.costs.values()) == pytest.approx(table.costs[index].tolist(), rel=1e-12)


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(array=[1.0, np.nan]), ["term 'conv'", "latency_ms", "NaN"]),
        (dict(array=[1.0, np.inf]), ["term 'conv'", "latency_ms", "infinity"]),
        (dict(array=[1.0, -2.0]), ["term 'conv'", "latency_ms", "-2"]),
        (dict(array=[1.0, 2.0], value=np.array([np.nan, 1.0])), ["term 'conv'", "value", "NaN"]),
        (dict(array=[1.0, 2.0, 3.0]), ["term 'conv'", "(3,)", "(2,)"]),
        (dict(array=[1.0, 2.0], options=(2, 2)), ["dimension 'conv.out'", "increasing"]),
        (dict(array=[1.0, 2.0], options=(-1, 2)), ["dimension 'conv.out'"]),
        (dict(array=[1.0, 2.0], dimensions=(3,)), ["term 'conv'", "dimension 3"]),
        (dict(array=[1.0, 2.0], block=0), ["term 'conv'", "block 0"]),
        (dict(array=[1.0, 2.0], blocks=(ProblemBlock("a", 1), ProblemBlock("b", 0))), ["'a'", "ancestor"]),
        (dict(array=[1.0, 2.0], blocks=(ProblemBlock("a"), ProblemBlock("a"))), ["'a'", "twice"]),
    ],
)
def test_bad_input_is_refused_by_name(bad, words):
    with pytest.raises(InvalidProblemError) as caught:
        problem_with(**bad)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_plan_that_is_no_structure_is_refused():
    problem = problem_with([1.0, 2.0], blocks=(ProblemBlock("layer"), ProblemBlock("sub", 0)))
    with pytest.raises(InvalidProblemError, match="'sub' is kept, its parent 'layer' is removed"):
        problem.evaluate(ProblemStructure((0,), (False, True)))
    with pytest.raises(InvalidProblemError, match=r"'conv\.out' has no option 2"):
        problem.evaluate(ProblemStructure((2,), (True, True)))


def test_damaged_files_are_named(tmp_path, random_problem):
    path = tmp_path / "problem.npz"
    with pytest.raises(FileFormatError, match="does not exist"):
        PruningProblem.load(path)
    random_problem(3).save(path)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not an archive", data[:200] + bytes(40) + data[240:]):
        path.write_bytes(damaged)
        with pytest.raises(MdpError, match=r"problem\.npz"):
            PruningProblem.load(path)
    np.savez(path, meta=np.array(json.dumps({"schema_version": 99})))
    with pytest.raises(FileFormatError, match="99"):
        PruningProblem.load(path)
    np.savez(path, meta=np.array(json.dumps({"schema_version": 1, "name": "x"})))
    with pytest.raises(FileFormatError, match="metrics"):
        PruningProblem.load(path)


def test_random_damage_never_escapes_as_another_error(tmp_path, random_problem):
    path = tmp_path / "problem.npz"
    random_problem(8).save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=5):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            PruningProblem.load(path)
        except MdpError:
            refused += 1
    assert refused > 200


def test_plan_indices_survive_json():
    plan = ProblemStructure((1, 0, 3), (True, False))
    assert ProblemStructure.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_solver_imports_neither_torch_nor_openmmlab():
    code = (
        "import sys, mdp_mmdet3d.solver, mdp_mmdet3d.solver.baselines, mdp_mmdet3d.solver.pareto; "
        "bad = {m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'mmcv', 'mmengine', 'mmdet', 'mmdet3d', 'scipy', 'numba', 'matplotlib'}; print(bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
