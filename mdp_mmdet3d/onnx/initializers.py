"""Check that an exported graph holds the weights of a given, usually pruned, model."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import onnx

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.lint import load_onnx


def check_initializers(model: str | Path | onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Compare the shapes of convolutions, linear layers and packed attention projections with a state dict's.

    The TorchScript exporter names a node after the modules whose calls led to it, so each ``Conv``, ``Gemm``
    and ``MatMul`` with a constant operand belongs to one key: ``<module>.weight``, or
    ``<module>.in_proj_weight``, whose rows are spread over three nodes. Linear weights may be transposed. Queries that
    are the same in every frame, as those of DETR's first decoder layer, are a constant in the graph, of heads x
    queries x width, and the projection that made them is gone: there the rest is compared by its columns.

    Args:
        model: Graph that was exported from the model.
        shapes: State-dict key -> shape, e.g. ``{k: tuple(v.shape) for k, v in model.state_dict().items()}``.

    Returns:
        The keys that were compared.

    Raises:
        DeploymentError: A shape differs, or nothing could be compared.
    """
    proto = load_onnx(model)
    constants = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    paths: dict[str, list[str]] = defaultdict(list)
    for key in shapes:
        owner, _, leaf = key.rpartition(".")
        if leaf in {"weight", "in_proj_weight"}:
            paths[leaf].append(owner)
    compared: set[str] = set()
    packed: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for node in proto.graph.node:
        weight = next((constants[name] for name in node.input[1::-1] if name in constants), ())
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or len(weight) < 2:
            continue
        called = module_path(node.name)
        if module := _owner(called, paths["weight"]):
            key = f"{module}.weight"
            expected = tuple(shapes[key])
            if weight != expected and (node.op_type == "Conv" or weight != expected[::-1]):
                raise DeploymentError(
                    f"{node.op_type} {node.name!r} has a weight of shape {weight}, "
                    f"the state dict's {key} has {expected}: the graph was not exported from this model"
                )
            compared.add(key)
        elif attention := _owner(called, paths["in_proj_weight"]):
            packed[f"{attention}.in_proj_weight"].append(weight)
    for key, weights in packed.items():
        matrices = [weight for weight in weights if len(weight) == 2]
        elements = sum(math.prod(weight) for weight in matrices)
        # torch.nn.MultiheadAttention does not call its out_proj: that weight is found under the attention itself.
        closing = shapes.get(f"{key.rpartition('.')[0]}.out_proj.weight", (0,))
        whole = math.prod(shapes[key])
        if len(matrices) < len(weights):
            fits = elements < whole + math.prod(closing) and all(shapes[key][1] in weight for weight in matrices)
        else:
            fits = elements in (whole, whole + math.prod(closing))
        if not fits:
            raise DeploymentError(
                f"the projections of {key} hold {elements} weights in the graph, "
                f"{tuple(shapes[key])} in the state dict: the graph was not exported from this model"
            )
    compared.update(packed)
    if not compared:
        raise DeploymentError("no weight of the graph belongs to a key of the state dict: is it of another model?")
    return compared


def module_path(node_name: str) -> list[str]:
    """Names of the modules that were called on the way to a node.

    ``/neck/convs.0/conv/Conv`` -> ``[neck, convs, 0, conv]``; children of a Sequential repeat its name:
    ``/layer1/layer1.0/Conv`` -> ``[layer1, 0]``.
    """
    path: list[str] = []
    parent: list[str] = []
    for part in node_name.split("/")[1:-1]:
        names = part.split(".")
        path += names[len(parent) :] if parent and names[: len(parent)] == parent else names
        parent = names
    return path


def _owner(called: list[str], modules: list[str]) -> str | None:
    """Module that ends like ``called`` and holds it in order; it lacks containers without a forward."""

    def same(name: str, call: str) -> bool:
        # The second call of a module has the suffix _1.
        return re.fullmatch(re.escape(name) + r"(_\d+)?", call) is not None

    def holds(module: str) -> bool:
        names = re.split(r"[./]", module)
        rest = iter(names)
        return same(names[-1], called[-1]) and all(any(same(name, call) for name in rest) for call in called)

    owners = sorted((module for module in modules if called and holds(module)), key=lambda name: name.count("."))
    if not owners or (len(owners) > 1 and owners[0].count(".") == owners[1].count(".")):
        return None
    return owners[0]
