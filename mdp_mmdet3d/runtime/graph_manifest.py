"""``deployment.json`` of a detector that is one graph without memory: camera image in, raw outputs of its heads out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mdp_mmdet3d.files import read_json
from mdp_mmdet3d.runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    SINGLE_GRAPH,
    DeploymentManifest,
    EngineSpec,
    Manifest,
)


@dataclass(frozen=True)
class GraphManifest(Manifest):
    """Everything that a host needs to run one exported graph.

    Attributes:
        engines: ``model``.
        model_type: Class of the detector.
        precision: ``"float32"`` or ``"float16"``.
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

    kind: ClassVar[str | None] = SINGLE_GRAPH

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

    @classmethod
    def _other_kind(cls, data: Mapping[str, Any]) -> str:
        return "is that of a StreamPETR's three engines, not of a single graph"


def load_manifest(folder: str | Path) -> DeploymentManifest | GraphManifest:
    """The manifest of either kind of deployment; raises `FileFormatError` as they do."""
    data = read_json(Path(folder) / MANIFEST_FILE, what="deployment manifest", schema_version=SCHEMA_VERSION)
    return GraphManifest.load(folder) if data.get("kind") == SINGLE_GRAPH else DeploymentManifest.load(folder)
