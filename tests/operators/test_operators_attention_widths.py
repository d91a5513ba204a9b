"""A probe of float16 is what a float16 deployment makes of an attention: heads padded to one width."""

from __future__ import annotations

import pytest

from mdp_mmdet3d.latency.graphs import operator_graph
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature

CROSS = OperatorSignature.make("attention", queries=6, keys=20, embed_dims=32, shared=False)
PACKED = OperatorSignature.make("attention", queries=6, keys=6, embed_dims=32, shared=True, packed=True)


@pytest.mark.parametrize(
    ("widths", "deployed"),
    [
        ((2, 24, 32), (2, 32, 32)),
        ((2, 4, 8), (2, 16, 16)),
        ((1, 4, 8), (1, 4, 8)),
        ((3, 20, 12), (3, 24, 24)),
        ((2, 16, 16), (2, 16, 16)),
    ],
)
def test_float16_is_measured_as_it_is_deployed(widths, deployed):
    def graph(signature, widths, precision):
        return operator_graph(signature, widths, precision).model

    assert graph(CROSS, widths, "float16") == graph(CROSS, deployed, "float16")
    assert (graph(CROSS, widths, "float32") == graph(CROSS, deployed, "float32")) is (widths == deployed)
    if widths != deployed:  # a packed projection is not padded
        assert graph(PACKED, widths, "float16") != graph(PACKED, deployed, "float16")


@pytest.mark.parametrize(
    ("fixed", "widths"),
    [
        (CROSS, (2, 16, 24)),
        (PACKED, (2, 8, 8)),
        (OperatorSignature.make("ffn", tokens=6, embed_dims=32, activation="gelu"), (48,)),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_sub_layer_whose_stream_has_a_width_to_choose_is_the_same_at_that_width(fixed, widths, precision):
    attributes = {name: value for name, value in fixed.attributes if name != "embed_dims"}
    chosen = OperatorSignature.make(f"stream_{fixed.kind}", **attributes)
    kinds = OPERATORS[chosen.kind], OPERATORS[fixed.kind]
    assert kinds[0].roles == (*kinds[1].roles, "embed_width")
    assert kinds[0].work(chosen, (*widths, 32)) == kinds[1].work(fixed, widths)
    narrow, wide = (operator_graph(chosen, (*widths, embed), precision).model for embed in (16, 32))
    assert wide == operator_graph(fixed, widths, precision).model
    assert narrow != wide
    call, inputs = kinds[0].torch_call(chosen, (*widths, 16))
    assert call(*inputs).shape[-1] == 16
