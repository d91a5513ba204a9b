"""Random networks through tracing and surgery: right, left alone, wrong, crash or hang.

    python benchmarks/fuzz.py --count 30                    # seeds 0 to 29; a failing network is shrunk and printed
    python benchmarks/fuzz.py --count 1 --seed 17 --json F
    python benchmarks/fuzz.py --stacks --onnx               # transformers (benchmarks/fuzz_stacks.py), and their export
    python benchmarks/fuzz.py --stacks --onnx --embed-width

Networks are lists of layers: plain, residual, concatenated, split, depthwise, grouped, transposed and gated
(squeeze-and-excitation, or one half of a split by the other) convolutions with batch norm, group norm or layer norm
over channels, shared towers, several outputs. "right": for random plans the pruned model equals the masked one and
reloads from its state dict, and with --onnx the exported pruned model equals it. "alone": nothing was offered.
"""

from __future__ import annotations

import argparse
import copy
import io
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_stacks
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mdp_mmdet3d.adapters import InputShape
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.files import write_json
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.space.types import Dimension, DimensionKind, PruningSpace
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

SIZE = (32, 32)
KINDS = ("conv", "residual", "concat", "split", "halves", "depthwise", "grouped", "gate", "down", "up",
         "tower", "output")  # fmt: skip
NORMS = ("bn", "bn", "gn", "ln", "none")
TOLERANCE = 1e-4  # of the largest output
Spec = list[tuple[str, int, str]]


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over the channels."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def unit(inputs: int, outputs: int, norm: str, kernel: int = 3, **settings: Any) -> nn.Sequential:
    """Convolution, norm and activation."""
    norms = {
        "bn": lambda: nn.BatchNorm2d(outputs),
        "gn": lambda: nn.GroupNorm(4, outputs),
        "ln": lambda: ChannelNorm(outputs),
        "none": nn.Identity,
    }
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)
    return nn.Sequential(conv, norms[norm](), nn.ReLU())


