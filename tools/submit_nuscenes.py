"""Write a nuScenes leaderboard submission: detect on a split, check with the devkit, zip."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import mdp_mmdet3d.runner  # noqa: F401  registers the pruned model and lets checkpoints load safely
from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.config_file import default_work_dir, read_config
from mdp_mmdet3d.files import check_target_file
from mdp_mmdet3d.shipped import config_path
from projects.streampetr.checkpoint import load_checkpoint
from projects.streampetr.submission import write_submission


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=config_path, help="config of the dense model, or a pruned_config.py")
    parser.add_argument("checkpoint", help="its weights; loaded strictly")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="which nuscenes_infos_*.pkl to use")
    parser.add_argument("--out", type=Path, help="default: work_dirs/<name of the config>/submission_<split>.json")
    parser.add_argument("--external", action="store_true", help="the weights have seen more than nuScenes and ImageNet")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, key=value ...")
    return parser.parse_args()


def configure(args: argparse.Namespace, folder: str, work_dir: Path) -> Config:
    config = read_config(args.config, args.cfg_options)
    info_file = f"nuscenes_infos_{args.split}.pkl"
    config.test_dataloader.dataset.ann_file = info_file
    config.test_evaluator.update(
        ann_file=f"{config.test_dataloader.dataset.data_root}/{info_file}", format_only=True, jsonfile_prefix=folder
    )
    config.work_dir = str(work_dir)
    config.load_from, config.resume = None, False
    return config


@command(stopped="nothing was written")
def main() -> int:
    args = parse_args()
    work_dir = default_work_dir(args.config, "submission")
    out = args.out or work_dir / f"submission_{args.split}.json"
    check_target_file(out)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner.from_cfg(configure(args, folder, work_dir))
        load_checkpoint(runner.model, args.checkpoint)
        runner.test()
        formatted = Path(folder) / "pred_instances_3d" / "results_nusc.json"
        results = json.loads(formatted.read_text(encoding="utf-8"))["results"]
    dataset = runner.test_dataloader.dataset
    tokens = [dataset.get_data_info(i)["token"] for i in range(len(dataset))]
    archive = write_submission(results, tokens, out, args.external)
    print(f"wrote {out} and {archive}: {len(tokens)} samples, checked with the devkit's loader")
    return 0


if __name__ == "__main__":
    sys.exit(main())
