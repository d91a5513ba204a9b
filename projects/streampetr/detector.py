"""The StreamPETR detector: images and poses of a stream of frames in, 3D boxes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet3d.models import Base3DDetector
from mmdet3d.registry import MODELS, TASK_UTILS
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from mmengine.structures import InstanceData
from torch import Tensor

from .auxiliary_head import image_targets
from .box_coder import Detections
from .denoising import DenoisingQueries
from .frame import FrameInputs, frame_inputs, metainfo
from .guidance import projected_tokens
from .head import HeadOutput
from .memory import MemoryState, post_update, pre_update, restart_streams
from .sliding_window import WINDOW_KEY, window_losses


@MODELS.register_module()
class StreamPETR(Base3DDetector):
    """Streaming multi-camera 3D detector (Wang et al., arXiv 2303.11926).

    It keeps the memory of its streams between calls: row b of the batch is always the same stream. The memory
    is no part of the state dict; it is cleared on every change between training and evaluation and by
    :meth:`reset_memory`.

    Args:
        img_backbone: Config of the backbone.
        img_neck: Config of the neck.
        pts_bbox_head: Config of the head.
        bbox_coder: Config of the box decoding.
        criterion: Config of the 3D losses; without it the model can only predict.
        denoising: Config of the denoising queries, used in training; None trains without them.
        img_roi_head: Config of the auxiliary 2D head, used in training; None trains without it.
        grid_mask: Config of the mask on training images; None trains without it.
        guidance: Config of the guidance of the cross-attention in training; None trains without it.
        position_level: Which neck output becomes image tokens.
        data_preprocessor: Config of the data preprocessor.
        init_cfg: Initialisation or checkpoint, as everywhere in MMEngine.
        train_cfg: Not used; MMDetection3D's ``init_model`` and inferencers set it on every model.
        test_cfg: Likewise.
    """

    def __init__(
        self,
        img_backbone: dict,
        img_neck: dict,
        pts_bbox_head: dict,
        bbox_coder: dict,
        criterion: dict | None = None,
        denoising: dict | None = None,
        img_roi_head: dict | None = None,
        grid_mask: dict | None = None,
        guidance: dict | None = None,
        position_level: int = 0,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
    ) -> None:
        # MMEngine would look it up in the current default scope, which a script may not have set.
        preprocessor = MODELS.build(data_preprocessor) if data_preprocessor else None
        super().__init__(data_preprocessor=preprocessor, init_cfg=init_cfg)
        self.img_backbone = MODELS.build(img_backbone)
        self.img_neck = MODELS.build(img_neck)
        self.pts_bbox_head = MODELS.build(pts_bbox_head)
        self.bbox_coder = TASK_UTILS.build(bbox_coder)
        self.criterion = MODELS.build(criterion) if criterion else None
        self.denoising = TASK_UTILS.build(denoising) if denoising else None
        self.img_roi_head = MODELS.build(img_roi_head) if img_roi_head else None
        self.grid_mask = MODELS.build(grid_mask) if grid_mask else None
        self.guidance = MODELS.build(guidance) if guidance else None
        if self.guidance is not None:
            self.guidance.watch(self.pts_bbox_head.transformer["decoder"])
        self.position_level = position_level
        self.memory: MemoryState | None = None
        self._scene_tokens: list[str] | None = None
        # Puts the frozen batch norms into eval mode, which a new module is not.
        self.train()

    def reset_memory(self) -> None:
        """Forget all streams."""
        self.memory = None
        self._scene_tokens = None

    def train(self, mode: bool = True) -> StreamPETR:
        """Switch between training and evaluation; a change clears the memory."""
        if mode != self.training:
            self.reset_memory()
        super().train(mode)
        return self

    def extract_feat(self, batch_inputs: dict) -> Tensor:
        """Image features of ``batch_inputs['imgs']``; see :meth:`extract_img_feat`."""
        return self.extract_img_feat(batch_inputs["imgs"])

    def extract_img_feat(self, imgs: Tensor) -> Tensor:
        """Backbone and neck.

        Args:
            imgs: (B, N, 3, H, W) normalised images.

        Returns:
            (B, N, C, h, w) features.
        """
        batch, cameras = imgs.shape[:2]
        images = imgs.flatten(0, 1)
        if self.grid_mask is not None:
            images = self.grid_mask(images)
        features = self.img_neck(self.img_backbone(images))[self.position_level]
        return features.unflatten(0, (batch, cameras))

    def run_frame(
        self,
        img_feats: Tensor,
        frame: FrameInputs,
        memory: MemoryState | None,
        denoising: DenoisingQueries | None = None,
        last_level_only: bool = False,
    ) -> tuple[HeadOutput, MemoryState]:
        """Detect the objects of a frame and update the memory, without touching the detector's state.

        Args:
            img_feats: (B, N, C, h, w).
            frame: Geometry and time.
            memory: As returned for the previous frame; None if there is none.
            denoising: Denoising queries to prepend.
            last_level_only: Predict from the last decoder level only.

        Returns:
            The raw predictions (denoising queries included) and the memory after the frame.

        Raises:
            ValueError: The memory is that of another batch size.
        """
        head = self.pts_bbox_head
        # Poses, sinusoids and the memory lose metres in half precision, so autocast ends at the neck.
        with torch.autocast(img_feats.device.type, enabled=False):
            img_feats = img_feats.float()
            pos_embed, cone = head.position_embedding(frame.pad_hw, frame.intrinsics, frame.img2lidar)
            if memory is None:
                current = head.empty_memory(len(img_feats))
                current = restart_streams(current, frame.prev_exists, head.pseudo_points)
            elif len(memory.embedding) != len(img_feats):
                raise ValueError(
                    f"the memory holds {len(memory.embedding)} streams but the batch has {len(img_feats)} "
                    "samples; keep the batch size constant (drop_last=True) or call reset_memory()"
                )
            else:
                current = pre_update(
                    memory,
                    length=head.memory_len,
                    timestamp=frame.timestamp,
                    ego_pose_inv=frame.ego_pose_inv,
                    prev_exists=frame.prev_exists,
                    pseudo_points=head.pseudo_points,
                )
            output = head.predict(
                img_feats,
                pos_embed,
                cone,
                current,
                extra_references=denoising.reference_points if denoising else None,
                self_attn_mask=denoising.self_attn_mask if denoising else None,
                last_level_only=last_level_only,
            )
            pad = denoising.reference_points.shape[1] if denoising else 0
            kept = HeadOutput(
                output.all_cls_scores[:, :, pad:],
                output.all_bbox_preds[:, :, pad:],
                output.embedding[:, pad:],
                output.reference_points[:, pad:],
            )
            current = head.remember(kept, current)
            return output, post_update(current, timestamp=frame.timestamp, ego_pose=frame.ego_pose)

    def loss(
        self, batch_inputs: dict, batch_data_samples: Sequence[Det3DDataSample], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Losses of one frame per stream, whose memory moves on by it, or of clips (`SlidingWindowDataset`).

        Args:
            batch_inputs: ``imgs`` (B, N, 3, H, W); for clips (B, frames * N, 3, H, W).
            batch_data_samples: With ``gt_instances_3d`` (``bboxes_3d`` 9-dim, ``labels_3d``) and the metainfo
                of :func:`frame_inputs`; for the auxiliary head see :func:`image_targets`.
            **kwargs: Not used.

        Returns:
            See :meth:`frame_losses`; those of clips as :func:`window_losses` names them.

        Raises:
            ValueError: The model was built without ``criterion``, or metainfo is missing.
        """
        imgs = batch_inputs["imgs"]
        if WINDOW_KEY in batch_data_samples[0].metainfo:
            return window_losses(self, imgs, batch_data_samples)
        losses, self.memory = self.frame_losses(imgs, batch_data_samples, self.memory)
        return losses

    def frame_losses(
        self, imgs: Tensor, samples: Sequence[Det3DDataSample], memory: MemoryState | None
    ) -> tuple[dict[str, Tensor], MemoryState]:
        """Losses of one frame per stream, without touching the detector's state.

        Args:
            imgs: (B, N, 3, H, W).
            samples: As for :meth:`loss`.
            memory: As returned for the previous frame; None if there is none.

        Returns:
            The losses of :class:`StreamPETRLoss`, :class:`AuxiliaryHead2D` and :class:`AttentionGuidance`, and the
            memory after the frame.

        Raises:
            ValueError: The model was built without ``criterion``, or metainfo is missing.
        """
        head = self.pts_bbox_head
        frame = frame_inputs(samples, imgs)
        gt_boxes, gt_labels = [], []
        for sample in samples:
            gt = sample.gt_instances_3d
            boxes = torch.cat((gt.bboxes_3d.gravity_center, gt.bboxes_3d.tensor[:, 3:]), dim=1)
            gt_boxes.append(boxes.to(imgs.device))
            gt_labels.append(gt.labels_3d.to(imgs.device))
        queries = None
        if self.denoising is not None and self.training:
            num_learned = head.reference_points.num_embeddings
            queries = self.denoising.generate(
                gt_boxes,
                gt_labels,
                num_classes=head.num_classes,
                pc_range=head.pc_range,
                num_queries=num_learned + head.num_propagated,
                num_keys=num_learned + head.memory_len,
            )
        img_feats = self.extract_img_feat(imgs)
        output, memory = self.run_frame(img_feats, frame, memory, queries)
        with torch.autocast(imgs.device.type, enabled=False):
            losses = self.compute_losses(output, gt_boxes, gt_labels, queries)
            if self.img_roi_head is not None and self.training:
                targets = image_targets(samples, imgs.shape[1], imgs.device)
                losses |= self.img_roi_head.loss(img_feats.flatten(0, 1).float(), targets)
            if self.guidance is not None and self.training:
                points = head.to_metres(output.reference_points)
                lidar2img = torch.linalg.inv(frame.img2lidar)
                height, width = img_feats.shape[-2:]
                tokens = projected_tokens(points, lidar2img, height, width, head.stride)
                losses |= self.guidance.losses(tokens)
        return losses, memory

    def compute_losses(
        self,
        output: HeadOutput,
        gt_boxes: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        denoising: DenoisingQueries | None,
    ) -> dict[str, Tensor]:
        """Losses of raw predictions.

        Args:
            output: With the denoising queries first.
            gt_boxes: Per sample (m, 9): gravity centre, sizes, yaw, velocity.
            gt_labels: Per sample (m,).
            denoising: The denoising queries, if there are any.

        Returns:
            See :class:`StreamPETRLoss`. Training with denoising yields the same keys for every batch.

        Raises:
            ValueError: The model was built without ``criterion``.
        """
        if self.criterion is None:
            raise ValueError("this StreamPETR has no losses; set criterion=dict(type='StreamPETRLoss')")
        head = self.pts_bbox_head
        scores, boxes = output.all_cls_scores, output.all_bbox_preds
        pad = denoising.reference_points.shape[1] if denoising else 0
        losses = self.criterion(
            scores[:, :, pad:], boxes[:, :, pad:], gt_boxes, gt_labels, head.code_weights, head.match_costs
        )
        if denoising is not None:
            losses |= self.criterion.denoising(scores[:, :, :pad], boxes[:, :, :pad], denoising, head.code_weights)
        elif self.denoising is not None and self.training:
            # A rank without ground truth must log the same keys as the others.
            losses |= {key.replace("loss_", "dn_loss_"): value.detach() for key, value in losses.items()}
        return losses

    def predict(
        self, batch_inputs: dict, batch_data_samples: Sequence[Det3DDataSample], **kwargs: Any
    ) -> list[Det3DDataSample]:
        """Detect; a stream restarts where the scene changes or ``prev_exists`` is 0.

        Args:
            batch_inputs: ``imgs`` (B, N, 3, H, W).
            batch_data_samples: With the metainfo of :func:`frame_inputs` and ``scene_token``.
            **kwargs: Not used.

        Returns:
            The samples with ``pred_instances_3d``: ``bboxes_3d`` (LiDARInstance3DBoxes, 9-dim),
            ``scores_3d``, ``labels_3d``.
        """
        output = self._stream(batch_inputs, batch_data_samples, last_level_only=True)
        detections = self.bbox_coder.decode(output.all_cls_scores[-1], output.all_bbox_preds[-1])
        return self.add_pred_to_datasample(list(batch_data_samples), [to_instances(d) for d in detections])

    def _forward(
        self, batch_inputs: dict, batch_data_samples: Sequence[Det3DDataSample] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Raw predictions of all levels, streaming like :meth:`predict`."""
        output = self._stream(batch_inputs, batch_data_samples or ())
        return {"all_cls_scores": output.all_cls_scores, "all_bbox_preds": output.all_bbox_preds}

    def _stream(
        self, batch_inputs: dict, samples: Sequence[Det3DDataSample], last_level_only: bool = False
    ) -> HeadOutput:
        imgs = batch_inputs["imgs"]
        frame = frame_inputs(samples, imgs)
        scenes = [metainfo(samples, i, "scene_token") for i in range(len(samples))]
        if self._scene_tokens is not None and len(self._scene_tokens) == len(scenes):
            goes_on = [before == now for before, now in zip(self._scene_tokens, scenes)]
            frame = frame._replace(prev_exists=frame.prev_exists * frame.prev_exists.new_tensor(goes_on))
        else:
            frame = frame._replace(prev_exists=torch.zeros_like(frame.prev_exists))
        if not frame.prev_exists.any():
            self.reset_memory()
        output, self.memory = self.run_frame(
            self.extract_img_feat(imgs), frame, self.memory, last_level_only=last_level_only
        )
        self._scene_tokens = scenes
        return output


def to_instances(detections: Detections) -> InstanceData:
    """Detections as MMDetection3D instances, whose boxes are bottom-centred."""
    boxes = LiDARInstance3DBoxes(detections.bboxes, box_dim=9, origin=(0.5, 0.5, 0.5))
    return InstanceData(bboxes_3d=boxes, scores_3d=detections.scores, labels_3d=detections.labels)
