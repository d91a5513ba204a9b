"""What pruned channels said is taken over by the kept ones: every kind of layer, alone and in a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mdp_mmdet3d.space.types import Block, BlockKind
from mdp_mmdet3d.surgery.repair import RepairSettings, repair
from mdp_mmdet3d.surgery.repair.stand_ins import run_ends

from .repair_nets import PRECISE, Attention, Residual, Shared, axes, cut, depend, error, frames_of, plan_of, randomise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(count: int = 4, channels: int = 3, size: int = 12) -> list[torch.Tensor]:
    return [torch.randn(2, channels, size, size) for _ in range(count)]


# The layer behind 8 channels, of which the last half are combinations of the first; where its inputs are sliced.
BEHIND = {
    "conv": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), "weight", 1),
    "dilated": (lambda: nn.Conv2d(8, 6, 3, padding=2, dilation=2, bias=False), "weight", 1),
    "reflected": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), "weight", 1),
    "same": (lambda: nn.Conv2d(8, 6, (3, 5), padding="same"), "weight", 1),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), "weight", 0),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), "weight", 1),
}


@pytest.mark.parametrize("kind", BEHIND)
def test_convolutions_take_over_what_pruned_channels_said(kind):
    make, tensor, axis = BEHIND[kind]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make()).eval()
    depend(model[0].weight.data, model[0].bias.data)
    if kind in ("conv", "dilated", "same", "transposed"):
        # A zero padding does not know the constant of a pruned channel.
        model[0].bias.data.zero_()
    plan = plan_of(model, {"0.out": (range(4), 8, axes(("0.weight", 0), ("0.bias", 0), (f"1.{tensor}", axis)))})
    pruned, inputs = cut(model, plan), images(5)
    before = error(model, pruned, inputs[-1])
    report = repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE)
    assert before > 0.1 and error(model, pruned, inputs[-1]) < 1e-4
    assert [layer.left for layer in report.layers] == ["it equals the dense model's", ""]
    assert report.layers[1].held_out[0] > 0.1 and report.layers[1].held_out[1] < 1e-3


def test_grouped_convolutions_are_refitted_group_by_group():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, padding=1, groups=2, bias=False)).eval()
    model[0].bias.data.zero_()
    for group in (slice(0, 8), slice(8, 16)):
        depend(model[0].weight.data[group], None)
    kept = [*range(4), *range(8, 12)]
    first = axes(("0.weight", 0), ("0.bias", 0))
    plan = plan_of(model, {"0.out": (kept, 16, first), "1.in": (range(4), 8, axes(("1.weight", 1)))})
    pruned, inputs = cut(model, plan), images(5)
    pruned[1].in_channels = 8
    assert error(model, pruned, inputs[-1]) > 0.1
    repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE)
    assert error(model, pruned, inputs[-1]) < 1e-4


def test_depthwise_convolutions_and_what_is_behind_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)).eval()
    model[0].bias.data.zero_()
    depend(model[0].weight.data, None)
    model[1].weight.data[4:] = model[1].weight.data[:1]  # one filter for all, or combinations would not stay ones
    model[1].weight.data[:4] = model[1].weight.data[:1]
    model[1].bias.data.zero_()
    members = axes(("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("2.weight", 1))
    plan = plan_of(model, {"0.out": (range(4), 8, members)})
    pruned, inputs = cut(model, plan), images(5)
    pruned[1].groups = 4
    assert error(model, pruned, inputs[-1]) > 0.1
    report = repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE)
    assert error(model, pruned, inputs[-1]) < 1e-4
    assert report.layers[1].unknowns == 9


def test_a_depthwise_convolution_corrects_its_inputs_scale():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=4)).eval()
    pruned, plan, inputs = cut(model, plan_of(model, {})), plan_of(model, {}), images(5)
    for parameter in pruned[1].parameters():
        parameter.data *= 0.5
    repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE)
    assert error(model, pruned, inputs[-1]) < 1e-4


def test_linear_layers_and_batch_norm_statistics():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Linear(100, 5),
    )
    randomise(model)
    plan = plan_of(
        model,
        {
            "0.out": (
                [0, 2, 3, 5, 6, 7],
                8,
                axes(
                    *((f"{i}.{t}", 0) for i, t in ((0, "weight"), (1, "weight"), (1, "bias"))),
                    ("1.running_mean", 0),
                    ("1.running_var", 0),
                    ("2.weight", 1),
                ),
            )
        },
    )
    pruned, inputs = cut(model, plan), images(6, size=10)
    before = error(model, pruned, inputs[-1])
    mean = pruned[3].running_mean.clone()
    report = repair(model, pruned, plan, frames_of(inputs[:5]))
    assert error(model, pruned, inputs[-1]) < 0.8 * before
    assert not torch.equal(mean, pruned[3].running_mean)
    # What the pruned network now gives to the norm has the mean that the norm expects.
    with torch.no_grad():
        ours, theirs = (torch.cat([net[:4](x) for x in inputs[:5]]).mean((0, 2, 3)) for net in (pruned, model))
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)
    assert all(layer.held_out[1] <= layer.held_out[0] for layer in report.refitted)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)])
def test_norms_get_their_gain_and_offset_back(norm):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(5, 6), norm

        def forward(self, x):
            return self.norm(self.first(x))

    model = randomise(Normed())
    plan = plan_of(model, {})
    pruned = cut(model, plan)
    pruned.norm.weight.data *= 1.5
    pruned.norm.bias.data += 0.5
    inputs = [torch.randn(64, 5) for _ in range(5)]
    repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE)
    assert error(model, pruned, inputs[-1]) < 1e-4
    torch.testing.assert_close(pruned.norm.weight, model.norm.weight, atol=1e-3, rtol=0)


def test_attention_whose_removed_heads_say_what_the_kept_ones_say():
    model = Attention(8, 4).eval()
    with torch.no_grad():  # heads 2 and 3 look where 0 and 1 look and say mixtures of it
        for part in range(3):
            model.qkv.weight[part * 8 + 4 : part * 8 + 8] = model.qkv.weight[part * 8 : part * 8 + 4]
            model.qkv.bias[part * 8 + 4 : part * 8 + 8] = model.qkv.bias[part * 8 : part * 8 + 4]
    rows = [part * 8 + i for part in range(3) for i in range(4)]
    plan = plan_of(
        model,
        {
            "qkv.out": (rows, 24, axes(("qkv.weight", 0), ("qkv.bias", 0))),
            "proj.in": (range(4), 8, axes(("proj.weight", 1))),
        },
    )
    pruned = cut(model, plan)
    pruned.num_heads = 2
    inputs = [torch.randn(4, 10, 8) for _ in range(5)]
    before = error(model, pruned, inputs[-1])
    repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE)
    assert before > 0.1 and error(model, pruned, inputs[-1]) < 1e-4


def test_what_a_removed_residual_block_added_is_taken_over():
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Residual(6), Residual(6), nn.Conv2d(6, 4, 1)))
    plan = plan_of(model, {}, Block("1", BlockKind.IDENTITY))
    pruned, inputs = cut(model, plan), images(9)
    before = error(model, pruned, inputs[-1])
    report = repair(model, pruned, plan, frames_of(inputs[:8]))
    assert error(model, pruned, inputs[-1]) < 0.8 * before
    assert "1.conv" not in [layer.name for layer in report.layers]


def test_layers_that_run_several_times_are_fitted_to_all_their_calls():
    model = randomise(Shared())
    members = axes(("stem.weight", 0), ("stem.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("tower.0.weight", 1))
    plan = plan_of(model, {"stem.out": ([0, 1, 2, 4, 5, 6], 8, members)})
    pruned, inputs = cut(model, plan), images(6)
    before = error(model, pruned, inputs[-1])
    report = {layer.name: layer for layer in repair(model, pruned, plan, frames_of(inputs[:5])).layers}
    assert error(model, pruned, inputs[-1]) < 0.8 * before
    assert report["tower.0"].calls == report["tower.2"].calls == 2
    every = 4 * 2 * (12 * 12 + 6 * 6)  # four frames of two images, both levels
    assert report["tower.0"].samples == every


def test_levels_of_a_decoder_are_paired_by_the_layers_that_are_left():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.norm = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.LayerNorm(6)

        def forward(self, x):
            levels = []
            for layer in self.layers:
                if not isinstance(layer, nn.Identity):
                    x = layer(x).tanh()
                    levels.append(self.norm(x))
            return levels[-1]

    model = randomise(Decoder())
    plan = plan_of(model, {}, Block("layers.1", BlockKind.LAYER))
    pruned, inputs = cut(model, plan), [torch.randn(40, 6) for _ in range(5)]
    before = error(model, pruned, inputs[-1])
    report = {layer.name: layer for layer in repair(model, pruned, plan, frames_of(inputs[:4]), PRECISE).layers}
    assert error(model, pruned, inputs[-1]) < before
    assert report["norm"].calls == 2 and report["norm"].samples == 3 * 2 * 40
    # Its first call is that of the first layer in both models, which are equal there.
    assert report["layers.0"].left == "it equals the dense model's"


class PostNorm(nn.Module):
    """A residual branch and the norm behind it."""

    def __init__(self, width):
        super().__init__()
        self.branch, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.branch(x))


@pytest.mark.parametrize("removed", [["1"], ["2"], ["1", "2"]])
def test_the_last_layer_in_front_of_removed_ones_gives_what_they_gave(removed):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.norm = nn.ModuleList(PostNorm(8) for _ in range(3)), nn.LayerNorm(8)

        def forward(self, x):
            return [self.norm(x := layer(x)) for layer in self.layers if not isinstance(layer, nn.Identity)][-1]

    model = randomise(Decoder())
    with torch.no_grad():
        for i, layer in enumerate(model.layers):  # each leaves the mean of its outputs elsewhere
            layer.norm.bias.add_(torch.linspace(-1, 1, 8) * (i + 1))
    plan = plan_of(model, {}, *(Block(f"layers.{each}", BlockKind.LAYER) for each in removed))
    pruned, inputs = cut(model, plan), [torch.randn(200, 8) for _ in range(5)]
    last = int(removed[-1])
    kept = 0 if removed[0] == "1" else 1
    repair(model, pruned, plan, frames_of(inputs[:4]))
    ends = []
    for each in (model, pruned):
        found = {}
        for name in (f"layers.{last}", f"layers.{kept}"):
            each.get_submodule(name).register_forward_hook(lambda m, x, y, n=name, found=found: found.update({n: y}))
        each(inputs[-1])
        ends.append(found)
    after, wanted, own = ends[1][f"layers.{kept}"], ends[0][f"layers.{last}"], ends[0][f"layers.{kept}"]
    assert (after - wanted).norm() < 0.5 * (own - wanted).norm()


def test_blocks_of_a_list_that_removed_ones_follow():
    names = ["body", *(f"body.{i}" for i in range(5)), "body.2.0", "other.0"]
    assert run_ends(names, {"body.1", "body.3", "body.4"}) == {"body.0": "body.1", "body.2": "body.4"}
    assert run_ends(names, {"body.0"}) == {}  # nothing stands in front of it
    assert run_ends(names, {"body.2.ffn"}) == {}


def test_a_position_that_is_not_sampled_is_not_needed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).eval()
    depend(model[0].weight.data, None)
    model[0].bias.data.zero_()
    plan = plan_of(model, {"0.out": (range(4), 8, axes(("0.weight", 0), ("0.bias", 0), ("1.weight", 1)))})
    pruned, inputs = cut(model, plan), images(5)
    report = repair(model, pruned, plan, frames_of(inputs[:4]), RepairSettings(ridge=1e-7, positions=200))
    assert report.layers[1].samples == 150  # a quarter is held out
    assert error(model, pruned, inputs[-1]) < 1e-4
