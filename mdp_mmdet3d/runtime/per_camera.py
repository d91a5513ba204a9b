"""An image encoder of one camera as if it took the images of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import DeploymentError


class PerCamera:
    """Runs an encoder of one image for each camera in turn, and puts the features side by side in host memory.

    Args:
        engine: Takes ``img`` (1, 1, 3, H, W), gives ``img_feats`` (1, 1, C, h, w) as an array.
        cameras: N.
    """

    def __init__(self, engine: Any, cameras: int) -> None:
        self._engine = engine
        self._cameras = cameras

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``img`` (1, N, 3, H, W) to ``img_feats`` (1, N, C, h, w).

        Raises:
            DeploymentError: Another number of images, or one that the engine refuses.
        """
        images = feeds["img"]
        if images.shape[:2] != (1, self._cameras):
            raise DeploymentError(f"input 'img' is {list(images.shape)}, the model has {self._cameras} cameras")
        features = [self._engine.run({"img": images[:, i : i + 1]})["img_feats"] for i in range(self._cameras)]
        return {"img_feats": np.concatenate(features, axis=1)}

    def to_host(self, value: np.ndarray) -> np.ndarray:
        """A copy of an output."""
        return np.array(value)
