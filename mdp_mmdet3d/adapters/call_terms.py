"""Cost terms of everything that is neither convolution, linear layer nor attention: which widths it depends on is seen
by running models with other widths, and its probe is the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters.cut_models import CutModels
from mdp_mmdet3d.adapters.deployed_graph import DeployedGraph
from mdp_mmdet3d.adapters.network import linear_units
from mdp_mmdet3d.operators import OperatorSignature
from mdp_mmdet3d.operators.call import CALL_KINDS, call_obstacle, call_text
from mdp_mmdet3d.space.builder import SpaceBuilder
from mdp_mmdet3d.space.operations import Operation, Template, readers_of, record_operations
from mdp_mmdet3d.space.types import GLOBAL_KINDS, BlockKind, Width, WidthSum, width_at, width_dimensions

PRODUCTS = ("conv2d", "linear")  # their terms are `add_conv_term` and the like
NORMS = ("batch_norm", "sync_batch_norm")
# What every runtime computes within the convolution in front of it.
FUSED = ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "hardsigmoid", "hardtanh", "clamp", "clip")
SILU = "torch.nn.functional.silu"
SUMS = ("add", "iadd", "radd")
DOES_NOT_RUN = "the model does not run with other widths"
PIECE = 16  # channels at most that stand for all parts of a concatenation but one
STREAM_BLOCKS = (BlockKind.SUB_LAYER, BlockKind.LAYER, BlockKind.BRANCH)  # terms of a sub-layer hold its norm and sum

Place = tuple[Any, ...]


@dataclass
class _Judged:
    """What is known of an operation before its cost."""

    operation: Operation
    holes: dict[Place, Width] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def widths(self) -> set[str]:
        """Dimensions that it depends on."""
        return {name for width in self.holes.values() for name in width_dimensions(width)}


def add_call_terms(
    builder: SpaceBuilder,
    model: nn.Module,
    graph: DeployedGraph,
    recorded: tuple[Sequence[Operation], Mapping[str, str]],
    deployed: Sequence[Operation],
    priced: Sequence[str] = (),
    cut_models: CutModels | None = None,
) -> None:
    """Add the cost of activations, norms, poolings, sums, products, concatenations and what else ran.

    What depends on a width, or goes with a block, and gets no term is noted with `SpaceBuilder.without_term`.

    Args:
        builder: Holds dimensions, blocks and all other terms already.
        model: The dense model.
        graph: What is deployed of it.
        recorded: `DeployedGraph.operations`.
        deployed: Those at the deployed size.
        priced: Paths of modules whose cost is in other terms.
        cut_models: Models with other widths, where several graphs share them.
    """
    dense, opaque = recorded
    part, engine = graph.part(model), graph.engine
    at_size = {operation.key: operation for operation in deployed}
    cut = _run_cut(builder, graph, cut_models or CutModels.of(builder, model))
    swishes = _swishes(dense)
    units = linear_units(part, dense)
    left_out = _fused(dense) | set(swishes.values()) | {p for unit in units.values() for p in unit.positions}
    covered, in_sub_layer = _covered(builder, priced), _beside(priced)
    everywhere = {d.name for d in builder.dimensions.values() if d.kind in GLOBAL_KINDS}
    for position, operation in enumerate(dense):
        if operation.view or operation.constant or position in left_out or covered(operation):
            continue
        versions = [operation, at_size.get(operation.key), *(run.get(operation.key) for run in cut.runs)]
        if position in swishes:
            versions = [v and replace(v, function=SILU, arguments=v.arguments[:1]) for v in versions]
        judged = _judge(builder, versions, cut)
        if judged is None:
            continue
        if in_sub_layer(operation) and judged.holes and everywhere.issuperset(judged.widths):
            continue
        if not judged.obstacle:
            judged.obstacle = _add_term(builder, judged, engine) or ""
        if judged.obstacle:
            builder.without_term(engine, _label(part, operation), judged.obstacle)
    for name, kind in opaque.items():
        if not any(f"{name}.".startswith(f"{path}.") for path in priced):
            builder.without_term(engine, kind, "is no function of PyTorch")


@dataclass(frozen=True)
class _Cut:
    """Runs of models with other widths.

    Attributes:
        runs: Operations of each by their key.
        widths: Width by the counts that it has in each.
        error: Why there are none.
    """

    runs: tuple[Mapping[tuple[str, str, int], Operation], ...] = ()
    widths: Mapping[tuple[int, ...], Width] = field(default_factory=dict)
    error: str = ""


def _run_cut(builder: SpaceBuilder, graph: DeployedGraph, cut_models: CutModels) -> _Cut:
    counts = cut_models.counts
    runs = []
    for cut in map(graph.part, cut_models.models):
        try:
            operations, _ = record_operations(cut, partial(graph.small, cut))
        except Exception as error:  # whatever a model raises with other widths; verification finds where
            return _Cut(error=f"{DOES_NOT_RUN} ({type(error).__name__})")
        runs.append({operation.key: operation for operation in operations})
    widths: dict[tuple[int, ...], Width] = {}
    for width in (*builder.dimensions, *_sums(builder)) if counts else ():
        widths.setdefault(tuple(width_at(width, chosen) for chosen in counts), width)
    return _Cut(tuple(runs), widths)


def _sums(builder: SpaceBuilder) -> Iterator[Width]:
    """Widths of all axes of weights, and of all terms, that are no single dimension."""
    tensors = builder.model.state_dict(keep_vars=True)
    axes = dict.fromkeys((m.tensor, m.axis) for d in builder.dimensions.values() for m in d.members)
    for tensor, axis in (a for a in axes if a[0] in tensors):
        width = builder.width_of(tensor, axis, tensors[tensor].shape[axis])
        if isinstance(width, WidthSum):
            yield width
    for term in builder.terms.values():
        yield from (width for width in term.widths if isinstance(width, WidthSum))


def _fused(operations: Sequence[Operation]) -> set[int]:
    """Positions of what runs within the convolution in front of it: batch norm, sum, activation, in this order."""
    readers = readers_of(operations)
    ends: dict[int, str] = {}  # results that are still within a convolution, and the last step of it
    for position, operation in enumerate(operations):
        name, alone = operation.name, [s for s in operation.reads if s is not None and len(readers[s]) == 1]
        before = [ends[s] for s in alone if s in ends]
        if name == "conv2d":
            ends[position] = "conv"
        elif name in NORMS and "conv" in before:
            ends[position] = "norm"
        elif name in SUMS and ("conv" in before or "norm" in before):
            ends[position] = "sum"
        elif name in FUSED and before and "activation" not in before:
            ends[position] = "activation"
    return {p for p, step in ends.items() if step != "conv"}


def _swishes(operations: Sequence[Operation]) -> dict[int, int]:
    """Positions of ``x * sigmoid(x)``, which runtimes compute at once, and those of the sigmoids in them."""
    readers = readers_of(operations)
    found = {}
    for position, operation in enumerate(operations):
        if operation.name == "sigmoid" and len(readers.get(position, ())) == 1:
            product = operations[readers[position][0]]
            if product.name == "mul" and product.reads == (operation.reads[0], position):
                found[readers[position][0]] = position
    return found


def _covered(builder: SpaceBuilder, priced: Sequence[str]) -> Callable[[Operation], bool]:
    modules = {name.rpartition("#")[0] if "#" in name else name for name in builder.terms}
    pyramids = {n.partition(".lateral_convs.")[0] for n in builder.terms if n.endswith(".upsample_add")}

    def covered(operation: Operation) -> bool:
        if any(f"{operation.module}.".startswith(f"{path}.") for path in priced):
            return True
        if operation.module in pyramids and operation.name in (*SUMS, "interpolate"):
            return True
        return operation.name in (*PRODUCTS, "max_pool2d") and operation.module in modules

    return covered


def _beside(priced: Sequence[str]) -> Callable[[Operation], bool]:
    """Whether an operation is the norm or sum of a sub-layer, which its term holds: it runs beside one in a layer."""
    layers = {path.rpartition(".")[0] for path in priced} - {""}

    def beside(operation: Operation) -> bool:
        inside = any(f"{operation.module}.".startswith(f"{layer}.") for layer in layers)
        return inside and operation.name in (*SUMS, "layer_norm")

    return beside


def _judge(builder: SpaceBuilder, versions: Sequence[Operation | None], cut: _Cut) -> _Judged | None:
    """The operation at the deployed size with its widths; None if no plan changes what it costs.

    Args:
        builder: Holds blocks.
        versions: It in the dense model at the small size, at the deployed size, and in each of the cut models; None
            where it did not run.
        cut: The cut models.
    """
    operation, at_size, *runs = versions
    assert operation is not None
    block = builder.block_of(operation.module)
    goes = block is not None and builder.blocks[block].kind not in STREAM_BLOCKS
    if cut.error:
        return _Judged(operation, obstacle=cut.error)
    leaves = dict(_leaves(operation))
    others = [dict(_leaves(run)) for run in runs if run is not None]
    if len(others) < len(runs) or any(other.keys() != leaves.keys() for other in others):
        return _Judged(operation, obstacle="runs in another way when the model has other widths")
    varying = [place for place in leaves if any(other[place] != leaves[place] for other in others)]
    if not varying and not goes:
        return None
    if at_size is None or dict(_leaves(at_size)).keys() != leaves.keys():
        return _Judged(operation, obstacle="runs in another way at another size")
    judged = _Judged(at_size)
    for place in varying:
        found = cut.widths.get(tuple(other[place] for other in others))
        if found is None:
            judged.obstacle = "depends on widths in a way that is not understood"
        else:
            judged.holes[place] = found
    return judged


def _leaves(operation: Operation) -> Iterator[tuple[Place, Any]]:
    def walk(value: Template, place: Place) -> Iterator[tuple[Place, Any]]:
        if isinstance(value, dict):
            for key, content in value.items():
                yield from walk(content, (*place, key))
        elif isinstance(value, list):
            for index, content in enumerate(value):
                yield from walk(content, (*place, index))
        else:
            yield place, value

    yield from walk([operation.arguments, operation.keywords], ())


def _add_term(builder: SpaceBuilder, judged: _Judged, engine: str) -> str | None:
    """Add the operation's term, or say why it has none."""
    operation, holes = judged.operation, judged.holes
    name = operation.module if operation.name not in PRODUCTS else f"{operation.module}.{operation.name}"
    if next(builder.model.get_submodule(operation.module).children(), None) is not None or not operation.module:
        name = ".".join(filter(None, (operation.module, operation.name)))
    while name in builder.terms:
        stem, _, count = name.partition("#")
        name = f"{stem}#{int(count or 1) + 1}"
    if (pool := _simple_pool(operation)) is not None and len(holes) <= 1:
        batch, channels, height, width = operation.arguments[0]["input"]
        window, stride, padding = pool
        builder.add_term(
            name, engine, "max_pool", (next(iter(holes.values()), channels),), builder.block_of(operation.module),
            batch=batch, height=height, width=width, kernel=window, stride=stride, padding=padding,
        )  # fmt: skip
        return None
    template = [operation.arguments, operation.keywords]
    if any(place[-1] == "other" for place, _ in _leaves(operation)):
        return "takes something other than numbers"
    roles = _roles(holes.values())
    if len(roles) <= len(CALL_KINDS):
        filled = _filled(template, {place: _written(width, roles) for place, width in holes.items()}, ())
    elif (joined := _joined(builder, operation, holes)) is not None:
        filled, roles = joined
    else:
        return f"depends on {len(roles)} widths"
    widths: tuple[Width, ...] = tuple(roles) or (1,)
    kind = CALL_KINDS[len(widths) - 1]
    text = call_text(_out_of_place(operation.function), *filled)
    dense = {d.name: d.size for d in builder.dimensions.values()}
    if (obstacle := _obstacle(kind, text, tuple(width_at(width, dense) for width in widths))) is not None:
        return None if obstacle == "moves no data" else obstacle
    builder.add_term(name, engine, kind, widths, builder.block_of(operation.module), call=text)
    return None


