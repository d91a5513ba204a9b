"""What Autoware's ``autoware_camera_streampetr`` loads, for every generation of the node (docs/deployment.md)."""

from .generations import GENERATIONS, NodeGeneration, node_generation
from .package import package_autoware
from .parameters import NodeSettings

__all__ = ["GENERATIONS", "NodeGeneration", "NodeSettings", "node_generation", "package_autoware"]
