"""How a pruned model is repaired, and what came of it. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from mdp_mmdet3d.sections import Count, Flag, Natural, Positive, read_section

PIXELS = 8_000_000
FRAMES = (8, 256)
METHOD = 5  # raised where equal settings give other weights than in earlier releases


@dataclass(frozen=True)
class RepairSettings:
    """What ``prune = dict(repair=dict(...))`` of a config may hold.

    Attributes:
        frames: Unlabelled frames to use, of which a quarter is held out to judge every layer; None: as many as make
            `PIXELS`, within `FRAMES`.
        stride: Every so manyth frame of a stream is used; the stream runs over those between.
        ridge: How firmly the weights are held to what they are, relative to the mean square of a layer's inputs.
        positions: Positions of a feature map, or tokens, that a layer is fitted to, over all frames.
        seed: Of the positions.
        memory_gb: What outputs that are kept between runs, and targets, may take.
        keep_raw: Whether ``pruned_raw.pth``, the pruned model before repair, is written as well.
    """

    frames: Count | None = None
    stride: Count = 1
    ridge: Annotated[Positive, Field(lt=1e6)] = 0.02
    positions: Annotated[Count, Field(ge=16)] = 20_000
    seed: Natural = 0
    memory_gb: Annotated[Positive, Field(lt=1e6)] = 3.0
    keep_raw: Flag = False

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> RepairSettings:
        """Read the section; raises `MdpError` on an unknown key (naming the nearest) or a bad value."""
        return read_section(cls, section, "prune.repair")

    def count(self, pixels: int) -> int:
        """Frames to use where one has ``pixels``."""
        return self.frames or min(max(PIXELS // pixels, FRAMES[0]), FRAMES[1])

    @property
    def identity(self) -> dict[str, Any]:
        """What the repaired weights depend on."""
        values = {name: value for name, value in asdict(self).items() if name not in ("keep_raw", "memory_gb")}
        return {**values, "method": METHOD}


@dataclass(frozen=True)
class LayerRepair:
    """What came of one layer.

    Attributes:
        name: Path of the module.
        kind: Its class.
        calls: How often a frame runs it.
        samples: Positions that it was fitted to, over all frames.
        unknowns: Inputs of an output; with fewer samples than that, the weights are held where nothing is known.
        fitted: Relative error against the dense model's outputs on the fitted frames, before and after.
        held_out: The same on the frames that were held out.
        left: Why it was left as it is; empty if it was refitted.
    """

    name: str
    kind: str
    calls: int = 0
    samples: int = 0
    unknowns: int = 0
    fitted: tuple[float, float] | None = None
    held_out: tuple[float, float] | None = None
    left: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerRepair:
        """Inverse of `to_dict`."""
        pairs = {key: tuple(data[key]) if data[key] is not None else None for key in ("fitted", "held_out")}
        return cls(**{**data, **pairs})


@dataclass(frozen=True)
class RepairReport:
    """What came of a model.

    Attributes:
        layers: In the order of execution, those that never ran last.
    """

    layers: tuple[LayerRepair, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RepairReport:
        """Inverse of `to_dict`."""
        return cls(tuple(LayerRepair.from_dict(layer) for layer in data["layers"]))

    @property
    def refitted(self) -> tuple[LayerRepair, ...]:
        """Layers that were changed."""
        return tuple(layer for layer in self.layers if not layer.left)

    def summary(self) -> dict[str, Any]:
        """For ``report.json``: counts, the median relative error before and after, and every layer."""
        pairs = [layer.held_out for layer in self.refitted if layer.held_out is not None]
        medians = [sorted(values)[len(values) // 2] for values in zip(*pairs)]
        return {
            "refitted": len(self.refitted),
            "left": len(self.layers) - len(self.refitted),
            "median_held_out_error": dict(zip(("before", "after"), medians)),
            **self.to_dict(),
        }
