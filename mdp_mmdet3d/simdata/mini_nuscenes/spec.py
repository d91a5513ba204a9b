"""What a miniature data set shall contain."""

from __future__ import annotations

from dataclasses import dataclass

from nuscenes.utils import splits

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.mini_nuscenes.catalogue import CATALOGUE

FULL_IMAGE_SIZE = (1600, 900)
_SCENES = {
    "v1.0-mini": (splits.mini_train, splits.mini_val),
    "v1.0-trainval": (splits.train, splits.val),
}
MOST_FRAMES = 1_000


@dataclass(frozen=True)
class MiniNuScenesSpec:
    """Parameters of a miniature data set; equal parameters give byte-identical tables and images.

    Attributes:
        scenes: Number of scenes, training and validation together.
        frames: Key frames per scene, half a second apart.
        seed: Seed of everything that is random.
        image_size: (width, height) in pixels. The horizontal field of view is nuScenes'; images flatter than 16:9
            lose rows at the top.
        classes: Detection classes that occur.
        object_count: Objects to expect within ``radius_m`` of the vehicle.
        radius_m: How far from the vehicle objects are annotated.
        cuboids: Whether objects are plain cuboids in class colours with distinct front, rear and sides.
        min_visible_pixels: Objects with fewer visible pixels in all cameras of a frame are not annotated in it.
        version: Name of the tables and source of the official scene names: v1.0-mini (at most 8 + 2 scenes) or
            v1.0-trainval (at most 700 + 150).
        val_scenes: How many of the scenes belong to the validation split; by default a fifth, at least one.

    Raises:
        MdpError: A value is out of range; the message names it.
    """

    scenes: int = 10
    frames: int = 10
    seed: int = 0
    image_size: tuple[int, int] = FULL_IMAGE_SIZE
    classes: tuple[str, ...] = tuple(CATALOGUE)
    object_count: int = 40
    radius_m: float = 60.0
    cuboids: bool = False
    min_visible_pixels: int = 1
    version: str = "v1.0-mini"
    val_scenes: int | None = None

    def __post_init__(self) -> None:
        if self.version not in _SCENES:
            raise MdpError(f"version {self.version!r} is unknown; choose one of {', '.join(_SCENES)}")
        train, val = self.split_sizes
        available = [len(names) for names in _SCENES[self.version]]
        if train < 1 or val < 1 or train > available[0] or val > available[1]:
            raise MdpError(
                f"{self.scenes} scenes with {val} for validation do not fit {self.version}: 1 to {available[0]} for "
                f"training and 1 to {available[1]} for validation are possible"
            )
        unknown = sorted(set(self.classes) - set(CATALOGUE))
        if unknown or not self.classes:
            raise MdpError(f"unknown classes {unknown}; known are {', '.join(CATALOGUE)}")
        width, height = self.image_size
        if width < 64 or height < 16 or height * FULL_IMAGE_SIZE[0] > width * FULL_IMAGE_SIZE[1]:
            raise MdpError(f"image size {width}x{height}: at least 64x16 and not taller than 16:9 is possible")
        for name, value, smallest in (
            ("frames", self.frames, 1),
            ("object_count", self.object_count, 1),
            ("radius_m", self.radius_m, 5),
            ("min_visible_pixels", self.min_visible_pixels, 0),
            ("seed", self.seed, 0),
        ):
            if value < smallest:
                raise MdpError(f"{name} is {value}; it must be at least {smallest}")
        if self.frames > MOST_FRAMES:
            raise MdpError(f"frames is {self.frames}; a scene has {MOST_FRAMES} key frames at most (nuScenes: 40)")

    @property
    def split_sizes(self) -> tuple[int, int]:
        """(training, validation) numbers of scenes."""
        val = self.val_scenes if self.val_scenes is not None else max(1, self.scenes // 5)
        return self.scenes - val, val

    @property
    def scene_names(self) -> list[str]:
        """Official names, training scenes first."""
        train, val = self.split_sizes
        names_train, names_val = _SCENES[self.version]
        return [*names_train[:train], *names_val[:val]]


def easy_spec(scenes: int = 70, frames: int = 20, seed: int = 0) -> MiniNuScenesSpec:
    """A variant on which a small detector learns quickly: five classes of cuboids close by, in 176x64 images.

    A seventh of the scenes is held out. More than ten scenes do not fit v1.0-mini, so it is written as v1.0-trainval.
    """
    return MiniNuScenesSpec(
        scenes=scenes,
        frames=frames,
        seed=seed,
        image_size=(176, 64),
        classes=("car", "truck", "bus", "pedestrian", "traffic_cone"),
        object_count=12,
        radius_m=20.0,
        cuboids=True,
        min_visible_pixels=4,
        version="v1.0-trainval",
        val_scenes=max(1, scenes // 7),
    )
