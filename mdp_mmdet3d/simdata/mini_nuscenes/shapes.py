"""Shapes of the ten classes. Every shape stays strictly inside its annotated box."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mdp_mmdet3d.simdata.mini_nuscenes.mesh import Colour, Mesh, MeshBuilder

FILL = 0.98
"""Share of the annotated box that a shape fills, so that lidar points on it lie inside the box."""

GLASS: Colour = (70, 58, 48)
DARK: Colour = (45, 42, 40)
STEEL: Colour = (150, 148, 145)
LAMP: Colour = (225, 240, 245)
REAR_LAMP: Colour = (40, 30, 190)
SKIN: Colour = (120, 150, 195)

CAR_COLOURS: tuple[Colour, ...] = (
    (225, 225, 225),
    (60, 58, 55),
    (140, 138, 135),
    (40, 35, 160),
    (130, 70, 35),
    (95, 100, 105),
    (60, 95, 50),
    (70, 140, 185),
    (165, 165, 170),
)
CLOTHES: tuple[Colour, ...] = (
    (50, 45, 45),
    (120, 60, 40),
    (45, 50, 140),
    (90, 120, 80),
    (170, 165, 160),
    (60, 130, 170),
    (110, 60, 110),
)
CLASS_COLOURS: dict[str, Colour] = {
    "car": (200, 90, 40),
    "truck": (50, 170, 60),
    "construction_vehicle": (30, 190, 230),
    "bus": (40, 60, 210),
    "trailer": (150, 150, 150),
    "barrier": (80, 80, 235),
    "motorcycle": (190, 60, 190),
    "bicycle": (200, 190, 40),
    "pedestrian": (60, 210, 230),
    "traffic_cone": (20, 120, 250),
}


def object_mesh(
    name: str, size_m: tuple[float, float, float], rng: np.random.Generator, rider: bool, worker: bool
) -> Mesh:
    """Mesh of one object, centred on the ground below the middle of its box.

    Args:
        name: Detection class.
        size_m: Width, length, height of the annotated box.
        rng: Picks colours.
        rider: Whether a cycle carries somebody.
        worker: Whether a pedestrian wears a safety vest.
    """
    width, length, height = (value * FILL for value in size_m)
    lift = size_m[2] * (1 - FILL) / 2
    builder = MeshBuilder()
    if name == "pedestrian":
        _pedestrian(builder, width, length, height, rng, worker)
    elif name in ("motorcycle", "bicycle"):
        _cycle(builder, width, length, height, rng, rider, name == "motorcycle")
    else:
        _SHAPES[name](builder, width, length, height, rng)
    return _lifted(builder.build(), lift)


def cuboid_mesh(name: str, size_m: tuple[float, float, float]) -> Mesh:
    """A cuboid in the colour of its class whose front, rear and sides can be told apart."""
    width, length, height = (value * FILL for value in size_m)
    lift = size_m[2] * (1 - FILL) / 2
    colour = np.asarray(CLASS_COLOURS[name], np.float64)
    x, y, z = length / 2, width / 2, height
    builder = MeshBuilder()
    builder.box((-x, x), (-y, y), (0, z), _tuple(colour))
    thin = 0.4 * size_m[1] * (1 - FILL)
    bright, dark = _tuple(colour * 0.3 + 255 * 0.7), _tuple(colour * 0.25)
    builder.box((x, x + thin), (-y * 0.8, y * 0.8), (z * 0.35, z * 0.9), bright, solid=False)
    builder.box((-x - thin, -x), (-y * 0.8, y * 0.8), (z * 0.35, z * 0.9), dark, solid=False)
    thin = 0.4 * size_m[0] * (1 - FILL)
    builder.box((-x * 0.9, x * 0.5), (-y - thin, y + thin), (z * 0.6, z * 0.8), _tuple(colour * 0.6), solid=False)
    return _lifted(builder.build(), lift)


def _car(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    colour = CAR_COLOURS[rng.integers(len(CAR_COLOURS))]
    wheel = 0.2 * h
    van = rng.random() < 0.25
    b.prism(
        [
            (-0.49 * l, 0.18 * h),
            (0.48 * l, 0.16 * h),
            (0.5 * l, 0.34 * h),
            (0.46 * l, 0.48 * h),
            (0.2 * l, 0.57 * h),
            (-0.47 * l, 0.58 * h),
            (-0.5 * l, 0.4 * h),
        ],
        (0.46 * w, 0.48 * w),
        {"side": colour, "top": _tuple(np.asarray(colour) * 1.04)},
    )
    rear = -0.47 if van else -0.42
    cabin = [(rear * l, 0.57 * h), (0.24 * l, 0.56 * h), (0.06 * l, h), ((rear + 0.09) * l, h)]
    b.prism(cabin, (0.46 * w, 0.36 * w), {"side": GLASS, "top": colour})
    for x in (-0.16, 0.05):  # door pillars
        b.prism(
            [(x * l - 0.04, 0.57 * h), (x * l + 0.04, 0.57 * h), (x * l + 0.01, 0.99 * h), (x * l - 0.07, 0.99 * h)],
            (0.465 * w, 0.365 * w),
            colour,
            solid=False,
        )
    _lamps(b, 0.49 * l, 0.44 * w, 0.38 * h, 0.09 * h)
    b.box((0.49 * l, 0.498 * l), (-0.18 * w, 0.18 * w), (0.2 * h, 0.32 * h), DARK, solid=False)
    b.box((-0.502 * l, -0.49 * l), (-0.14 * w, 0.14 * w), (0.3 * h, 0.37 * h), (215, 215, 215), solid=False)
    _wheels(b, (0.31 * l, -0.3 * l), wheel, 0.49 * w)


def _truck(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    colour = CAR_COLOURS[rng.integers(len(CAR_COLOURS))]
    cargo = CAR_COLOURS[rng.integers(3)]
    b.prism(
        [(0.26 * l, 0.2 * h), (0.5 * l, 0.18 * h), (0.5 * l, 0.5 * h), (0.45 * l, 0.84 * h), (0.26 * l, 0.84 * h)],
        0.46 * w,
        colour,
    )
    b.prism(
        [(0.497 * l, 0.53 * h), (0.455 * l, 0.8 * h), (0.45 * l, 0.8 * h), (0.45 * l, 0.53 * h)],
        0.41 * w,
        GLASS,
        solid=False,
    )
    b.box((0.31 * l, 0.43 * l), (-0.468 * w, 0.468 * w), (0.52 * h, 0.76 * h), GLASS, solid=False)
    b.box((-0.49 * l, 0.24 * l), (-0.48 * w, 0.48 * w), (0.3 * h, h), {"side": cargo, "rear": (190, 190, 190)})
    b.box((-0.45 * l, 0.2 * l), (-0.486 * w, 0.486 * w), (0.6 * h, 0.7 * h), colour, solid=False)
    b.box((-0.48 * l, 0.26 * l), (-0.3 * w, 0.3 * w), (0.18 * h, 0.3 * h), DARK)
    _lamps(b, 0.495 * l, 0.42 * w, 0.28 * h, 0.06 * h)
    _wheels(b, (0.36 * l, -0.24 * l, -0.36 * l), 0.16 * h, 0.48 * w)


def _bus(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    colour = ((60, 60, 190), (180, 120, 40), (90, 160, 70), (210, 210, 210))[rng.integers(4)]
    b.prism(
        [(-0.5 * l, 0.12 * h), (0.49 * l, 0.12 * h), (0.5 * l, 0.45 * h), (0.485 * l, h), (-0.5 * l, h)],
        0.48 * w,
        {"side": colour, "top": (200, 200, 200)},
    )
    for i in range(7):
        x = -0.46 * l + i * 0.125 * l
        b.box((x, x + 0.11 * l), (-0.487 * w, 0.487 * w), (0.5 * h, 0.82 * h), GLASS, solid=False)
    b.box((-0.5 * l, 0.49 * l), (-0.486 * w, 0.486 * w), (0.36 * h, 0.41 * h), (225, 225, 225), solid=False)
    b.prism(
        [(0.504 * l, 0.45 * h), (0.491 * l, 0.85 * h), (0.48 * l, 0.85 * h), (0.48 * l, 0.45 * h)],
        0.43 * w,
        GLASS,
        solid=False,
    )
    b.box((-0.504 * l, -0.49 * l), (-0.4 * w, 0.4 * w), (0.58 * h, 0.82 * h), GLASS, solid=False)
    b.box((0.48 * l, 0.497 * l), (-0.3 * w, 0.3 * w), (0.87 * h, 0.95 * h), (40, 150, 230), solid=False)
    _lamps(b, 0.5 * l, 0.43 * w, 0.22 * h, 0.05 * h)
    _wheels(b, (0.33 * l, -0.3 * l), 0.14 * h, 0.484 * w)


def _trailer(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    colour = ((200, 200, 198), (110, 130, 90), (60, 80, 160))[rng.integers(3)]
    b.box((-0.5 * l, 0.5 * l), (-0.48 * w, 0.48 * w), (0.3 * h, h), {"side": colour, "rear": (165, 165, 160)})
    for i in range(8):
        x = -0.46 * l + i * 0.13 * l
        b.box((x, x + 0.01 * l), (-0.487 * w, 0.487 * w), (0.3 * h, h), _tuple(np.asarray(colour) * 0.75), solid=False)
    b.box((-0.48 * l, 0.48 * l), (-0.3 * w, 0.3 * w), (0.2 * h, 0.3 * h), DARK)
    b.box((0.36 * l, 0.38 * l), (-0.35 * w, 0.35 * w), (0.0, 0.2 * h), STEEL)
    for side in (-0.4, 0.4):
        b.box((-0.503 * l, -0.49 * l), (side * w - 0.1, side * w + 0.1), (0.22 * h, 0.28 * h), REAR_LAMP, solid=False)
    _wheels(b, (-0.22 * l, -0.33 * l, -0.44 * l), 0.13 * h, 0.48 * w)


def _construction_vehicle(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    yellow = ((30, 170, 225), (25, 135, 235))[rng.integers(2)]
    for side in (-1, 1):
        y = (0.27 * w, 0.48 * w) if side > 0 else (-0.48 * w, -0.27 * w)
        b.prism(
            [
                (-0.42 * l, 0.0),
                (0.22 * l, 0.0),
                (0.3 * l, 0.12 * h),
                (0.22 * l, 0.24 * h),
                (-0.42 * l, 0.24 * h),
                (-0.49 * l, 0.12 * h),
            ],
            (y[1] - y[0]) / 2,
            DARK,
            (y[0] + y[1]) / 2,
        )
    b.box((-0.47 * l, 0.18 * l), (-0.44 * w, 0.44 * w), (0.26 * h, 0.55 * h), yellow)
    b.prism(
        [(-0.1 * l, 0.55 * h), (0.17 * l, 0.55 * h), (0.13 * l, 0.92 * h), (-0.08 * l, 0.92 * h)],
        0.2 * w,
        {"side": GLASS, "top": yellow},
        0.2 * w,
    )
    b.prism(
        [(0.0, 0.5 * h), (0.06 * l, 0.45 * h), (0.35 * l, 0.9 * h), (0.32 * l, 0.99 * h)], 0.07 * w, yellow, -0.1 * w
    )
    b.prism(
        [(0.32 * l, 0.98 * h), (0.36 * l, 0.93 * h), (0.47 * l, 0.3 * h), (0.43 * l, 0.3 * h)],
        0.06 * w,
        yellow,
        -0.1 * w,
    )
    b.prism(
        [(0.36 * l, 0.2 * h), (0.5 * l, 0.05 * h), (0.5 * l, 0.33 * h), (0.4 * l, 0.36 * h)], 0.2 * w, STEEL, -0.1 * w
    )


def _barrier(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    panels = ((55, 55, 205), (220, 220, 225)) if rng.random() < 0.5 else ((150, 155, 160), (175, 178, 180))
    # The long side of a nuScenes barrier is its width.
    for i in range(4):
        low = -0.5 * w + i * 0.25 * w
        middle = low + 0.125 * w
        foot = [
            (-0.48 * l, 0.0),
            (0.48 * l, 0.0),
            (0.45 * l, 0.28 * h),
            (0.22 * l, 0.5 * h),
            (-0.22 * l, 0.5 * h),
            (-0.45 * l, 0.28 * h),
        ]
        b.prism(foot, 0.125 * w, panels[i % 2], middle)
        # It reaches into the foot, whose bright upper face would show at the seam otherwise.
        b.prism(
            [(-0.235 * l, 0.47 * h), (0.235 * l, 0.47 * h), (0.16 * l, h), (-0.16 * l, h)],
            0.125 * w,
            panels[i % 2],
            middle,
        )


def _traffic_cone(b: MeshBuilder, w: float, l: float, h: float, rng: np.random.Generator) -> None:  # noqa: E741
    orange, white = (25, 85, 240), (235, 235, 235)
    b.box((-0.5 * l, 0.5 * l), (-0.5 * w, 0.5 * w), (0.0, 0.06 * h), (30, 60, 170))
    heights = np.array([0.06, 0.36, 0.56, 0.74, 0.86, 1.0])
    radii = 0.4 * w * np.interp(heights, [0.06, 1.0], [1.0, 0.12])
    rings = list(zip((heights * h).tolist(), radii.tolist()))
    b.lathe(rings, [orange, white, orange, white, orange])


def _pedestrian(
    b: MeshBuilder,
    w: float,
    l: float,  # noqa: E741
    h: float,
    rng: np.random.Generator,
    worker: bool,
) -> None:
    shirt = (30, 210, 190) if worker else CLOTHES[rng.integers(len(CLOTHES))]
    trousers = CLOTHES[rng.integers(len(CLOTHES))]
    step = rng.uniform(0.25, 0.34) * l
    for side, forward in ((0.16, step), (-0.16, -step)):
        y = side * w
        b.prism(
            [(forward - 0.07, 0.0), (forward + 0.09, 0.0), (0.1, 0.5 * h), (-0.1, 0.5 * h)],
            0.1 * w,
            trousers,
            y,
        )
        b.prism(
            [(-forward * 0.8 - 0.05, 0.48 * h), (-forward * 0.8 + 0.05, 0.48 * h), (0.06, 0.8 * h), (-0.06, 0.8 * h)],
            0.06 * w,
            shirt,
            2.4 * y,
        )
    rings = [(0.47 * h, 0.24 * w), (0.62 * h, 0.275 * w), (0.8 * h, 0.3 * w), (0.84 * h, 0.12 * w)]
    b.lathe(rings, shirt, stretch=(0.7, 1.0))
    hair = ((35, 35, 40), (50, 80, 120), (30, 200, 230))[2 if worker else rng.integers(2)]
    b.lathe([(0.84 * h, 0.05), (0.88 * h, 0.09), (0.95 * h, 0.1), (h, 0.05)], [SKIN, SKIN, hair], sides=7)


def _cycle(
    b: MeshBuilder,
    w: float,
    l: float,  # noqa: E741
    h: float,
    rng: np.random.Generator,
    rider: bool,
    motor: bool,
) -> None:
    colour = CAR_COLOURS[rng.integers(3, len(CAR_COLOURS))]
    radius = 0.19 * l if motor else 0.2 * l
    thickness = 0.09 * w if motor else 0.05 * w
    for x in (-0.5 * l + radius, 0.5 * l - radius):
        b.wheel(x, radius, radius, (-thickness, thickness))
    saddle = 0.55 * h if rider else 0.8 * h
    frame = radius * 1.1
    if motor:
        b.prism(
            [(-0.2 * l, frame * 0.6), (0.15 * l, frame * 0.6), (0.22 * l, saddle), (-0.3 * l, saddle * 0.92)],
            0.16 * w,
            colour,
        )
        b.prism(
            [(-0.35 * l, saddle * 0.9), (0.0, saddle * 0.9), (-0.02 * l, saddle), (-0.36 * l, saddle)], 0.18 * w, DARK
        )
        b.box((0.27 * l, 0.31 * l), (-0.1 * w, 0.1 * w), (saddle * 0.85, saddle * 1.05), LAMP, solid=False)
    else:
        b.prism(
            [(-0.25 * l, frame), (-0.15 * l, frame * 0.8), (0.2 * l, saddle * 0.9), (0.12 * l, saddle)],
            0.05 * w,
            colour,
        )
        b.prism(
            [(-0.2 * l, saddle * 0.92), (-0.02 * l, saddle * 0.92), (-0.04 * l, saddle), (-0.2 * l, saddle)],
            0.1 * w,
            DARK,
        )
    b.prism(
        [(0.27 * l, frame * 0.8), (0.31 * l, frame * 0.8), (0.24 * l, saddle * 1.2), (0.2 * l, saddle * 1.2)],
        0.06 * w,
        STEEL,
    )
    b.box((0.18 * l, 0.24 * l), (-0.47 * w, 0.47 * w), (saddle * 1.15, saddle * 1.22), DARK)
    if rider:
        shirt = CLOTHES[rng.integers(len(CLOTHES))]
        for side in (-0.17, 0.17):
            hip = saddle * 1.05
            leg = [(0.02 * l, frame * 0.9), (0.1 * l, frame * 0.9), (0.04 * l, hip), (-0.14 * l, hip)]
            b.prism(leg, 0.09 * w, CLOTHES[0], side * w)
        b.prism([(-0.16 * l, saddle), (0.0, saddle), (0.1 * l, 0.86 * h), (-0.04 * l, 0.86 * h)], 0.22 * w, shirt)
        b.lathe(
            [(0.86 * h, 0.05), (0.89 * h, 0.1), (0.96 * h, 0.11), (h, 0.06)],
            [SKIN, colour, colour],
            centre=(0.04 * l, 0.0),
            sides=7,
        )


def _wheels(b: MeshBuilder, axles: tuple[float, ...], radius: float, half_width: float) -> None:
    for x in axles:
        for y in ((half_width - 0.22, half_width), (-half_width, -half_width + 0.22)):
            b.wheel(x, radius, radius, y)


def _lamps(b: MeshBuilder, x: float, y: float, z: float, size: float) -> None:
    """Head lamps at ``x``, rear lamps at ``-x``, on both sides."""
    for side in (-1, 1):
        edges = sorted((side * y, side * (y - 2.2 * size)))
        b.box((x - 0.02, x + 0.01), (edges[0], edges[1]), (z, z + size), LAMP, solid=False)
        b.box((-x - 0.015, -x + 0.02), (edges[0], edges[1]), (z + size * 0.3, z + size * 1.3), REAR_LAMP, solid=False)


def _lifted(mesh: Mesh, z: float) -> Mesh:
    """The mesh moved up by ``z`` metres."""
    offset = np.array([0.0, 0.0, z])
    solids = mesh.solids.copy()
    solids[..., 3] += solids[..., :3] @ offset
    return Mesh(mesh.polygons + offset, mesh.colours, mesh.textures, solids, mesh.intensities)


def _tuple(colour: np.ndarray) -> Colour:
    blue, green, red = np.clip(colour, 0, 255).tolist()
    return blue, green, red


_SHAPES: dict[str, Callable[[MeshBuilder, float, float, float, np.random.Generator], None]] = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _construction_vehicle,
    "barrier": _barrier,
    "traffic_cone": _traffic_cone,
}
