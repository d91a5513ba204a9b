from __future__ import annotations

import numpy as np
from latency_spaces import small_space
from matplotlib.image import imread

from mdp_mmdet3d.latency import LatencyModel, random_structure
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.plots import plot_breakdown, plot_staircases


def test_pictures_show_something(tmp_path):
    space = small_space()
    table = measure_latency(space, FakeBackend(), tmp_path / "table.json", progress=False)
    model = LatencyModel.from_dense(space, table, {"image_encoder": 5.0, "head": 2.0})
    pruned = random_structure(space, 0)
    plot_staircases(space, table, tmp_path / "staircases.png")
    plot_breakdown(
        {"dense": model.breakdown({}), "pruned": model.breakdown(pruned.widths, pruned.removed)},
        tmp_path / "breakdown.png",
    )
    for name in ("staircases.png", "breakdown.png"):
        picture = imread(tmp_path / name)[..., :3]
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
