"""The folder that Autoware's ``autoware_camera_streampetr`` loads (docs/deployment.md, section 1)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.onnx.folders import new_deployment
from mdp_mmdet3d.runtime.manifest import DeploymentManifest

MODEL_PARAMETERS = "ml_package_camera_streampetr.param.yaml"
NODE_PARAMETERS = "camera_streampetr.param.yaml"
KNOWN_CLASSES = frozenset(
    {"CAR", "TRUCK", "BUS", "TRAILER", "MOTORCYCLE", "BICYCLE", "PEDESTRIAN", "TRAFFIC_CONE", "BARRIER"}
)
"""Classes that the node publishes under their name; every other becomes UNKNOWN."""


@dataclass(frozen=True)
class NodeSettings:
    """What the node needs to know beyond the model.

    Attributes:
        precision: ``"fp16"`` or ``"fp32"``, of the engines that the node builds from the ONNX files.
        confidence_threshold: Boxes below it are dropped, for every class.
        yaw_norm_threshold: Boxes whose (sin, cos) is shorter are dropped; pedestrians keep all.
        circle_nms_dist_threshold: Metres.
        iou_nms_search_distance_2d: Metres.
        iou_nms_threshold: Overlap on the ground of two boxes of which one is dropped.
        max_camera_time_diff_s: Cameras further apart are no frame.
        multithreading: Whether images are preprocessed in parallel.
    """

    precision: str = "fp16"
    confidence_threshold: float = 0.35
    yaw_norm_threshold: float = 0.3
    circle_nms_dist_threshold: float = 0.5
    iou_nms_search_distance_2d: float = 10.0
    iou_nms_threshold: float = 0.5
    max_camera_time_diff_s: float = 0.15
    multithreading: bool = True


def package_autoware(source: str | Path, out_dir: str | Path, settings: NodeSettings | None = None) -> list[str]:
    """Write the three ONNX files, the two parameter files and a README.

    Args:
        source: float32 deployment in the Autoware layout, without a ``prev_exists`` input.
        out_dir: Folder to make; it must not exist or be empty.
        settings: Of the node.

    Returns:
        Names of the files.

    Raises:
        DeploymentError: The deployment does not have the layout, or the folder is not empty.
        FileFormatError: The deployment is incomplete, or its files have changed.
    """
    source, out_dir = Path(source), Path(out_dir)
    settings = settings or NodeSettings()
    manifest = DeploymentManifest.load(source)
    _check(manifest, source, settings)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise DeploymentError(f"{out_dir} is not empty; give another folder")
    with new_deployment(out_dir) as part:
        for spec in manifest.engines.values():
            shutil.copyfile(source / spec.file, part / spec.file)
        _write_yaml(part / MODEL_PARAMETERS, model_parameters(manifest))
        _write_yaml(part / NODE_PARAMETERS, node_parameters(manifest, settings))
        (part / "README.md").write_text(readme(manifest), encoding="utf-8")
    return sorted(path.name for path in out_dir.iterdir())


def model_parameters(manifest: DeploymentManifest) -> dict[str, Any]:
    """Parameters that describe the model; all follow from the manifest."""
    return {
        "class_names": [name.upper() for name in manifest.class_names],
        "detection_range": list(manifest.post_center_range),
        "input_image_height": manifest.image.size[0],
        "input_image_width": manifest.image.size[1],
        "num_proposals": manifest.levels * manifest.num_queries,
        "rois_number": len(manifest.camera_names),
        "pre_memory_length": manifest.memory.pre_length,
        "post_memory_length": manifest.memory.post_length,
    }


def node_parameters(manifest: DeploymentManifest, settings: NodeSettings) -> dict[str, Any]:
    """Parameters of the node."""
    names = manifest.class_names
    return {
        "max_camera_time_diff": settings.max_camera_time_diff_s,
        "multithreading": settings.multithreading,
        "model_params": {"trt_precision": settings.precision, "use_temporal": True},
        "post_process_params": {
            "confidence_threshold": [settings.confidence_threshold] * len(names),
            "circle_nms_dist_threshold": settings.circle_nms_dist_threshold,
            "iou_nms_search_distance_2d": settings.iou_nms_search_distance_2d,
            "iou_nms_threshold": settings.iou_nms_threshold,
            "yaw_norm_thresholds": [0.0 if name == "pedestrian" else settings.yaw_norm_threshold for name in names],
        },
    }


def readme(manifest: DeploymentManifest) -> str:
    """What the parameter files cannot say."""
    image = manifest.image
    unknown = [name for name in manifest.class_names if name.upper() not in KNOWN_CLASSES]
    cameras = "\n".join(f"{index}. {name}" for index, name in enumerate(manifest.camera_names))
    nms = (
        "All decoder levels are in the outputs: every object appears once per level, so keep the IoU NMS on."
        if manifest.levels > 1
        else "Only the last decoder level is in the outputs, the one that is evaluated; NMS has little left to do."
    )
    return f"""# StreamPETR for autoware_camera_streampetr

Plan {manifest.plan_hash or "none (dense model)"}, weights {manifest.weights}.

* **Camera order.** The image slots are, in this order:

{cameras}

* **Colour order.** Mean {list(image.mean)} and standard deviation {list(image.std)} are in {image.channel_order} order.
  The node normalises the channels of the incoming image as they are, without a swap: publish {image.channel_order}
  images, and enter these figures in this order.
* **Resize filter.** The model was trained with PIL's bicubic filter with antialiasing, to {image.resized_size[1]} x
  {image.resized_size[0]} pixels, then cut at row {image.crop_offset[0]}, column {image.crop_offset[1]} to
  {image.size[1]} x {image.size[0]}. The node has a triangle (bilinear) filter: boxes differ slightly.
* **Reset.** The node fills the memory with zeros at the start and after lost synchronisation. Training starts from
  {manifest.memory.num_propagated} pseudo points with identity poses instead, so boxes of the first frames after a reset
  differ from what the model was trained to give. A host that can do better takes the points of init_memory.json.
* **Lidar frame.** Everything called lidar is base_link there.
* **Calibration.** The node runs position_embedding.onnx once, at start-up: restart it when the calibration changes.
* **Classes.** {f"{', '.join(unknown)} become UNKNOWN." if unknown else "All classes are known to the node."}
* **Levels.** {nms}
"""


def _check(manifest: DeploymentManifest, source: Path, settings: NodeSettings) -> None:
    if manifest.layout != "autoware":
        raise DeploymentError(f"{source} has the layout {manifest.layout!r}; export with --layout autoware")
    if manifest.precision != "float32":
        raise DeploymentError(f"{source} is {manifest.precision}; the node reduces precision itself: export float32")
    if any(spec.name == "prev_exists" for spec in manifest.engines["head"].inputs):
        raise DeploymentError(f"{source} has a prev_exists input, which the node does not feed; export without it")
    if settings.precision not in ("fp16", "fp32"):
        raise DeploymentError(f"precision={settings.precision!r} is neither 'fp16' nor 'fp32'")


def _write_yaml(path: Path, parameters: dict[str, Any]) -> None:
    # The model's file wraps everything in model_params, the node's has them beside other groups.
    if path.name == MODEL_PARAMETERS:
        parameters = {"model_params": parameters}
    with atomic_path(path) as temporary:
        temporary.write_text(
            yaml.safe_dump({"/**": {"ros__parameters": parameters}}, sort_keys=False), encoding="utf-8"
        )
