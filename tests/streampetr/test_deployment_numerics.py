"""What is equal up to rounding passes, what is a mistake does not: the comparisons of tests and product, tested."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mdp_mmdet3d.errors import DeploymentError
from projects.streampetr import MemoryState
from projects.streampetr import head as head_module
from projects.streampetr.compare import check_against_pytorch, compare_stream, host_memory, run_reference
from projects.streampetr.export import export_streampetr
from projects.streampetr.memory_rows import memory_difference, tie_margin

from ..numerics import COLUMNS, assert_close, assert_same_memory
from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE, build_tiny

pytestmark = pytest.mark.numerics
NEW = 16


def set_eps(kind: type, eps: float):
    def change(model):
        for module in model.modules():
            if isinstance(module, kind):
                module.eps = eps

    return change


def swap_image_axes(model):
    original = model.extract_img_feat
    model.extract_img_feat = lambda img: original(img).transpose(-1, -2).reshape(original(img).shape)


def swap_sine_axes(model):
    weight = model.pts_bbox_head.reference_points.weight
    with torch.no_grad():
        weight.copy_(weight[:, [1, 0, 2]])


def swap_boxes(model):
    with torch.no_grad():
        layer = model.pts_bbox_head.reg_branches[0][-1]
        layer.weight[[0, 1]] = layer.weight[[1, 0]]
        layer.bias[[0, 1]] = layer.bias[[1, 0]]


MODEL_MISTAKES = {
    "LayerNorm eps 1e-4": set_eps(nn.LayerNorm, 1e-4),
    "BatchNorm eps 1e-3": set_eps(nn.modules.batchnorm._BatchNorm, 1e-3),
    "feature map transposed": swap_image_axes,
    "query x and y swapped": swap_sine_axes,
    "box x and y swapped": swap_boxes,
}


@pytest.fixture(scope="module")
def right(deployed_model, stream):
    """Second frame of the stream, from the memory of the first."""
    _, before = run_reference(deployed_model, stream[0], None)
    return before, *run_reference(deployed_model, stream[1], before)


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_same_frame(found, expected):
    (queries, memory), (right_queries, right_memory) = found, expected
    assert_close(queries.logits, right_queries.logits)
    assert_close(queries.boxes, right_queries.boxes, COLUMNS, columns=True)
    assert_same_memory(memory, right_memory, queries.logits[None], right_queries.logits[None], NEW)


def test_the_same_frame_again_is_the_same(deployed_model, stream, right):
    before, *expected = right
    assert_same_frame(run_reference(deployed_model, stream[1], before), expected)


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistake_in_the_model_is_no_rounding(deployed_model, stream, right, mistake):
    before, *expected = right
    model = copy.deepcopy(deployed_model)
    MODEL_MISTAKES[mistake](model)
    with pytest.raises(AssertionError):
        assert_same_frame(run_reference(model, stream[1], before), expected)


def stale(stream, before):
    return stream[1], MemoryState(*(value.roll(1, dims=1) for value in before))


def no_memory(stream, before):
    return stream[1], None


def float32_clock(stream, before):
    # The difference to a memory time of 1.5e9 s is lost: what float32 time stamps give.
    rounded = before._replace(timestamp=before.timestamp.float().double())
    return replace(stream[1], timestamp=float(np.float32(stream[1].timestamp))), rounded


def pose_not_inverted(stream, before):
    return replace(stream[1], ego_pose=np.linalg.inv(stream[1].ego_pose)), before


INPUT_MISTAKES = {f.__name__: f for f in (stale, no_memory, float32_clock, pose_not_inverted)}


@pytest.mark.parametrize("mistake", INPUT_MISTAKES)
def test_a_mistake_in_memory_or_pose_is_no_rounding(deployed_model, stream, right, mistake):
    before, *expected = right
    with pytest.raises(AssertionError):
        assert_same_frame(run_reference(deployed_model, *INPUT_MISTAKES[mistake](stream, before)), expected)


def wrong_choice(memory, scores, embedding, boxes, topk):
    """The next best queries in place of the best."""
    order = scores.detach().topk(2 * topk, dim=1).indices[:, topk:].unsqueeze(-1)
    rows = torch.zeros_like(scores).scatter(1, order[..., 0], 1.0)
    return head_module_push(memory, rows, embedding, boxes, topk)


head_module_push = head_module.push_detections


@pytest.mark.parametrize("choice", ["next best", "worst", "one row twice"])
def test_a_wrong_choice_of_queries_is_no_tie(deployed_model, stream, right, choice, monkeypatch):
    before, queries, after = right
    if choice == "one row twice":
        rows = MemoryState(*(value.clone() for value in after))
        for value in (rows.embedding, rows.reference_point, rows.velo):
            value[:, 3] = value[:, 4]
        found = (queries, rows)
    else:
        wrong = wrong_choice if choice == "next best" else lambda m, s, *rest: head_module_push(m, -s, *rest)
        monkeypatch.setattr(head_module, "push_detections", wrong)
        found = run_reference(deployed_model, stream[1], before)
    with pytest.raises(AssertionError):
        assert_same_memory(found[1], after, found[0].logits[None], queries.logits[None], NEW)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model whose learned queries are pairs of twins, which score exactly alike, and its deployment."""
    model = build_tiny()
    with torch.no_grad():
        points = model.pts_bbox_head.reference_points.weight
        points[30:] = points[:30]
    folder = tmp_path_factory.mktemp("tied") / "deployment"
    export_streampetr(model, folder, class_names=CLASS_NAMES, input_size=INPUT_SIZE)
    return model, folder


