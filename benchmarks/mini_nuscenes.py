"""MDP (loss values, first-order importance), HALP and uniform pruning of the small StreamPETR.

    python benchmarks/mini_nuscenes.py --json work_dirs/mini_nuscenes.json

`tools/compare.py` with this benchmark's budgets and seeds. Further options are that program's, and come last: the last
one counts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (
    "tools/compare.py configs/streampetr_mini_mdp.py --methods mdp,mdp-taylor,halp,uniform --budgets 0.85 0.7 0.55 0.4 "
    "--seeds 0 1 2 --work-dir work_dirs/mini_nuscenes"
)

if __name__ == "__main__":
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, *COMMAND.split(), *sys.argv[1:]])
