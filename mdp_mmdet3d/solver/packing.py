"""States of many variables packed into a few integers, so that adding joins plans and comparing orders them."""

from __future__ import annotations

import numpy as np

from mdp_mmdet3d.solver.graph import FactorGraph
from mdp_mmdet3d.solver.problem import ProblemStructure

_WORD_BITS = 62


class Packing:
    """Bit fields for the options of all dimensions, then the kept flags of all blocks, most significant first.

    Only what the graph leaves open takes bits. "Off" counts as the last option, which is its canonical form, so
    a larger tuple of words is a lexicographically larger plan.

    Attributes:
        words: Number of words W.
        codes: Per variable, ``(states, W)``: what choosing a state adds.
    """

    def __init__(self, graph: FactorGraph) -> None:
        self.graph = graph
        problem = graph.problem
        self._fields: list[tuple[int, bool, int, int, np.ndarray]] = []
        word, room = 0, _WORD_BITS
        digits: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in graph.states]
        slots = [
            (d, False, np.minimum(graph.states[d], len(dimension.options) - 1))
            for d, dimension in enumerate(problem.dimensions)
        ]
        slots += [(b, True, graph.kept_states(b).astype(np.int64)) for b in range(len(problem.blocks))]
        for index, is_block, numbers in slots:
            meanings, digit = np.unique(numbers, return_inverse=True)
            bits = int(len(meanings) - 1).bit_length()
            if bits > room:
                word, room = word + 1, _WORD_BITS
            room -= bits
            self._fields.append((index, is_block, word, room, meanings))
            digits[graph.witness[index] if is_block else index].append((word, room, digit))
        self.words = word + 1
        self.codes = []
        for states, parts in zip(graph.states, digits):
            code = np.zeros((len(states), self.words), dtype=np.int64)
            for position, shift, digit in parts:
                code[:, position] += digit.astype(np.int64) << shift
            self.codes.append(code)

    def unpack(self, words: np.ndarray) -> ProblemStructure:
        """The plan of ``(W,)`` summed codes."""
        options = [0] * len(self.graph.problem.dimensions)
        kept = [False] * len(self.graph.problem.blocks)
        for index, is_block, word, shift, meanings in self._fields:
            mask = (1 << int(len(meanings) - 1).bit_length()) - 1
            meaning = int(meanings[(int(words[word]) >> shift) & mask])
            if is_block:
                kept[index] = bool(meaning)
            else:
                options[index] = meaning
        return self.graph.problem.canonical(ProblemStructure(tuple(options), tuple(kept)))
