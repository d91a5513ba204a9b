"""Measure the operators of a model on this machine into a latency table; compare and merge tables.

profile_latency.py CONFIG [--policy grid|sparse|exact] [--backend onnxruntime|torch|tensorrt] [--out latency_table.json]
profile_latency.py CONFIG --bundle probes.zip      # measure on another device, without torch and mmcv
profile_latency.py CONFIG --bundle more.zip --plan plan.json --lacking A.json   # what a plan uses and A interpolates
profile_latency.py CONFIG --backend tensorrt --build-only --target sm86 [--precision float16] [--out FOLDER]
profile_latency.py diff A.json B.json
profile_latency.py merge TARGET.json OTHER.json [--force]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # works in a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mdp_mmdet3d.extras import tell_missing

    tell_missing(__file__)

from rich.console import Console
from rich.table import Table

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency import LatencyModel, entries_of
from mdp_mmdet3d.latency.backends.base import Backend
from mdp_mmdet3d.latency.compare import compare_tables, print_comparison
from mdp_mmdet3d.latency.sampling import EntryKey, policy_entries
from mdp_mmdet3d.latency.table import LatencyTable
from mdp_mmdet3d.shipped import config_path
from mdp_mmdet3d.space.types import PruningSpace
from mdp_mmdet3d.surgery.plan import PruningPlan

if TYPE_CHECKING:
    from mdp_mmdet3d.latency.backends.onnxruntime import Provider
    from mdp_mmdet3d.latency.graphs import Precision

ORT_PROVIDERS: dict[str, Provider] = {
    "onnxruntime": "cpu",
    "onnxruntime-cuda": "cuda",
    "onnxruntime-tensorrt": "tensorrt",
}


def parse_args() -> argparse.Namespace:
    commands = ("diff", "merge")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        parser.add_argument("command", choices=commands)
        parser.add_argument("table", type=Path, help="latency table; merge writes into it")
        parser.add_argument("other", type=Path, help="latency table to compare with, or to take entries from")
        parser.add_argument("--force", action="store_true", help="merge tables of different devices or protocols")
        return parser.parse_args()
    parser.set_defaults(command="measure")
    parser.add_argument("config", type=config_path, help="config with a prune section, e.g. configs/streampetr_mdp.py")
    parser.add_argument("--out", type=Path, help="default: work_dirs/<name of the config>/latency_table.json")
    parser.add_argument(
        "--policy",
        choices=("grid", "sparse", "exact"),
        default="grid",
        help="a few widths per dimension, fewer, or every combination of options",
    )
    parser.add_argument("--backend", choices=(*ORT_PROVIDERS, "torch", "tensorrt"), default="onnxruntime")
    parser.add_argument(
        "--precision", choices=("float32", "float16"), default="float32", help="of TensorRT, PyTorch and bundles"
    )
    parser.add_argument("--bundle", type=Path, help="measure nothing here: write a zip file to run on the target")
    parser.add_argument(
        "--networks",
        type=int,
        metavar="N",
        help="whole networks in the bundle: dense, smallest, random ones; default: prune.fit_networks, 0 with --plan",
    )
    parser.add_argument("--plan", type=Path, help="only the entries that this plan.json uses")
    parser.add_argument("--lacking", type=Path, metavar="TABLE", help="with --plan: only those that this table lacks")
    parser.add_argument(
        "--build-only",
        action="store_true",
        help="time nothing: build every operator's engine with TensorRT-RTX, no GPU is needed, and "
        "write kernels and memory of each",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="SM",
        help="with --build-only: compute capability such as sm86; may be repeated",
    )
    parser.add_argument("--plots", type=Path, help="folder for pictures: staircases.png, breakdown.png")
    return parser.parse_args()


def make_backend(name: str, precision: Precision) -> Backend:
    if name.startswith("onnxruntime"):
        from mdp_mmdet3d.latency.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(ORT_PROVIDERS[name], precision)
    if name == "tensorrt":
        from mdp_mmdet3d.latency.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(precision)
    import torch

    from mdp_mmdet3d.latency.backends.torch import TorchBackend

    return TorchBackend("cuda" if torch.cuda.is_available() else "cpu", precision)


def plan_entries(space: PruningSpace, plan: PruningPlan, lacking: Path | None) -> list[EntryKey]:
    """What a plan uses, without what a table holds."""
    if plan.model_digest != space.model_digest:
        raise MdpError(f"plan {plan.hash} is of another model than this config's; give the config it was made with")
    keys = entries_of(space, plan.widths(space), set(plan.removed))
    if lacking is not None:
        table = LatencyTable.load(lacking)
        keys = [key for key in keys if table.get(*key) is None]
    if not keys:
        raise MdpError(f"{lacking} holds every entry that plan {plan.hash} uses: nothing is left to measure")
    return keys


def measure(args: argparse.Namespace, console: Console) -> None:
    from mmengine.logging import MMLogger

    from mdp_mmdet3d.adapters import adapter_of
    from mdp_mmdet3d.config_file import read_config
    from mdp_mmdet3d.latency.bundle import write_bundle
    from mdp_mmdet3d.latency.measure import measure_latency
    from mdp_mmdet3d.runner.networks import bundle_networks
    from mdp_mmdet3d.runner.settings import PruneSettings

    MMLogger.get_instance("mdp", log_level="WARNING")  # initialisers are talkative
    config = read_config(args.config)
    s = PruneSettings.from_config(config.get("prune", {}))
    adapter = adapter_of(config, s.input_shape, s.adapter)
    model = adapter.build(None)[0]
    space = adapter.trace(model, s.space_options)
    widths: dict[str, int] = {}
    removed: set[str] = set()
    if args.plan is not None:
        plan = PruningPlan.load(args.plan)
        widths, removed = plan.widths(space), set(plan.removed)
        keys = plan_entries(space, plan, args.lacking)
    else:
        keys = policy_entries(space, args.policy)
    if args.bundle is not None:
        number = args.networks if args.networks is not None else (0 if args.plan else s.fit_networks)
        if number < 0 or number == 1:
            raise MdpError(f"--networks {number}: give 0, or 2 and more: the dense and the smallest are always needed")
        with tempfile.TemporaryDirectory() as folder:
            networks = bundle_networks(adapter, space, model, Path(folder), args.precision, number) if number else []
            count = write_bundle(keys, args.bundle, args.precision, networks)
        console.print(
            f"{args.bundle}: {count} operators, {number} whole networks; on the target: unzip it and run python "
            "probe.py --backend tensorrt|onnxruntime",
            highlight=False,
        )
        return
    if args.build_only:
        build(args, keys, console)
        return
    path = args.out or Path("work_dirs") / args.config.stem / "latency_table.json"
    table = measure_latency(
        space, make_backend(args.backend, args.precision), path, policy="none", extra=keys, improve=True
    )
    console.print(f"{path}: {len(table)} entries of {table.device}", highlight=False)
    disturbed = len(table.disturbed())
    if disturbed:
        console.print(
            f"[yellow]{disturbed} of them were measured while the machine was busy[/yellow]: run again when "
            "it is idle, or expect them to be too slow"
        )
    unit = {term.engine: 1.0 for term in space.frame_terms()}
    rows = LatencyModel(space, table, dict.fromkeys(unit, 0.0), unit).breakdown(widths, removed)
    name = "dense" if args.plan is None else "pruned"
    shown = Table("module", "ms", "share", title=f"where the milliseconds of the {name} model are")
    for module, ms in rows.items():
        if ms > 0:
            shown.add_row(module, f"{ms:.1f}", f"{ms / sum(rows.values()):.1%}")
    console.print(shown)
    if args.plots is not None:
        from mdp_mmdet3d.latency.plots import plot_breakdown, plot_staircases

        plot_staircases(space, table, args.plots / "staircases.png")
        plot_breakdown({name: rows}, args.plots / "breakdown.png")


def build(args: argparse.Namespace, keys: list[EntryKey], console: Console) -> None:
    """Engines of every entry, for each target."""
    from mdp_mmdet3d.latency.build_probes import build_probes, compute_capability, refused, summary_line

    if args.backend != "tensorrt" or not args.target:
        raise MdpError("--build-only needs --backend tensorrt and at least one --target, e.g. --target sm86")
    folder, bad = args.out or Path("work_dirs") / args.config.stem, 0
    for capability in map(compute_capability, args.target):
        path = folder / f"probes_sm{capability.replace('.', '')}_{args.precision}.json"
        result = build_probes(keys, args.precision, capability, path, console)
        console.print(f"{path}: {summary_line(result)}", highlight=False)
        for probe in refused(result):
            bad += 1
            console.print(
                f"  refused: {probe['operator']} {probe['widths']}: {probe['error']}", highlight=False, markup=False
            )
    if bad:
        raise MdpError(f"TensorRT refused {bad} probes; they are listed above and in {folder}")


def main() -> int:
    args = parse_args()
    console = Console(soft_wrap=True)
    try:
        if args.command == "measure":
            measure(args, console)
        elif args.command == "diff":
            first, second = LatencyTable.load(args.table), LatencyTable.load(args.other)
            print_comparison(compare_tables(first, second), first.device, second.device, console)
        else:
            table = LatencyTable.load(args.table)
            taken = table.merge(LatencyTable.load(args.other), force=args.force)
            table.save(args.table)
            console.print(f"{taken} entries taken over; {args.table} now holds {len(table)}")
    except MdpError as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
