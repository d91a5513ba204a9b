"""SSD's head that can predict: MMDetection 3.3's own asks itself for a `loss_cls` that it does not have.

Imported by the configs of SSD alone (``custom_imports``): everything else runs without MMDetection.
"""

from __future__ import annotations

from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS


@MODELS.register_module()
class PredictingSSDHead(SSDHead):
    """`SSDHead` whose `loss_cls` is None, so that its scores are the softmax (open-mmlab/mmdetection issue 11780)."""

    loss_cls = None
