"""The adapter of lidar detectors: what comes after the points are a feature map in bird's eye view is one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdp_mmdet3d.adapters.base import register_adapter
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.space.builder import SpaceBuilder

OUTSIDE = ("voxel_encoder", "middle_encoder")
BEFORE = "works on as many voxels as a frame has; it runs before the exported graph and is not in its latency"


class DensePart(nn.Module):
    """Backbone, neck and head of a lidar detector, under the names that they have in it.

    Args:
        model: A detector of MMDetection3D with ``backbone`` and ``bbox_head``, or ``pts_backbone`` and so on.

    Raises:
        MdpError: It has no such parts, or its backbone has no plain convolution that reads the feature map.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.prefix = prefix = "pts_" if hasattr(model, "pts_backbone") else ""
        for part in ("backbone", "neck", "bbox_head"):
            if isinstance(module := getattr(model, prefix + part, None), nn.Module):
                self.add_module(prefix + part, module)
            elif part != "neck":
                raise MdpError(
                    f"{type(model).__name__} has no {prefix}{part}: the adapter BirdEye is for lidar detectors"
                )
        backbone = self.get_submodule(f"{prefix}backbone")
        first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None:
            raise MdpError(f"{prefix}backbone ({type(backbone).__name__}) has no convolution: it takes no feature map")
        self.input_channels = first.in_channels

    def forward(self, features: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """(1, C, H, W), the output of the middle encoder, to the raw outputs of the head."""
        x = self.get_submodule(f"{self.prefix}backbone")(features)
        if hasattr(self, f"{self.prefix}neck"):
            x = self.get_submodule(f"{self.prefix}neck")(x)
        return self.get_submodule(f"{self.prefix}bbox_head")(x)


@register_adapter
class BirdEye(SingleGraph):
    """PointPillars, CenterPoint, SECOND and others of MMDetection3D: their dense part.

    ``prune.input_size`` is the grid (height, width) in cells that the middle encoder returns. Voxelisation, voxel
    encoder and middle encoder stay as they are and run before the graph; importance and losses are of the whole model.
    """

    models = ("MVXTwoStageDetector", "VoxelNet", "DynamicVoxelNet")
    headline = ("mAP", "NDS")

    def deployed(self, model: nn.Module) -> nn.Module:
        """Backbone, neck and head."""
        if isinstance(model, DensePart):
            return model
        if hasattr(model, "img_backbone"):
            raise MdpError(
                f"{type(model).__name__} has an image backbone as well: the adapter BirdEye prunes lidar detectors. "
                "Write an adapter with two engines (docs/how-to/new-architecture.md)"
            )
        return DensePart(model)

    def add_to_space(self, builder: SpaceBuilder, model: nn.Module) -> None:
        """As for images; the encoders before are named as left alone."""
        for name, _ in model.named_children():
            if name.endswith(OUTSIDE):
                builder.leave(name, BEFORE)
        super().add_to_space(builder, model)

    def frames(self, model: nn.Module, count: int) -> list[np.ndarray]:
        """Feature maps (1, C, H, W) of the importance data, resized to the deployed grid where that is another."""
        size = (self.shape.height, self.shape.width)
        found: list[np.ndarray] = []
        with torch.no_grad():
            for batch in self.importance_batches():
                inputs = model.data_preprocessor(dict(batch), False)["inputs"]
                maps = _feature_maps(model, inputs)
                if tuple(maps.shape[-2:]) != size:
                    maps = nn.functional.interpolate(maps, size, mode="nearest")
                found += [np.ascontiguousarray(one[None].numpy()) for one in maps]
                if len(found) >= count:
                    return found[:count]
        if not found:
            raise MdpError("the importance data set has no frames")
        return found

    def calibration_frames(self, model: nn.Module, count: int, stride: int = 1) -> list[Any]:
        """Feature maps of the importance data at their own size; see `Adapter.calibration_frames`."""
        frames: list[Any] = []
        found = 0
        for batch in self.calibration_batches(count, stride):
            with torch.no_grad():
                maps = _feature_maps(model, model.data_preprocessor(dict(batch), False)["inputs"])
            frames.append(_DenseFrame(maps))
            found += len(maps)
            if found >= count:
                break
        return frames


class _DenseFrame:
    def __init__(self, maps: Tensor) -> None:
        self.maps = maps

    def __call__(self, model: nn.Module) -> Any:
        return DensePart(model)(self.maps)


def _feature_maps(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """(B, C, H, W) of the middle encoder, from what the data preprocessor returns."""
    prefix = "pts_" if hasattr(model, "pts_backbone") else ""
    voxels = inputs.get("voxels")
    voxel_encoder, middle_encoder = (getattr(model, prefix + name, None) for name in OUTSIDE)
    if voxels is None or voxel_encoder is None or middle_encoder is None:
        raise MdpError(
            f"{type(model).__name__}: BirdEye needs a data preprocessor that makes voxels and {' and '.join(OUTSIDE)}"
        )
    features = voxel_encoder(voxels["voxels"], voxels["num_points"], voxels["coors"])
    maps: Tensor = middle_encoder(features, voxels["coors"], int(voxels["coors"][-1, 0]) + 1)
    return maps
