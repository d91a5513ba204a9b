"""Auxiliary 2D head and GridMask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData

from projects.streampetr.auxiliary_head import AuxiliaryHead2D, ImageTargets, cell_locations, center_heatmap
from projects.streampetr.grid_mask import GridMask, grid_mask

NAMES = {"enc_loss_cls", "enc_loss_bbox", "enc_loss_iou", "centers2d_losses", "centerness_losses"}


def targets(*boxes: list[float]) -> ImageTargets:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    centers = (corners[:, :2] + corners[:, 2:]) / 2
    return ImageTargets(corners, torch.arange(len(corners)) % 10, centers)


@pytest.fixture
def head() -> AuxiliaryHead2D:
    torch.manual_seed(0)
    return AuxiliaryHead2D(in_channels=32, feat_channels=32)


def test_state_dict_has_the_official_names(tiny_shapes) -> None:
    expected = {key: shape for key, shape in tiny_shapes.items() if key.startswith("img_roi_head.")}
    found = {f"img_roi_head.{key}": list(value.shape) for key, value in AuxiliaryHead2D().state_dict().items()}
    assert found == expected


def test_perfect_predictions_cost_no_box_loss(head) -> None:
    truth = targets([8, 8, 40, 40], [50, 10, 90, 60])
    size = torch.tensor([96.0, 64.0])
    output = head(torch.randn(1, 32, 4, 6))
    boxes, centers = output.boxes.detach().clone(), output.centers.detach().clone()
    for cell, i in ((9, 0), (3, 1)):
        lo, hi = truth.boxes[i, :2] / size, truth.boxes[i, 2:] / size
        boxes[0, cell] = torch.cat(((lo + hi) / 2, hi - lo))
        centers[0, cell] = truth.centers[i] / size
    losses = head.compute_losses(output._replace(boxes=boxes, centers=centers), [truth], 4, 6)
    for name in ("enc_loss_bbox", "enc_loss_iou", "centers2d_losses"):
        assert losses[name].item() == pytest.approx(0.0, abs=1e-5)


def test_images_without_objects_give_finite_losses(head) -> None:
    losses = head.loss(torch.randn(2, 32, 4, 6), [targets(), targets()])
    assert set(losses) == NAMES
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert head.shared_reg[0].weight.grad is not None


def test_losses_are_sums_over_images_divided_by_all_objects(head) -> None:
    features = torch.randn(2, 32, 4, 6)
    truth = [targets([8, 8, 40, 40]), targets([50, 10, 90, 60], [3, 3, 30, 20])]
    together = head.loss(features, truth)
    apart = [head.loss(features[i : i + 1], truth[i : i + 1]) for i in range(2)]
    for name in NAMES:
        expected = (apart[0][name] * 1 + apart[1][name] * 2) / 3
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-5)


def test_heatmap_peaks_at_the_centres_and_never_beyond_one() -> None:
    truth = targets([0, 0, 64, 64], [60, 20, 95, 63])
    heatmap = center_heatmap(truth, 4, 6, 16)
    assert heatmap.max() == 1.0 and heatmap.min() >= 0.0
    assert heatmap[2, 2] == 1.0 and heatmap[2, 4] == 1.0
    assert heatmap[0, 5] < 0.2


def test_a_centre_on_the_border_is_no_error() -> None:
    truth = ImageTargets(torch.tensor([[80.0, 40, 96, 64]]), torch.tensor([0]), torch.tensor([[96.0, 64.0]]))
    assert not center_heatmap(truth, 4, 6, 16).any()


def test_locations_are_cell_centres() -> None:
    locations = cell_locations(2, 3, torch.zeros(1)) * torch.tensor([48.0, 32.0])
    assert locations.tolist() == [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]]


def test_wrong_number_of_targets_is_refused(head) -> None:
    with pytest.raises(ValueError, match="2 images came with 2D ground truth of 1"):
        head.loss(torch.randn(2, 32, 4, 6), [targets()])


@settings(max_examples=60, deadline=None)
@given(height=st.integers(8, 80), width=st.integers(8, 120), data=st.data())
def test_grid_mask_blanks_the_crossings_of_gaps(height: int, width: int, data) -> None:
    period = data.draw(st.integers(2, height - 1))
    offset_y, offset_x = data.draw(st.integers(0, period - 1)), data.draw(st.integers(0, period - 1))
    mask = grid_mask(height, width, period, 0.5, offset_y, offset_x).numpy()
    assert set(np.unique(mask)) <= {0.0, 1.0}
    rows, columns = mask.min(axis=1), mask.min(axis=0)  # 1 where a whole row or column is a band
    np.testing.assert_array_equal(mask, np.maximum(rows[:, None], columns[None]))
    band = int(np.clip(int(period * 0.5 + 0.5), 1, period - 1))
    top = (int(1.5 * height) - height) // 2
    inside = range(max(top, offset_y), top + height - period)
    for y in inside:  # one period of rows holds exactly one band
        if (y - offset_y) // period < int(1.5 * height) // period - 1 and mask[y - top : y - top + period].min() == 0:
            assert rows[y - top : y - top + period].sum() == band


def test_grid_mask_acts_in_training_only_and_on_all_images_alike() -> None:
    images = torch.rand(6, 3, 32, 48) + 1
    mask = GridMask(prob=1.0)
    torch.manual_seed(1)
    masked = mask(images)
    assert (masked == 0).any()
    blanked = masked == 0
    assert (blanked == blanked[:1, :1]).all()
    torch.testing.assert_close(masked[~blanked], images[~blanked])
    assert mask.eval()(images) is images
    assert GridMask(prob=0.0).train()(images) is images


def test_detector_trains_with_auxiliary_head_and_predicts_without_it(build_reference, make_sample) -> None:
    model = build_reference(auxiliary=True)
    images = torch.randn(1, 6, 3, 64, 96)
    sample = make_sample()
    with torch.no_grad():
        assert not any(name.startswith("enc_") for name in model({"imgs": images}, [sample], mode="loss"))
    model.train()
    with pytest.raises(ValueError, match="data sample 0 has no 2D ground truth"):
        model({"imgs": images}, [sample], mode="loss")
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 40, 50], [3, 3, 30, 30]]), labels=torch.tensor([0, 7]),
        centers_2d=torch.tensor([[25.0, 30], [15, 15]]), camera=torch.tensor([0, 4]),
    )  # fmt: skip
    model.reset_memory()
    losses = model({"imgs": images}, [sample], mode="loss")
    assert set(losses) >= NAMES
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.img_roi_head.parameters())
