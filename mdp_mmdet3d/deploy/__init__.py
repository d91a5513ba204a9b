"""From a model to engines that a host runs.

What is exported here is the runtime and needs numpy and ONNX Runtime only. Making engines needs PyTorch and
ONNX and is imported by its own name: ``mdp_mmdet3d.deploy.streampetr.export_streampetr``,
``mdp_mmdet3d.deploy.compare.compare_stream``, ``mdp_mmdet3d.deploy.lint.lint_onnx``.
"""

from mdp_mmdet3d.deploy.decode import Detections
from mdp_mmdet3d.deploy.errors import DeploymentError
from mdp_mmdet3d.deploy.manifest import DeploymentManifest
from mdp_mmdet3d.deploy.measure import LatencyStats, device_fingerprint, measure_interleaved, speedup
from mdp_mmdet3d.deploy.ort_engine import OrtEngine
from mdp_mmdet3d.deploy.stream import Frame, HostMemory, StreamOutput, StreamRunner

__all__ = [
    "DeploymentError",
    "DeploymentManifest",
    "Detections",
    "Frame",
    "HostMemory",
    "LatencyStats",
    "OrtEngine",
    "StreamOutput",
    "StreamRunner",
    "device_fingerprint",
    "measure_interleaved",
    "speedup",
]
