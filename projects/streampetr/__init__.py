"""StreamPETR for MMDetection3D 1.4: streaming multi-camera 3D detection (arXiv 2303.11926)."""

from .adapter import StreamPETRAdapter
from .assigner import StreamPETRHungarianAssigner
from .augmentation import LoadImageObjects, RandomResizeCropFlip, RandomRotateScaleWorld
from .auxiliary_head import AuxiliaryHead2D
from .box_coder import Detections, StreamPETRBoxCoder
from .cp_fpn import CPFPN
from .dataset import StreamNuScenesDataset
from .decoder import StreamPETRDecoder
from .denoising import DenoisingGenerator
from .detector import StreamPETR
from .distillation import Distillation, DistillationHook
from .frame import FrameInputs, frame_inputs
from .grid_mask import GridMask
from .guidance import AttentionGuidance, GuidanceHook
from .head import HeadOutput, StreamPETRHead
from .losses import StreamPETRLoss
from .memory import MemoryState
from .metric import ClassSetNuScenesMetric
from .sampler import SceneSampler, StreamBatchSampler
from .sliding_window import SlidingWindowDataset
from .train_loop import StreamStateHook, StreamTrainLoop
from .transforms import LoadStreamImages, PackStreamInputs, ResizeCropImages
from .vovnet import VoVNet

__all__ = [
    "CPFPN",
    "AttentionGuidance",
    "AuxiliaryHead2D",
    "ClassSetNuScenesMetric",
    "DenoisingGenerator",
    "Detections",
    "Distillation",
    "DistillationHook",
    "FrameInputs",
    "GridMask",
    "GuidanceHook",
    "HeadOutput",
    "LoadImageObjects",
    "LoadStreamImages",
    "MemoryState",
    "PackStreamInputs",
    "RandomResizeCropFlip",
    "RandomRotateScaleWorld",
    "ResizeCropImages",
    "SceneSampler",
    "SlidingWindowDataset",
    "StreamBatchSampler",
    "StreamNuScenesDataset",
    "StreamPETR",
    "StreamPETRAdapter",
    "StreamPETRBoxCoder",
    "StreamPETRDecoder",
    "StreamPETRHead",
    "StreamPETRHungarianAssigner",
    "StreamPETRLoss",
    "StreamStateHook",
    "StreamTrainLoop",
    "VoVNet",
    "frame_inputs",
]