@cache
def _obstacle(kind: str, text: str, widths: tuple[int, ...]) -> str | None:
    return call_obstacle(OperatorSignature.make(kind, call=text), widths)


def _simple_pool(operation: Operation) -> tuple[int, int, int] | None:
    """Window, stride and padding of a max-pooling that a `MaxPool` describes."""
    if operation.name != "max_pool2d":
        return None
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {**dict(zip(names, operation.arguments)), **operation.keywords}
    sizes = [given.get("kernel_size"), given.get("stride") or given.get("kernel_size"), given.get("padding", 0)]
    plain = given.get("dilation", 1) == 1 and not given.get("ceil_mode") and not given.get("return_indices")
    if not plain or not all(isinstance(size, int) for size in sizes) or len(given["input"]["input"]) != 4:
        return None
    return sizes[0], sizes[1], sizes[2]


def _roles(widths: Any) -> list[Width]:
    """What the widths are made of: dimensions, and sums of several that appear as a whole."""
    roles: dict[Width, None] = {}
    for width in widths:
        if isinstance(width, WidthSum) and len(width.parts) == 1:
            roles[width.parts[0][0]] = None
        else:
            roles[width] = None
    return list(roles)


def _written(width: Width, roles: Sequence[Width]) -> str:
    if width in roles:
        return f"${roles.index(width)}"
    assert isinstance(width, WidthSum)
    (name, times), fixed = width.parts[0], width.fixed
    return f"{times}*${roles.index(name)}" if not fixed else f"{fixed}+{times}*${roles.index(name)}"


