"""Train or fine-tune a detector; dense and pruned configs alike, also under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401  registers the hooks and lets checkpoints load safely
from mdp_mmdet3d.config_file import default_work_dir, read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import writing
from mdp_mmdet3d.runner.cpu_processes import prepare_cpu_processes, process_failure
from mdp_mmdet3d.runner.lock import work_dir_lock
from mdp_mmdet3d.runner.plan_hook import add_plan_hook
from mdp_mmdet3d.runner.train_config import add_optional_hooks, check_loaders, choose_start
from mdp_mmdet3d.shipped import config_path

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # as the launchers tell it


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=config_path, help="e.g. configs/streampetr_mini.py, or a pruned_config.py")
    parser.add_argument(
        "--work-dir", help="default: work_dirs/<name of the config>; training/ beside a pruned_config.py"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a file, from the latest one in the work directory",
    )
    parser.add_argument(
        "--float32", action="store_true", help="train in single precision although the config says mixed"
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> Config:
    config = read_config(args.config, args.cfg_options)
    if "train_dataloader" not in config:
        raise MdpError(
            f"{args.config} cannot be trained: it has no train_dataloader; use one of configs/streampetr/"
            "*e.py, or prune one of them to fine-tune the result"
        )
    config.launcher = args.launcher
    config.work_dir = str(args.work_dir or default_work_dir(args.config, "training"))
    add_optional_hooks(config)
    add_plan_hook(config)
    check_loaders(config)
    choose_start(config, args.resume)
    if args.float32 and config.optim_wrapper.type == "AmpOptimWrapper":
        config.optim_wrapper.type = "FiniteOptimWrapper"
        for key in ("loss_scale", "dtype"):
            config.optim_wrapper.pop(key, None)
    return config


def main() -> int:
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        config = configure(args)
        prepare_cpu_processes(config)
        # The other processes of a distributed training belong to the first one.
        first = not any(int(os.environ.get(name, 0)) for name in RANKS)
        alone = work_dir_lock(config.work_dir) if first else nullcontext()
        with writing(config.work_dir), alone:
            Runner.from_cfg(config).train()
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if (message := process_failure(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
