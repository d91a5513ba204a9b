"""What may be asked of a deployment, whatever the kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DeployOptions:
    """What ``tools/export.py`` is asked for.

    Attributes:
        precision: ``"float32"``, ``"float16"`` or ``"int8"``.
        simplify: Let onnxslim fuse nodes and merge equal ones.
        synthetic: Compare and calibrate on noise, not on the importance data.
        num_frames: Frames to compare on.
        calibration_frames: Frames for int8's ranges, spread over the importance data.
        exclude: Patterns of names of convolutions that int8 leaves in float16.
        quantised: ONNX file of another tool with Q/DQ, taken as the int8 image encoder.
        evaluate: Run the engines over the config's test data and keep the metrics.
        source_size: Camera image of the host (height, width) in pixels; None: that of the data set.
        layout: ``"native"`` or that of a public runtime.
        node: Release of that runtime, whose normalisation of images the graphs shall take; None: the model's own.
        camera_encoding: Of its camera images.
        levels: Decoder levels in the outputs, ``"last"`` or ``"all"``.
        prev_exists: Give a streaming head an input that starts a stream.
        encoder_batch: Images that one run of the image encoder takes, 1 or all; None: all.
        on_progress: Called with (what is done, steps done, steps in all) during long work.
    """

    precision: str = "float32"
    simplify: bool = True
    synthetic: bool = False
    num_frames: int = 4
    calibration_frames: int = 32
    exclude: tuple[str, ...] = ()
    quantised: Path | None = None
    evaluate: bool = False
    source_size: tuple[int, int] | None = None
    layout: str = "native"
    node: str | None = None
    camera_encoding: str = "rgb8"
    levels: str = "last"
    prev_exists: bool = False
    encoder_batch: int | None = None
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
