"""`LatencyTable`: what each operator costs on one device, in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mdp_mmdet3d.device import Device
from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.files import read_json, write_json
from mdp_mmdet3d.latency.backends.staircases import STAIRCASES
from mdp_mmdet3d.latency.interpolation import Grid, Staircase, inside, measured_grid, multilinear
from mdp_mmdet3d.operators import OPERATORS, OperatorSignature
from mdp_mmdet3d.space.types import CostTerm, PruningSpace, WidthSum, cost_axes, width_at

SCHEMA_VERSION = 1
DISTURBED = 1.1


class NotMeasuredError(MdpError):
    """The table does not cover an operator or a width that is asked for."""


@dataclass(frozen=True)
class MeasurementProtocol:
    """How the entries were measured.

    Attributes:
        name: Short description of the context in which an operator runs.
        warmup: Runs that were thrown away.
        runs: Runs that count.
        statistic: What of the runs is the entry, in words.
        staircase: Operators are interpolated along the steps of the runtime (`backends.staircases`) instead of straight
            lines.
    """

    name: str
    warmup: int
    runs: int
    statistic: str
    staircase: bool

    def differences(self, other: MeasurementProtocol) -> list[str]:
        """Fields in which two protocols differ, as readable text."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} and {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


@dataclass(frozen=True)
class Entry:
    """One measurement.

    Attributes:
        ms: Milliseconds.
        spread: (largest - smallest) / median of the runs that count.
        runs: How many runs count.
        time: When, ISO 8601 in UTC.
        reference_ms: Time of the backend's reference operator next to this measurement; 0 if it has none. Where
            it is longer than elsewhere in the table, something else kept the machine busy.
        attempts: How often it was measured; the fastest attempt is kept.
    """

    ms: float
    spread: float
    runs: int
    time: str
    reference_ms: float = 0.0
    attempts: int = 1


@dataclass(frozen=True)
class Lookup:
    """Milliseconds of an operator, and whether they were interpolated."""

    ms: float
    interpolated: bool


