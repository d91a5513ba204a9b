"""What a removed block leaves is what its declaration says, also through files and for files that say nothing."""

import copy
import json

import pytest
import torch
from torch import nn

from mdp_mmdet3d.errors import MdpError, StructureMismatchError
from mdp_mmdet3d.space import Block, BlockKind
from mdp_mmdet3d.surgery.apply import apply_plan, model_digest
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan


class OwnBlock(nn.Module):
    """A residual block with names of its own: y = act(skip_norm(skip(x)) + last(first(x)))."""

    def __init__(self):
        super().__init__()
        self.first, self.last_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1, bias=False)
        self.skip, self.skip_norm, self.act = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.GELU()
        self.last_conv.bias = None

    def forward(self, x):
        return self.act(self.skip_norm(self.skip(x)) + self.last_conv(self.first(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(OwnBlock(), nn.Conv2d(16, 4, 1)).eval()


OWN = Block("0", BlockKind.RESIDUAL_BRANCH, last="last_conv", stays=("skip", "skip_norm", "act"))


def test_a_block_with_names_of_its_own_is_masked_and_replaced(model, tmp_path):
    PruningPlan(model_digest(model), {}, {"0": OWN}).save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.removed == {"0": OWN}
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        masked = mask_model(copy.deepcopy(model), plan)(x)
        pruned_model = apply_plan(copy.deepcopy(model), plan)
        torch.testing.assert_close(masked, pruned_model(x))
    assert set(pruned_model.state_dict()) < set(model.state_dict())
    assert not any("first" in name or "last" in name for name in pruned_model.state_dict())


def test_what_a_block_contains_follows_from_what_stays():
    assert OWN.contains("0.first.weight") and OWN.contains("0") and not OWN.contains("01.first")
    assert not OWN.contains("0.skip.weight") and not OWN.contains("0.skip_norm.bias")
    assert OWN.contains("0.skipped.weight")
    assert Block("0", BlockKind.IDENTITY).contains("0.downsample.0.weight")


def test_plans_that_keep_the_usual_shortcut_have_the_file_and_hash_of_version_1(tmp_path):
    usual = PruningPlan("f", {}, {"a": Block("a", BlockKind.RESIDUAL_BRANCH, last="bn3")})
    assert usual.structure["removed"] == {"a": "residual_branch"}
    data = usual.to_dict()
    del data["last"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    old = PruningPlan.load(tmp_path / "plan.json")
    assert old.hash == usual.hash and old.removed["a"].stays == ("downsample", "relu")
    assert PruningPlan("f", {}, {"a": OWN}).hash != usual.hash


def test_undeclared_and_absent_parts_are_named(model):
    plan = PruningPlan(model_digest(model), {}, {"0": Block("0", BlockKind.RESIDUAL_BRANCH)})
    with pytest.raises(MdpError, match=r"'not declared'.*OwnBlock.*add_block\(last="):
        mask_model(copy.deepcopy(model), plan)
    with pytest.raises(StructureMismatchError, match=r"0: 'downsample' is to stay.*skip_norm"):
        apply_plan(model, plan)
