"""What one exported model is: ``deployment.json``, read by every runtime, written last by every export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import digest, file_sha256, read_json, read_npz, write_json
from mdp_mmdet3d.runtime.manifest_facts import check_graphs, check_names, check_stream
from mdp_mmdet3d.tensor_spec import TensorSpec

MANIFEST_FILE = "deployment.json"
PRECISIONS_V1 = {"fp32": "float32", "fp16": "float16"}  # as the first release wrote them
SCHEMA_VERSION = 1
DIGEST = "digest"
"""Key of the digest of everything else in the file; the first release wrote none."""
SINGLE_GRAPH = "single_graph"
"""``kind`` of a deployment of one graph (`graph_manifest`); a StreamPETR's has none."""


@dataclass(frozen=True)
class EngineSpec:
    """One ONNX file, relative to the deployment folder, and its signature."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ImageTransform:
    """How a camera image becomes a network input: resize, crop, normalise, in that order.

    Attributes:
        source_size: Camera image (height, width) in pixels.
        resized_size: (height, width) after resizing with ``interpolation``.
        crop_offset: (top, left) of the crop in the resized image, in pixels.
        size: Network input (height, width).
        mean: Per channel, in ``channel_order``, on the 0..255 scale.
        std: Per channel, in ``channel_order``, on the 0..255 scale.
        channel_order: ``"RGB"`` or ``"BGR"``.
        interpolation: Name of the resize filter.
    """

    source_size: tuple[int, int]
    resized_size: tuple[int, int]
    crop_offset: tuple[int, int]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str
    interpolation: str = "pil_bicubic"


@dataclass(frozen=True)
class MemorySpec:
    """Row counts of the temporal memory.

    Attributes:
        pre_length: Rows that the head reads.
        post_length: Rows that the head writes; the first ``pre_length`` of them are read in the next frame.
        num_propagated: Rows that hold pseudo reference points after a reset.
        init_file: npz file with ``pseudo_reference_points`` (num_propagated, 3) in metres, lidar frame.
    """

    pre_length: int
    post_length: int
    num_propagated: int
    init_file: str


M = TypeVar("M", bound="Manifest")


class Manifest:
    """How the manifests of both kinds of deployment, which are dataclasses, are written and read."""

    kind: ClassVar[str | None] = None
    __dataclass_fields__: ClassVar[dict[str, Any]]
    engines: dict[str, EngineSpec]
    checksums: dict[str, str]
    checks: dict[str, Any]

    def runs(self, engine: str) -> int:
        """How often an engine runs for the frames that it is needed for."""
        return 1

    def save(self, folder: str | Path) -> None:
        """Write ``deployment.json`` into ``folder``, signed by its own digest."""
        kind = {} if self.kind is None else {"kind": self.kind}
        data = {"schema_version": SCHEMA_VERSION, **kind, **asdict(self)}
        write_json(Path(folder) / MANIFEST_FILE, {**data, DIGEST: digest(data)})

    def with_checks(self: M, folder: str | Path, **checks: Any) -> M:
        """Add results of checks and write the manifest again."""
        manifest = replace(self, checks={**self.checks, **checks})
        manifest.save(folder)
        return manifest

    @classmethod
    def load(cls: type[M], folder: str | Path) -> M:
        """Read ``deployment.json``; check it against its digest, its facts against the graphs, the files that it lists
        against their checksums.

        Raises:
            FileFormatError: The manifest is missing, malformed, changed, of the other kind or not what the graphs say,
                or a file is missing, has changed or holds weights that are not finite.
        """
        path = Path(folder) / MANIFEST_FILE
        data = read_json(path, what="deployment manifest", schema_version=SCHEMA_VERSION)
        if data.get("kind") != cls.kind:
            raise FileFormatError(f"{path} {cls._other_kind(data)}")
        signature = data.pop(DIGEST, None)
        if signature not in (None, digest(data)):
            raise FileFormatError(
                f"deployment manifest {path} was changed after it was written: its digest is {digest(data)}, it says "
                f"{signature!r}; export again"
            )
        try:
            manifest = cls._from_json(data)
            check_names(path, (*manifest.checksums, *manifest._files()))
            check_files(folder, manifest.checksums, manifest._files())
            manifest._check(path)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(f"deployment manifest {path} is malformed ({error!r}); export again") from error
        return manifest

    @classmethod
    def _from_json(cls: type[M], data: Mapping[str, Any]) -> M:
        values = tuples({item.name: data[item.name] for item in fields(cls)})
        values["precision"] = PRECISIONS_V1.get(data["precision"], data["precision"])
        values["engines"] = {name: engine_from_json(engine) for name, engine in data["engines"].items()}
        return cls(**values)

    @classmethod
    def _other_kind(cls, data: Mapping[str, Any]) -> str:
        """What a manifest of another kind is, after its path."""
        raise NotImplementedError

    def _files(self) -> set[str]:
        """Files that must have a checksum."""
        return {engine.file for engine in self.engines.values()}

    def _check(self, path: Path) -> None:
        """Raise `FileFormatError` where the manifest contradicts its graphs."""
        check_graphs(path, self)


@dataclass(frozen=True)
class DeploymentManifest(Manifest):
    """Everything that a host needs to run an exported StreamPETR (docs/deployment.md, section 1).

    Attributes:
        engines: ``image_encoder``, ``position_embedding`` and ``head``.
        layout: ``"native"``: outputs (levels, 1, Q, C); ``"autoware"``: (1, C, levels * Q).
        levels: Decoder levels in the outputs, the last one being the result.
        num_queries: Q, learned and propagated queries.
        precision: ``"float32"``, ``"float16"`` or ``"int8"``; see ``docs/deployment.md`` for what stays in float32.
        class_names: In the order of the score columns.
        camera_names: In the order of the image slots.
        image: How network inputs are made.
        pc_range: x, y, z minimum and maximum in metres.
        post_center_range: Boxes whose centre is outside are dropped.
        max_detections: Best (query, class) pairs that are decoded per frame.
        score_threshold: Boxes at or below it are dropped; None keeps all.
        memory: Row counts and initial state of the temporal memory.
        plan_hash: Hash of the pruning plan, None for a dense model.
        weights: Where the weights came from, e.g. a checkpoint's name, or ``"random"``.
        software: Versions of the libraries that exported.
        checksums: SHA-256 of every other file in the folder, by name.
        checks: What was compared after the export, and the differences found.
    """

    engines: dict[str, EngineSpec]
    layout: str
    levels: int
    num_queries: int
    precision: str
    class_names: tuple[str, ...]
    camera_names: tuple[str, ...]
    image: ImageTransform
    pc_range: tuple[float, ...]
    post_center_range: tuple[float, ...]
    max_detections: int
    score_threshold: float | None
    memory: MemorySpec
    plan_hash: str | None
    weights: str
    software: dict[str, str]
    checksums: dict[str, str]
    checks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> DeploymentManifest:
        # Folders of the first release have no checks.
        values = {
            "checks": {},
            **data,
            "image": ImageTransform(**tuples(data["image"])),
            "memory": MemorySpec(**data["memory"]),
        }
        return super()._from_json(values)

    @classmethod
    def _other_kind(cls, data: Mapping[str, Any]) -> str:
        return (
            f"is that of a single graph ({data.get('model_type')}): the streaming runtime and what builds "
            "on it run StreamPETR only; run model.onnx with ONNX Runtime or TensorRT itself"
        )

    @property
    def encoder_batch(self) -> int:
        """Images that one run of the image encoder takes: those of all cameras, or 1."""
        return self.engines["image_encoder"].inputs[0].shape[1]

    def runs(self, engine: str) -> int:
        """The image encoder may run camera by camera."""
        return len(self.camera_names) // self.encoder_batch if engine == "image_encoder" else 1

    def _files(self) -> set[str]:
        return {*super()._files(), self.memory.init_file}

    def _check(self, path: Path) -> None:
        check_stream(path, self)
        super()._check(path)

    def pseudo_reference_points(self, folder: str | Path) -> np.ndarray:
        """Read the points (num_propagated, 3), metres, that a reset puts into the memory; float32."""
        path = Path(folder) / self.memory.init_file
        _, arrays = read_npz(path, what="initial memory", schema_version=SCHEMA_VERSION)
        points = arrays.get("pseudo_reference_points")
        expected = (self.memory.num_propagated, 3)
        if points is None or points.shape != expected or not np.isfinite(points).all():
            raise FileFormatError(
                f"initial memory {path} has no finite pseudo_reference_points of shape {expected}; export again"
            )
        return points


def check_files(folder: str | Path, checksums: Mapping[str, str], needed: set[str]) -> None:
    """Raise `FileFormatError` if a file has changed or is missing, or one of ``needed`` has no checksum."""
    if unchecked := sorted(needed - checksums.keys()):
        raise FileFormatError(f"{Path(folder) / MANIFEST_FILE} has no checksum of {unchecked}; export again")
    for name, sha256 in checksums.items():
        _check_file(Path(folder) / name, sha256)


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise FileFormatError(f"{path} is listed in {MANIFEST_FILE} but does not exist; export again")
    found = file_sha256(path)
    if found != sha256:
        raise FileFormatError(
            f"{path} has SHA-256 {found[:16]}..., {MANIFEST_FILE} says {sha256[:16]}...: "
            "truncated or replaced; export again"
        )


def tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of a JSON object as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def engine_from_json(data: Mapping[str, Any]) -> EngineSpec:
    """Inverse of ``asdict``."""

    def specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(**tuples(item)) for item in items)

    return EngineSpec(data["file"], specs(data["inputs"]), specs(data["outputs"]))
