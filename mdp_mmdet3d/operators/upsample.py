"""Top-down step of a feature pyramid: nearest upsampling by 2 and addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mdp_mmdet3d.operators.base import SOURCE_CHANNELS, GraphBuilder, OperatorKind, OperatorSignature, Work

if TYPE_CHECKING:
    from torch import Tensor


class UpsampleAdd(OperatorKind):
    """Adds a map of half the size to (batch, channels, height, width), the finer one."""

    name = "upsample_add"
    roles = ("channels",)
    attributes = ("batch", "height", "width")

    def work(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Work:
        """Reads both maps, writes the finer one."""
        pixels = signature["batch"] * signature["height"] * signature["width"]
        return Work(0.0, widths[0] * pixels * (0.25 + 1 + 1), 1)

    def graph(self, build: GraphBuilder, signature: OperatorSignature, widths: tuple[int, ...]) -> int:
        """Upsampling and addition; the fine convolution alone is the offset."""
        batch, height, width, channels = signature["batch"], signature["height"], signature["width"], widths[0]
        fine_seed = build.input("fine_seed", batch, SOURCE_CHANNELS, height, width)
        coarse_seed = build.input("coarse_seed", batch, SOURCE_CHANNELS, -(-height // 2), -(-width // 2))
        coarse = build.conv(coarse_seed, "source_coarse", SOURCE_CHANNELS, channels)
        if height % 2 or width % 2:
            size = ["", "", build.constant("sizes", np.array([batch, channels, height, width], dtype=np.int64))]
        else:
            size = ["", build.constant("scales", np.array([1, 1, 2, 2], dtype=np.float32), keep_type=True)]
        upsampled = build.node(
            "Resize",
            [coarse, *size],
            "target_upsampled",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        # The addition runs inside the fine convolution: its cost is what an equal one without it does not take.
        fine = build.conv(fine_seed, "target_fine", SOURCE_CHANNELS, channels)
        build.pool_sink(build.node("Add", [fine, upsampled], "target"))
        build.pool_sink(build.conv(fine_seed, "offset_fine", SOURCE_CHANNELS, channels), "sink_offset")
        return 1

    def torch_call(
        self, signature: OperatorSignature, widths: tuple[int, ...]
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """`torch.nn.functional.interpolate` and an addition."""
        import torch
        import torch.nn.functional as F

        fine = torch.randn(signature["batch"], widths[0], signature["height"], signature["width"])
        coarse = fine[..., ::2, ::2].contiguous()

        def call(fine: Tensor, coarse: Tensor) -> Tensor:
            return fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")

        return call, (fine, coarse)
