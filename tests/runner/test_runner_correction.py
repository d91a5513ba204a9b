"""What a finished search keeps for the same job, and for no other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from mdp_mmdet3d.latency.predict import LatencyModel
from mdp_mmdet3d.runner.correction import load_correction, save_correction, search_identity
from mdp_mmdet3d.runner.settings import PruneSettings


def test_a_correction_is_taken_by_the_same_search_only(tmp_path):
    """With more refinements it goes on: else what the report of a missed budget advises would change nothing."""
    space, importance = SimpleNamespace(hash="s"), SimpleNamespace(weights="w", data="d", frames=8)
    networks = [SimpleNamespace(engines_ms={"model": 10.0})]

    def identity(values=None, **changes):
        return search_identity(replace(PruneSettings(), **changes), space, importance, networks, values)

    latency = LatencyModel(space, None, {"model": 1.0}, {"model": 1.5})
    path = tmp_path / "calibration.json"
    assert load_correction(path, identity(), latency) is None
    save_correction(path, identity(), replace(latency, scale={"model": 1.25}), 2)
    found, corrections = load_correction(path, identity(), latency)
    assert found.scale == {"model": 1.25} and corrections == 2
    for other in (identity(refinements=6), identity(budget="70%"), identity(tolerance=0.1), identity(["loss"])):
        assert load_correction(path, other, latency) is None
