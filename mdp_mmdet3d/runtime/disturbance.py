"""A stream with everything that goes wrong on a road: cuts, dropped cameras, bad pixels, late and repeated frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.runtime.host import resident_mib
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner
from mdp_mmdet3d.runtime.synthetic import FRAME_INTERVAL_S, synthetic_frames

DISTURBANCES: dict[str, Callable[[Frame], Frame]] = {
    "dropped camera": lambda frame: replace(frame, img=frame.img[:-1]),
    "bad pixels": lambda frame: replace(frame, img=np.where(np.arange(frame.img.shape[-1]) == 3, np.nan, frame.img)),
    "wrong size": lambda frame: replace(frame, img=frame.img[..., :-1]),
    "time stands still": lambda frame: replace(frame, timestamp=-1.0),
    "pose lost": lambda frame: replace(frame, ego_pose=np.full((4, 4), np.nan)),
}


@dataclass(frozen=True)
class SoakResult:
    """What a soak saw.

    Attributes:
        frames: Frames that were run.
        refused: Frames that were refused, by kind.
        resets: Scene cuts.
        resets_checked: Cuts after which the boxes were compared with those of a fresh stream.
        wrong_after_reset: Of these, how many differed by a single bit.
        memory_mib: Resident memory at each tenth of the run.
    """

    frames: int
    refused: dict[str, int]
    resets: int
    resets_checked: int
    wrong_after_reset: int
    memory_mib: tuple[float, ...]


def soak(
    runner: StreamRunner,
    frames: int,
    *,
    seed: int = 0,
    cut_share: float = 0.02,
    bad_share: float = 0.05,
    check_share: float = 0.25,
    on_frame: Callable[[int], None] | None = None,
) -> SoakResult:
    """Run a disturbed stream; a refused frame must raise `DeploymentError` and nothing else.

    Args:
        runner: The deployment.
        frames: Frames to run, refused ones not counted.
        seed: Of everything random.
        cut_share: Share of frames that start a scene.
        bad_share: Share of frames before which a bad one is fed.
        check_share: Share of cuts that are compared with a fresh stream of a second runner.
        on_frame: Called with the frames done.

    Raises:
        DeploymentError: A bad frame was not refused, or a good one was.
    """
    rng = np.random.default_rng(seed)
    fresh = StreamRunner(runner.folder, runner.threads, runner.backend)
    base = synthetic_frames(runner.manifest, count=16, seed=seed)
    refused: Counter[str] = Counter()
    memory = []
    scene = checked = wrong = 0
    runner.reset()
    for index in range(frames):
        cut = bool(rng.random() < cut_share)
        scene += cut
        frame = replace(base[index % 16], timestamp=FRAME_INTERVAL_S * (index + 1), scene_token=str(scene))
        # Only inside a scene can time stand still.
        if index and not cut and rng.random() < bad_share:
            kind = str(rng.choice(list(DISTURBANCES)))
            _feed_bad(runner, DISTURBANCES[kind](frame), kind)
            refused[kind] += 1
        output = runner.run(frame)
        if cut and rng.random() < check_share:
            fresh.reset()
            checked += 1
            wrong += not np.array_equal(fresh.run(frame).bbox_preds, output.bbox_preds)
        if index % max(1, frames // 10) == 0:
            memory.append(resident_mib())
        if on_frame:
            on_frame(index + 1)
    memory.append(resident_mib())
    return SoakResult(frames, dict(refused), scene, checked, wrong, tuple(memory))


def _feed_bad(runner: StreamRunner, frame: Frame, kind: str) -> None:
    try:
        runner.run(frame)
    except DeploymentError:
        return
    raise DeploymentError(f"a frame with {kind} was not refused")
