"""StreamPETR as three engines: image encoder, position embedding, head (docs/deployment.md, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from mdp_mmdet3d.datasets.conventions import CAMERAS
from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import file_sha256, write_json, write_npz
from mdp_mmdet3d.onnx.export import engine_spec, export_onnx, export_software, tensor_specs
from mdp_mmdet3d.onnx.folders import check_target, new_deployment
from mdp_mmdet3d.onnx.initializers import check_initializers
from mdp_mmdet3d.runtime.manifest import (
    SCHEMA_VERSION,
    DeploymentManifest,
    ImageTransform,
    MemorySpec,
)

from .autoware.generations import node_generation
from .memory import MemoryState
from .normalisation import Affine, Convert, conversion
from .transforms import evaluation_augmentation, scaled_size

Layout = Literal["native", "autoware"]
Levels = Literal["last", "all"]

MEMORY_FIELDS = MemoryState._fields
INIT_MEMORY = "init_memory"


class ImageEncoder(nn.Module):
    """``img`` (1, N, 3, H, W), normalised as the host does it, to ``img_feats`` (1, N, C, h, w)."""

    def __init__(self, model: nn.Module, affine: Affine | None = None) -> None:
        super().__init__()
        self.model = model
        self.convert = None if affine is None else Convert(affine)

    def forward(self, img: Tensor) -> Tensor:
        """Conversion to the model's normalisation, backbone and neck."""
        return self.model.extract_img_feat(img if self.convert is None else self.convert(img))


class PositionEmbedding(nn.Module):
    """Rig to ``pos_embed`` (1, M, C) before the gate and ``cone`` (1, M, 8)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.pts_bbox_head = head

    def forward(self, img_metas_pad: Tensor, intrinsics: Tensor, img2lidar: Tensor) -> tuple[Tensor, Tensor]:
        """``img_metas_pad`` is (H, W, 3); the matrices are (1, N, 4, 4)."""
        return self.pts_bbox_head.position_embedding(img_metas_pad, intrinsics, img2lidar)


class Head(nn.Module):
    """One frame of the head over explicit memory tensors, in one of two output layouts."""

    def __init__(self, head: nn.Module, layout: Layout, levels: Levels, prev_exists: bool = False) -> None:
        super().__init__()
        self.pts_bbox_head = head
        self.layout = layout
        self.last_level_only = levels == "last"
        self.prev_exists = prev_exists

    def forward(
        self, x: Tensor, pos_embed: Tensor, cone: Tensor, ego_pose: Tensor, ego_pose_inv: Tensor, *pre: Tensor
    ) -> tuple[Tensor, ...]:
        """Shapes as in `StreamPETRHead.forward`; ``pre`` in the order of `MEMORY_FIELDS`, then ``prev_exists`` (1)."""
        memory = MemoryState(*pre[: len(MEMORY_FIELDS)])
        if self.prev_exists or self.layout == "autoware":
            start = self.pts_bbox_head.initial_memory(ego_pose)
            # Autoware's node starts from zeros, and a pose is never zero.
            goes_on = (pre[-1] if self.prev_exists else memory.egopose[:, 0, 3, 3]) > 0.5
            # Where, not a product: what a host leaves in the buffers at a reset may be NaN.
            memory = MemoryState(*(torch.where(goes_on, old, new) for old, new in zip(memory, start)))
        scores, boxes, memory = self.pts_bbox_head(
            x, pos_embed, cone, ego_pose, ego_pose_inv, memory, self.last_level_only
        )
        if self.layout == "autoware":
            scores, boxes = (value.flatten(0, 2).transpose(0, 1).unsqueeze(0) for value in (scores, boxes))
        return (scores, boxes, *memory)


class SingleFrameHead(nn.Module):
    """A head that keeps no memory: neither poses nor ``pre_memory_*`` are inputs of its graph."""

    def __init__(self, head: nn.Module, levels: Levels) -> None:
        super().__init__()
        self.pts_bbox_head = head
        self.last_level_only = levels == "last"

    def forward(self, x: Tensor, pos_embed: Tensor, cone: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes as in `StreamPETRHead.predict`."""
        head = self.pts_bbox_head
        output = head.predict(x, pos_embed, cone, head.empty_memory(1), last_level_only=self.last_level_only)
        return output.all_cls_scores, output.all_bbox_preds


