"""Names and sizes of all bindings, which the newest node checks when it starts, checked before a package leaves."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import onnx

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.export import tensor_specs

_FIELDS = ("embedding", "reference_point", "timestamp", "egopose", "velo")
BINDINGS = {
    "image_encoder": ({"img"}, {"img_feats"}),
    "position_embedding": ({"img_metas_pad", "intrinsics", "img2lidar"}, {"pos_embed", "cone"}),
    "head": (
        {"x", "pos_embed", "cone", "data_ego_pose", "data_ego_pose_inv", *(f"pre_memory_{name}" for name in _FIELDS)},
        {"all_cls_scores", "all_bbox_preds", *(f"post_memory_{name}" for name in _FIELDS)},
    ),
}
"""Inputs and outputs that the node binds, of each engine."""

BOX_ROWS = 8
"""Rows of the box output that the node reads at least."""


def check_shapes(
    graphs: Mapping[str, onnx.ModelProto], parameters: Mapping[str, Any], encoder_batch: int | None = None
) -> None:
    """Compare graphs with the parameters that describe them.

    Args:
        graphs: By engine.
        parameters: Dotted key -> value.
        encoder_batch: Images that one run of the image encoder takes; None: those of all cameras.

    Raises:
        DeploymentError: A binding is missing, is one that the node does not feed, is not float32, or has another size.
    """
    sizes: dict[str, int] = {}
    for engine, (inputs, outputs) in BINDINGS.items():
        graph = graphs[engine].graph
        for what, expected, values in (("inputs", inputs, graph.input), ("outputs", outputs, graph.output)):
            specs = tensor_specs(values)
            if (found := {spec.name for spec in specs}) != expected:
                raise DeploymentError(
                    f"{engine}: the node binds the {what} {sorted(expected)}; missing {sorted(expected - found)}, "
                    f"unknown {sorted(found - expected)}"
                )
            if other := [f"{spec.name} ({spec.dtype})" for spec in specs if spec.dtype != "float32"]:
                raise DeploymentError(f"{engine}: the node binds float32, not {', '.join(other)}")
            sizes |= {f"{engine}.{spec.name}": prod(spec.shape) for spec in specs}
    model = {key.partition(".")[2]: value for key, value in parameters.items() if key.startswith("model_params.")}
    proposals, cameras = model["num_proposals"], model["rois_number"]
    batch, batch_name = (cameras, "rois_number") if encoder_batch is None else (encoder_batch, str(encoder_batch))
    expected_sizes = {
        "image_encoder.img": (
            batch * 3 * model["input_image_height"] * model["input_image_width"],
            f"{batch_name} x 3 x input_image_height x input_image_width",
        ),
        "head.x": (
            sizes["image_encoder.img_feats"] * cameras // batch,
            "the image encoder's img_feats" + (" of all cameras" if batch != cameras else ""),
        ),
        "head.pos_embed": (sizes["position_embedding.pos_embed"], "the position embedding's pos_embed"),
        "head.cone": (sizes["position_embedding.cone"], "the position embedding's cone"),
        "position_embedding.intrinsics": (cameras * 16, "rois_number x 16"),
        "position_embedding.img2lidar": (cameras * 16, "rois_number x 16"),
        "head.all_cls_scores": (len(model["class_names"]) * proposals, "class_names x num_proposals"),
        "head.pre_memory_timestamp": (model["pre_memory_length"], "pre_memory_length"),
        "head.post_memory_timestamp": (model["post_memory_length"], "post_memory_length"),
    }
    for binding, (expected_size, meaning) in expected_sizes.items():
        if sizes[binding] != expected_size:
            raise DeploymentError(
                f"{binding} holds {sizes[binding]} elements, {meaning} says {expected_size}: graphs and parameters "
                "do not belong together; export again"
            )
    boxes = sizes["head.all_bbox_preds"]
    if boxes % proposals or boxes < BOX_ROWS * proposals:
        raise DeploymentError(f"head.all_bbox_preds holds {boxes} elements for {proposals} proposals; export again")
    # The node copies as many bytes of post_memory_* as pre_memory_* has.
    if model["pre_memory_length"] > model["post_memory_length"]:
        raise DeploymentError(f"the memory shrinks: {model['pre_memory_length']} rows in, fewer out")
    if len(model["detection_range"]) != 6:
        raise DeploymentError(f"detection_range needs six numbers, got {model['detection_range']}")
