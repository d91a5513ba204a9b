"""Steps in which a runtime's cost rises, for runtimes whose protocol says ``staircase``. Data, no runtime."""

from __future__ import annotations

from collections.abc import Mapping

from mdp_mmdet3d.latency.interpolation import Staircase

# Blocked convolutions of ONNX Runtime: counts are padded to 16, a tile has 64 channels.
# Source: measurements of ONNX Runtime 1.31 on AVX-512 (docs/latency.md).
ONNXRUNTIME_CPU = Staircase(
    kind="conv",
    block=16,
    left_over=(0.0, 0.39, 0.56, 0.76),
    input_multiple=4,
    remark="an input count that is no multiple of 4 leaves ONNX Runtime's blocked layout",
)

STAIRCASES: Mapping[str, Staircase] = {"onnxruntime-cpu": ONNXRUNTIME_CPU}