def export_streampetr(
    model: nn.Module,
    out_dir: str | Path,
    *,
    class_names: Sequence[str],
    camera_names: Sequence[str] = CAMERAS,
    input_size: tuple[int, int] = (256, 704),
    source_size: tuple[int, int] = (900, 1600),
    layout: Layout = "native",
    node: str | None = None,
    camera_encoding: str = "rgb8",
    levels: Levels = "last",
    prev_exists: bool = False,
    encoder_batch: int | None = None,
    simplify: bool = True,
    plan_hash: str | None = None,
    weights: str = "unknown",
    on_engine: Callable[[str], None] | None = None,
) -> DeploymentManifest:
    """Write a dense or pruned StreamPETR as a deployment folder.

    The folder holds ``image_encoder.onnx``, ``position_embedding.onnx``, ``head.onnx`` (linted, weight shapes
    checked against the model's), ``init_memory.npz`` and ``.json`` and ``deployment.json``. It is built next
    to ``out_dir`` and renamed, so ``out_dir`` is always complete; an earlier deployment there is replaced.

    Args:
        model: Built and loaded `StreamPETR`, in float32.
        out_dir: Folder to write.
        class_names: In the order of the score columns.
        camera_names: In the order of the image slots.
        input_size: (H, W) of the network input in pixels, multiples of the head's stride.
        source_size: (H, W) of a camera image in pixels.
        layout: ``"native"``: outputs (levels, 1, Q, C); ``"autoware"``: (1, C, levels * Q), and a memory of zeros
            starts a stream.
        node: Release of Autoware's node (`autoware.node_generation`): the image encoder takes images normalised as it
            does. None: as the model was trained.
        camera_encoding: ``"rgb8"`` or ``"bgr8"``, of the camera images of a node that does not convert them.
        levels: Which decoder levels are in the outputs; only the last one is evaluated.
        prev_exists: Give the head an input ``prev_exists`` (1) float32; at 0 the graph makes the first frame's
            memory itself and ignores ``pre_memory_*``.
        encoder_batch: Images that one run of the image encoder takes: 1, for a host that runs it as each image comes;
            None: those of all cameras.
        simplify: See `export_onnx`.
        plan_hash: Hash of the pruning plan, None for a dense model.
        weights: Where the weights came from, for the manifest.
        on_engine: Called with the name of each engine before it is exported.

    Returns:
        The manifest as written.

    Raises:
        DeploymentError: An argument does not fit the model, a graph cannot be deployed, or ``out_dir`` holds
            something else than a deployment.
    """
    out_dir = Path(out_dir)
    head = model.pts_bbox_head
    check_target(out_dir)
    _check_arguments(model, class_names, input_size, layout, levels, prev_exists)
    cameras = len(camera_names)
    if encoder_batch not in (None, 1, cameras):
        raise DeploymentError(f"encoder_batch={encoder_batch!r}: the image encoder takes 1 image or all {cameras}")
    trained = image_transform(model.data_preprocessor, input_size, source_size)
    image = trained
    if node is not None:
        if layout != "autoware":
            raise DeploymentError(f"node={node!r} needs the layout 'autoware', not {layout!r}")
        image = node_generation(node).normalised(trained, camera_encoding)
    encoder = ImageEncoder(model, conversion(image, trained))
    with new_deployment(out_dir) as part:
        graphs = _export_graphs(
            encoder,
            part,
            cameras,
            encoder_batch or cameras,
            input_size,
            Head(head, layout, levels, prev_exists) if head.remembers else SingleFrameHead(head, levels),
            simplify,
            on_engine,
        )
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for graph in graphs.values():
            check_initializers(graph, shapes)
        _write_initial_memory(head, part)
        specs = {name: engine_spec(f"{name}.onnx", graph) for name, graph in graphs.items()}
        tensors = (*specs["head"].inputs, *specs["head"].outputs)
        rows = {spec.name: spec.shape[1] for spec in tensors if "memory" in spec.name}
        coder = model.bbox_coder
        queries = head.reference_points.num_embeddings + head.num_propagated
        scores_shape = specs["head"].outputs[0].shape
        manifest = DeploymentManifest(
            engines=specs,
            layout=layout,
            levels=scores_shape[0] if layout == "native" else scores_shape[2] // queries,
            num_queries=queries,
            precision="float32",
            class_names=tuple(class_names),
            camera_names=tuple(camera_names),
            image=image,
            pc_range=tuple(head.pc_range.tolist()),
            post_center_range=tuple(coder.post_center_range),
            max_detections=coder.max_num,
            score_threshold=coder.score_threshold,
            memory=MemorySpec(
                pre_length=rows.get("pre_memory_embedding", 0),
                post_length=rows.get("post_memory_embedding", 0),
                num_propagated=head.num_propagated,
                init_file=f"{INIT_MEMORY}.npz",
            ),
            plan_hash=plan_hash,
            weights=weights,
            software=export_software(simplify),
            checksums={path.name: file_sha256(path) for path in sorted(part.iterdir())},
        )
        manifest.save(part)
    return manifest


