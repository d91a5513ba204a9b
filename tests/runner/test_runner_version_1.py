"""What an older version wrote into work directories keeps loading."""

from __future__ import annotations

import subprocess
import sys

CONFIG = """
custom_imports = dict(imports=["mdp_mmdet3d.engine"], allow_failed_imports=False)
custom_hooks = [dict(type="mmdet3d.PlanHook")]
"""
PROGRAM = """
import sys
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
config = Config.fromfile(sys.argv[1])
assert HOOKS.get("PlanHook") is not None and MODELS.get("MDPSlimModel") is not None
assert HOOKS.get("PlanHook").__module__ == "mdp_mmdet3d.runner.plan_hook"
"""


def test_a_config_that_imports_the_old_package_registers_hooks_and_models(tmp_path):
    (tmp_path / "pruned_config.py").write_text(CONFIG)
    # A process of its own: here everything may have been registered already.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "pruned_config.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
