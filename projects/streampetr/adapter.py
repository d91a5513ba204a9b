"""StreamPETR's adapter: three engines, of which two run every frame, and a memory from frame to frame.

What deployment needs (ONNX and its runtime) is imported where it is used: training does without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mdp_mmdet3d.adapters import Adapter, DeployOptions, register_adapter
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runtime.manifest import Manifest
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.surgery.repair import Frame

from .checkpoint import load_checkpoint
from .pruning import add_streampetr

NUSCENES_IMAGE = (900, 1600)


@register_adapter
class StreamPETRAdapter(Adapter):
    """Streaming multi-camera detection: the batches are streams, the deployed model takes `runtime.stream.Frame`."""

    models = ("StreamPETR",)
    once = ("position_embedding",)
    training_only = ("img_roi_head.",)
    headline = ("mAP", "NDS")
    default_cams = 6
    camera_by_camera = True
    embed_widths = True
    object_queries = True

    def load(self, model: nn.Module, path: str) -> None:
        """Official, converted and own checkpoints."""
        load_checkpoint(model, path)

    def add_to_space(self, builder: SpaceBuilder, model: nn.Module) -> None:
        """Backbone, neck, embeddings, decoder; raises `MdpError` where the image does not fit the pyramid."""
        size = (self.shape.height, self.shape.width)
        if any(pixels % 16 for pixels in size):
            raise MdpError(
                f"prune.input_size = {size} must be (height, width), multiples of 16: the neck's upper level"
            )
        add_streampetr(builder, model, self.shape)

    @property
    def repeated(self) -> dict[str, int]:
        """The image encoder, where it takes one camera at a time."""
        return {"image_encoder": self.shape.encoder_runs}

    def frames(self, model: nn.Module, count: int) -> list[Any]:
        """The first ``count`` frames of the importance data, preprocessed as a host would feed them."""
        from .frames import frame_of

        frames: list[Any] = []
        for batch in islice(self.importance_batches(), count):
            data = model.data_preprocessor(dict(batch), False)
            pairs = zip(data["inputs"]["imgs"], data["data_samples"])
            frames += [frame_of(imgs, sample.metainfo) for imgs, sample in pairs]
        if not frames:
            raise MdpError("the importance data set has no frames")
        size, wanted = frames[0].img.shape[-2:], (self.shape.height, self.shape.width)
        if size != wanted:
            raise MdpError(
                f"the importance data has network images of {size} pixels (height, width), prune.input_size is "
                f"{wanted}: set prune.input_size to the data's, or final_shape of the pipeline to prune.input_size"
            )
        return frames[:count]

    def calibration_frames(self, model: nn.Module, count: int, stride: int = 1) -> list[Frame]:
        """Frames of streams, each with the dense model's memory of the frames before, a few to a batch."""
        from .calibration import calibration_frames

        return calibration_frames(model, self.calibration_batches(count, stride), count, stride)

    def spread_frames(self, model: nn.Module, count: int) -> list[Any]:
        """``count`` frames of the importance data, evenly spaced over all of it: for ranges, not for streams."""
        from .frames import frame_of

        loader = self.importance_loader()
        frames: list[Any] = []
        for index in np.unique(np.linspace(0, len(loader.dataset) - 1, count).round().astype(int)).tolist():
            data = model.data_preprocessor(dict(loader.collate_fn([loader.dataset[index]])), False)
            frames.append(frame_of(data["inputs"]["imgs"][0], data["data_samples"][0].metainfo))
        return frames

    @cached_property
    def source_size(self) -> tuple[int, int]:
        """Camera images (height, width) of the importance data; those of nuScenes where there is no data."""
        try:
            sample = self.importance_loader().dataset[0]
        except (MdpError, OSError):
            return NUSCENES_IMAGE
        height, width = sample["data_samples"].metainfo["ori_shape"][:2]
        return int(height), int(width)

    def export(
        self,
        model: nn.Module,
        folder: Path,
        *,
        plan_hash: str | None,
        weights: str,
        on_engine: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """Image encoder, position embedding and head; ``options`` as in `export_streampetr`."""
        from .export import export_streampetr

        options["source_size"] = options.get("source_size") or self.source_size
        options["encoder_batch"] = options.get("encoder_batch") or self.shape.encoder_batch or None

        export_streampetr(
            model,
            folder,
            class_names=self.class_names,
            input_size=(self.shape.height, self.shape.width),
            plan_hash=plan_hash,
            weights=weights,
            on_engine=on_engine,
            **options,
        )

    def deploy(
        self,
        model: nn.Module,
        folder: Path,
        options: DeployOptions,
        *,
        plan_hash: str | None,
        weights: str,
        say: Callable[[str], None],
    ) -> str:
        """Three engines, initial memory and the runtime as one file."""
        from .deployment import deploy

        return deploy(self, model, folder, options, say, plan_hash=plan_hash, weights=weights)

    def is_deployed_so(self, manifest: Manifest) -> bool:
        """Equal image size and images per run of the encoder."""
        shape = self.shape
        image = manifest.engines["image_encoder"].inputs[0].shape
        return image[1:2] + image[3:] == (shape.encoder_batch or shape.num_cams, shape.height, shape.width)

    def compare(self, model: nn.Module, folder: Path, frames: Sequence[Any]) -> dict[str, float]:
        """Logits, box codes and memory over a stream, the engines starting every frame from PyTorch's memory."""
        from .compare import compare_stream

        found = compare_stream(model, folder, frames)
        return {"logits": found.max_logits, "boxes": found.max_boxes, "memory": found.max_memory}
