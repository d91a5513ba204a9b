"""The old name of `mdp_mmdet3d.runner`, kept for configs of version 1.

A ``pruned_config.py`` in an old work directory says ``custom_imports = dict(imports=[..., "mdp_mmdet3d.engine"])``.
Importing this registers what it needs; nothing else belongs here.
"""

import mdp_mmdet3d.runner  # noqa: F401
