"""Evaluate a checkpoint; dense and pruned configs alike, also under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mmengine.config import Config, DictAction
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401  registers the pruned model and lets checkpoints load safely
from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.config_file import default_work_dir, read_config
from mdp_mmdet3d.files import check_target_file
from mdp_mmdet3d.runner.cpu_processes import prepare_cpu_processes
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runner.train_config import check_loaders
from mdp_mmdet3d.shipped import config_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=config_path, help="e.g. configs/streampetr_mini.py, or a pruned_config.py")
    parser.add_argument("checkpoint", help="its weights; loaded strictly")
    parser.add_argument("--work-dir", help="default: work_dirs/<name of the config>")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> Config:
    config = read_config(args.config, args.cfg_options)
    config.launcher = args.launcher
    config.work_dir = str(args.work_dir or default_work_dir(args.config, "test"))
    check_target_file(Path(config.work_dir) / "log")
    config.load_from, config.resume = None, False
    check_loaders(config)
    return config


@command(stopped="run the same command again")
def main() -> int:
    args = parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config = configure(args)
    prepare_cpu_processes(config)
    runner = Runner.from_cfg(config)
    settings = PruneSettings.from_config(config.get("prune", {}))
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    adapter_of(config, settings.input_shape, settings.adapter).load(model, args.checkpoint)
    runner.test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
