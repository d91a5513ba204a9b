"""Write a small generated image set for configs whose real data is not at hand: an ImageNet folder, COCO, VOC.

Or fetch a small set of real images, Fashion-MNIST, from Debian's archive: ``fashion``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import Progress

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.fashion_mnist import fetch_fashion_mnist
from mdp_mmdet3d.simdata.images import write_coco, write_image_folder, write_voc

WRITERS = {"imagenet": write_image_folder, "coco": write_coco, "voc": write_voc}
FASHION = "fashion"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=[*WRITERS, FASHION])
    parser.add_argument("out", type=Path, help="folder to make, e.g. data/mini_imagenet")
    parser.add_argument("--images", type=int, default=64, help="generated to train on; a quarter more for validation")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        if args.format == FASHION:
            fetched = fetch_fashion_mnist(args.out)
            print(f"{'wrote' if fetched else 'nothing to do:'} Fashion-MNIST in {args.out}, 60,000 and 10,000 images")
            return 0
        with Progress() as bar:
            task = bar.add_task("images", total=None)
            WRITERS[args.format](args.out, args.images, seed=args.seed, on_image=lambda: bar.advance(task))
    except (MdpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {args.out} in the format of {args.format}: {args.images} images to train on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
