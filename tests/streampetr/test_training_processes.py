"""Two processes (gloo, CPU): exact resuming with the memory of every rank, a killed rank, unequal data."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet3d.registry import MODELS

from projects.streampetr.train_loop import STATE_KEY

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def start(mini_config, easy_root, tmp_path):
    """Function that starts tools/train.py with two processes of one stream each."""
    mini_config.train_dataloader.batch_size = 1
    mini_config.model.pts_bbox_head.decoder.update(dropout=0.1)  # random numbers matter
    mini_config.env_cfg = dict(dist_cfg=dict(backend="gloo"))
    mini_config.dump(tmp_path / "config.py")

    def run(work_dir: Path, *options: str, resume: bool = False, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                   "--rdzv_endpoint=localhost:0", str(ROOT / "tools" / "train.py"), str(tmp_path / "config.py"),
                   "--launcher", "pytorch", "--work-dir", str(work_dir), *(["--resume"] if resume else []),
                   "--cfg-options", *options]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MINI_NUSCENES_ROOT": str(easy_root),
            **(env or {}),
        }
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def saved(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_every_rank_goes_on_with_its_own_memory_and_its_teachers(start, mini_config, tmp_path) -> None:
    teacher = MODELS.build(mini_config.model)
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, tmp_path / "teacher.pth")
    distillation = [
        f"distillation.teacher_config={tmp_path}/config.py",
        f"distillation.teacher_checkpoint={tmp_path}/teacher.pth",
    ]
    options = ("train_cfg.max_iters=5", "default_hooks.checkpoint.interval=3", *distillation)
    finish(start(tmp_path / "whole", *options))
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole" / "iter_3.pth", tmp_path / "parts")  # as if it had been stopped there
    (tmp_path / "parts" / "last_checkpoint").write_text(str(tmp_path / "parts" / "iter_3.pth"))
    states = saved(tmp_path / "parts" / "iter_3.pth")[STATE_KEY]["ranks"]
    assert len(states) == 2
    memories = [state["memory"]["reference_point"] for state in states]
    assert not torch.equal(*memories)  # each follows a stream of its own
    written = (tmp_path / "parts" / "iter_3.pth").stat().st_mtime_ns
    finish(start(tmp_path / "parts", *options, resume=True))
    assert (tmp_path / "parts" / "iter_3.pth").stat().st_mtime_ns == written  # not begun again
    whole, parts = (saved(tmp_path / name / "iter_5.pth") for name in ("whole", "parts"))
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=0, atol=0)
    for ours, theirs in zip(parts[STATE_KEY]["ranks"], whole[STATE_KEY]["ranks"]):
        torch.testing.assert_close(ours["memory"], theirs["memory"], rtol=0, atol=0)
        torch.testing.assert_close(ours["hooks"], theirs["hooks"], rtol=0, atol=0)
        assert ours["hooks"]["DistillationHook"]["embedding"].abs().sum() > 0
        assert torch.equal(ours["random"]["torch"], theirs["random"]["torch"])


def test_a_killed_rank_ends_the_training_clearly_and_it_can_be_resumed(start, tmp_path) -> None:
    work_dir = tmp_path / "work"
    process = start(work_dir, "train_cfg.max_iters=100000", "default_hooks.checkpoint.interval=2")
    deadline = time.monotonic() + 120
    while not (work_dir / "iter_4.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"lost another one, which was killed|Signal 9 \(SIGKILL\)", output)
    last = max(int(re.search(r"(\d+)", path.stem)[1]) for path in work_dir.glob("iter_*.pth"))
    finish(start(work_dir, f"train_cfg.max_iters={last + 1}", resume=True))
    assert (work_dir / f"iter_{last + 1}.pth").exists()


def test_ranks_with_different_data_are_told_so(mini_config, tmp_path) -> None:
    mini_config.env_cfg = dict(dist_cfg=dict(backend="gloo"))
    mini_config.dump(tmp_path / "config.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, infos in enumerate(("train", "val")):
        command = [sys.executable, str(ROOT / "tools" / "train.py"), str(tmp_path / "config.py"), "--launcher",
                   "pytorch", "--work-dir", str(tmp_path / "work"), "--cfg-options",
                   f"train_dataloader.dataset.ann_file=nuscenes_infos_{infos}.pkl"]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 2, output[-3000:]
        assert "error:" in output and "every rank must read the same data" in output, output[-3000:]
        assert "rank 0: 8 frames in 2 sequences, rank 1: 4 frames in 1 sequences" in output
