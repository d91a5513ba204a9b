"""A float32 deployment folder in, one of reduced precision out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import file_sha256
from mdp_mmdet3d.onnx.attention_widths import pad_attention
from mdp_mmdet3d.onnx.folders import check_target, new_deployment
from mdp_mmdet3d.onnx.lint import load_onnx, require_clean
from mdp_mmdet3d.onnx.precision import to_float16
from mdp_mmdet3d.onnx.quantise import check_replaces, to_int8
from mdp_mmdet3d.runtime.accuracy import compare_boxes
from mdp_mmdet3d.runtime.graph_manifest import load_manifest
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner

Precision = Literal["float16", "int8"]


def reduce_precision(
    source: str | Path,
    out_dir: str | Path,
    precision: Precision,
    frames: Sequence[Frame],
    *,
    calibration: Sequence[np.ndarray] | None = None,
    exclude: Sequence[str] = (),
    quantised: str | Path | None = None,
) -> DeploymentManifest:
    """Convert the engines, compare the boxes with those of ``source`` on ``frames``, and write both down.

    Args:
        source: float32 deployment folder; it is left as it is.
        out_dir: Folder to write; an earlier deployment there is replaced once the new one is complete.
        precision: ``"float16"``: learned layers of image encoder and head; ``"int8"``: convolutions of the image
            encoder with Q/DQ, the rest as in float16.
        frames: To compare on.
        calibration: Images (N, 3, H, W) as the encoder takes them, for int8; default: those of ``frames``.
        exclude: Convolutions that stay float16 in int8, see `to_int8`.
        quantised: ONNX file with Q/DQ that another tool made of ``image_encoder.onnx``; taken as it is.

    Returns:
        The new manifest; ``checks["boxes_against_float32"]`` has the agreement, ``checks["padded_attentions"]`` the
        attentions whose heads were widened for TensorRT (`pad_attention`).

    Raises:
        DeploymentError: ``source`` is not float32, there is no frame, a graph cannot be converted, or ``out_dir``
            holds something else than a deployment.
    """
    source, out_dir = Path(source), Path(out_dir)
    check_target(out_dir)
    manifest = DeploymentManifest.load(source)
    if precision != "int8" and (exclude or quantised):
        raise DeploymentError(f"layers to exclude and a quantised graph are for int8, not for {precision}")
    if quantised and exclude:
        raise DeploymentError(f"{quantised} is taken as it is: exclude layers in the tool that makes it")
    if manifest.precision != "float32" or precision not in ("float16", "int8") or not frames:
        raise DeploymentError(
            f"cannot make {precision!r} of {source}, which is {manifest.precision}, with {len(frames)} frames: start "
            "from a float32 deployment, ask for float16 or int8, and give at least one frame"
        )
    with new_deployment(out_dir) as part:
        for name in manifest.checksums:
            shutil.copyfile(source / name, part / name)
        padded: tuple[str, ...] = ()
        for name, spec in manifest.engines.items():
            graph = onnx.load(str(source / spec.file))
            if name == "image_encoder" and precision == "int8":
                images = calibration or [frame.img for frame in frames]
                graph = _int8(graph, quantised, images, exclude, manifest.encoder_batch)
            else:
                graph, widened = pad_attention(graph)
                padded += widened
                graph = to_float16(graph, name)
            require_clean(graph, f"{spec.file} in {precision}")
            onnx.save(graph, str(part / spec.file))
        manifest = replace(
            manifest,
            precision=precision,
            checksums={name: file_sha256(part / name) for name in manifest.checksums},
            checks={"padded_attentions": list(padded)} if padded else {},
        )
        manifest.save(part)
        agreement = compare_boxes(StreamRunner(source), StreamRunner(part), frames)
        manifest = manifest.with_checks(part, boxes_against_float32=agreement.to_json())
    return manifest


def halve(folder: str | Path) -> None:
    """Convert the engines of a float32 deployment of either kind to float16 in place, uncompared: for timing."""
    folder = Path(folder)
    manifest = load_manifest(folder)
    for name, spec in manifest.engines.items():
        graph, _ = pad_attention(onnx.load(str(folder / spec.file)))
        onnx.save(to_float16(graph, name), str(folder / spec.file))
    checksums = {name: file_sha256(folder / name) for name in manifest.checksums}
    replace(manifest, precision="float16", checksums=checksums).save(folder)


def _int8(
    graph: onnx.ModelProto,
    quantised: str | Path | None,
    images: Sequence[np.ndarray],
    exclude: Sequence[str],
    batch: int,
) -> onnx.ModelProto:
    if quantised is None:
        # One frame stays one, so that it is refused, if the encoder takes its cameras one by one.
        parts = [image[i : i + batch] for image in images for i in range(0, len(image), batch)]
        feeds = [{"img": part[None]} for part in (parts if len(images) > 1 else parts[:1])]
        return to_int8(graph, feeds, exclude)
    taken = load_onnx(quantised)
    check_replaces(taken, graph)
    return taken
