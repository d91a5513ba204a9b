"""The network before and after, as it flows: engines, modules, cards (blocks), layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mdp_mmdet3d.operators.opened import OPENED
from mdp_mmdet3d.report.html_inputs import RunFiles, plan_indices
from mdp_mmdet3d.report.html_order import first_uses, runs_after
from mdp_mmdet3d.solver.build import LATENCY
from mdp_mmdet3d.space.types import BlockKind, CostTerm, PruningSpace, width_at, width_dimensions

# Roles whose width is the layer's own; the others are widths of what comes before.
OWN_ROLES = {
    "conv": {1: ""},
    "linear": {1: ""},
    "attention": {0: "heads", 1: "q/k width", 2: "v width"},
    "ffn": {0: "hidden"},
}
OWN_ROLES |= {kind.name: OWN_ROLES[kind.base.name] for kind in OPENED}
CROWDED = 6  # a card of more layers that is no block is drawn as cards of its parts
REPLACED = {
    BlockKind.IDENTITY: "its input is passed on",
    BlockKind.RESIDUAL_BRANCH: "the shortcut stays",
    BlockKind.SUB_LAYER: "its input is passed on to the norm",
    BlockKind.LAYER: "the whole layer is left out",
    BlockKind.BRANCH: "nothing is added to the stream",
}


@dataclass
class Layer:
    """One width of one layer: ``kept`` of ``size``; a fixed one has no dimension."""

    name: str
    kept: int
    size: int
    dimension: str | None
    gone: bool = False
    times: int = 1

    @property
    def share(self) -> float:
        """Part that stays."""
        return 0.0 if self.gone else self.kept / self.size


@dataclass
class Card:
    """A block, or what lies together outside of blocks."""

    path: str
    name: str
    removed: str = ""
    layers: list[Layer] = field(default_factory=list)
    dense_ms: float = 0.0
    pruned_ms: float = 0.0


@dataclass
class Module:
    """Cards that follow each other."""

    path: str
    cards: dict[str, Card] = field(default_factory=dict)
    removed: bool = False

    @property
    def dense_ms(self) -> float:
        """Predicted, of all cards."""
        return sum(card.dense_ms for card in self.cards.values())

    @property
    def pruned_ms(self) -> float:
        """Predicted, of all cards."""
        return sum(card.pruned_ms for card in self.cards.values())


@dataclass
class Engine:
    """A deployed graph."""

    name: str
    once: bool
    modules: dict[str, Module] = field(default_factory=dict)


def structure(files: RunFiles) -> list[Engine]:
    """Engines, modules and cards in the order of the space's cost terms; what runs after its children after them."""
    places = Places(files.space)
    widths, removed = files.widths, files.removed
    sizes = {dimension.name: dimension.size for dimension in files.space.dimensions}
    costs = _term_ms(files)
    engines: dict[str, Engine] = {}
    seen: dict[tuple[str, str], Layer] = {}
    for term in files.space.terms:
        name, _, repeat = term.name.partition("#")
        module_path, card_path = places.of(name, term.block)
        engine = engines.setdefault(term.engine, Engine(term.engine, term.engine in files.space.once))
        module = engine.modules.setdefault(module_path, Module(module_path, removed=module_path in removed))
        card = module.cards.get(card_path)
        if card is None:
            card = module.cards[card_path] = Card(
                card_path, _short(card_path, module_path), _removed(files.space, card_path, removed)
            )
        gone = any(block in removed for block in files.space.chain(term.block))
        for role, title in OWN_ROLES.get(term.signature.kind, {}).items():
            width = term.widths[role]
            relative = title or name.removeprefix(card_path).strip(".") or term.signature.kind
            key = (name, relative)
            if key in seen:
                seen[key].times += bool(repeat)
                continue
            dense, kept = width_at(width, sizes), width_at(width, widths)
            seen[key] = Layer(relative, kept, dense, " + ".join(width_dimensions(width)) or None, gone)
            card.layers.append(seen[key])
        dense_ms, pruned_ms = costs.get(term.name, (0.0, 0.0))
        card.dense_ms += dense_ms
        card.pruned_ms += pruned_ms
    for engine in engines.values():
        children_first(engine, first_uses(files.work_dir, engine.name))
    return list(engines.values())


