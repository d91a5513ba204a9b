"""Write a small generated image set for configs whose real data is not at hand: an ImageNet folder, COCO, VOC.

Or fetch a small set of real images, Fashion-MNIST, from Debian's archive: ``fashion``; or draw its objects on textured
backgrounds, in VOC's format, for detectors: ``fashion-voc``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.progress import Progress

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.fashion_mnist import fashion_mnist_folder, fetch_fashion_mnist
from mdp_mmdet3d.simdata.fashion_voc import write_fashion_voc
from mdp_mmdet3d.simdata.images import write_coco, write_image_folder, write_voc

WRITERS: dict[str, Callable] = {
    "imagenet": write_image_folder,
    "coco": write_coco,
    "voc": write_voc,
    "fashion-voc": partial(write_fashion_voc, fashion=fashion_mnist_folder()),
}
FASHION = "fashion"
IMAGES = {"fashion-voc": 4000}
DEFAULT_IMAGES = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=[*WRITERS, FASHION])
    parser.add_argument("out", type=Path, help="folder to make, e.g. data/mini_imagenet")
    parser.add_argument(
        "--images",
        type=int,
        help="to train on; a quarter more for validation; default: "
        f"{DEFAULT_IMAGES}, {', '.join(f'{name}: {count}' for name, count in IMAGES.items())}",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        if args.format == FASHION:
            fetched = fetch_fashion_mnist(args.out)
            print(f"{'wrote' if fetched else 'nothing to do:'} Fashion-MNIST in {args.out}, 60,000 and 10,000 images")
            return 0
        if args.seed < 0:
            raise MdpError(f"--seed = {args.seed} must be 0 or more")
        images = IMAGES.get(args.format, DEFAULT_IMAGES) if args.images is None else args.images
        with Progress() as bar:
            task = bar.add_task("images", total=images + images // 4)
            WRITERS[args.format](args.out, images, seed=args.seed, on_image=lambda: bar.advance(task))
    except (MdpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {args.out} in the format of {args.format}: {images} images to train on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
