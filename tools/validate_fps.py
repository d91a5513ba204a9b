"""Validate the frame rate of a deployment on this machine. Exit status: 0 met, 3 missed, 2 bad input, 130 Ctrl-C.

Runs with Python >= 3.8, numpy and ONNX Runtime or TensorRT; recorded drives need Pillow, plots matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # on a vehicle the repository is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.files import check_target_file, write_json
from mdp_mmdet3d.runtime.host import host_device, host_state
from mdp_mmdet3d.runtime.load import Runner, load_runner
from mdp_mmdet3d.runtime.stream import BACKENDS, StreamRunner
from mdp_mmdet3d.runtime.validate import ENGINES_KEYS, Requirement, Validation, check_counts, validate

MET, BAD_INPUT, MISSED, STOPPED = 0, 2, 3, 130


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deployment", type=Path, help="folder that tools/export.py wrote")
    parser.add_argument("--fps", type=float, required=True, help="required frames per second")
    parser.add_argument("--deadline-ms", type=float, help="latest end of a frame; default: 1000 / fps")
    parser.add_argument("--allowed-misses", type=float, default=0.01, help="share of frames that may be later")
    parser.add_argument("--frames", default="synthetic", help="'synthetic' or the folder of a recorded drive")
    parser.add_argument("--num-frames", type=int, default=300, help="timed frames; 1000 and more show rare delays")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1, help="threads inside one operator (ONNX Runtime)")
    parser.add_argument("--dense", type=Path, help="deployment of the dense model, measured in turn")
    parser.add_argument("--predicted-ms", type=float, help="prediction of the latency table")
    parser.add_argument("--report", type=Path, help="report.json of tools/prune.py, for the prediction")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="write the latency trace as an image (needs matplotlib)")
    return parser.parse_args()


def prediction_ms(args: argparse.Namespace) -> float | None:
    """Predicted latency from the command line or from a pruning report."""
    found = args.predicted_ms
    if args.report is not None:
        try:
            found = float(json.loads(args.report.read_text(encoding="utf-8"))["pruned"]["predicted_ms"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MdpError(f"{args.report} has no prediction ({error!r}); give --predicted-ms") from error
    if found is not None and not 0 < found < float("inf"):
        raise MdpError(f"a prediction of {found} ms ({args.report or '--predicted-ms'}) is none: it must be positive")
    return found


def stream_of(runner: Runner, frames: str):
    """Endless; a drive is read frame by frame between the timed ones, and repeated as new scenes."""
    if frames == "synthetic":
        from mdp_mmdet3d.runtime.synthetic import repeat_frames, synthetic_frames, synthetic_images

        streams = isinstance(runner, StreamRunner)
        made: list = (synthetic_frames if streams else synthetic_images)(runner.manifest, count=8)
        return repeat_frames(made)
    if not isinstance(runner, StreamRunner):
        raise MdpError(f"--frames {frames}: a recorded drive is for a streaming deployment; a single graph takes noise")
    from mdp_mmdet3d.runtime.drive import repeat_drive
    from mdp_mmdet3d.runtime.preprocess import preprocess

    return (preprocess(frame, runner.manifest) for frame in repeat_drive(frames))


def progress(done: int, total: int) -> None:
    """One line on a terminal; a log file gets one line per tenth."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} frames", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % max(1, total // 10) == 0:
        print(f"{done} of {total} frames", file=sys.stderr, flush=True)


def show(result: Validation, predicted_ms: float | None) -> None:
    columns = [("deployment", result.latency)]
    if result.dense_latency:
        columns.append(("dense", result.dense_latency))
    print(f"{'':<18}" + "".join(f"{name:>12}" for name, _ in columns))
    for key in result.latency:
        print(f"{key:<18}" + "".join(f"{values[key]:>12.2f}" for _, values in columns))
    if result.speedup:
        print(f"{'speed-up':<18}{result.speedup:>12.3f}")
    if predicted_ms is not None:
        p50, quiet = (result.latency[key] / predicted_ms - 1 for key in ENGINES_KEYS)
        deviations = f"measured undisturbed {quiet:+.1%}, p50 {p50:+.1%}"
        print(f"{'predicted_ms':<18}{predicted_ms:>12.2f}  (of the engines; {deviations})")
    if result.rig is not None:
        print(
            f"the camera rig changed in {result.rig['changes']} of {len(result.samples_ms)} frames: position embedding "
            f"p50 {result.rig['p50_ms']:.2f} ms, not in the latencies above, as a vehicle's rig does not change"
        )
    memory = result.memory_mib
    print(
        f"deadline {result.requirement.deadline_ms:.2f} ms: {result.deadline_misses} of {len(result.samples_ms)} "
        f"frames late; memory {memory['start']:.0f} MiB at the start, {memory['end']:.0f} at the end, "
        f"{memory['peak']:.0f} at most"
    )
    if result.gpu_memory_mib is not None:
        gpu = result.gpu_memory_mib
        print(
            f"memory of the GPU in use by all processes: {gpu['start']:.0f} MiB at the start, {gpu['end']:.0f} at the "
            f"end, {gpu['peak']:.0f} at most"
        )
    print("MET" if result.met else "MISSED: " + "; ".join(result.failures))


def main() -> int:
    args = parse_args()
    try:
        check_counts(args.num_frames, args.warmup)
        for path in filter(None, (args.json, args.plot)):
            check_target_file(path)
        if args.plot:
            from mdp_mmdet3d.runtime.trace_plot import plot_trace  # fails before a long run, not after it
        deadline_ms = args.deadline_ms
        if deadline_ms is None:
            deadline_ms = 1e3 / args.fps if args.fps > 0 else 0.0
        requirement = Requirement(args.fps, deadline_ms, args.allowed_misses)
        predicted_ms = prediction_ms(args)
        runner = load_runner(args.deployment, args.threads, args.backend)
        dense = load_runner(args.dense, args.threads, args.backend) if args.dense else None
        before = host_state()
        stream = stream_of(runner, args.frames)
        result = validate(
            runner, stream, args.num_frames, requirement, warmup=args.warmup, dense=dense, on_frame=progress
        )
        manifest = runner.manifest
        show(result, predicted_ms)
        if args.json:
            write_json(
                args.json,
                {
                    **result.to_json(),
                    "predicted_ms": predicted_ms,
                    "backend": runner.backend_info(),
                    "deployment": {
                        "folder": str(args.deployment),
                        "precision": manifest.precision,
                        "layout": getattr(manifest, "layout", None),
                        "plan_hash": manifest.plan_hash,
                        "weights": manifest.weights,
                    },
                    "frames": args.frames,
                    "warmup": args.warmup,
                    "host": host_device(),
                    "host_state": {"before": before, "after": host_state()},
                },
            )
        if args.plot:
            plot_trace(args.plot, result)
    except ImportError as error:
        print(f"error: {error}; install it, or leave out the option that needs it", file=sys.stderr)
        return BAD_INPUT
    except (MdpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return STOPPED
    return MET if result.met else MISSED


if __name__ == "__main__":
    sys.exit(main())
