"""Convert a public StreamPETR checkpoint (official or AWML) into one that loads strictly and safely here."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from mmengine.registry import DefaultScope

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mmdet3d.registry import MODELS

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.runner.outputs import write_checkpoint
from mdp_mmdet3d.shipped import config_path
from projects.streampetr import checkpoint as ckpt


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="checkpoint to read")
    parser.add_argument("target", type=Path, help="checkpoint to write")
    parser.add_argument("--from", dest="origin", choices=("official", "awml"), default="official")
    parser.add_argument("--config", type=config_path, help="also load the result strictly into this config's model")
    parser.add_argument("--classes", nargs="+", help="AWML: order of its logits (default: for nuScenes)")
    parser.add_argument("--target-classes", nargs="+", help="AWML: wanted order (default: the official one)")
    parser.add_argument(
        "--swap-colours",
        action="store_true",
        help="fold BGR weights into an RGB model or the other way round, as AWML's R50 needs for the R50 configs here",
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged (EMA) weights of a file that has both")
    parser.add_argument(
        "--trust", action="store_true", help="run the code that a pickle asks for: only for files of a maker you trust"
    )
    return parser.parse_args()


@command(stopped="nothing was written")
def main() -> int:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = None
    if args.config:
        config = read_config(args.config)
        with DefaultScope.overwrite_default_scope("mmdet3d"):
            model = MODELS.build(config.model)
    own = model.state_dict() if model else ()
    state = ckpt.read_checkpoint(args.source, own, averaged=args.ema, trust=args.trust)["state_dict"]
    eps = ckpt.OFFICIAL_EPS
    if args.origin == "awml":
        eps = ckpt.AWML_EPS
        state = ckpt.convert_awml(
            state, args.classes or ckpt.AWML_CLASSES, args.target_classes or ckpt.OFFICIAL_CLASSES
        )
    if args.swap_colours:
        state = ckpt.fold_colour_order(state)
    elif args.origin == "awml":
        print(
            "note: AWML's R50 is trained on BGR images, with ImageNet's statistics in that order, and configs/ "
            "here on RGB; if this is one of them, add --swap-colours, or accuracy is lost without an error"
        )
    if model:
        if model.pts_bbox_head.eps != eps:
            print(f"note: the {args.origin} weights need model.pts_bbox_head.eps={eps:g} in the config")
        report = ckpt.load_state_dict(model, state, what=str(args.source))
        state = model.state_dict()
        print(f"loads strictly into {args.config}; left out {len(report.dropped)} tensors of the 2D head")
    meta = {"streampetr_origin": args.origin, "streampetr_eps": eps}
    write_checkpoint(args.target, {"state_dict": state, "meta": meta})
    print(f"wrote {args.target}: {len(state)} tensors, eps {eps:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
