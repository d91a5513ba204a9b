from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdp_mmdet3d.latency.backends.staircases import ONNXRUNTIME_CPU
from mdp_mmdet3d.latency.interpolation import inside, measured_grid, multilinear

axes = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True).map(sorted), min_size=1, max_size=3)


@given(axes, st.randoms(use_true_random=False))
def test_interpolation_hits_every_measured_point_and_stays_between_them(axes, random):
    entries = {widths: random.uniform(0.1, 9.0) for widths in product(*axes)}
    grid = measured_grid(entries)
    assert [axis.tolist() for axis in grid[0]] == axes
    assert multilinear(grid, np.array(list(entries))) == pytest.approx(list(entries.values()))
    points = np.array([[random.randint(axis[0], axis[-1]) for axis in axes] for _ in range(20)])
    assert inside(grid, points).all()
    values = multilinear(grid, points)
    assert (values >= min(entries.values()) - 1e-9).all() and (values <= max(entries.values()) + 1e-9).all()


@given(st.integers(2, 400), st.integers(2, 400), st.integers(2, 400))
def test_a_multilinear_function_is_reproduced(x, y, z):
    def function(x, y, z):
        return 2 + 3 * x + 5 * x * y + 7 * x * y * z

    grid = measured_grid({w: function(*w) for w in product((1, 40, 400), (1, 400), (1, 9, 50, 400))})
    assert multilinear(grid, np.array([[x, y, z]]))[0] == pytest.approx(function(x, y, z))


def test_single_extra_points_do_not_disturb_the_grid():
    entries = {widths: 1.0 for widths in product((16, 64, 128), (16, 64, 128))}
    extra = {(32, 48): 9.0, (128, 80): 9.0, (96, 16): 9.0, (256, 64): 9.0, (16, 80): 9.0, (8, 8): 9.0}
    coordinates, values = measured_grid(entries | extra)
    assert [axis.tolist() for axis in coordinates] == [[16, 64, 128], [16, 64, 128]]
    assert (values == 1.0).all()


def test_scattered_points_are_no_grid_but_a_point():
    coordinates, _ = measured_grid({(16, 32): 1.0, (32, 16): 1.0})
    assert [len(axis) for axis in coordinates] == [1, 1]
    assert measured_grid({}) is None


def test_outside_is_outside_on_either_side():
    grid = measured_grid({w: 1.0 for w in product((16, 64), (32, 64))})
    assert inside(grid, np.array([[16, 32], [64, 64], [15, 32], [16, 65]])).tolist() == [True, True, False, False]


def test_the_staircase_rises_at_multiples_of_sixteen_only():
    steps = ONNXRUNTIME_CPU.steps(np.arange(1, 257))
    assert (np.diff(steps) >= 0).all()
    assert set(np.flatnonzero(np.diff(steps)) + 1) == set(range(16, 256, 16))
    assert steps[63] == 1 and steps[255] == 4
