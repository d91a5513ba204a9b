"""The head: geometry of the tokens, the deployed form of a frame, and widths read from the modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from projects.streampetr.conditioning import MLN
from projects.streampetr.detector import StreamPETR
from projects.streampetr.embeddings import inverse_sigmoid, point_embedding, sine_embedding
from projects.streampetr.frame import frame_inputs
from projects.streampetr.head import StreamPETRHead
from projects.streampetr.position_embedding import CONE_NEAR_BIN, depth_bins, frustum_points, token_cone

from ..numerics import COLUMNS, LAYER, assert_close, assert_differs, assert_same_memory

PC_RANGE = torch.tensor([-61.2, -61.2, -10.0, 61.2, 61.2, 10.0])


def test_depth_bins_grow_linearly() -> None:
    bins = depth_bins(64, 1.0, 61.2)
    assert float(bins[0]) == 1.0
    assert float(bins[-1]) == pytest.approx(59.35, abs=5e-3)
    torch.testing.assert_close(bins.diff().diff(), torch.full((62,), 2 * 60.2 / (64 * 65)), atol=1e-4, rtol=0)
    uniform = depth_bins(64, 1.0, 61.2, use_lid=False)
    torch.testing.assert_close(uniform.diff(), torch.full((63,), 60.2 / 64))


def test_frustum_points_project_to_the_centres_of_their_cells(make_sample) -> None:
    sample = make_sample()
    lidar2img = torch.as_tensor(sample.lidar2img, dtype=torch.float64)
    depths = depth_bins(64, 1.0, 61.2).double()
    points = frustum_points((64, 96), 16, depths, torch.linalg.inv(lidar2img)[None], PC_RANGE.double())
    metres = points * (PC_RANGE[3:] - PC_RANGE[:3]) + PC_RANGE[:3]
    metres = metres.reshape(6, 4, 6, 64, 3)
    homogeneous = torch.cat((metres, torch.ones(6, 4, 6, 64, 1)), dim=-1)
    pixels = torch.einsum("nij,nrcdj->nrcdi", lidar2img, homogeneous)
    torch.testing.assert_close(pixels[..., 2], depths.expand(6, 4, 6, 64), atol=1e-6, rtol=1e-6)
    u, v = pixels[..., 0] / pixels[..., 2], pixels[..., 1] / pixels[..., 2]
    columns = (torch.arange(6) * 16 + 8).double()
    rows = (torch.arange(4) * 16 + 8).double()
    torch.testing.assert_close(u, columns[None, None, :, None].expand_as(u), atol=1e-5, rtol=0)
    torch.testing.assert_close(v, rows[None, :, None, None].expand_as(v), atol=1e-5, rtol=0)


def test_cone_tiles_focal_lengths_as_asked() -> None:
    focal = torch.tensor([1266.0, -1260.0, 1272.0, 809.0, 1256.0, 1259.0])
    intrinsics = torch.eye(4).repeat(1, 6, 1, 1)
    intrinsics[0, :, 0, 0] = focal
    intrinsics[0, :, 1, 1] = focal.abs()
    points = torch.rand(1, 6 * 8, 64, 3)
    minor = token_cone(points, intrinsics, "camera_minor")
    major = token_cone(points, intrinsics, "camera_major")
    expected = focal.abs() / 1000
    torch.testing.assert_close(minor[0, :, 0], expected.repeat(8))
    torch.testing.assert_close(major[0, :, 0], expected.repeat_interleave(8))
    for cone in (minor, major):
        torch.testing.assert_close(cone[..., 2:5], points[:, :, 63])
        torch.testing.assert_close(cone[..., 5:], points[:, :, CONE_NEAR_BIN])


def test_inverse_sigmoid_is_bounded_by_eps() -> None:
    x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    extremes = inverse_sigmoid(torch.tensor([-3.0, 4.0]), eps=1e-4)
    torch.testing.assert_close(extremes, torch.tensor([-np.log(1e4), np.log(1e4)], dtype=torch.float32))


def test_sinusoids_interleave_and_put_y_first() -> None:
    value = sine_embedding(torch.tensor([0.37]), 128)[0]
    k = torch.arange(128)
    angle = 2 * np.pi * 0.37 / 1e4 ** (2 * (k // 2) / 128)
    torch.testing.assert_close(value, torch.where(k % 2 == 0, angle.sin(), angle.cos()))
    point = torch.tensor([0.1, 0.2, 0.3])
    expected = torch.cat([sine_embedding(point[i], 128) for i in (1, 0, 2)])
    torch.testing.assert_close(point_embedding(point, 128), expected)


def test_new_mln_is_a_layer_norm() -> None:
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(MLN(8, 32)(x, torch.randn(2, 5, 8)), nn.functional.layer_norm(x, (32,)))


@pytest.mark.numerics
@torch.no_grad()
def test_deployed_frame_equals_the_streaming_frame(build_small, make_sample, make_images) -> None:
    """The graph sees float32 ages and no prev_exists; the host keeps the clock and starts from `initial_memory`."""
    model = build_small()
    head: StreamPETRHead = model.pts_bbox_head
    memory = None
    for t in range(3):
        images = make_images(t)
        frame = frame_inputs([make_sample(t)], images)
        feats = model.extract_img_feat(images)
        if memory is None:
            pre = head.initial_memory(frame.ego_pose)
        else:
            pre = memory._replace(timestamp=(memory.timestamp + frame.timestamp.reshape(-1, 1, 1)).float())
        output, memory = model.run_frame(feats, frame, memory)
        pos_embed, cone = head.position_embedding(frame.pad_hw, frame.intrinsics, frame.img2lidar)
        scores, boxes, post = head(feats, pos_embed, cone, frame.ego_pose, frame.ego_pose_inv, pre)
        assert_close(scores, output.all_cls_scores)
        assert_close(boxes, output.all_bbox_preds, COLUMNS, columns=True)
        post = post._replace(timestamp=post.timestamp.double() - frame.timestamp.reshape(-1, 1, 1))
        assert_same_memory(post, memory, scores[-1], output.all_cls_scores[-1], head.topk_proposals)
        last = head(feats, pos_embed, cone, frame.ego_pose, frame.ego_pose_inv, pre, last_level_only=True)
        assert_close(last[0], scores[-1:], LAYER)
        assert_close(last[1], boxes[-1:], LAYER)


def run_once(model: StreamPETR, make_sample, make_images) -> tuple[torch.Tensor, torch.Tensor]:
    images = make_images()
    output, _ = model.run_frame(model.extract_img_feat(images), frame_inputs([make_sample()], images), None)
    return output.all_cls_scores, output.all_bbox_preds


def cut_rows(module: nn.Module, keep: torch.Tensor) -> None:
    module.weight = nn.Parameter(module.weight[keep])
    module.bias = nn.Parameter(module.bias[keep])
    if isinstance(module, nn.Linear):
        module.out_features = len(keep)
    elif isinstance(module, nn.Conv2d):
        module.out_channels = len(keep)


def cut_columns(module: nn.Linear, keep: torch.Tensor) -> None:
    module.weight = nn.Parameter(module.weight[:, keep])
    module.in_features = len(keep)


@pytest.mark.parametrize(
    ("producer", "consumers"),
    [
        ("img_neck.fpn_convs.0.conv", ["pts_bbox_head.memory_embed.0"]),
        ("pts_bbox_head.memory_embed.0", ["pts_bbox_head.memory_embed.2"]),
        ("pts_bbox_head.position_encoder.0", ["pts_bbox_head.position_encoder.2"]),
        ("pts_bbox_head.featurized_pe.conv_reduce", ["pts_bbox_head.featurized_pe.conv_expand"]),
        ("pts_bbox_head.query_embedding.0", ["pts_bbox_head.query_embedding.2"]),
        (
            "pts_bbox_head.ego_pose_memory.reduce.0",
            ["pts_bbox_head.ego_pose_memory.gamma", "pts_bbox_head.ego_pose_memory.beta"],
        ),
        (
            "pts_bbox_head.spatial_alignment.reduce.0",
            ["pts_bbox_head.spatial_alignment.gamma", "pts_bbox_head.spatial_alignment.beta"],
        ),
        ("pts_bbox_head.reg_branches.0.2", ["pts_bbox_head.reg_branches.0.4"]),
        (
            "pts_bbox_head.transformer.decoder.layers.1.ffns.0.layers.0.0",
            ["pts_bbox_head.transformer.decoder.layers.1.ffns.0.layers.1"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.numerics
@torch.no_grad()
def test_widths_cut_in_place(build_small, make_sample, make_images, producer: str, consumers: list[str]) -> None:
    model = build_small()
    dense = run_once(model, make_sample, make_images)
    keep = torch.arange(0, len(model.get_submodule(producer).weight), 3)
    for consumer in map(model.get_submodule, consumers):
        gone = torch.ones(consumer.weight.shape[1], dtype=torch.bool)
        gone[keep] = False
        consumer.weight[:, gone] = 0
    masked = run_once(model, make_sample, make_images)
    cut_rows(model.get_submodule(producer), keep)
    for consumer in map(model.get_submodule, consumers):
        cut_columns(consumer, keep)
    pruned = run_once(model, make_sample, make_images)
    assert_close(pruned[0], masked[0])
    assert_close(pruned[1], masked[1], COLUMNS, columns=True)
    assert_differs(torch.cat(pruned, dim=-1), torch.cat(dense, dim=-1))


@torch.no_grad()
def test_one_remaining_level_predicts(build_small, make_sample, make_images) -> None:
    model = build_small()
    layers = model.pts_bbox_head.transformer["decoder"].layers
    layers[0] = layers[2] = nn.Identity()
    (sample,) = model.predict({"imgs": make_images()}, [make_sample()])
    assert len(sample.pred_instances_3d) > 0
    losses = model.loss({"imgs": make_images(1)}, [make_sample(1)])
    assert set(losses) == {"loss_cls", "loss_bbox"}


@torch.no_grad()
def test_a_diverged_frame_does_not_poison_later_scenes(build_small, make_sample, make_images) -> None:
    model = build_small()
    images = make_images()
    frame = frame_inputs([make_sample()], images)
    feats = torch.full_like(model.extract_img_feat(images), float("nan"))
    output, memory = model.run_frame(feats, frame, None)
    assert output.all_cls_scores.isfinite().all() and output.all_bbox_preds.isfinite().all()
    assert all(value.isfinite().all() for value in memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk_proposals": 8}, "topk_proposals=8 must lie between num_propagated=16"),
        ({"topk_proposals": 77}, "num_query . num_propagated=76"),
        ({"memory_len": 8}, "num_propagated=16 exceeds memory_len=8"),
        ({"depth_num": 30}, "depth_num=30"),
        ({"intrinsics_tiling": "row_major"}, "intrinsics_tiling='row_major'"),
    ],
)
def test_contradictory_arguments_are_refused(arguments: dict, message: str) -> None:
    counts = dict(num_query=60, num_propagated=16, memory_len=64, topk_proposals=16) | arguments
    with pytest.raises(ValueError, match=message):
        StreamPETRHead(**counts)