class Layer(nn.Module):
    """One entry of a `Spec`."""

    def __init__(self, kind: str, inputs: int, width: int, norm: str) -> None:
        super().__init__()
        self.kind, self.outputs = kind, inputs
        if kind in ("conv", "down"):
            self.a = unit(inputs, width, norm, stride=2 if kind == "down" else 1)
            self.outputs = width
        elif kind == "residual":
            self.a, self.b = unit(inputs, width, norm), nn.Conv2d(width, inputs, 3, padding=1)
        elif kind == "concat":
            self.a, self.b = unit(inputs, width, norm), unit(inputs, 2 * width, norm, kernel=1)
            self.outputs = 3 * width
        elif kind == "split":
            self.a = unit(inputs // 2, inputs // 2, norm)
        elif kind == "halves":
            self.a, self.b = nn.Conv2d(inputs, 2 * width, 3, padding=1), unit(width, inputs, norm)
        elif kind == "up":
            self.a = nn.Sequential(nn.ConvTranspose2d(inputs, width, 2, 2), *unit(width, width, norm)[1:])
            self.outputs = width
        elif kind == "depthwise":
            self.a = unit(inputs, inputs, norm, groups=inputs)
        elif kind == "grouped":
            self.a = unit(inputs, inputs, norm, groups=4)
        elif kind == "gate":
            self.a, self.b = nn.Conv2d(inputs, width, 1), nn.Conv2d(width, inputs, 1)
        elif kind == "tower":
            self.a, self.b = unit(inputs, width, norm), nn.Conv2d(width, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer."""
        if self.kind == "residual":
            return torch.relu(x + self.b(self.a(x)))
        if self.kind == "concat":
            return torch.cat([self.a(x), self.b(x)], dim=1)
        if self.kind == "split":
            left, right = x.chunk(2, dim=1)
            return torch.cat([left, self.a(right)], dim=1)
        if self.kind == "halves":
            left, right = self.a(x).chunk(2, dim=1)
            return x + self.b(left * torch.sigmoid(right))
        if self.kind == "up":
            return self.a(nn.functional.max_pool2d(x, 2))
        if self.kind == "gate":
            return x * torch.sigmoid(self.b(torch.relu(self.a(x.mean((2, 3), keepdim=True)))))
        if self.kind == "tower":  # the same weights at two resolutions
            small = self.b(self.a(nn.functional.max_pool2d(x, 2)))
            return x + self.b(self.a(x)) + nn.functional.interpolate(small, size=x.shape[-2:])
        return x if self.kind == "output" else self.a(x)


class Network(nn.Module):
    """A stem, the layers of a `Spec` and one head per output."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.stem = unit(3, 16, "bn")
        width, layers, self.heads = 16, [], nn.ModuleList()
        for kind, size, norm in spec:
            layers.append(Layer(kind, width, size, norm))
            width = layers[-1].outputs
            if kind == "output":
                self.heads.append(nn.Conv2d(width, 5, 1))
        self.layers, self.kinds = nn.ModuleList(layers), [kind for kind, _, _ in spec]
        self.heads.append(nn.Conv2d(width, 7, 1))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> tuple[Tensor, ...]:
        """Outputs of all heads."""
        x, results, heads = self.stem(inputs), [], iter(self.heads)
        for layer, kind in zip(self.layers, self.kinds):  # a removed layer has no kind of its own any more
            x = layer(x)
            if kind == "output":
                results.append(next(heads)(x))
        return (*results, next(heads)(x))


def random_spec(seed: int) -> Spec:
    """Three to eight layers; at most two halve the resolution."""
    rng = np.random.default_rng(seed)
    spec: Spec = []
    for _ in range(rng.integers(3, 9)):
        kind = str(rng.choice(KINDS))
        if kind == "down" and sum(k == "down" for k, _, _ in spec) == 2:
            kind = "conv"
        spec.append((kind, int(rng.choice([8, 16, 24])), str(rng.choice(NORMS))))
    return spec


def build(spec: Spec, seed: int) -> Network:
    """The network with random weights and statistics."""
    torch.manual_seed(seed)
    model = Network(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def random_plan(space: PruningSpace, rng: np.random.Generator) -> PruningPlan:
    kept = {
        d.name: tuple(
            tuple(sorted(rng.choice(d.size, count, replace=False).tolist()))
            for count in [int(rng.choice(d.options))] * d.copies
        )
        for d in space.dimensions
    }
    removed = {b.name for b in space.blocks if rng.random() < 0.3}
    return PruningPlan.from_kept(space, kept, frozenset(removed))


def outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(image))


class Hang(Exception):
    """Tracing took longer than the limit."""


def judge(
    spec: Spec,
    seed: int,
    limit_s: int,
    make: Callable[[Spec, int], nn.Module] = build,
    onnx: bool = False,
    embed_width: bool = False,
) -> dict[str, Any]:
    """What becomes of one network, which ``make`` builds from the spec and a seed."""

    def late(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_s)
    try:
        return _judge(spec, seed, make, onnx, embed_width)
    except Hang:
        return {"verdict": "hang", "why": f"longer than {limit_s} s"}
    except Exception as error:  # whatever a network makes the line raise is what is being counted
        return {"verdict": "crash", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        signal.alarm(0)


def _judge(
    spec: Spec, seed: int, make: Callable[[Spec, int], nn.Module], onnx: bool, embed_width: bool
) -> dict[str, Any]:
    model = make(spec, seed)
    adapter = SingleGraph(Config({}), InputShape(1, *SIZE))
    space = adapter.trace(model, SpaceOptions(4, 4, 4, 0.0, (), embed_width=embed_width))
    reasons = [f"{n.module}: {n.reason}" for n in space.not_prunable]
    if not space.dimensions and not space.blocks:
        return {"verdict": "alone", "why": "; ".join(reasons)[:300]}
    members = {m.tensor for d in space.dimensions for m in d.members}
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    share = sum(size for name, size in sizes.items() if name in members) / sum(sizes.values())
    rng, image = np.random.default_rng(seed), torch.randn(1, 3, *SIZE)
    for _ in range(3):
        plan = random_plan(space, rng)
        pruned, masked = apply_plan(copy.deepcopy(model), plan), mask_model(copy.deepcopy(model), plan)
        stored = io.BytesIO()
        torch.save(pruned.state_dict(), stored)
        stored.seek(0)
        again = apply_plan(make(spec, seed + 1), plan)
        again.load_state_dict(torch.load(stored, weights_only=True))
        for found, expected, reloaded in zip(outputs(pruned, image), outputs(masked, image), outputs(again, image)):
            difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
            if not difference <= TOLERANCE:
                return {"verdict": "wrong", "why": f"pruned and masked differ by {difference:.1e}", "share": share}
            if not torch.equal(found, reloaded):
                return {"verdict": "wrong", "why": "reloading changes the outputs", "share": share}
    if onnx:
        with tempfile.TemporaryDirectory() as folder:
            adapter.export(pruned, Path(folder), plan_hash=plan.hash, weights="random")
            difference = max(adapter.compare(masked, Path(folder), [image.numpy()]).values())
        if not difference <= TOLERANCE:
            return {"verdict": "wrong", "why": f"ONNX and masked differ by {difference:.1e}", "share": share}
    counts = {"blocks": len(space.blocks), "dimensions": len(space.dimensions)}
    return {"verdict": "right", "share": share, **counts, "embed_widths": sum(map(is_embed_width, space.dimensions))}


def is_embed_width(dimension: Dimension) -> bool:
    return dimension.kind is DimensionKind.EMBED_WIDTH


def shrink(spec: Spec, verdict: str, judged: Callable[[Spec], dict[str, Any]]) -> Spec:
    """The smallest list of layers, by leaving out one after the other, that is judged the same."""
    position = 0
    while position < len(spec):
        shorter = spec[:position] + spec[position + 1 :]
        if judged(shorter)["verdict"] == verdict:
            spec = shorter
        else:
            position += 1
    return spec


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--limit", type=int, default=60, help="seconds per network (default 60)")
    parser.add_argument("--stacks", action="store_true", help="transformers instead of convolutional networks")
    parser.add_argument("--onnx", action="store_true", help="export each, and compare")
    parser.add_argument("--embed-width", action="store_true", help="cut the embedding widths of transformers too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    draw, make = (fuzz_stacks.random_spec, fuzz_stacks.build) if args.stacks else (random_spec, build)
    warnings.simplefilter("ignore")
    rows = []
    for seed in range(args.seed, args.seed + args.count):
        spec = draw(seed)
        judged = partial(judge, seed=seed, limit_s=args.limit, make=make, onnx=args.onnx, embed_width=args.embed_width)
        row = {"seed": seed, **judged(spec)}
        if row["verdict"] in ("wrong", "crash", "hang"):
            row["layers"] = shrink(spec, row["verdict"], judged)
        rows.append(row)
        share = f"{row['share']:.2f}" if "share" in row else "-"
        print(f"{seed:<5} {row['verdict']:<6} {share:<5} {row.get('why', '')} {row.get('layers', '')}", flush=True)
    counts = Counter(row["verdict"] for row in rows)
    shares = [row.get("share", 0.0) for row in rows]
    print(f"{dict(counts)}; share of weights prunable: median {np.median(shares):.2f}")
    if args.embed_width:
        print(f"embedding width prunable in {sum(row.get('embed_widths', 0) > 0 for row in rows)} of {len(rows)}")
    if args.json:
        write_json(args.json, {"schema_version": 1, "rows": rows})
    return 1 if counts["wrong"] or counts["crash"] or counts["hang"] else 0


if __name__ == "__main__":
    sys.exit(main())
