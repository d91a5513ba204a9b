"""Convex polyhedra out of which everything in the town is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Colour = tuple[float, float, float]
MAX_VERTICES = 12
NO_PLANE = (0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Mesh:
    """Polygons to look at and half spaces to cast rays against, in the frame of the object (x ahead, z up).

    Attributes:
        polygons: (F, MAX_VERTICES, 3) metres, outward winding, padded by repeating the last vertex.
        colours: (F, 3) BGR, 0 to 255.
        textures: (F,) index into the textures of the town, -1 for a flat colour.
        solids: (S, P, 4) half spaces ``n . x <= d`` as (n, d) of each convex solid, padded with `NO_PLANE`.
        intensities: (S,) lidar reflectivity, 0 to 255.
    """

    polygons: NDArray[np.float64]
    colours: NDArray[np.float64]
    textures: NDArray[np.int64]
    solids: NDArray[np.float64]
    intensities: NDArray[np.float64]


class MeshBuilder:
    """Collects convex parts of one object."""

    def __init__(self) -> None:
        self._polygons: list[NDArray] = []
        self._colours: list[Colour] = []
        self._textures: list[int] = []
        self._solids: list[NDArray] = []
        self._intensities: list[float] = []

    def polyhedron(
        self,
        faces: Sequence[ArrayLike],
        colours: Sequence[Colour],
        textures: Sequence[int] | None = None,
        solid: bool = True,
    ) -> None:
        """Add a convex polyhedron.

        Args:
            faces: (n, 3) vertices of each face, n at most ``MAX_VERTICES``, either winding.
            colours: One per face.
            textures: One per face, -1 for none.
            solid: Whether lidar rays hit it; thin decals need not be.
        """
        arrays = [np.asarray(face, np.float64) for face in faces]
        centre = np.concatenate(arrays).mean(0)
        polygons = np.stack(
            [np.concatenate([face, np.repeat(face[-1:], MAX_VERTICES - len(face), 0)]) for face in arrays]
        )
        normals = np.cross(polygons[:, 1] - polygons[:, 0], polygons[:, 2] - polygons[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        inward = np.einsum("ij,ij->i", normals, polygons[:, 0] - centre) < 0
        normals[inward] *= -1
        for i in np.flatnonzero(inward):
            face = arrays[i][::-1]
            polygons[i, : len(face)], polygons[i, len(face) :] = face, face[-1]
        planes = np.column_stack([normals, np.einsum("ij,ij->i", normals, polygons[:, 0])])
        self._polygons.append(polygons)
        self._colours += colours
        self._textures += textures or [-1] * len(arrays)
        if solid:
            self._solids.append(planes)
            self._intensities.append(float(np.clip(np.mean(colours) * 0.4, 2, 120)))

    def prism(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: float | tuple[float, float],
        colour: Colour | dict[str, Colour],
        y: float = 0.0,
        solid: bool = True,
    ) -> None:
        """Add a convex (x, z) profile extruded along y, optionally narrower at the top.

        Args:
            profile: Vertices in metres.
            half_width: Half extent along y, or that at the lowest and at the highest vertex.
            colour: One colour, or those of ``front``, ``rear``, ``side``, ``top`` (``side`` stands in for absent ones).
            y: Middle of the extrusion.
            solid: As for `polyhedron`.
        """
        points = np.asarray(profile, np.float64)
        bottom, top = half_width if isinstance(half_width, tuple) else (half_width, half_width)
        low, high = points[:, 1].min(), points[:, 1].max()
        half = bottom + (top - bottom) * (points[:, 1] - low) / (high - low)
        left = np.stack([points[:, 0], y + half, points[:, 1]], 1)
        right = np.stack([points[:, 0], y - half, points[:, 1]], 1)
        palette = colour if isinstance(colour, dict) else {"side": colour}
        faces, colours = [left, right], [palette["side"]] * 2
        middle = points.mean(0)
        for i in range(len(points)):
            j = (i + 1) % len(points)
            faces.append(np.stack([left[i], left[j], right[j], right[i]]))
            ahead, up = (points[i] + points[j]) / 2 - middle
            edge = points[j] - points[i]
            steep = abs(edge[1]) > 0.5 * abs(edge[0])
            name = ("front" if ahead > 0 else "rear") if steep else ("top" if up > 0 else "side")
            colours.append(palette.get(name, palette["side"]))
        self.polyhedron(faces, colours, solid=solid)

    def box(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        z: tuple[float, float],
        colour: Colour | dict[str, Colour],
        solid: bool = True,
    ) -> None:
        """Add an axis-aligned box given by its extents in metres."""
        profile = [(x[0], z[0]), (x[1], z[0]), (x[1], z[1]), (x[0], z[1])]
        self.prism(profile, (y[1] - y[0]) / 2, colour, (y[0] + y[1]) / 2, solid)

    def wheel(self, x: float, z: float, radius: float, y: tuple[float, float], sides: int = 10) -> None:
        """Add a wheel whose axle runs along y."""
        angle = np.arange(sides) * 2 * np.pi / sides + np.pi / sides
        profile = list(zip(x + radius * np.cos(angle), z + radius * np.sin(angle)))
        self.prism(profile, (y[1] - y[0]) / 2, (32, 30, 30), (y[0] + y[1]) / 2)
        hub = [(px * 0.5 + x * 0.5, pz * 0.5 + z * 0.5) for px, pz in profile]
        self.prism(hub, (y[1] - y[0]) / 2 + 0.005, (140, 140, 145), (y[0] + y[1]) / 2, solid=False)

    def lathe(
        self,
        rings: Sequence[tuple[float, float]],
        colour: Colour | Sequence[Colour],
        centre: tuple[float, float] = (0.0, 0.0),
        sides: int = 8,
        stretch: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Add a convex solid of revolution around a vertical axis.

        Args:
            rings: (z, radius) from bottom to top, radii positive.
            colour: One colour, or one per band between rings.
            centre: (x, y) of the axis.
            sides: Corners of a ring.
            stretch: Factors of the radius along x and y.
        """
        angle = np.arange(sides) * 2 * np.pi / sides
        circle = np.stack([np.cos(angle) * stretch[0], np.sin(angle) * stretch[1]], 1)
        corners = [np.column_stack([np.asarray(centre) + radius * circle, np.full(sides, z)]) for z, radius in rings]
        bands = len(rings) - 1
        band_colours = [colour] * bands if isinstance(colour[0], (int, float)) else list(colour)
        faces, colours = [corners[0], corners[-1]], [band_colours[0], band_colours[-1]]
        for lower, upper, band_colour in zip(corners, corners[1:], band_colours):
            for i in range(sides):
                j = (i + 1) % sides
                faces.append(np.stack([lower[i], lower[j], upper[j], upper[i]]))
                colours.append(band_colour)
        self.polyhedron(faces, colours)  # type: ignore[arg-type]

    def build(self) -> Mesh:
        """Freeze what was added."""
        most = max(len(planes) for planes in self._solids)
        solids = np.tile(np.asarray(NO_PLANE), (len(self._solids), most, 1))
        for padded, planes in zip(solids, self._solids):
            padded[: len(planes)] = planes
        return Mesh(
            polygons=np.concatenate(self._polygons),
            colours=np.asarray(self._colours, np.float64),
            textures=np.asarray(self._textures, np.int64),
            solids=solids,
            intensities=np.asarray(self._intensities),
        )
