"""The node's parameters: every value that a generation declares, of the type that ROS wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.manifest import DeploymentManifest

from .generations import NodeGeneration

ENGINE_FILES = {
    "image_encoder": "simplify_extract_img_feat.onnx",
    "position_embedding": "simplify_position_embedding.onnx",
    "head": "simplify_pts_head_memory.onnx",
}
"""Names of the three graphs in every release."""

MODEL_PATH = "$(var model_path)"
"""Replaced by the launch file."""


@dataclass(frozen=True)
class NodeSettings:
    """What the node needs to know beyond the model.

    Attributes:
        precision: ``"fp16"`` or ``"fp32"``, of the engines that the node builds from the ONNX files.
        confidence_threshold: Boxes below it are dropped, for every class.
        yaw_norm_threshold: Boxes whose (sin, cos) is shorter are dropped; pedestrians keep all.
        circle_nms_dist_threshold: Metres; 0 turns it off.
        iou_nms_search_distance_2d: Metres.
        iou_nms_threshold: Overlap on the ground of two boxes of which one is dropped; 0 turns it off.
        max_camera_time_diff_s: Cameras further apart are no frame.
        encoder_batch: Images that one run of the image encoder takes; 1 is for a node that runs it camera by camera,
            which no release listed here does. None: those of all cameras.
        multithreading: Whether images are preprocessed in parallel.
        anchor_camera: Slot of the camera whose image starts a frame: the one that comes last.
        debug_mode: Whether the node publishes its latencies.
        compressed: Whether it subscribes to compressed images.
        distorted: Whether it has to undistort them.
        workspace_log2_bytes: Memory that TensorRT may use while it builds.
        max_processing_time_ms: A longer frame is a warning on ``/diagnostics``.
        max_consecutive_delay_ms: Longer frames for that long are an error there.
        max_image_age_ms: An older camera image is an error there.
        diagnostics_interval_ms: Of ``/diagnostics``.
    """

    precision: str = "fp16"
    confidence_threshold: float = 0.35
    yaw_norm_threshold: float = 0.3
    circle_nms_dist_threshold: float = 0.5
    iou_nms_search_distance_2d: float = 10.0
    iou_nms_threshold: float = 0.5
    max_camera_time_diff_s: float = 0.15
    encoder_batch: int | None = None
    multithreading: bool = True
    anchor_camera: int = 0
    debug_mode: bool = False
    compressed: bool = False
    distorted: bool = False
    workspace_log2_bytes: int = 32
    max_processing_time_ms: float = 200.0
    max_consecutive_delay_ms: float = 1000.0
    max_image_age_ms: float = 300.0
    diagnostics_interval_ms: float = 100.0

    def check(self, num_cams: int) -> None:
        """Raise `DeploymentError` if a value is none that the node takes."""
        if self.precision not in ("fp16", "fp32"):
            raise DeploymentError(f"precision={self.precision!r} is neither 'fp16' nor 'fp32'")
        if not 0 <= self.anchor_camera < num_cams:
            raise DeploymentError(f"anchor_camera={self.anchor_camera} is none of the {num_cams} cameras (from 0)")
        if not 20 <= self.workspace_log2_bytes <= 40:
            raise DeploymentError(f"workspace_log2_bytes={self.workspace_log2_bytes} must be 20 to 40 (32: 4 GiB)")
        for name in ("confidence_threshold", "yaw_norm_threshold", "iou_nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise DeploymentError(f"{name}={getattr(self, name)} must be 0 to 1")


def all_parameters(manifest: DeploymentManifest, settings: NodeSettings, generation: NodeGeneration) -> dict[str, Any]:
    """Dotted key -> value of everything that any generation declares.

    ROS takes no integer where a float is declared, so floats are made of whatever the manifest holds.
    """
    classes, levels = manifest.class_names, manifest.levels
    threshold = float(settings.confidence_threshold)
    yaw_norm = float(settings.yaw_norm_threshold)
    model = {
        "class_names": [name.upper() for name in classes],
        "detection_range": [float(value) for value in manifest.post_center_range],
        "input_image_height": int(manifest.image.size[0]),
        "input_image_width": int(manifest.image.size[1]),
        "num_proposals": levels * manifest.num_queries,
        "rois_number": len(manifest.camera_names),
        "pre_memory_length": manifest.memory.pre_length,
        "post_memory_length": manifest.memory.post_length,
        "trt_precision": settings.precision,
        "use_temporal": True,
        "workspace_size": int(settings.workspace_log2_bytes),
    }
    for engine, key in (("image_encoder", "backbone"), ("head", "head"), ("position_embedding",) * 2):
        model[f"{key}_path"] = f"{MODEL_PATH}/{ENGINE_FILES[engine]}"
        model[f"{key}_engine_path"] = ""  # beside the ONNX file
    post_process = {
        "confidence_threshold": [threshold] * len(classes) if generation.threshold_per_class else threshold,
        "circle_nms_dist_threshold": float(settings.circle_nms_dist_threshold),
        "iou_nms_search_distance_2d": float(settings.iou_nms_search_distance_2d),
        "iou_nms_threshold": float(settings.iou_nms_threshold),
        "yaw_norm_thresholds": [0.0 if name == "pedestrian" else yaw_norm for name in classes],
    }
    diagnostics = {
        "max_allowed_processing_time_ms": float(settings.max_processing_time_ms),
        "max_acceptable_consecutive_delay_ms": float(settings.max_consecutive_delay_ms),
        "max_image_age_ms": float(settings.max_image_age_ms),
        "validation_callback_interval_ms": float(settings.diagnostics_interval_ms),
    }
    return {
        **{f"model_params.{key}": value for key, value in model.items()},
        **{f"post_process_params.{key}": value for key, value in post_process.items()},
        "max_camera_time_diff": float(settings.max_camera_time_diff_s),
        "multithreading": bool(settings.multithreading),
        "anchor_camera_id": int(settings.anchor_camera),
        "debug_mode": bool(settings.debug_mode),
        "is_compressed_image": bool(settings.compressed),
        "is_distorted_image": bool(settings.distorted),
        **{f"diagnostics.{key}": value for key, value in diagnostics.items()},
    }


def parameter_files(parameters: dict[str, Any], generation: NodeGeneration) -> dict[str, str]:
    """File name -> YAML text of each parameter file of a generation."""
    return {file: _yaml({key: parameters[key] for key in keys}) for file, keys in generation.files.items()}


class _Dumper(yaml.SafeDumper):
    """Lists in one line, as the node's own files have them."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def _yaml(parameters: dict[str, Any]) -> str:
    nested: dict[str, Any] = {}
    for key, value in parameters.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return yaml.dump({"/**": {"ros__parameters": nested}}, Dumper=_Dumper, sort_keys=False, width=120)
