"""2D auxiliary head ("FocalHead" of Focal-PETR): supervises the image features in training, absent at inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.models.utils import gen_gaussian_target
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps, bbox_xyxy_to_cxcywh
from mmdet.utils import reduce_mean
from mmdet3d.registry import MODELS
from mmdet3d.structures import Det3DDataSample
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .assigner import focal_cost
from .embeddings import inverse_sigmoid


class ImageTargets(NamedTuple):
    """2D ground truth of one image, in pixels of the network image.

    Attributes:
        boxes: (m, 4) corners (x1, y1, x2, y2).
        labels: (m,) class indices in the order of the info files.
        centers: (m, 2) projected centres of the 3D boxes.
    """

    boxes: Tensor
    labels: Tensor
    centers: Tensor


class AuxiliaryOutput(NamedTuple):
    """Predictions per image and cell; cells in row-major order.

    Attributes:
        cls_scores: (I, h * w, num_classes) logits.
        boxes: (I, h * w, 4) (cx, cy, w, h) as shares of the image.
        centers: (I, h * w, 2) projected 3D centres as shares of the image.
        centerness: (I, h * w, 1) logits.
    """

    cls_scores: Tensor
    boxes: Tensor
    centers: Tensor
    centerness: Tensor


def image_targets(samples: Sequence[Det3DDataSample], num_cams: int, device: torch.device) -> list[ImageTargets]:
    """2D ground truth of all images of a batch, sample by sample and camera by camera.

    Args:
        samples: With ``gt_instances`` (``bboxes``, ``labels``, ``centers_2d``, ``camera``), as
            :class:`~.transforms.PackStreamInputs` packs them.
        num_cams: Images of a sample.
        device: Where the targets are needed.

    Raises:
        ValueError: A sample has no 2D ground truth, which is not the same as one without objects.
    """
    targets = []
    for i, sample in enumerate(samples):
        objects = sample.gt_instances if "gt_instances" in sample else None
        if objects is None or "camera" not in objects:
            raise ValueError(
                f"data sample {i} has no 2D ground truth, which img_roi_head needs; use LoadImageObjects and "
                "PackStreamInputs in the pipeline, or set img_roi_head=None"
            )
        for camera in range(num_cams):
            own = objects.camera == camera
            fields = (objects.bboxes[own], objects.labels[own], objects.centers_2d[own])
            targets.append(ImageTargets(*(value.to(device) for value in fields)))
    return targets


def cell_locations(height: int, width: int, like: Tensor) -> Tensor:
    """(h * w, 2) centres (x, y) of the cells as shares of the image."""
    y = (torch.arange(height).to(like) + 0.5) / height
    x = (torch.arange(width).to(like) + 0.5) / width
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2)


def center_heatmap(targets: ImageTargets, height: int, width: int, stride: int) -> Tensor:
    """Heat map (h, w) with a Gaussian per object, as wide as its centre is far from the nearest side of its box."""
    heatmap = targets.boxes.new_zeros(height, width)
    left_top = targets.centers - targets.boxes[:, :2]
    right_bottom = targets.boxes[:, 2:] - targets.centers
    radii = (torch.cat((left_top, right_bottom), dim=1).amin(dim=1) / stride).ceil().clamp(min=1)
    cells = (targets.centers / stride).int()
    for (x, y), radius in zip(cells.tolist(), radii.int().tolist()):
        if 0 <= x < width and 0 <= y < height:
            gen_gaussian_target(heatmap, (x, y), radius)
    return heatmap


@MODELS.register_module()
class AuxiliaryHead2D(nn.Module):
    """Classes, boxes, projected centres and centre heat map on the image features (arXiv 2212.05505).

    Args:
        num_classes: Classes in the order of MMDetection3D's info files, not in that of the 3D head.
        in_channels: Channels of the features.
        feat_channels: Channels of the two towers.
        stride: Image pixels per cell.
        cls_weight: Weight of the quality focal loss, and of the focal cost of the matching.
        box_weight: Weight of the L1 loss of the boxes, and of its cost.
        iou_weight: Weight of the GIoU loss, and of its cost.
        center_weight: Weight of the L1 loss of the projected centres, and of its cost.
        centerness_weight: Weight of the heat map's loss.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 256,
        feat_channels: int = 256,
        stride: int = 16,
        cls_weight: float = 2.0,
        box_weight: float = 5.0,
        iou_weight: float = 2.0,
        center_weight: float = 10.0,
        centerness_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.cls_weight = cls_weight
        self.box_weight = box_weight
        self.iou_weight = iou_weight
        self.center_weight = center_weight
        self.shared_cls = _tower(in_channels, feat_channels)
        self.shared_reg = _tower(in_channels, feat_channels)
        self.cls = nn.Conv2d(feat_channels, num_classes, 1)
        self.centerness = nn.Conv2d(feat_channels, 1, 1)
        self.ltrb = nn.Conv2d(feat_channels, 4, 1)
        self.center2d = nn.Conv2d(feat_channels, 2, 1)
        for logits in (self.cls, self.centerness):
            nn.init.constant_(logits.bias, -math.log((1 - 0.01) / 0.01))
        self.loss_cls = MODELS.build(dict(type="mmdet.QualityFocalLoss", beta=2.0, loss_weight=cls_weight))
        self.loss_iou = MODELS.build(dict(type="mmdet.GIoULoss", loss_weight=iou_weight))
        self.loss_centerness = MODELS.build(
            dict(type="mmdet.GaussianFocalLoss", alpha=2.0, gamma=4.0, loss_weight=centerness_weight)
        )

    def forward(self, features: Tensor) -> AuxiliaryOutput:
        """Predict from features (I, C, h, w) of all images."""
        height, width = features.shape[-2:]
        location = cell_locations(height, width, features)
        classified, regressed = self.shared_cls(features), self.shared_reg(features)
        sides = _cells(self.ltrb(regressed)).sigmoid()
        corners = torch.cat((location - sides[..., :2], location + sides[..., 2:]), dim=-1).clamp(0.0, 1.0)
        return AuxiliaryOutput(
            cls_scores=_cells(self.cls(classified)),
            boxes=bbox_xyxy_to_cxcywh(corners),
            centers=(inverse_sigmoid(location) + _cells(self.center2d(regressed))).sigmoid(),
            centerness=_cells(self.centerness(classified)),
        )

    def loss(self, features: Tensor, targets: Sequence[ImageTargets]) -> dict[str, Tensor]:
        """Losses of all images together.

        Args:
            features: (I, C, h, w).
            targets: One per image.

        Returns:
            ``enc_loss_cls``, ``enc_loss_bbox``, ``enc_loss_iou``, ``centers2d_losses``, ``centerness_losses``.

        Raises:
            ValueError: There are more or fewer targets than images.
        """
        if len(targets) != len(features):
            raise ValueError(f"{len(features)} images came with 2D ground truth of {len(targets)}")
        height, width = features.shape[-2:]
        output = self(features)
        return self.compute_losses(output, targets, height, width)

    def compute_losses(
        self, output: AuxiliaryOutput, targets: Sequence[ImageTargets], height: int, width: int
    ) -> dict[str, Tensor]:
        """Losses of predictions on a grid of ``height`` x ``width`` cells; see :meth:`loss`."""
        size = output.boxes.new_tensor([width * self.stride, height * self.stride])
        matches = [
            self._match(*image, target, size)
            for *image, target in zip(output.cls_scores, output.boxes, output.centers, targets)
        ]
        image_index = torch.cat([cell.new_full(cell.shape, i) for i, (cell, _) in enumerate(matches)])
        cell_index = torch.cat([cell for cell, _ in matches])
        matched = ImageTargets(*(torch.cat([v[gt] for v, (_, gt) in zip(field, matches)]) for field in zip(*targets)))
        boxes, centers = output.boxes[image_index, cell_index], output.centers[image_index, cell_index]
        pixel_boxes = bbox_cxcywh_to_xyxy(boxes) * size.repeat(2)

        labels = image_index.new_full(output.cls_scores.shape[:2], output.cls_scores.shape[-1])
        labels[image_index, cell_index] = matched.labels
        quality = output.boxes.new_zeros(labels.shape)
        quality[image_index, cell_index] = bbox_overlaps(pixel_boxes.detach(), matched.boxes, is_aligned=True)

        num_pos = max(len(cell_index), 1)
        mean_pos = reduce_mean(boxes.new_tensor(float(len(cell_index)))).clamp(min=1.0)
        box_error = (boxes - bbox_xyxy_to_cxcywh(matched.boxes) / size.repeat(2)).abs().sum()
        center_error = (centers - matched.centers / size).abs().sum()
        heatmaps = torch.stack([center_heatmap(t, height, width, self.stride).flatten() for t in targets])
        probability = output.centerness.squeeze(-1).sigmoid().clamp(1e-4, 1 - 1e-4)
        return {
            "enc_loss_cls": self.loss_cls(
                output.cls_scores.flatten(0, 1), (labels.flatten(), quality.flatten()), avg_factor=num_pos
            ),
            "enc_loss_bbox": self.box_weight * box_error / mean_pos,
            "enc_loss_iou": self.loss_iou(pixel_boxes, matched.boxes, avg_factor=num_pos),
            "centers2d_losses": self.center_weight * center_error / mean_pos,
            "centerness_losses": self.loss_centerness(probability, heatmaps, avg_factor=num_pos),
        }

    @torch.no_grad()
    def _match(
        self, logits: Tensor, boxes: Tensor, centers: Tensor, target: ImageTargets, size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hungarian matching of cells (n, ...) to the objects of one image: indices of cells and objects."""
        size4 = size.repeat(2)
        cost = (
            self.cls_weight * focal_cost(logits)[:, target.labels]
            + self.box_weight * torch.cdist(boxes, bbox_xyxy_to_cxcywh(target.boxes) / size4, p=1)
            + self.center_weight * torch.cdist(centers, target.centers / size, p=1)
            - self.iou_weight * bbox_overlaps(bbox_cxcywh_to_xyxy(boxes) * size4, target.boxes, mode="giou")
        )
        cost = torch.nan_to_num(cost, nan=100.0, posinf=100.0, neginf=-100.0)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        return torch.as_tensor(rows, device=logits.device), torch.as_tensor(columns, device=logits.device)


def _tower(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(32, out_channels), nn.ReLU())


def _cells(x: Tensor) -> Tensor:
    """(I, C, h, w) to (I, h * w, C)."""
    return x.flatten(2).transpose(1, 2)