def _joined(
    builder: SpaceBuilder, operation: Operation, holes: Mapping[Place, Width]
) -> tuple[Template, list[Width]] | None:
    """A concatenation of many parts as one of two parts of the same size in all; its arguments and its one width."""
    tensors = operation.arguments[0] if operation.name in ("cat", "concat", "concatenate") else None
    if not isinstance(tensors, list) or not all(isinstance(t, dict) and "input" in t for t in tensors):
        return None
    given = [*operation.arguments[1:2], operation.keywords.get("dim", 0)]
    axis = given[0] % len(tensors[0]["input"])
    parts: dict[str, int] = {}
    fixed = 0
    for index, tensor in enumerate(tensors):
        width = holes.get((0, 0, index, "input", axis), tensor["input"][axis])
        for name in width_dimensions(width):
            parts[name] = parts.get(name, 0) + (dict(width.parts)[name] if isinstance(width, WidthSum) else 1)
        fixed += width.fixed if isinstance(width, WidthSum) else 0 if isinstance(width, str) else width
    whole = WidthSum(tuple(parts.items()), fixed)
    smallest = width_at(whole, {name: builder.dimensions[name].options[0] for name in parts})
    piece = min(PIECE, smallest // 2)
    first, second = list(tensors[0]["input"]), list(tensors[0]["input"])
    first[axis], second[axis] = f"-{piece}+$0", piece
    return [[[{"input": first}, {"input": second}], *operation.arguments[1:]], operation.keywords], [whole]


def _filled(template: Template, holes: Mapping[Place, str], place: Place) -> Template:
    if place in holes:
        return holes[place]
    if isinstance(template, dict):
        return {key: _filled(value, holes, (*place, key)) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, holes, (*place, index)) for index, value in enumerate(template)]
    return template


def _out_of_place(function: str) -> str:
    """``add`` for ``add_`` and ``__iadd__``: a probe reads graph inputs, which stay."""
    stem, _, name = function.rpartition(".")
    plain = name.strip("_")
    plain = plain[1:] if name.startswith("__i") and plain[1:] in ("add", "sub", "mul", "truediv") else plain
    return f"{stem}.{plain}" if name.endswith("_") and not name.startswith("__r") else function


def _label(part: nn.Module, operation: Operation) -> str:
    """For people: the class of a module that is one operator, else the function."""
    module = part.get_submodule(operation.module)
    alone = operation.module and next(module.children(), None) is None
    return type(module).__name__ if alone else operation.name
