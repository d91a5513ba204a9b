"""The generations of the node: which parameters it declares, in which file they lie, how it normalises images.

Read from the sources of autowarefoundation/autoware_universe, ``perception/autoware_camera_streampetr``;
docs/deployment.md names the changes that separate the generations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.manifest import ImageTransform

ENCODINGS = {"rgb8": "RGB", "bgr8": "BGR"}
"""Encodings of camera images that the node takes, and the order of their channels."""

_BGR_MEAN, _BGR_STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)

_SHAPES = (
    "class_names", "detection_range", "input_image_height", "input_image_width", "num_proposals", "rois_number",
    "pre_memory_length", "post_memory_length",
)  # fmt: skip
_BUILD = (
    "trt_precision", "use_temporal", "workspace_size", "backbone_path", "head_path", "position_embedding_path",
    "backbone_engine_path", "head_engine_path", "position_embedding_engine_path",
)  # fmt: skip
_POST_PROCESS = (
    "confidence_threshold", "circle_nms_dist_threshold", "iou_nms_search_distance_2d", "iou_nms_threshold",
    "yaw_norm_thresholds",
)  # fmt: skip
_DIAGNOSTICS = (
    "max_allowed_processing_time_ms", "max_acceptable_consecutive_delay_ms", "max_image_age_ms",
    "validation_callback_interval_ms",
)  # fmt: skip


def _keys(group: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for name in names)


SHAPES = _keys("model_params", _SHAPES)
BUILD = _keys("model_params", _BUILD)
POST_PROCESS = _keys("post_process_params", _POST_PROCESS)
DIAGNOSTICS = _keys("diagnostics", _DIAGNOSTICS)
NODE = (
    "max_camera_time_diff", "multithreading", "anchor_camera_id", "debug_mode", "is_compressed_image",
    "is_distorted_image",
)  # fmt: skip

ONE_FILE = "tensorrt_stream_petr.param.yaml"
MODEL_FILE = "ml_package_camera_streampetr.param.yaml"
NODE_FILE = "camera_streampetr.param.yaml"


@dataclass(frozen=True)
class NodeGeneration:
    """Releases of the node that take the same package.

    Attributes:
        name: First release.
        releases: All of them.
        files: Parameter file -> keys in it, dotted. Together they are all that the node declares, with and without a
            default, apart from ego masks and ``build_only``.
        converts_to_rgb: Whether the node brings images to RGB before it normalises them with RGB statistics; older
            ones apply BGR statistics to the channels as the camera sends them.
        threshold_per_class: Whether ``confidence_threshold`` is a list.
    """

    name: str
    releases: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    converts_to_rgb: bool = False
    threshold_per_class: bool = True

    def normalised(self, image: ImageTransform, encoding: str) -> ImageTransform:
        """``image`` with the normalisation that is compiled into the node.

        Args:
            image: Of the model.
            encoding: Of the camera images, a key of `ENCODINGS`; newer nodes do not depend on it.

        Raises:
            DeploymentError: The node takes no such encoding.
        """
        if encoding not in ENCODINGS:
            raise DeploymentError(f"camera encoding {encoding!r} is neither 'rgb8' nor 'bgr8'; the node takes no other")
        if self.converts_to_rgb:
            return replace(image, mean=_BGR_MEAN[::-1], std=_BGR_STD[::-1], channel_order="RGB")
        return replace(image, mean=_BGR_MEAN, std=_BGR_STD, channel_order=ENCODINGS[encoding])


GENERATIONS = (
    NodeGeneration(
        "0.48", ("0.48",), {ONE_FILE: (*SHAPES, *BUILD, *POST_PROCESS, *NODE)}, threshold_per_class=False
    ),
    NodeGeneration("0.49", ("0.49", "0.50"), {ONE_FILE: (*SHAPES, *BUILD, *POST_PROCESS, *NODE)}),
    NodeGeneration("0.51", ("0.51",), {MODEL_FILE: SHAPES, NODE_FILE: (*BUILD, *POST_PROCESS, *NODE)}),
    NodeGeneration("0.52", ("0.52",), {MODEL_FILE: (*SHAPES, *BUILD, *POST_PROCESS), NODE_FILE: NODE}),
    NodeGeneration(
        "0.53",
        ("0.53",),
        {MODEL_FILE: (*SHAPES, *BUILD, *POST_PROCESS), NODE_FILE: (*NODE, *DIAGNOSTICS)},
        converts_to_rgb=True,
    ),
)  # fmt: skip


def node_generation(release: str) -> NodeGeneration:
    """Generation of a release of ``autoware_camera_streampetr``, e.g. ``"0.50"`` or ``"0.50.2"`` (its package.xml).

    Raises:
        DeploymentError: No generation is known for it.
    """
    short = ".".join(release.split(".")[:2])
    for generation in GENERATIONS:
        if short in generation.releases:
            return generation
    known = ", ".join(name for generation in GENERATIONS for name in generation.releases)
    raise DeploymentError(
        f"node release {release!r} is not known: this version packages for {known}. The release stands in "
        "perception/autoware_camera_streampetr/package.xml of your autoware_universe; what a later one declares has "
        "to be read from its sources first"
    )
