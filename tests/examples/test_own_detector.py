"""The example's two commands, as its README has them: a detector of the user's own, trained and pruned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/own_detector/markers_mdp.py"


def run(tool: str, *arguments: object) -> None:
    path = os.pathsep.join([str(ROOT / "examples/own_detector"), str(ROOT)])
    command = [sys.executable, f"tools/{tool}.py", CONFIG, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_a_detector_of_ones_own_is_trained_and_pruned(tmp_path):
    run("train", "--work-dir", tmp_path / "train")
    work = tmp_path / "pruned"
    run("prune", "--checkpoint", tmp_path / "train" / "epoch_1.pth", "--work-dir", work)
    space = PruningSpace.load(work / "space.json")
    report = json.loads((work / "report.json").read_text())
    plan = PruningPlan.load(work / "plan.json")
    assert {block.name for block in space.blocks} == {"blocks.1", "blocks.2", "blocks.3"}
    assert "another program reads" in {each.module: each.reason for each in space.not_prunable}["blocks.0"]
    assert not any(member.tensor.startswith("blocks.0.") for d in space.dimensions for member in d.members)
    assert plan.hash == report["plan_hash"] and (plan.cuts or plan.removed)
    assert set(report["accuracy"]["dense"]) >= {"recall"}
    state = torch.load(work / "pruned.pth", weights_only=True)["state_dict"]
    deployed = sum(t.numel() for n, t in state.items() if not n.startswith("edges.") and "running" not in n)
    assert report["pruned"]["params"] <= deployed  # the head that guides training does not count
