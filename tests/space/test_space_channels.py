"""Concatenated, grouped and group-normalised channels: what is cut together, and what the operators behind cost."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mdp_mmdet3d.adapters.network import record_input_shapes
from mdp_mmdet3d.importance.table import ImportanceTable
from mdp_mmdet3d.operators import OPERATORS
from mdp_mmdet3d.solver import ProblemStructure, SolveStatus, solve
from mdp_mmdet3d.solver.build import LATENCY, Ranking, build_problem, kept_elements
from mdp_mmdet3d.solver.links import options_of
from mdp_mmdet3d.space.builder import SpaceBuilder, SpaceOptions
from mdp_mmdet3d.space.channels import ChannelTies, Run
from mdp_mmdet3d.space.conv import add_conv_dimensions
from mdp_mmdet3d.space.conv_terms import add_conv_term
from mdp_mmdet3d.space.files import from_dict, to_dict
from mdp_mmdet3d.space.types import PruningSpace, WidthSum, cost_axes
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan


class Aggregation(nn.Module):
    """``parts`` convolutions one behind the other; another one reads them all."""

    def __init__(self, parts: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.parts = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(parts))
        self.join = nn.Conv2d(parts * width, width, 1)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        x, found = self.stem(x), []
        for part in self.parts:
            x = torch.relu(part(x))
            found.append(x)
        return self.head(torch.relu(self.join(torch.cat(found, dim=1))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32)
        self.b = nn.Conv2d(32, 64, 3, padding=1, groups=4)  # four groups of 8 inputs and 16 outputs
        self.c = nn.Conv2d(64, 5, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x))))))


def traced(net, **options):
    torch.manual_seed(0)
    builder = SpaceBuilder(net, SpaceOptions(**{"channel_multiple": 8, **options}))
    add_conv_dimensions(builder, net, outputs_are_read=False)
    shapes = record_input_shapes(net, lambda: net(torch.zeros(1, 3, 16, 16)))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            add_conv_term(builder, name, module, shapes[name][0], "model")
    return builder.finish("net", model_digest(net))


class WorkLatency:
    """A device on which an operator costs its multiplications."""

    total_fixed_ms = 1.0

    def __init__(self, space):
        self.space = space

    def of(self, term, widths):
        return 1e-6 * OPERATORS[term.signature.kind].work(term.signature, widths).macs

    def predict(self, counts):
        return self.total_fixed_ms + sum(self.of(t, t.counts(counts)) for t in self.space.frame_terms())

    def cost_array(self, term, sums={}):  # noqa: B006
        axes = cost_axes(term, sums)
        options = [sums[a] if isinstance(a, WidthSum) else self.space.by_name[a].options for a in axes]
        array = np.empty([len(o) for o in options])
        for index in np.ndindex(array.shape):
            chosen = {a: o[i] for a, o, i in zip(axes, options, index)}
            widths = [chosen[w] if w in sums else WidthSum(((w, 1),)) if isinstance(w, str) else w for w in term.widths]
            widths = [
                w.fixed + sum(t * chosen[n] for n, t in w.parts) if isinstance(w, WidthSum) else w for w in widths
            ]
            array[index] = self.of(term, tuple(widths))
        return array, np.zeros(array.shape, dtype=bool)


def importance_of(space):
    rng = np.random.default_rng(0)
    scores = {d.name: {s.block: rng.exponential(size=(d.copies, d.size)) for s in d.sources} for d in space.dimensions}
    return ImportanceTable(space.model_digest, "random", 1, 0, 1, scores)


def test_ties_tell_elements_that_touch_different_layers_apart():
    ties, a, b = ChannelTies(), ("a", "out"), ("b", "in")
    ties.add(a, 8)
    ties.add(b, 4)
    ties.tie(a, range(4, 8), b, range(4))
    left, right = ties.bundles(a, [a, b])
    assert left.runs == {a: (Run(0, 1),)} and right.runs == {a: (Run(4, 1),), b: (Run(0, 1),)}
    ties.tie(a, range(4), a, range(4, 8))  # halves that go together
    (both,) = ties.bundles(a, [a, b])
    assert both.runs == {a: (Run(0, 1), Run(4, 1)), b: (Run(0, 1),)} and len(both.elements) == 4
    ties.tie(a, [0, 2], a, [1, 3])
    (pairs,) = ties.bundles(a, [a, b])
    assert pairs.runs[b] == (Run(0, 2),)
    ties = ChannelTies()
    ties.add(a, 4)
    ties.add(b, 4)
    ties.tie(a, range(4), b, [1, 0, 3, 2])  # shuffled
    (shuffled,) = ties.bundles(a, [a, b])
    assert shuffled.runs[b] is None


def test_groups_go_as_a_whole_and_are_priced_as_such():
    net = Grouped().eval()
    space = traced(net)
    (dimension,) = space.dimensions
    assert (dimension.name, dimension.size, dimension.options) == ("b.out", 4, (1, 2, 3, 4))
    widths = {(m.tensor, m.axis): m.width for m in dimension.members}
    assert widths["a.weight", 0] == widths["norm.bias", 0] == 8
    assert widths["b.weight", 0] == widths["c.weight", 1] == 16 and ("b.weight", 1) not in widths
    terms = {t.name: t for t in space.terms}
    assert terms["b"].signature.kind == "grouped_conv" and terms["b"].widths == ("b.out",)
    assert terms["c"].counts({"b.out": 3}) == (48, 5)
    plan = PruningPlan.from_kept(space, {"b.out": ((1, 3),)}, frozenset())
    x = torch.randn(1, 3, 16, 16)
    pruned, masked = apply_plan(copy.deepcopy(net), plan), mask_model(copy.deepcopy(net), plan)
    assert (pruned.norm.num_groups, pruned.b.groups, pruned.b.in_channels, pruned.c.in_channels) == (4, 2, 16, 32)
    with torch.no_grad():
        expected = masked(x)
        torch.testing.assert_close(pruned(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    dense = OPERATORS["grouped_conv"].work(terms["b"].signature, (4,))
    assert dense.macs == 16 * 16 * 64 * 8 * 9 and OPERATORS["grouped_conv"].work(terms["b"].signature, (2,)).macs == (
        dense.macs / 2
    )
    call, inputs = OPERATORS["grouped_conv"].torch_call(terms["b"].signature, (2,))
    with torch.no_grad():
        assert call(*inputs).shape == (1, 32, 16, 16)


@pytest.mark.parametrize("parts, exact", [(2, True), (3, True), (6, False)])
def test_the_program_prices_a_concatenation_by_its_sum(parts, exact):
    """Up to 16 attainable sums exactly; beyond, never below what the operators cost."""
    options = {"max_options": 4} if parts <= 3 else {"max_options": 8, "channel_multiple": 4}
    space = traced(Aggregation(parts), **options)
    assert {"stem.out", *(f"parts.{i}.out" for i in range(parts)), "join.out"} == set(space.by_name)
    assert from_dict(to_dict(space)) == space and isinstance(space, PruningSpace)
    importance, latency = importance_of(space), WorkLatency(space)
    ranking = Ranking.by_importance(space, importance)
    problem = build_problem(space, importance, latency, ranking)
    assert (len(problem.dimensions) > len(space.dimensions)) == (parts > 2)
    rng, above = np.random.default_rng(0), 0
    for _ in range(40):
        counts = {d.name: int(rng.choice(d.options)) for d in space.dimensions}
        structure = ProblemStructure(options_of(problem, counts), ())
        found, expected = problem.evaluate(structure).costs[LATENCY], latency.predict(counts)
        assert problem.allows(structure) and found >= expected * (1 - 1e-12)
        above += found > expected * (1 + 1e-9)
    assert (above == 0) == exact
    dense = problem.dense.costs[LATENCY]
    assert dense == pytest.approx(latency.predict({d.name: d.size for d in space.dimensions}))
    result = solve(problem, {LATENCY: 0.5 * dense})
    assert result.status is SolveStatus.OPTIMAL
    kept, _ = kept_elements(space, ranking, result.plan)
    assert latency.predict({name: len(copies[0]) for name, copies in kept.items()}) <= 0.5 * dense * (1 + 1e-9)
