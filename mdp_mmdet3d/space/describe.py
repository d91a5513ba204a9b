"""A pruning space for people."""

from __future__ import annotations

from collections import Counter

from mdp_mmdet3d.space.types import DimensionKind, PruningSpace


def describe(space: PruningSpace) -> str:
    """Every dimension, block and number of cost terms, and what is left alone and why."""
    lines = [f"pruning space of {space.model} ({space.model_digest})", "", f"{len(space.dimensions)} dimensions:"]
    width = max((len(d.name) for d in space.dimensions), default=0)
    for d in space.dimensions:
        heads = d.copies // 2 if d.kind is DimensionKind.HEAD_WIDTH else d.copies
        copies = f" in each of {heads} heads" if d.copies > 1 else ""
        blocks = sorted({s.block for s in d.sources if s.block})
        where = f", in {blocks[0]}" if len(blocks) == 1 else f", shared by {len(blocks)} blocks" if blocks else ""
        lines.append(
            f"  {d.name:{width}}  {d.kind.value:8} {d.size:5} -> {', '.join(map(str, d.options[:-1]))}{copies}"
            f"  ({len(d.members)} tensors{where})"
        )
    lines += ["", f"{len(space.blocks)} removable blocks:"]
    for block in space.blocks:
        indent = "  " * len(space.chain(block.name))
        lines.append(f"{indent}{block.name}  {block.kind.value.replace('_', ' ')}")
    kinds = Counter((t.engine, t.signature.kind) for t in space.terms)
    lines += ["", f"{len(space.terms)} cost terms, {len({t.signature for t in space.terms})} distinct operators:"]
    for (engine, kind), count in sorted(kinds.items()):
        runs = space.runs(engine)
        often = " (runs once per rig, costs nothing per frame)" if engine in space.once else ""
        often = often or (f" (runs {runs} times per frame)" if runs > 1 else "")
        lines.append(f"  {engine}: {count} x {kind}{often}")
    lines += ["", "not prunable:"]
    lines += [f"  {n.module}: {n.reason}" for n in space.not_prunable]
    return "\n".join(lines)
