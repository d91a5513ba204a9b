"""From what MMDetection3D hands to a model to what a host hands to the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.stream import Frame


def frame_of(imgs: Tensor, metainfo: Mapping[str, Any]) -> Frame:
    """One sample of a preprocessed batch as a `Frame`.

    Args:
        imgs: (N, 3, H, W) float32, ``inputs["imgs"][i]`` behind the data preprocessor.
        metainfo: Of the same sample: ``ego_pose``, ``timestamp``, ``intrinsics``, ``lidar2img``,
            ``scene_token`` and ``prev_exists``.

    Raises:
        DeploymentError: A key is missing.
    """
    keys = ("ego_pose", "timestamp", "intrinsics", "lidar2img", "scene_token", "prev_exists")
    if missing := [key for key in keys if metainfo.get(key) is None]:
        raise DeploymentError(f"metainfo lacks {missing}; add them to the packing transform's meta_keys")
    return Frame(
        img=imgs.detach().cpu().numpy(),
        ego_pose=np.asarray(metainfo["ego_pose"], np.float64),
        timestamp=float(metainfo["timestamp"]),
        intrinsics=np.asarray(metainfo["intrinsics"], np.float64),
        lidar2img=np.asarray(metainfo["lidar2img"], np.float64),
        scene_token=str(metainfo["scene_token"]),
        prev_exists=bool(metainfo["prev_exists"]),
    )
