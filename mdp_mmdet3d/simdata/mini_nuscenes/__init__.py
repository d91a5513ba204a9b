"""A miniature nuScenes: a small simulated town, written in the schema of the nuScenes devkit.

``write_mini_nuscenes(out, MiniNuScenesSpec())`` makes a complete v1.0-mini; ``easy_spec()`` describes a variant on
which a small detector learns within minutes.
"""

from mdp_mmdet3d.simdata.mini_nuscenes.spec import MiniNuScenesSpec, easy_spec
from mdp_mmdet3d.simdata.mini_nuscenes.writer import write_mini_nuscenes

__all__ = ["MiniNuScenesSpec", "easy_spec", "write_mini_nuscenes"]