class LatencyTable:
    """Measured latency per operator signature and widths.

    Args:
        device: Where the entries were measured.
        protocol: How.

    Attributes:
        networks: Whole networks that the probe bundle measured beside the operators, as it wrote them.
    """

    def __init__(self, device: Device, protocol: MeasurementProtocol) -> None:
        self.device = device
        self.protocol = protocol
        self.networks: list[dict[str, Any]] = []
        self._entries: dict[OperatorSignature, dict[tuple[int, ...], Entry]] = {}
        self._grids: dict[OperatorSignature, Grid | None] = {}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    def __iter__(self) -> Iterator[tuple[OperatorSignature, tuple[int, ...], Entry]]:
        for signature, entries in self._entries.items():
            for widths, entry in entries.items():
                yield signature, widths, entry

    def get(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Entry | None:
        """The measurement itself, or None."""
        return self._entries.get(signature, {}).get(tuple(widths))

    def add(self, signature: OperatorSignature, widths: tuple[int, ...], entry: Entry) -> None:
        """Add or replace an entry; raises `ValueError` if it is no finite time >= 0 of this operator."""
        roles = OPERATORS[signature.kind].roles
        if len(widths) != len(roles) or any(width < 0 for width in widths):
            raise ValueError(f"{signature.key}: widths {widths} do not fit the roles {roles}")
        for name in ("ms", "spread", "reference_ms"):
            value = getattr(entry, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{signature.key} {widths}: {name} is {value!r}, not a finite number >= 0")
        self._entries.setdefault(signature, {})[tuple(int(width) for width in widths)] = entry
        self._grids.pop(signature, None)

    def disturbed(self) -> list[tuple[OperatorSignature, tuple[int, ...]]]:
        """Entries measured while the reference operator was `DISTURBED` times slower than at its fastest."""
        limit = DISTURBED * min((entry.reference_ms for _, _, entry in self if entry.reference_ms > 0), default=0.0)
        return [(signature, widths) for signature, widths, entry in self if entry.reference_ms > limit]

    def doubt(self) -> str | None:
        """Why the table as a whole is not to be trusted, and the remedy; None while at most half of it is disturbed."""
        count = len(self.disturbed())
        if 2 * count <= len(self):
            return None
        return (
            f"{count} of {len(self)} entries of the latency table were measured while something else ran on "
            f"{self.device.processor} (the reference operator took more than {DISTURBED} times its fastest): they are "
            "too slow, and unequally so. Measure again while nothing else runs there (here: delete latency_table.json "
            "of the work directory; a probe bundle: python probe.py with another --out)"
        )

    def expected_ms(self, signature: OperatorSignature, widths: tuple[int, ...]) -> float | None:
        """What the other entries make one expect of an entry, or None if they do not surround it."""
        others = LatencyTable(self.device, self.protocol)
        others._entries[signature] = {
            key: entry for key, entry in self._entries.get(signature, {}).items() if key != tuple(widths)
        }
        try:
            return others.lookup(signature, widths).ms
        except NotMeasuredError:
            return None

    def lookup(self, signature: OperatorSignature, widths: tuple[int, ...]) -> Lookup:
        """Latency of one operator; raises `NotMeasuredError` outside the measured range."""
        ms, interpolated = self.lookup_many(signature, np.array([widths]))
        return Lookup(float(ms[0]), bool(interpolated[0]))

    def lookup_many(self, signature: OperatorSignature, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latency of one operator at many widths.

        Args:
            signature: The operator.
            widths: Integer counts per role, shape (N, R). A row with a 0 is no operator and costs nothing.

        Returns:
            Milliseconds (N,) and which of them were interpolated (N,).

        Raises:
            NotMeasuredError: The operator was never measured, or a row lies outside the measured range.
        """
        roles = OPERATORS[signature.kind].roles
        if widths.ndim != 2 or widths.shape[1] != len(roles):
            raise ValueError(
                f"{signature.key}: widths have shape {widths.shape}, expected (N, {len(roles)}) for {roles}"
            )
        entries = self._entries.get(signature)
        if entries is None:
            raise NotMeasuredError(f"the latency table has no entry of {signature.key}; run measure_latency")
        ms = np.zeros(len(widths))
        missing = np.zeros(len(widths), dtype=bool)
        for row, key in enumerate(map(tuple, widths.tolist())):
            if key in entries:
                ms[row] = entries[key].ms
            else:
                missing[row] = 0 not in key
        if missing.any():
            ms[missing] = self._interpolate(signature, widths[missing])
        return ms, missing

    def cost_array(
        self, space: PruningSpace, term: CostTerm, sums: Mapping[WidthSum, Sequence[int]] = MappingProxyType({})
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latency of a cost term over the options of its dimensions.

        Args:
            space: The space that ``term`` belongs to.
            term: The operator.
            sums: Widths that are an axis of their own in place of the dimensions of their parts, and their counts.

        Returns:
            Milliseconds and which were interpolated, both of shape (options of ``cost_axes(term, sums)[0]``, ...);
            without ``sums`` the axes are ``term.dimensions``.

        Raises:
            NotMeasuredError: The table does not cover the term.
        """
        axes = cost_axes(term, sums)
        options = [sums[a] if isinstance(a, WidthSum) else space.by_name[a].options for a in axes]
        rows = []
        for counts in product(*options):
            chosen = dict(zip(axes, counts, strict=True))
            named = {name: count for name, count in chosen.items() if isinstance(name, str)}
            rows.append(
                [chosen[w] if isinstance(w, WidthSum) and w in sums else width_at(w, named) for w in term.widths]
            )
        ms, interpolated = self.lookup_many(term.signature, np.array(rows))
        shape = tuple(len(option) for option in options)
        return ms.reshape(shape), interpolated.reshape(shape)

    def _interpolate(self, signature: OperatorSignature, widths: np.ndarray) -> np.ndarray:
        grid = self._grid(signature)
        if grid is None:
            raise NotMeasuredError(f"the latency table holds no complete grid of {signature.key}; run measure_latency")
        stairs = self._staircase(signature)
        if stairs is not None:
            blocked = (widths[:, 0] % stairs.input_multiple == 0) | np.isin(widths[:, 0], grid[0][0])
            if not blocked.all():
                raise NotMeasuredError(
                    f"{signature.key} with {widths[~blocked][0].tolist()} channels: {stairs.remark} and cannot be "
                    "interpolated; measure it (policy 'exact') or let the dimension's options be multiples of "
                    f"{stairs.input_multiple}"
                )
        covered = inside(grid, widths)
        if not covered.all():
            ranges = ", ".join(
                f"{role} {axis[0]}..{axis[-1]}"
                for role, axis in zip(OPERATORS[signature.kind].roles, grid[0], strict=True)
            )
            raise NotMeasuredError(
                f"{signature.key}: widths {widths[~covered][0].tolist()} lie outside the measured "
                f"range ({ranges}) and are not extrapolated; measure them"
            )
        values = multilinear(grid, widths)
        return values if stairs is None else values * stairs.steps(widths[:, -1])

    def _staircase(self, signature: OperatorSignature) -> Staircase | None:
        if not self.protocol.staircase:
            return None
        if self.device.runtime not in STAIRCASES:
            raise NotMeasuredError(
                f"{signature.key}: the table's protocol says that costs rise in steps, but no staircase of the runtime "
                f"{self.device.runtime!r} is known ({', '.join(STAIRCASES)}); add it to latency/backends/staircases.py"
            )
        stairs = STAIRCASES[self.device.runtime]
        return stairs if signature.kind == stairs.kind else None

    def _grid(self, signature: OperatorSignature) -> Grid | None:
        """Complete grid of a signature, relative to the staircase where it follows one."""
        if signature not in self._grids:
            stairs = self._staircase(signature)
            self._grids[signature] = measured_grid(
                {
                    widths: entry.ms if stairs is None else entry.ms / float(stairs.steps(np.array(widths[-1])))
                    for widths, entry in self._entries[signature].items()
                    if 0 not in widths
                }
            )
        return self._grids[signature]

    def merge(self, other: LatencyTable, *, force: bool = False) -> int:
        """Take over the entries of another table that are newer or missing here.

        Args:
            other: Table to read from.
            force: Accept a table of another device or protocol.

        Returns:
            How many entries were taken.

        Raises:
            StructureMismatchError: Other device or protocol, and not ``force``.
        """
        if not force:
            other.require(self.device, self.protocol, "the table to merge")
        taken = 0
        for signature, widths, entry in other:
            mine = self.get(signature, widths)
            if mine is None or mine.time < entry.time:
                self.add(signature, widths, entry)
                taken += 1
        known = [network["name"] for network in self.networks]
        self.networks += [network for network in other.networks if network["name"] not in known]
        return taken

    def require(
        self, device: Device, protocol: MeasurementProtocol | None = None, what: str | Path = "latency table"
    ) -> None:
        """Raise `StructureMismatchError` unless measured on ``device`` (and by ``protocol``)."""
        differences = self.device.differences(device)
        if protocol is not None and protocol != self.protocol:
            differences += self.protocol.differences(protocol)
        if differences:
            raise StructureMismatchError(
                f"{what} was made on another device or in another way ({'; '.join(differences)}): "
                "delete it or measure into another file, or force its use if you know that it holds here"
            )

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "device": asdict(self.device),
                "protocol": asdict(self.protocol),
                "operators": [
                    {
                        "operator": signature.kind,
                        "attributes": dict(signature.attributes),
                        "entries": [
                            {"widths": list(widths), **asdict(entry)} for widths, entry in sorted(entries.items())
                        ],
                    }
                    for signature, entries in sorted(self._entries.items(), key=lambda item: item[0].key)
                ],
                **({"networks": self.networks} if self.networks else {}),
            },
        )

    @classmethod
    def load(cls, path: str | Path, *, device: Device | None = None, force: bool = False) -> LatencyTable:
        """Read what `save` wrote.

        Args:
            path: JSON file.
            device: Refuse a table that was measured elsewhere.
            force: Accept it all the same.

        Raises:
            FileFormatError: Truncated, of another version, or with a value that is no time.
            StructureMismatchError: Measured on another device, and not ``force``.
        """
        data = read_json(path, what="latency table", schema_version=SCHEMA_VERSION)
        try:
            table = cls(_build(Device, data["device"]), _build(MeasurementProtocol, data["protocol"]))
            for operator in data["operators"]:
                signature = OperatorSignature.make(operator["operator"], **operator["attributes"])
                for entry in operator["entries"]:
                    values = {name: value for name, value in entry.items() if name != "widths"}
                    table.add(signature, tuple(entry["widths"]), _build(Entry, values))
            table.networks = [dict(network) for network in data.get("networks", [])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"latency table {path} is damaged ({error}); delete it and measure again") from error
        if device is not None and not force:
            table.require(device, what=f"latency table {path}")
        return table


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Construct a dataclass, refusing missing, unknown and wrongly typed fields."""
    expected = {field.name: str(field.type) for field in fields(kind)}
    if set(values) != set(expected):
        raise ValueError(f"{kind.__name__} has the fields {sorted(values)}, expected {sorted(expected)}")
    allowed: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
    }
    for name, type_name in expected.items():
        value = values[name]
        if not isinstance(value, allowed[type_name]) or (isinstance(value, bool) and type_name != "bool"):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}, not {type_name}")
    return kind(**values)
