"""Run by `mdp_mmdet3d.solver.scip.run_scip` in a process of its own."""

import sys

from mdp_mmdet3d.solver.scip import child_main

if __name__ == "__main__":
    child_main(sys.argv[1])
