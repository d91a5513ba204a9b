"""A deployment in the Autoware layout as a folder that one generation of the node loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.onnx.attention_widths import pad_attention
from mdp_mmdet3d.onnx.folders import new_deployment
from mdp_mmdet3d.onnx.lint import require_clean
from mdp_mmdet3d.runtime.manifest import DeploymentManifest

from ..normalisation import conversion
from .generations import ENCODINGS, NodeGeneration, node_generation
from .launch import LAUNCH_FILE, launch_file
from .parameters import ENGINE_FILES, NodeSettings, all_parameters, parameter_files
from .readme import README_FILE, readme
from .shapes import check_shapes


def package_autoware(
    source: str | Path, out_dir: str | Path, node: str, settings: NodeSettings | None = None
) -> list[str]:
    """Write the three graphs, the parameter files, a launch file and a README.

    Attentions of unequal head widths are padded where the node builds float16 (`pad_attention`).

    Args:
        source: float32 deployment in the Autoware layout, without a ``prev_exists`` input, exported for this node.
        out_dir: Folder to make; it must not exist or be empty.
        node: Release of ``autoware_camera_streampetr``, e.g. ``"0.53"``.
        settings: Of the node.

    Returns:
        Names of the files.

    Raises:
        DeploymentError: The node is not known, the deployment is not what it needs, or the folder is not empty.
        FileFormatError: The deployment is incomplete, or its files have changed.
    """
    source, out_dir = Path(source), Path(out_dir)
    settings = settings or NodeSettings()
    generation = node_generation(node)
    manifest = DeploymentManifest.load(source)
    settings.check(len(manifest.camera_names))
    encodings = _check(manifest, source, generation, settings)
    graphs = {name: onnx.load(str(source / spec.file)) for name, spec in manifest.engines.items()}
    parameters = all_parameters(manifest, settings, generation)
    check_shapes(graphs, parameters, settings.encoder_batch)
    if not _starts_from_zeros(graphs["head"]):
        raise DeploymentError(
            f"the head of {source} does not know a memory of zeros, from which the node starts: it was exported by an "
            "older version; export again"
        )
    if out_dir.exists() and any(out_dir.iterdir()):
        raise DeploymentError(f"{out_dir} is not empty; give another folder")
    with new_deployment(out_dir) as part:
        padded: tuple[str, ...] = ()
        for name, spec in manifest.engines.items():
            graph, widened = pad_attention(graphs[name]) if settings.precision == "fp16" else (graphs[name], ())
            if widened:
                require_clean(graph, spec.file)
                onnx.save(graph, str(part / ENGINE_FILES[name]))
            else:
                shutil.copyfile(source / spec.file, part / ENGINE_FILES[name])
            padded += widened
        texts = {
            **parameter_files(parameters, generation),
            LAUNCH_FILE: launch_file(manifest, settings, generation),
            README_FILE: readme(manifest, generation, encodings, padded),
        }
        for file, text in texts.items():
            with atomic_path(part / file) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return sorted(path.name for path in out_dir.iterdir())


def _check(
    manifest: DeploymentManifest, source: Path, generation: NodeGeneration, settings: NodeSettings
) -> tuple[str, ...]:
    """Raise unless the node can run the deployment; the encodings that the cameras may have."""
    if manifest.layout != "autoware":
        raise DeploymentError(f"{source} has the layout {manifest.layout!r}; export with --layout autoware")
    if manifest.precision != "float32":
        raise DeploymentError(f"{source} is {manifest.precision}; the node reduces precision itself: export float32")
    if any(spec.name == "prev_exists" for spec in manifest.engines["head"].inputs):
        raise DeploymentError(f"{source} has a prev_exists input, which the node does not feed; export without it")
    found, cameras = manifest.encoder_batch, len(manifest.camera_names)
    wanted = cameras if settings.encoder_batch is None else settings.encoder_batch
    if found != wanted:
        raise DeploymentError(
            f"the image encoder of {source} takes {found} of {cameras} images at a time, asked for is {wanted}: the "
            f"released nodes copy all images in at once (export with --encoder-batch {cameras}); "
            "for a node that runs it camera by camera give --encoder-batch 1 to both tools"
        )
    image = manifest.image
    encodings = tuple(code for code in ENCODINGS if conversion(generation.normalised(image, code), image) is None)
    if not encodings:
        raise DeploymentError(
            f"{source} takes images normalised by mean {list(image.mean)} and deviation {list(image.std)} in "
            f"{image.channel_order} order, which is not what node {generation.name} feeds, and no parameter of it "
            f"changes that: export with --layout autoware --node {generation.name}, which folds the difference in"
        )
    return encodings


def _starts_from_zeros(head: onnx.ModelProto) -> bool:
    return any(node.op_type == "Where" and "pre_memory_embedding" in node.input for node in head.graph.node)
