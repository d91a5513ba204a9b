"""What the parameter files of a package cannot say."""

from __future__ import annotations

from mdp_mmdet3d.runtime.manifest import DeploymentManifest

from .generations import NodeGeneration
from .launch import LAUNCH_FILE

README_FILE = "README.md"
TRAINED_WIDTH = 256
"""Channels of a query in released models."""
KNOWN_CLASSES = frozenset(
    {"CAR", "TRUCK", "BUS", "TRAILER", "MOTORCYCLE", "BICYCLE", "PEDESTRIAN", "TRAFFIC_CONE", "BARRIER"}
)
"""Classes that the node publishes under their name (cones and barriers as HAZARD); every other becomes UNKNOWN."""


def readme(
    manifest: DeploymentManifest, generation: NodeGeneration, encodings: tuple[str, ...], padded: tuple[str, ...]
) -> str:
    """README of a package.

    Args:
        manifest: Of the deployment.
        generation: Of the node.
        encodings: Encodings of camera images for which the graphs are right.
        padded: Attentions whose heads were widened.
    """
    image = manifest.image
    unknown = [name for name in manifest.class_names if name.upper() not in KNOWN_CLASSES]
    cameras = "\n".join(f"{index}. {name}" for index, name in enumerate(manifest.camera_names))
    nms = (
        "All decoder levels are in the outputs: every object appears once per level, so keep the IoU NMS on."
        if manifest.levels > 1
        else "Only the last decoder level is in the outputs, the one that is evaluated; NMS has little left to do."
    )
    colour = (
        "Cameras may publish rgb8 or bgr8: the node brings both to RGB."
        if generation.converts_to_rgb
        else f"The cameras must publish **{' or '.join(encodings)}**: this node normalises the channels as they come."
    )
    attention = (
        f"{len(padded)} pruned: heads padded with zeros to one width, so that TensorRT runs each in one kernel."
        if padded
        else "All have heads of one width."
    )
    cameras_at_once = (
        "All cameras in one run."
        if manifest.encoder_batch == len(manifest.camera_names)
        else f"**One camera per run**: `img` (1, 1, 3, H, W) to `img_feats` (1, 1, C, h, w), which the node has to put "
        f"at its slot of the head's `x`. Node {generation.name} as released copies all {len(manifest.camera_names)} "
        "images in at once and cannot use it: this is for a build that runs the encoder camera by camera."
    )
    width = next(
        (s.shape[-1] for s in manifest.engines["head"].inputs if s.name == "pre_memory_embedding"), TRAINED_WIDTH
    )
    queries = (
        f"{width} channels."
        if width == TRAINED_WIDTH
        else f"**{width} channels**, not the {TRAINED_WIDTH} of released models; `pos_embed` and the memory's "
        "`embedding` are as narrow. What this generation of the node checks at its start does not name that size: run "
        "it once with `build_only` before you rely on it."
    )
    return f"""# StreamPETR for autoware_camera_streampetr {" and ".join(generation.releases)}

Plan {manifest.plan_hash or "none (dense model)"}, weights {manifest.weights}.

    ros2 launch ./{LAUNCH_FILE} build_only:=true     # the engines, once per GPU
    ros2 launch ./{LAUNCH_FILE} camera0_image:=/your/topic camera0_info:=/its/camera_info ...

* **Cameras.** Slot i of the model is `camera<i>`:

{cameras}

* **Image encoder.** {cameras_at_once}
* **Colours.** {colour} Mean and deviation of the node are compiled in; what the model was trained with is in the graph.
* **Resize filter.** The model was trained with PIL's bicubic filter with antialiasing, to {image.resized_size[1]} x
  {image.resized_size[0]} pixels, then cut at row {image.crop_offset[0]}, column {image.crop_offset[1]} to
  {image.size[1]} x {image.size[0]}. The node has a triangle (bilinear) filter, same cut: boxes differ slightly.
* **Reset.** The node fills the memory with zeros at the start and after lost synchronisation; the head takes that as
  the start of a stream and begins with the {manifest.memory.num_propagated} pseudo points it was trained with.
* **Lidar frame.** Everything called lidar is base_link there.
* **Calibration.** The node runs the position embedding once, at start-up: restart it when the calibration changes.
* **Classes.** {f"{', '.join(unknown)} become UNKNOWN." if unknown else "All classes are known to the node."}
* **Levels.** {nms}
* **Attention.** {attention}
* **Queries.** {manifest.num_queries} queries, {manifest.memory.num_propagated} of them propagated. {queries}
"""
