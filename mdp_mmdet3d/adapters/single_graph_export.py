"""A detector whose tensor mode takes images, as one ONNX file: MMDetection3D's monocular, MMDetection's 2D ones."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from mmdet3d.models.data_preprocessors import Det3DDataPreprocessor
from mmdet3d.structures import Det3DDataSample
from torch import Tensor, nn

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import file_sha256
from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.onnx.export import engine_spec, export_onnx, export_software
from mdp_mmdet3d.onnx.folders import check_target, new_deployment
from mdp_mmdet3d.onnx.initializers import check_initializers
from mdp_mmdet3d.onnx.lint import require_clean
from mdp_mmdet3d.onnx.precision import to_float16
from mdp_mmdet3d.runtime.graph_manifest import GraphManifest
from mdp_mmdet3d.runtime.ort_engine import OrtEngine

GRAPH_FILE = "model.onnx"
POINT_MODULES = ("voxel_encoder", "pts_voxel_encoder", "middle_encoder", "pts_middle_encoder")
COMPARED_IMAGES = 2
ROUNDING_SHARE = 4.0  # of PyTorch's own rounding that another order of additions may add up to


class TensorMode(nn.Module):
    """``img`` (B, 3, H, W), or (B, N, 3, H, W), to the flattened outputs of ``forward(mode="tensor")``."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.output_names: list[str] = []

    def forward(self, img: Tensor) -> tuple[Tensor, ...]:
        """Raw outputs in the order of `output_names`."""
        size = self.size
        sample = Det3DDataSample(
            metainfo={"img_shape": size, "batch_input_shape": size, "pad_shape": size, "ori_shape": size,
                      "scale_factor": (1.0, 1.0)}
        )  # fmt: skip
        # What the data preprocessor makes: MMDetection3D's a dictionary, MMDetection's a tensor.
        preprocessor = getattr(self.model, "data_preprocessor", None)
        inputs = {"imgs": img} if isinstance(preprocessor, Det3DDataPreprocessor) else img
        # Not a call, which would put "model" into every node's name.
        found = dict(_flatten(self.model.forward(inputs, [sample] * len(img), mode="tensor")))
        self.output_names = list(found)
        return tuple(found.values())


def export_single_graph(
    model: nn.Module,
    out_dir: str | Path,
    *,
    input_size: tuple[int, int],
    num_cams: int = 1,
    channels: int = 3,
    class_names: Sequence[str] = (),
    precision: str = "float32",
    simplify: bool = True,
    tolerance: float = 1e-3,
    plan_hash: str | None = None,
    weights: str = "unknown",
) -> GraphManifest:
    """Write a dense or pruned detector as ``model.onnx`` and ``deployment.json``, linted and compared with PyTorch.

    The graph ends at the raw outputs of the heads: decoding, NMS and preprocessing stay with the host.

    Args:
        model: Built and loaded, in float32.
        out_dir: Folder to write; an earlier deployment there is replaced once the new one is complete.
        input_size: (H, W) of the network image in pixels.
        num_cams: Camera images per frame; more than one makes the input (1, N, 3, H, W).
        channels: Of the input; other than 3 for a part of a model that takes features.
        class_names: In the order of the score columns.
        precision: ``"float32"`` or ``"float16"`` (learned layers in float16; see `to_float16`).
        simplify: See `export_onnx`.
        tolerance: Largest difference of a float32 output from PyTorch, relative to the output's largest value if
            that is above 1.
        plan_hash: Hash of the pruning plan, None for a dense model.
        weights: Where the weights came from.

    Raises:
        DeploymentError: The model takes points, cannot be traced (names module and operator), breaks the lint, or
            differs from PyTorch.
    """
    out_dir = Path(out_dir)
    check_target(out_dir)
    if precision not in ("float32", "float16"):
        raise DeploymentError(f"precision={precision!r}: a single graph is float32 or float16 (int8: StreamPETR only)")
    _check_takes_images(model)
    wrapper = TensorMode(model, (input_size[0], input_size[1]))
    shape = (1, channels, *input_size) if num_cams == 1 else (1, num_cams, channels, *input_size)
    images = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(COMPARED_IMAGES)]
    with evaluating(model):
        expected = [_run(wrapper, image) for image in images]
    with new_deployment(out_dir) as part:
        path = part / GRAPH_FILE
        try:
            with _constant_shapes():
                graph = export_onnx(wrapper, {"img": images[0]}, wrapper.output_names, path, simplify=simplify)
        except DeploymentError as error:
            raise DeploymentError(f"{type(model).__name__}: {error}{_where(wrapper, images[0], str(error))}") from error
        check_initializers(graph, {key: tuple(value.shape) for key, value in model.state_dict().items()})
        rounding = partial(_rounding, wrapper, images, expected)
        checks = {"float32_against_pytorch": compare(path, images, expected, tolerance, rounding)}
        if precision == "float16":
            graph = to_float16(graph, "model")
            require_clean(graph, f"{GRAPH_FILE} in float16")
            onnx.save(graph, str(path))
            checks["float16_against_pytorch"] = compare(path, images, expected, None)
        mean, std, order = _normalisation(model)
        manifest = GraphManifest(
            engines={"model": engine_spec(GRAPH_FILE, graph)},
            model_type=type(model).__name__,
            precision=precision,
            class_names=tuple(class_names),
            mean=mean,
            std=std,
            channel_order=order,
            plan_hash=plan_hash,
            weights=weights,
            software=export_software(simplify),
            checksums={GRAPH_FILE: file_sha256(path)},
            checks=checks,
        )
        manifest.save(part)
    return manifest


