"""Random networks (benchmarks/fuzz.py): what is offered is right; what tracing does not follow is left alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mdp_mmdet3d.adapters.residual_blocks import find_residual_blocks
from mdp_mmdet3d.space.calls import record_calls

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
LIMIT_S = 120


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_random_networks_are_right_and_mostly_prunable(fuzz):
    rows = [fuzz.judge(fuzz.random_spec(seed), seed, LIMIT_S) for seed in range(10)]
    assert all(row["verdict"] in ("right", "alone") for row in rows), rows
    assert np.median([row.get("share", 0.0) for row in rows]) >= 0.8, rows


@pytest.mark.parametrize(
    "spec",
    [
        [("concat", 16, "bn"), ("concat", 8, "gn"), ("conv", 16, "ln")],
        [("grouped", 16, "gn"), ("concat", 8, "bn"), ("depthwise", 16, "ln")],
    ],
)
def test_what_is_concatenated_and_grouped_is_right_in_onnx_too(spec, fuzz):
    row = fuzz.judge(spec, 0, LIMIT_S, onnx=True)
    assert row["verdict"] == "right" and row["share"] > 0.95, row


@pytest.mark.parametrize("before, block", [("conv", True), ("tower", False)])
def test_only_behind_a_relu_a_residual_layer_without_its_branch_passes_its_input_on(before, block, fuzz):
    """Seed 10095 was wrong: what entered the layer was below 0, and verification happened to cut just that."""
    model = fuzz.build([(before, 16, "bn"), ("residual", 16, "bn")], 0)
    calls = record_calls(model, lambda: model(torch.randn(1, 3, 32, 32)))
    assert ("layers.1" in [found.name for found in find_residual_blocks(calls)[0]]) is block


def test_a_width_that_cannot_be_cut_takes_no_price_from_others(fuzz):
    """With half of a split cut alone no model with other widths runs, and upsampled widths were without a term."""
    spec = [("split", 8, "gn"), ("split", 8, "none"), ("up", 16, "bn"), ("up", 24, "bn")]
    found = fuzz.judge(spec, 2051, 120)
    assert found["verdict"] == "right" and found["dimensions"] == 3, found


def test_halves_of_a_split_that_must_be_equally_wide_are_left_alone(fuzz):
    """One half comes from the stem, the other from the layer between: cut alone, the split is in the wrong place."""
    spec = [("split", 24, "ln"), ("output", 8, "bn"), ("gate", 8, "gn"), ("split", 8, "bn"), ("up", 24, "none")]
    found = fuzz.judge(spec, 2078, 120)
    assert found["verdict"] == "right" and found["share"] > 0.5, found


@pytest.mark.parametrize("embed_width", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_transformers(seed, embed_width, fuzz):
    stacks = fuzz.fuzz_stacks
    spec = stacks.random_spec(seed)
    row = fuzz.judge(spec, seed, LIMIT_S, make=stacks.build, onnx=True, embed_width=embed_width)
    assert row["verdict"] == "right" and row["share"] > 0.8, row
    assert row["embed_widths"] == embed_width, row


def test_attention_of_torch_has_an_onnx_form(fuzz):
    """In evaluation mode it would run a fused operator that the exporter does not know."""
    spec = [("ffn/packed", 32, "post"), ("self/torch", 4, "pre")]
    row = fuzz.judge(spec, 0, LIMIT_S, make=fuzz.fuzz_stacks.build, onnx=True)
    assert row["verdict"] == "right", row


@pytest.mark.parametrize(
    "spec",
    [
        [("split", 16, "none"), ("split", 16, "bn"), ("concat", 8, "gn")],
        [("halves", 16, "ln"), ("up", 24, "gn"), ("up", 8, "bn"), ("halves", 8, "bn")],
    ],
)
def test_channels_that_are_split_or_upsampled_are_cut(spec, fuzz):
    row = fuzz.judge(spec, 0, LIMIT_S, onnx=True)
    assert row["verdict"] == "right" and row["share"] > 0.6, row
