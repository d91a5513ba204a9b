"""A detector that is in no library: its model, its data, and the adapter that `mdp_mmdet3d` prunes it by."""

from .adapter import MarkerAdapter
from .data import MarkerImages, MarkerRecall
from .model import MarkerDetector

__all__ = ["MarkerAdapter", "MarkerDetector", "MarkerImages", "MarkerRecall"]
