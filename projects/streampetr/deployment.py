"""StreamPETR's engines as ``tools/export.py`` writes them: compared over a stream, reduced in precision, evaluated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mdp_mmdet3d.adapters import Adapter, DeployOptions
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.onnx.folders import check_target, part_folder
from mdp_mmdet3d.onnx.reduce import reduce_precision
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.pyz import RUNTIME_FILE, write_runtime
from mdp_mmdet3d.runtime.stream import Frame
from mdp_mmdet3d.runtime.synthetic import synthetic_frames
from mdp_mmdet3d.together import replace_folder

from .compare import check_against_pytorch
from .deployed_accuracy import evaluate_deployment
from .export import image_transform
from .normalisation import converted

FEW_MATCHES = 0.9
MOST_FRAMES = 10_000  # all are kept
FEW_MATCHES_ADVICE = (
    "many boxes are gone in this precision. With random weights that is chance; with trained ones do not deploy it "
    "before --evaluate says what it costs: calibrate on more frames (--calibration-frames), leave layers out "
    "(--int8-exclude), or take float16"
)


def deploy(
    adapter: Adapter, model: nn.Module, folder: Path, options: DeployOptions, say: Callable[[str], None], **facts: Any
) -> str:
    """See `Adapter.deploy`; ``facts`` are plan hash and weights."""
    for name, count in (("--num-frames", options.num_frames), ("--calibration-frames", options.calibration_frames)):
        if not 1 <= count <= MOST_FRAMES:
            raise MdpError(f"{name} must be in 1..{MOST_FRAMES}, got {count}")
    if options.source_size is not None and min(options.source_size) < 1:
        raise MdpError(f"--source-size {options.source_size} must be height and width of a camera image in pixels")
    check_target(folder)
    with part_folder(folder) as part:
        made = part / "new"  # moves to its place when nothing can fail any more
        float32 = made if options.precision == "float32" else part / "float32"
        adapter.export(
            model,
            float32,
            source_size=options.source_size,
            layout=options.layout,
            node=options.node,
            camera_encoding=options.camera_encoding,
            levels=options.levels,
            prev_exists=options.prev_exists,
            simplify=options.simplify,
            on_engine=lambda engine: say(f"export {engine}"),
            **facts,
        )
        manifest = DeploymentManifest.load(float32)
        count = options.num_frames
        frames = synthetic_frames(manifest, count) if options.synthetic else adapter.frames(model, count)
        check = check_against_pytorch(model, float32, frames)
        figures = ", ".join(f"{name} {check['teacher_forced'][name]:.1e}" for name in ("logits", "boxes", "memory"))
        say(f"against PyTorch over {len(frames)} frames: {figures} (teacher-forced)")
        if options.precision == "float32":
            manifest = manifest.with_checks(made, against_pytorch=check)
        else:
            manifest = _reduce(adapter, model, manifest, float32, made, options, frames)
            found = manifest.checks["boxes_against_float32"]
            say(
                f"{options.precision} against float32: {found['matched_share']:.1%} of {found['boxes']} boxes found "
                f"within {found['match_distance_m']} m, mean distance {found['mean_distance_m']:.3f} m"
            )
            if found["matched_share"] < FEW_MATCHES:
                say(f"WARNING: {FEW_MATCHES_ADVICE}")
            manifest = manifest.with_checks(made, float32_against_pytorch=check)
        if options.evaluate:
            accuracy = {}
            for precision, place in {"float32": float32, options.precision: made}.items():
                on_frame = partial(options.on_progress, f"evaluate {precision}")
                accuracy[precision] = evaluate_deployment(adapter.config, model.data_preprocessor, place, on_frame)
                numbers = {k: v for k, v in accuracy[precision].items() if isinstance(v, float)}
                say(
                    f"{precision} on {accuracy[precision]['frames']} frames: "
                    + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
                )
            manifest = manifest.with_checks(made, accuracy=accuracy)
        runtime = write_runtime(made / RUNTIME_FILE)
        replace_folder(made, folder)
    return f"{', '.join(spec.file for spec in manifest.engines.values())}, init_memory.npz, {runtime.name}"


def _reduce(
    adapter: Adapter,
    model: nn.Module,
    manifest: DeploymentManifest,
    source: Path,
    folder: Path,
    options: DeployOptions,
    frames: list[Frame],
) -> DeploymentManifest:
    """`reduce_precision` with frames normalised as the deployment takes them, calibrated on data of its own."""
    image = manifest.image
    trained = image_transform(model.data_preprocessor, image.size, image.source_size)
    calibration = None
    if options.precision == "int8" and options.quantised is None:
        count = options.calibration_frames
        spread = synthetic_frames(manifest, count) if options.synthetic else adapter.spread_frames(model, count)  # type: ignore[attr-defined]
        calibration = [converted(frame, trained, image).img for frame in spread]
    return reduce_precision(
        source,
        folder,
        options.precision,  # type: ignore[arg-type]
        [converted(frame, trained, image) for frame in frames],
        calibration=calibration,
        exclude=options.exclude,
        quantised=options.quantised,
    )
