"""A vision transformer with its embedding width as a global dimension: seconds, proof, combinations ruled out.

    python benchmarks/solver_global.py                       # DeiT-base, 8 embedding widths
    python benchmarks/solver_global.py --layers 24 --json F

Tables come from a cost model (matrix products in tiles of 64, a launch time per operator), importances are random with
a heavy tail; the structure is the real one: per layer heads, q/k width, v width and hidden width of the MLP, attention
and MLP as removable blocks, and nearly everything depends on the embedding width.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mdp_mmdet3d.errors import InfeasibleBudgetError
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.solver import ProblemBlock, ProblemDimension, ProblemTerm, PruningProblem, solve
from mdp_mmdet3d.solver.certificate import audit
from mdp_mmdet3d.solver.conditioning import conditions

BUDGETS = (0.7, 0.5, 0.3, 0.15)
TOKENS, EMBED, HEADS, HEAD_WIDTH, HIDDEN = 197, 768, 12, 64, 3072
LAUNCH_MS, GIGAFLOPS, TILE = 0.004, 9000.0, 64


def product_ms(rows: Any, inner: Any, columns: Any) -> np.ndarray:
    """Milliseconds of a matrix product; widths are rounded up to tiles."""
    tiles = [-(-np.asarray(n, dtype=np.float64) // TILE) * TILE for n in (inner, columns)]
    return LAUNCH_MS + 2.0 * np.asarray(rows) * tiles[0] * tiles[1] / GIGAFLOPS * 1e-6


def transformer(layers: int = 12, widths: int = 8, seed: int = 0) -> PruningProblem:
    """The program of one transformer; its last dimension, the embedding width, is global."""
    rng = np.random.default_rng(seed)
    embed = np.arange(1, widths + 1) * (EMBED // widths)
    heads, inner = np.arange(1, HEADS + 1), np.arange(1, 5) * (HEAD_WIDTH // 4)
    hidden = np.arange(1, 13) * (HIDDEN // 12)
    dimensions, blocks, terms = [], [], []
    width = 4 * layers  # index of the embedding width, which comes last

    def kept(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.cumsum(np.sort(scores)[::-1])[counts - 1]

    def term(name: str, axes: tuple[int, ...], block: int | None, cost: np.ndarray, value: np.ndarray | None = None):
        terms.append(ProblemTerm(name, axes, block, {"latency_ms": cost}, value))

    stream = rng.exponential(size=EMBED) ** 2
    for layer in range(layers):
        first = len(dimensions)
        dimensions += [
            ProblemDimension(f"layer {layer} {what}", tuple(int(k) for k in counts))
            for what, counts in (("heads", heads), ("q/k", inner), ("v", inner), ("MLP", hidden))
        ]
        attention, mlp = len(blocks), len(blocks) + 1
        blocks += [ProblemBlock(f"layer {layer} attention"), ProblemBlock(f"layer {layer} MLP")]
        h, q, v, e = np.ix_(heads, inner, inner, embed)
        # q, k and v projections, scores, weighted sum, output projection; softmax and norm count as launches
        cost = (
            product_ms(TOKENS, e, h * (2 * q + v))
            + product_ms(h * TOKENS, q, TOKENS)
            + product_ms(h * TOKENS, TOKENS, v)
            + product_ms(TOKENS, h * v, e)
            + 2 * LAUNCH_MS
        )
        term(f"layer {layer} attention", (first, first + 1, first + 2, width), attention, cost)
        m, e = np.ix_(hidden, embed)
        cost = product_ms(TOKENS, e, m) + product_ms(TOKENS, m, e) + 2 * LAUNCH_MS
        term(f"layer {layer} MLP", (first + 3, width), mlp, cost)
        weight = rng.uniform(0.3, 1.0) * np.array([1.0, 1.0, 1.0, 0.5])
        for axis in (1, 2):
            scores = rng.exponential(size=(HEADS, HEAD_WIDTH)) ** 2 * rng.exponential(size=(HEADS, 1))
            per_head = np.cumsum(-np.sort(-scores, axis=1), axis=1)[:, inner - 1]
            value = np.cumsum(per_head[np.argsort(-scores.sum(axis=1))], axis=0)
            term("value of heads", (first, first + axis), attention, np.zeros(value.shape), weight[axis] * value)
        scores = rng.exponential(size=HIDDEN) ** 2
        term("value of MLP", (first + 3,), mlp, np.zeros(12), weight[3] * kept(scores, hidden))
        for block in (attention, mlp):
            share = kept(stream * rng.uniform(0.5, 1.5, EMBED), embed)
            term("value of embedding", (width,), block, np.zeros(widths), weight[0] * share)
    dimensions.append(ProblemDimension("embedding", tuple(int(k) for k in embed)))
    term("patches", (width,), None, product_ms(TOKENS - 1, 768, embed), kept(stream, embed))
    term("classes", (width,), None, product_ms(1, embed, 1000))
    return PruningProblem(
        "transformer", ("latency_ms",), tuple(dimensions), tuple(blocks), tuple(terms), global_dimensions=(width,)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--widths", type=int, default=8, help="options of the embedding width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="solve every combination by itself as well")
    parser.add_argument("--audit", type=float, metavar="S", help="SCIP on the whole program, S seconds per budget")
    parser.add_argument("--json", type=Path, help="also write all rows here")
    args = parser.parse_args()
    problem = transformer(args.layers, args.widths, args.seed)
    rows = []
    for share in BUDGETS:
        budgets = {"latency_ms": share * problem.dense.costs["latency_ms"]}
        result = solve(problem, budgets)
        assert result.combinations is not None
        row = {"budget_share": share, "value_share": result.objective / problem.dense.value, **result.to_json()}
        row["embedding"] = problem.counts(result.plan)["embedding"]
        row["removed_blocks"] = len(problem.removed_blocks(result.plan))
        found = result.combinations
        print(
            f"{share:<5} {result.status.value} gap {result.gap:.0e}  value {row['value_share']:.4f}  embedding "
            f"{row['embedding']}, {row['removed_blocks']} blocks removed; {found.total} combinations: "
            f"{found.infeasible} over budget, {found.dropped} dropped, {found.solved} solved; "
            f"{result.seconds['total']:.2f} s ({result.proof})",
            flush=True,
        )
        if args.check:
            best = max(_alone(case.problem, budgets) for case in conditions(problem))
            print(
                f"      every combination by itself: {best / problem.dense.value:.4f}, {best - result.objective:+.1e}"
            )
        if args.audit:
            row["audit"] = audit(problem, result, time_limit_s=args.audit)
            print(f"      SCIP on the whole program: {row['audit']}")
        rows.append(row)
    if args.json:
        write_json(args.json, {"schema_version": 1, "rows": rows})


def _alone(problem: PruningProblem, budgets: dict[str, float]) -> float:
    try:
        return solve(problem, budgets).objective
    except InfeasibleBudgetError:
        return float("-inf")


if __name__ == "__main__":
    main()
