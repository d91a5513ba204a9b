"""The thirteen JSON tables of nuScenes, with tokens that follow from names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mdp_mmdet3d.simdata.mini_nuscenes.catalogue import ATTRIBUTES, CATEGORIES

TABLE_NAMES: tuple[str, ...] = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)
SHARED_TABLES = ("category", "attribute", "visibility")
"""Tables that are complete from the start."""

_VISIBILITY = {"1": (0, 40), "2": (40, 60), "3": (60, 80), "4": (80, 100)}

Row = dict[str, Any]


class Tables:
    """Rows by table, and chains of rows linked by ``prev`` and ``next``.

    Args:
        seed: Makes the tokens of data sets with different seeds different.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: dict[str, list[Row]] = {name: [] for name in TABLE_NAMES}
        self._tails: dict[tuple[str, str], Row] = {}
        for name in CATEGORIES:
            self.add("category", name, name=name, description=f"Simulated: {name}")
        for name in ATTRIBUTES:
            self.add("attribute", name, name=name, description=f"Simulated: {name}")
        for token, (low, high) in _VISIBILITY.items():
            self._rows["visibility"].append(
                {
                    "token": token,
                    "level": f"v{low}-{high}",
                    "description": f"visibility of whole object is between {low} and {high}%",
                }
            )

    def token(self, table: str, name: str) -> str:
        """Token of the row ``name``: 32 hexadecimal digits."""
        return hashlib.md5(f"{self._seed}/{table}/{name}".encode(), usedforsecurity=False).hexdigest()

    def add(self, table: str, key: str, /, **values: Any) -> str:
        """Append a row and return its token."""
        token = self.token(table, key)
        self._rows[table].append({"token": token, **values})
        return token

    def add_linked(self, table: str, key: str, chain: str, /, **values: Any) -> str:
        """Append a row to a chain: ``prev`` and ``next`` hold tokens, empty at the ends."""
        tail = self._tails.get((table, chain))
        token = self.add(table, key, **values, prev=tail["token"] if tail else "", next="")
        if tail:
            tail["next"] = token
        self._tails[table, chain] = self._rows[table][-1]
        return token

    def rows(self, table: str) -> list[Row]:
        """Rows of a table, in the order in which they were added."""
        return self._rows[table]

    def extend(self, other: Tables) -> None:
        """Append the rows of ``other`` that every data set does not have anyway."""
        for name, rows in other._rows.items():
            known = {row["token"] for row in self._rows[name]} if name in SHARED_TABLES else set()
            self._rows[name] += [row for row in rows if row["token"] not in known]

    def write(self, folder: Path) -> None:
        """Write one JSON file per table."""
        folder.mkdir(parents=True)
        for name, rows in self._rows.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=0, allow_nan=False), encoding="utf-8")


def visibility_token(visible_pixels: int, silhouette_pixels: int) -> str:
    """Token of the visibility level of an object of which so many pixels are not hidden."""
    percent = 100 * visible_pixels / silhouette_pixels if silhouette_pixels else 0
    return next((token for token, (_, high) in _VISIBILITY.items() if percent < high), "4")