def test_exact_ties_do_not_fail_a_right_deployment(tied, stream):
    model, folder = tied
    queries, _ = run_reference(model, stream[0], None)
    np.testing.assert_allclose(queries.logits[:30], queries.logits[30:60], atol=1e-4)
    result = check_against_pytorch(model, folder, stream)
    assert result["teacher_forced"]["near_ties"] > 0
    assert max(result["teacher_forced"][name] for name in ("logits", "boxes", "memory")) < 1e-3


def test_swapped_twins_are_the_same_memory_and_swapped_strangers_are_not(tied, stream):
    model, _ = tied
    queries, after = run_reference(model, replace(stream[0], ego_pose=np.eye(4)), None)  # global frame = lidar frame
    twin = MemoryState(*(value.clone() for value in after))
    margin = tie_margin(queries.logits, queries.logits)
    expected = host_memory(after)
    for value in twin:
        value[:, [0, 1]] = value[:, [1, 0]]
    assert memory_difference(host_memory(twin), expected, queries, NEW, margin).largest < 1e-3
    stranger = MemoryState(*(value.clone() for value in after))
    for value in stranger:
        value[:, [0, NEW - 1]] = value[:, [NEW - 1, 0]]
    assert memory_difference(host_memory(stranger), expected, queries, NEW, margin).largest > 1e-2


@pytest.mark.parametrize("choice", ["next best", "worst"])
def test_ties_do_not_hide_a_deployment_that_keeps_the_wrong_queries(tied, stream, choice, tmp_path, monkeypatch):
    """Logits and boxes of a frame are right; what is kept for the next one is not."""
    model, _ = tied
    with monkeypatch.context() as patch:
        wrong = wrong_choice if choice == "next best" else lambda m, s, *rest: head_module_push(m, -s, *rest)
        patch.setattr(head_module, "push_detections", wrong)
        export_streampetr(model, tmp_path / "wrong", class_names=CLASS_NAMES, input_size=INPUT_SIZE)
    difference = compare_stream(model, tmp_path / "wrong", stream[:1])
    assert difference.max_logits < 1e-3 and difference.max_memory > 1e-2
    with pytest.raises(DeploymentError, match="memory after a frame"):
        check_against_pytorch(model, tmp_path / "wrong", stream)