def compare(
    path: Path,
    images: Sequence[Tensor],
    expected: Sequence[Mapping[str, np.ndarray]],
    tolerance: float | None,
    rounding: Callable[[], dict[str, float]] = dict,
) -> dict[str, Any]:
    """ONNX Runtime against recorded outputs on noise: per output the largest difference and the largest value.

    Args:
        path: The graph.
        images: Its inputs.
        expected: PyTorch's outputs.
        tolerance: Of a difference, relative to the largest value where that is above 1; None: any.
        rounding: How far PyTorch's outputs themselves are from exact ones. Only asked where the tolerance is exceeded:
            a network that magnifies rounding so much cannot be closer to them.

    Raises:
        DeploymentError: A difference exceeds the tolerance, and what rounding explains.
    """
    engine = OrtEngine(path)
    worst: dict[str, float] = {}
    largest: dict[str, float] = {}
    for image, reference in zip(images, expected):
        found = engine.run({"img": image.numpy()})
        for name, values in reference.items():
            difference = float(np.abs(found[name] - values).max())
            worst[name] = max(worst.get(name, 0.0), difference)
            largest[name] = max(largest.get(name, 0.0), float(np.abs(values).max()))
    result: dict[str, Any] = {"images": len(images), "difference": worst, "largest": largest}
    if tolerance is None:
        return result
    above = [name for name, difference in worst.items() if not difference <= tolerance * max(1.0, largest[name])]
    if above:
        result["rounding"] = own = rounding()
        for name in above:
            if not worst[name] <= ROUNDING_SHARE * own.get(name, 0.0):
                raise DeploymentError(
                    f"output {name!r} of {path.name} differs from PyTorch by {worst[name]:.2e} (largest value "
                    f"{largest[name]:.2e}), of which rounding explains {own.get(name, 0.0):.2e}: do not deploy it; the "
                    "ONNX Runtime or PyTorch release may be at fault"
                )
    return result


def _rounding(
    wrapper: TensorMode, images: Sequence[Tensor], expected: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Largest difference of every float32 output from that in float64; empty where the model does not run in it."""
    worst: dict[str, float] = {}
    try:
        exact = TensorMode(copy.deepcopy(wrapper.model).double().eval(), wrapper.size)
        for image, reference in zip(images, expected):
            for name, values in _run(exact, image.double()).items():
                worst[name] = max(worst.get(name, 0.0), float(np.abs(values - reference[name]).max()))
    except Exception:  # operators without a float64 form: then nothing is explained
        return {}
    return worst


@contextmanager
def _constant_shapes() -> Iterator[None]:
    """Let sizes of feature maps be constants of the graph where a model asks for them as tensors.

    Deformable DETR does; kept as operators, they leave every later shape unknown to the exporter.
    """
    before = torch._shape_as_tensor
    torch._shape_as_tensor = lambda x: torch.tensor([int(size) for size in x.shape])
    try:
        yield
    finally:
        torch._shape_as_tensor = before


def _check_takes_images(model: nn.Module) -> None:
    for name in POINT_MODULES:
        if isinstance(getattr(model, name, None), nn.Module):
            raise DeploymentError(
                f"{type(model).__name__} takes points: {name} ({type(getattr(model, name)).__name__}) works on as many "
                "voxels as a frame has, with scatter or sparse operators that no static ONNX graph has. Export of "
                "camera detectors only; MMDeploy has point detectors with plugins"
            )


def _run(wrapper: TensorMode, image: Tensor) -> dict[str, np.ndarray]:
    """Outputs by name; an error names the module that was running."""
    path: list[str] = []

    def enter(name: str) -> Any:
        return lambda *_: path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    handles = []
    for name, module in wrapper.model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with torch.no_grad():
            outputs = wrapper(image)
    except Exception as error:  # whatever a detector raises, the user needs to know where
        where = path[-1] if path else "the detector's tensor mode"
        raise DeploymentError(
            f"{type(wrapper.model).__name__} does not run on one image of shape {tuple(image.shape)} in tensor mode: "
            f"{type(error).__name__} in {where!r}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise DeploymentError(f"{type(wrapper.model).__name__} returns no tensor in tensor mode")
    return {name: value.numpy() for name, value in zip(wrapper.output_names, outputs)}


def _where(wrapper: TensorMode, image: Tensor, message: str) -> str:
    """The modules that use the operator which an exporter's message names."""
    found = re.search(r"(?:aten|prim|torchvision|mmcv)::\w+", message)
    if found is None:
        return ""
    try:
        with torch.no_grad():
            graph = torch.jit.trace(wrapper, image, check_trace=False).inlined_graph
    except Exception:  # only for the message: the first error is the one that counts
        return ""
    scopes = [node.scopeName() for node in graph.findAllNodes(found.group(0))]
    names = sorted({scope.rpartition("/")[2].replace("__module.model.", "") for scope in scopes})
    return f" (used in {', '.join(names[:5])})" if names else ""


def _normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    preprocessor = getattr(model, "data_preprocessor", None)
    order = "RGB" if getattr(preprocessor, "_channel_conversion", False) else "BGR"
    if preprocessor is None or not getattr(preprocessor, "_enable_normalize", False):
        return (), (), order
    mean, std = (tuple(round(v, 5) for v in x.flatten().tolist()) for x in (preprocessor.mean, preprocessor.std))
    return mean, std, order


def _flatten(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested lists and dictionaries, named by their place: ``output_1_0``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}_{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{name}_{index}")
