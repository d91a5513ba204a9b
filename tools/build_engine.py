"""Build TensorRT or TensorRT-RTX engines of deployment folders and list kernels and memory side by side."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # on a vehicle the repository is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.runtime.graph_manifest import load_manifest
from mdp_mmdet3d.trt.build import build_engines, kernel_types, split_convolutions
from mdp_mmdet3d.trt.report import engine_report

MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployments", nargs="+", type=Path, help="folders of tools/export.py, e.g. dense and pruned")
    parser.add_argument(
        "--capability",
        action="append",
        metavar="X.Y",
        help="compute capability, e.g. 8.6; may be repeated (TensorRT-RTX); default: the GPU here",
    )
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write kernels and memory side by side")
    parser.add_argument("--layers", action="store_true", help="print every kernel")
    return parser.parse_args()


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:.1f}"


def main() -> int:
    args = parse_args()
    start = time.perf_counter()
    try:
        print(
            f"{'deployment':<32} {'target':<7} {'engine':<19} {'kernels':>7} {'plan MiB':>9} {'weights':>8} "
            f"{'activations':>11} {'scratch':>8} {'s':>6}  kernel types"
        )
        for capability in args.capability or [None]:
            for folder in args.deployments:
                manifest = load_manifest(folder)
                for name, report in build_engines(folder, manifest, capability).items():
                    types = ", ".join(f"{kind} {count}" for kind, count in kernel_types(report).most_common(4))
                    print(
                        f"{str(folder)[-32:]:<32} {capability or 'here':<7} {name:<19} {len(report['kernels']):>7} "
                        f"{megabytes(report['plan_bytes']):>9} {megabytes(report['weights_bytes']):>8} "
                        f"{megabytes(report['activation_bytes']):>11} {megabytes(report['scratch_bytes']):>8} "
                        f"{report['seconds']:>6.1f}  {types}"
                    )
                    split, convolutions = split_convolutions(report)
                    if manifest.precision == "int8" and split > convolutions / 2:
                        print(
                            f"    WARNING: {split} of {convolutions} convolutions run as two kernels, with int32 sums "
                            "in memory between them: float16 is likely faster with this TensorRT"
                        )
                    if args.layers:
                        for kernel in report["kernels"]:
                            print(f"    {kernel['type']:<14} {', '.join(kernel['onnx_layers']) or kernel['name']}")
        print(f"built in {time.perf_counter() - start:.1f} s")
        if args.report:
            with atomic_path(args.report) as temporary:
                temporary.write_text(engine_report(args.deployments), encoding="utf-8")
    except MdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
