"""``deployment.json`` of a detector that is one graph without memory: camera image in, raw outputs of its heads out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mdp_mmdet3d.deploy.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SINGLE_GRAPH,
    DeploymentManifest,
    EngineSpec,
    check_files,
    engine_from_json,
    tuples,
)
from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import read_json, write_json


@dataclass(frozen=True)
class GraphManifest:
    """Everything that a host needs to run one exported graph.

    Attributes:
        engines: ``model``.
        model_type: Class of the detector.
        precision: ``"fp32"`` or ``"fp16"``.
        class_names: In the order of the score columns; empty if the config does not tell.
        mean: Per channel in ``channel_order`` on the 0..255 scale; empty if the model does not normalise.
        std: Likewise.
        channel_order: ``"RGB"`` or ``"BGR"``.
        plan_hash: Hash of the pruning plan, None for a dense model.
        weights: Where the weights came from.
        software: Versions of the libraries that exported.
        checksums: SHA-256 of every other file in the folder, by name.
        checks: What was compared after the export, and the differences found.
    """

    engines: dict[str, EngineSpec]
    model_type: str
    precision: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str
    plan_hash: str | None
    weights: str
    software: dict[str, str]
    checksums: dict[str, str]
    checks: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write ``deployment.json`` into ``folder``."""
        write_json(
            Path(folder) / MANIFEST_FILE, {"schema_version": SCHEMA_VERSION, "kind": SINGLE_GRAPH, **asdict(self)}
        )

    def with_checks(self, folder: str | Path, **checks: Any) -> GraphManifest:
        """Add results of checks and write the manifest again."""
        manifest = replace(self, checks={**self.checks, **checks})
        manifest.save(folder)
        return manifest

    @classmethod
    def load(cls, folder: str | Path) -> GraphManifest:
        """Read ``deployment.json`` and check the files that it lists against their checksums.

        Raises:
            FileFormatError: The manifest is missing, malformed or that of a StreamPETR, or a file is missing or has
                changed.
        """
        path = Path(folder) / MANIFEST_FILE
        data = read_json(path, what="deployment manifest", schema_version=SCHEMA_VERSION)
        if data.get("kind") != SINGLE_GRAPH:
            raise FileFormatError(f"{path} is that of a StreamPETR's three engines, not of a single graph")
        try:
            values = tuples({item.name: data[item.name] for item in fields(cls)})
            values["engines"] = {name: engine_from_json(engine) for name, engine in data["engines"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"deployment manifest {path} is malformed ({error!r}); export again") from error
        manifest = cls(**values)
        check_files(folder, manifest.checksums, {engine.file for engine in manifest.engines.values()})
        return manifest


def load_manifest(folder: str | Path) -> DeploymentManifest | GraphManifest:
    """The manifest of either kind of deployment; raises `FileFormatError` as they do."""
    data = read_json(Path(folder) / MANIFEST_FILE, what="deployment manifest", schema_version=SCHEMA_VERSION)
    return GraphManifest.load(folder) if data.get("kind") == SINGLE_GRAPH else DeploymentManifest.load(folder)
