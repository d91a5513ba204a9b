"""From a PyTorch module to a linted ONNX graph with static shapes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxslim
import torch
from onnx import helper
from torch import Tensor, nn

import mdp_mmdet3d
from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.layers.evaluation import evaluating
from mdp_mmdet3d.layers.fused import without_fused_layers
from mdp_mmdet3d.onnx.lint import require_clean
from mdp_mmdet3d.onnx.pads import constant_pads
from mdp_mmdet3d.runtime.manifest import EngineSpec, TensorSpec
from mdp_mmdet3d.runtime.onnx_file import onnx_facts

OPSET = 17
"""Newest opset of which neither ONNX Runtime nor TensorRT-RTX refuses an operator that the exporter emits."""

REWRITES = ("graph_fusion", "subexpression_elimination", "weight_tying")
"""What onnxslim does beyond folding constants and dropping dead nodes."""


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output_names: Sequence[str],
    path: str | Path,
    *,
    simplify: bool = True,
) -> onnx.ModelProto:
    """Export one module with its batch norms folded, simplify it, lint it and write it.

    Args:
        module: Takes the tensors of ``inputs`` in their order and returns a tensor or a tuple of tensors.
        inputs: Example inputs by name; their shapes and dtypes become the graph's.
        output_names: One name per output.
        path: File to write.
        simplify: Let onnxslim also fuse nodes, merge equal ones and share equal weights. Constants are folded in any
            case: the exporter computes shapes from constants, and the lint refuses shapes that are computed.

    Returns:
        The graph as written.

    Raises:
        DeploymentError: The module cannot be exported or holds weights that are not finite, or the lint refuses the
            graph.
    """
    try:
        with evaluating(module), warnings.catch_warnings(), torch.no_grad(), without_fused_layers(), constant_pads():
            # Deprecated upstream, but TensorRT-RTX refuses graphs of the new exporter's default opset.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=list(output_names),
                opset_version=OPSET,
                do_constant_folding=True,
                dynamo=False,
            )
    except (RuntimeError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise DeploymentError(f"{Path(path).name} cannot be exported: {error}") from error
    graph = onnxslim.slim(onnx.load(str(path)), skip_optimizations=[] if simplify else list(REWRITES))
    require_clean(graph, Path(path).name)
    if dropped := sorted(inputs.keys() - {value.name for value in graph.graph.input}):
        raise DeploymentError(
            f"{Path(path).name} does not depend on its inputs {dropped}; remove them from the module's signature. "
            "Where a pruned model alone is so, its removed blocks were the only way there: keep one with prune.freeze"
        )
    onnx.save(graph, str(path))
    if bad := onnx_facts(path).not_finite:
        raise DeploymentError(
            f"{Path(path).name}: {len(bad)} weights hold NaN or infinity, the first is {bad[0]!r}: the deployed model "
            "would be blind without an error. Export from a checkpoint with finite weights"
        )
    return graph


def export_software(simplify: bool) -> dict[str, str]:
    """Versions of what made a graph, for ``deployment.json``."""
    return {
        "mdp_mmdet3d": mdp_mmdet3d.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxslim": onnxslim.__version__,
        "simplify": "all" if simplify else "constants only",
        "opset": str(OPSET),
    }


def engine_spec(file: str, graph: onnx.ModelProto) -> EngineSpec:
    """Signature of a graph with static shapes."""
    return EngineSpec(file, tensor_specs(graph.graph.input), tensor_specs(graph.graph.output))


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of inputs or outputs."""
    return tuple(
        TensorSpec(
            value.name,
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
