"""The pruned StreamPETR equals the masked dense one, and reloads to equal outputs."""

import copy

import numpy as np
import pytest
import torch

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.masking import mask_model
from mdp_mmdet3d.surgery.plan import PruningPlan

from ..numerics import COLUMNS, assert_close, assert_differs


def run(model, batches):
    outputs = []
    model.reset_memory()
    with torch.no_grad():
        for batch in batches:
            data = model.data_preprocessor(dict(batch), False)
            raw = model(**data, mode="tensor")
            outputs.append((raw["all_cls_scores"], raw["all_bbox_preds"]))
    return outputs


def make_plan(space, random_kept, seed, p_remove=0.2):
    kept, removed = random_kept(space, np.random.default_rng(seed), p_remove)
    return PruningPlan.from_kept(space, kept, removed)


@pytest.fixture
def space(tiny_model):
    return trace_space(tiny_model, InputShape(6, 64, 176))


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(6))
def test_pruned_equals_masked_dense(tiny_model, space, tiny_frames, random_kept, seed):
    plan = make_plan(space, random_kept, seed)
    # Free-running memory would reorder near-ties in its top-k, so frames are compared from an empty memory.
    frames = tiny_frames(1, seed)
    masked = run(mask_model(copy.deepcopy(tiny_model), plan), frames)
    pruned = run(apply_plan(copy.deepcopy(tiny_model), plan), frames)
    for (cls_a, box_a), (cls_b, box_b) in zip(masked, pruned):
        assert cls_a.shape == cls_b.shape
        assert_close(cls_a, cls_b)
        assert_close(box_a, box_b, COLUMNS, columns=True)


def test_masking_changes_the_outputs(tiny_model, space, tiny_frames, random_kept):
    plan = make_plan(space, random_kept, 0)
    dense = run(copy.deepcopy(tiny_model), tiny_frames(1))[0][0][-1]
    pruned = run(apply_plan(copy.deepcopy(tiny_model), plan), tiny_frames(1))[0][0][-1]
    assert_differs(dense, pruned)


def test_shapes_follow_the_plan(tiny_model, space, random_kept):
    plan = make_plan(space, random_kept, 3)
    pruned = apply_plan(copy.deepcopy(tiny_model), plan)
    tensors = pruned.state_dict()
    for name, cut in plan.cuts.items():
        for member in cut.members:
            if member.tensor in tensors and cut.kind.value in ("channels", "hidden"):
                assert tensors[member.tensor].shape[member.axis] == cut.count, (name, member)
    for module in pruned.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, torch.nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


def test_everything_removed_still_runs(tiny_model, space, tiny_frames):
    smallest = {d.name: tuple(tuple(range(d.options[0])) for _ in range(d.copies)) for d in space.dimensions}
    plan = PruningPlan.from_kept(space, smallest, {b.name for b in space.blocks})
    pruned = apply_plan(copy.deepcopy(tiny_model), plan)
    outputs = run(pruned, tiny_frames(3))
    assert outputs[-1][0].shape[0] == 1
    assert all(torch.isfinite(x).all() for pair in outputs for x in pair)


def test_pruned_model_trains(tiny_model, space, tiny_frames, random_kept):
    pruned = apply_plan(tiny_model, make_plan(space, random_kept, 1)).train()
    data = pruned.data_preprocessor(dict(tiny_frames(1)[0]), True)
    loss, _ = pruned.parse_losses(pruned(**data, mode="loss"))
    loss.backward()
    wanted = [n for n, p in pruned.named_parameters() if p.requires_grad and p.grad is None]
    assert wanted == []


def test_plan_file_round_trip_and_tampering(space, random_kept, tmp_path):
    plan = make_plan(space, random_kept, 2)
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again.structure == plan.structure and again.hash == plan.hash
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="truncated"):
        PruningPlan.load(tmp_path / "cut.json")
    (tmp_path / "edited.json").write_text(
        text.replace('"identity"', '"layer"', 1)
        if '"identity"' in text
        else text.replace('"size": 256', '"size": 255', 1)
    )
    with pytest.raises(FileFormatError, match="changed by hand"):
        PruningPlan.load(tmp_path / "edited.json")


def test_plan_of_another_model_is_refused_and_leaves_it_whole(tiny_model, tiny_config, space, random_kept):
    from mmdet3d.registry import MODELS

    config = tiny_config()
    config.img_neck.out_channels = 128
    config.pts_bbox_head.in_channels = 128
    other = MODELS.build(config)
    before = {k: v.shape for k, v in other.state_dict().items()}
    with pytest.raises(StructureMismatchError, match="another model"):
        apply_plan(other, make_plan(space, random_kept, 0))
    assert before == {k: v.shape for k, v in other.state_dict().items()}


def test_unknown_names_and_counts_are_refused(space):
    name = space.dimensions[0].name
    with pytest.raises(StructureMismatchError, match="does not have"):
        PruningPlan.from_kept(space, {"nothing.out": ((0,),)}, set())
    with pytest.raises(StructureMismatchError, match="do not fit"):
        PruningPlan.from_kept(space, {name: (tuple(range(space.dimensions[0].options[0] - 1)),)}, set())
