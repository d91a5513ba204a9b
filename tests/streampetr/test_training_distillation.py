"""Distillation: zero for equal models, in step with the student's streams, nothing of the teacher in checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401
from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.distillation import Distillation, DistillationHook, matching_levels
from projects.streampetr.train_loop import STATE_KEY

from ..numerics import EPS, LAYER, NETWORK, assert_decided

LOSSES = ("distill_loss_logits", "distill_loss_features")


@pytest.fixture
def pair(build_small):
    """A student in training mode and a teacher with the same weights; batch norms are frozen, dropout is off."""
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet3d")
    student = build_small()
    teacher = copy.deepcopy(student)
    return student.train(), teacher


@pytest.fixture
def logits(pair):
    """Class logits of the last level, frame by frame, of student and teacher: both choose their queries by them."""
    seen = [], []
    for model, frames in zip(pair, seen):
        head = model.pts_bbox_head
        queries = head.reference_points.num_embeddings + head.num_propagated

        def record(module, args, levels, frames=frames, queries=queries) -> None:
            frames.append(levels[-1, :, -queries:].detach())

        head.cls_branches[0].register_forward_hook(record)
    return seen


def assert_nothing_to_learn(losses, logits) -> None:
    """The losses are 0 up to rounding, where both models must have chosen the same queries on every processor.

    With and without gradients a forward pass rounds differently. The first loss is a difference of cross-entropies of
    ten classes, the second a squared difference of normalised features, whose largest is below 5.
    """
    for student, teacher in zip(*logits):
        assert_decided(student, teacher, [16], aligned=60)
    assert abs(losses["distill_loss_logits"].item()) < LAYER * EPS * 10 * math.log(2)
    assert losses["distill_loss_features"].item() < (NETWORK * EPS * 5) ** 2


@pytest.fixture
def step(make_sample, make_images):
    """Function that runs the losses of frame t."""

    def run(model, t: int):
        return model(inputs=dict(imgs=make_images(t)), data_samples=[make_sample(t)], mode="loss")

    return run


@pytest.mark.numerics
def test_equal_models_have_nothing_to_learn_along_a_stream(pair, step, logits) -> None:
    student, teacher = pair
    distillation = Distillation(student, teacher)
    for t in range(3):
        losses = step(student, t)
        assert_nothing_to_learn(losses, logits)
        assert student.memory.embedding.shape[1] == distillation.memory.embedding.shape[1]
    assert student.memory.embedding.abs().sum() > 0
    distillation.close()
    assert not set(LOSSES) & set(step(student, 3))


@pytest.mark.numerics
def test_the_teachers_memory_is_emptied_with_the_students(pair, step, logits) -> None:
    student, teacher = pair
    Distillation(student, teacher)
    for t in range(2):
        step(student, t)
    student.eval()
    student.train()
    # The frame goes on a stream of which the student has forgotten everything.
    assert_nothing_to_learn(step(student, 2), logits)


@pytest.mark.numerics
def test_a_forgetful_student_differs_from_its_teacher(pair, step) -> None:
    student, teacher = pair
    distillation = Distillation(student, teacher)
    for t in range(2):
        step(student, t)
    distillation.memory = None
    losses = step(student, 2)
    assert all(losses[name].item() > 1e-3 for name in LOSSES)


def test_gradients_pull_the_student_to_the_teacher_and_leave_that_alone(pair, step) -> None:
    student, teacher = pair
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    Distillation(student, teacher, logits_weight=2.0, features_weight=0.5)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    values = []
    for _ in range(6):
        student.reset_memory()
        losses = step(student, 0)
        total = sum(losses[name] for name in LOSSES)
        values.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]
    assert student.img_backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_evaluation_of_the_student_is_untouched(pair, make_images, make_sample) -> None:
    student, teacher = pair
    distillation = Distillation(student, teacher)
    student.eval()
    with torch.no_grad():
        student(inputs=dict(imgs=make_images()), data_samples=[make_sample()], mode="predict")
        losses = student(inputs=dict(imgs=make_images()), data_samples=[make_sample()], mode="loss")
    assert not set(LOSSES) & set(losses)
    assert distillation.memory is None


@pytest.mark.numerics
def test_clips_of_a_sliding_window_are_followed_from_their_first_frame(pair, make_images, make_sample, logits) -> None:
    student, teacher = pair
    Distillation(student, teacher)
    clip = [make_sample(t, prev_exists=t > 0) for t in range(4)]
    last = clip[-1].clone()
    last.set_metainfo(dict(window=clip, grad_frames=2))
    images = torch.cat([make_images(t) for t in range(4)], dim=1)
    losses = student(inputs=dict(imgs=images), data_samples=[last], mode="loss")
    assert {key.split("_")[1] for key in losses if key.startswith("frame_")} == {"2", "3"}
    assert len(logits[0]) == len(logits[1]) == 4
    assert_nothing_to_learn(losses, logits)


@pytest.mark.parametrize(("student", "teacher", "levels"), [
    ([0, 1, 2], [0, 1, 2], [0, 1, 2]),
    ([0, 2, 5], [0, 1, 2, 3, 4, 5], [0, 2, 5]),
    ([0, 1, 3], [0, 1, 2, 3, 4, 5], [0, 1, 5]),
    ([0], [0, 1, 2], [2]),
    ([0, 1, 2], [0, 2], [0, 0, 1]),
    ([1, 2], [2], [0, 0]),
])  # fmt: skip
def test_levels_match_by_layer_and_last_with_last(student, teacher, levels) -> None:
    assert matching_levels(student, teacher) == levels


def test_a_teacher_of_another_task_is_refused(pair, build_small) -> None:
    student, _ = pair
    with pytest.raises(StructureMismatchError, match="the teacher has 7 classes, the student 10"):
        Distillation(student, build_small(num_classes=7))
    with pytest.raises(StructureMismatchError, match="61 learned queries"):
        Distillation(student, build_small(num_query=61))
    with pytest.raises(MdpError, match="must not be negative"):
        DistillationHook("a.py", "a.pth", logits_weight=-1.0)
    with pytest.raises(MdpError, match="one must be positive"):
        DistillationHook("a.py", "a.pth", 0.0, 0.0)


@pytest.fixture
def pruned_config(mini_config, tmp_path):
    """The mini config with a pruned model (a decoder layer and half of everything gone) and its dense teacher."""
    torch.manual_seed(0)
    dense = MODELS.build(mini_config.model)
    mini_config.dump(tmp_path / "dense.py")
    torch.save({"state_dict": dense.state_dict(), "meta": {}}, tmp_path / "dense.pth")
    space = trace_space(dense.eval(), InputShape(6, 64, 176), SpaceOptions(4, 8, 8, 0.0, ()))
    kept = {d.name: (tuple(range(d.options[len(d.options) // 2])),) * d.copies for d in space.dimensions}
    layer = "pts_bbox_head.transformer.decoder.layers.1"
    removed = {b.name for b in space.blocks if layer in (b.name, b.parent)}
    PruningPlan.from_kept(space, kept, removed).save(tmp_path / "plan.json")
    mini_config.model = dict(type="MDPPrunedModel", architecture=mini_config.model, plan=str(tmp_path / "plan.json"))
    mini_config.custom_hooks += [dict(type="PlanHook"), dict(
        type="DistillationHook", teacher_config=str(tmp_path / "dense.py"),
        teacher_checkpoint=str(tmp_path / "dense.pth"))]  # fmt: skip
    return mini_config


def train(config: Config, work_dir, iterations: int, resume=None) -> Runner:
    config = copy.deepcopy(config)
    config.work_dir, config.train_cfg.max_iters = str(work_dir), iterations
    config.experiment_name = f"{work_dir.name}-{iterations}-{bool(resume)}"
    if resume:
        config.resume, config.load_from = True, str(resume)
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


@pytest.mark.slow
def test_a_pruned_model_is_fine_tuned_with_a_teacher_and_resumes_exactly(pruned_config, tmp_path) -> None:
    whole = train(pruned_config, tmp_path / "whole", 5)
    for name in LOSSES:
        logged = whole.message_hub.get_scalar(f"train/{name}").data[0]
        assert len(logged) == 5 and min(logged) > 0
    hook = next(h for h in whole.hooks if isinstance(h, DistillationHook))
    assert hook.distillation.levels == [0, 2]
    train(pruned_config, tmp_path / "parts", 3)
    saved = torch.load(tmp_path / "parts" / "iter_3.pth", weights_only=True)
    student = sum(value.numel() for value in whole.model.state_dict().values())
    assert sum(value.numel() for value in saved["state_dict"].values()) == student
    assert saved[STATE_KEY]["ranks"][0]["hooks"]["DistillationHook"]["embedding"].abs().sum() > 0
    resumed = train(pruned_config, tmp_path / "parts", 5, tmp_path / "parts" / "iter_3.pth")
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    # Without the teacher's memory the resumed training would be another one.
    del saved[STATE_KEY]["ranks"][0]["hooks"]["DistillationHook"]
    torch.save(saved, tmp_path / "forgetful.pth")
    forgetful = train(pruned_config, tmp_path / "forgetful", 5, tmp_path / "forgetful.pth")
    name = "pts_bbox_head.query_embedding.0.weight"
    assert not torch.equal(forgetful.model.state_dict()[name], whole.model.state_dict()[name])


@pytest.mark.slow
def test_a_missing_or_foreign_teacher_is_named(pruned_config, tmp_path) -> None:
    hook = pruned_config.custom_hooks[-1]
    missing = copy.deepcopy(pruned_config)
    missing.custom_hooks[-1].teacher_checkpoint = str(tmp_path / "no.pth")
    with pytest.raises(FileFormatError, match=r"no\.pth does not exist"):
        train(missing, tmp_path / "a", 1)
    missing.custom_hooks[-1] = dict(hook, teacher_config=str(tmp_path / "no.py"))
    with pytest.raises(MdpError, match=r"no\.py does not exist"):
        train(missing, tmp_path / "b", 1)
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}, "meta": {}}, tmp_path / "dense.pth")
    with pytest.raises(StructureMismatchError, match="is of another model"):
        train(pruned_config, tmp_path / "c", 1)