def _check_arguments(
    model: nn.Module,
    class_names: Sequence[str],
    input_size: tuple[int, int],
    layout: str,
    levels: str,
    prev_exists: bool,
) -> None:
    if layout not in ("native", "autoware"):
        raise DeploymentError(f"layout={layout!r} is neither 'native' nor 'autoware'")
    if levels not in ("last", "all"):
        raise DeploymentError(f"levels={levels!r} is neither 'last' nor 'all'")
    if not model.pts_bbox_head.remembers and (layout == "autoware" or prev_exists):
        raise DeploymentError(
            f"layout={layout!r}, prev_exists={prev_exists}: this model has no memory (memory_len=0, topk_proposals=0), "
            "which Autoware's node and the input prev_exists are about; export it in the layout 'native' without them"
        )
    stride = model.pts_bbox_head.stride
    if any(side <= 0 or side % stride for side in input_size):
        raise DeploymentError(f"input_size={tuple(input_size)}: height and width must be multiples of {stride} pixels")
    num_classes = model.pts_bbox_head.num_classes
    if len(class_names) != num_classes:
        raise DeploymentError(
            f"{len(class_names)} class names for a head of {num_classes} classes: {list(class_names)}"
        )
    if other := {name: value.dtype for name, value in model.named_parameters() if value.dtype != torch.float32}:
        name, dtype = next(iter(other.items()))
        raise DeploymentError(f"parameter {name} is {dtype}; export the float32 model (model.float())")


def _export_graphs(
    encoder: ImageEncoder,
    folder: Path,
    num_cams: int,
    encoder_batch: int,
    input_size: tuple[int, int],
    detector: Head | SingleFrameHead,
    simplify: bool,
    on_engine: Callable[[str], None] | None,
) -> dict[str, onnx.ModelProto]:
    head = detector.pts_bbox_head
    device = head.pc_range.device

    def export(
        name: str, module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]
    ) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
        if on_engine:
            on_engine(name)
        graph = export_onnx(module, inputs, outputs, folder / f"{name}.onnx", simplify=simplify)
        return graph, {spec.name: torch.zeros(spec.shape, device=device) for spec in tensor_specs(graph.graph.output)}

    identity = torch.eye(4, device=device)
    images = torch.zeros(1, encoder_batch, 3, *input_size, device=device)
    features_graph, features = export("image_encoder", encoder, {"img": images}, ["img_feats"])
    rig = {
        "img_metas_pad": torch.tensor([*input_size, 3], dtype=torch.float32, device=device),
        "intrinsics": identity.expand(1, num_cams, 4, 4),
        "img2lidar": identity.expand(1, num_cams, 4, 4),
    }
    position, tokens = export("position_embedding", PositionEmbedding(head), rig, ["pos_embed", "cone"])
    inputs = {"x": features["img_feats"][:, :1].repeat(1, num_cams, 1, 1, 1), **tokens}
    outputs = ["all_cls_scores", "all_bbox_preds"]
    if isinstance(detector, Head):
        memory = head.initial_memory(identity[None])._asdict()
        inputs |= {"data_ego_pose": identity[None], "data_ego_pose_inv": identity[None]}
        inputs |= {f"pre_memory_{field}": memory[field] for field in MEMORY_FIELDS}
        outputs += [f"post_memory_{field}" for field in MEMORY_FIELDS]
        if detector.prev_exists:
            inputs["prev_exists"] = torch.ones(1, device=device)
    graph, _ = export("head", detector, inputs, outputs)
    return {"image_encoder": features_graph, "position_embedding": position, "head": graph}


def _write_initial_memory(head: nn.Module, folder: Path) -> None:
    points = head.pseudo_points.detach().cpu().numpy()
    write_npz(folder / f"{INIT_MEMORY}.npz", {"schema_version": SCHEMA_VERSION}, {"pseudo_reference_points": points})
    write_json(
        folder / f"{INIT_MEMORY}.json",
        {
            "schema_version": SCHEMA_VERSION,
            "unit": "metre",
            "frame": "lidar of the first frame",
            "pseudo_reference_points": points.tolist(),
            "rows_with_pseudo_point": {
                "reference_point": "ego_pose applied to the pseudo point",
                "egopose": "ego_pose",
                "embedding, timestamp, velo": 0,
            },
            "other_rows": {"reference_point": "translation of ego_pose", "everything else": 0},
        },
    )


def image_transform(
    preprocessor: nn.Module, input_size: tuple[int, int], source_size: tuple[int, int]
) -> ImageTransform:
    """Resize, crop and normalisation of the model that has this data preprocessor.

    Raises:
        DeploymentError: It does not normalise.
    """
    if not getattr(preprocessor, "_enable_normalize", False):
        raise DeploymentError("the model's data_preprocessor does not normalise images; set its mean and std")
    augmentation = evaluation_augmentation(source_size[1], source_size[0], (input_size[0], input_size[1]))
    width, height = scaled_size(source_size[1], source_size[0], augmentation.scale)
    return ImageTransform(
        source_size=(source_size[0], source_size[1]),
        resized_size=(height, width),
        crop_offset=(augmentation.crop_top, augmentation.crop_left),
        size=(input_size[0], input_size[1]),
        # The preprocessor holds them in float32.
        mean=tuple(round(value, 5) for value in preprocessor.mean.flatten().tolist()),
        std=tuple(round(value, 5) for value in preprocessor.std.flatten().tolist()),
        # Images are loaded as BGR.
        channel_order="RGB" if preprocessor._channel_conversion else "BGR",
    )