def children_first(engine: Engine, uses: dict[str, int]) -> None:
    """Split modules of which a part runs after the modules inside of them, as a head's branches after its decoder.

    Args:
        engine: Changed in place.
        uses: Position of the first use of each parameter in the engine's graph; empty leaves the order as it is.
    """
    order = list(engine.modules.values())
    for module in list(order):
        children = [other for other in order if other.path.startswith(f"{module.path}.")]
        later = runs_after(uses, list(module.cards.values()), [child.path for child in children])
        if not later:
            continue
        rest = Module(module.path, removed=module.removed)
        for card in later:
            rest.cards[card.path] = module.cards.pop(card.path)
        order.insert(order.index(children[-1]) + 1, rest)
        if not module.cards:
            order.remove(module)
    engine.modules = {f"{module.path}#{index}": module for index, module in enumerate(order)}


class Places:
    """Which module and card a layer is drawn in."""

    def __init__(self, space: PruningSpace) -> None:
        names = [block.name for block in space.blocks]
        self.layers = {p for name in names for p in _prefixes(name)[:-1] if p.rpartition(".")[2].isdigit()}
        self.parents = {name.rpartition(".")[0] for name in names}
        found: dict[str, set[str]] = {}
        for term in space.terms:
            name = term.name.partition("#")[0]
            if term.block is None and term.signature.kind in OWN_ROLES:
                found.setdefault(self._at(name, None)[1], set()).add(name)
        self.crowded = {card for card, layers in found.items() if len(layers) > CROWDED}

    def of(self, name: str, block: str | None) -> tuple[str, str]:
        """Paths of module and card of the layer ``name`` in ``block``."""
        module, card = self._at(name, block)
        if block is not None or card not in self.crowded or name == card:
            return module, card
        parts = name.removeprefix(f"{card}.").split(".")
        module = f"{card}.{parts[0]}" if parts[0].isdigit() and len(parts) > 2 else card
        return module, _unit(name, module)

    def _at(self, name: str, block: str | None) -> tuple[str, str]:
        prefixes = _prefixes(name)
        module = next((p for p in reversed(prefixes) if p in self.layers), None)
        module = module or next((p for p in reversed(prefixes) if p in self.parents and p), None)
        if module is None:
            return prefixes[0], prefixes[min(1, len(prefixes) - 1)]
        return module, block or _unit(name, module)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _unit(name: str, module: str) -> str:
    """``module`` and the next component, with its number if it has one."""
    parts = name.removeprefix(f"{module}.").split(".")
    length = 2 if len(parts) > 1 and not parts[0].isdigit() and parts[1].isdigit() else 1
    return ".".join([module, *parts[:length]])


def _short(card: str, module: str) -> str:
    rest = card.removeprefix(module).strip(".")
    return f"{module.rpartition('.')[2]}.{rest}" if rest.isdigit() else rest or card


def _removed(space: PruningSpace, card: str, removed: frozenset[str]) -> str:
    if card not in space.blocks_by_name or not removed.intersection(space.chain(card)):
        return ""
    if card not in removed:
        return "removed with its layer"
    return f"removed: {REPLACED[space.blocks_by_name[card].kind]}"


def _term_ms(files: RunFiles) -> Mapping[str, tuple[float, float]]:
    """Predicted milliseconds of every cost term, dense and pruned; empty without the program."""
    problem = files.problem
    if isinstance(problem, str):
        return {}
    plan = plan_indices(problem, files.widths, files.removed)
    terms: dict[str, CostTerm] = {term.name: term for term in files.space.terms}
    found = {}
    for term in problem.terms:
        if term.name in terms:
            cost = np.asarray(term.costs[LATENCY])
            kept = term.block is None or plan.kept[term.block]
            pruned = float(cost[tuple(plan.options[d] for d in term.dimensions)]) if kept else 0.0
            found[term.name] = (float(cost[(-1,) * cost.ndim]), pruned)
    return found
