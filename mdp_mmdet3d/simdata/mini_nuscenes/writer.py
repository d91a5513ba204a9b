"""The whole data set: folders, scenes, maps, tables, info files; complete or not at all."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path

import cv2

from mdp_mmdet3d.datasets.conventions import CAMERAS, LIDAR
from mdp_mmdet3d.datasets.nuscenes_infos import create_infos
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.mini_nuscenes.ground import map_mask
from mdp_mmdet3d.simdata.mini_nuscenes.road import Road
from mdp_mmdet3d.simdata.mini_nuscenes.scene import Drive, SceneWriter
from mdp_mmdet3d.simdata.mini_nuscenes.spec import MiniNuScenesSpec
from mdp_mmdet3d.simdata.mini_nuscenes.tables import Tables
from mdp_mmdet3d.together import new_folder

LOCATIONS = ("singapore-onenorth", "boston-seaport", "singapore-queenstown", "singapore-hollandvillage")
TILE_M = 420.0


def write_mini_nuscenes(
    out: str | Path,
    spec: MiniNuScenesSpec,
    overwrite: bool = False,
    step: Callable[[], None] = lambda: None,
    workers: int = 1,
) -> Path:
    """Write a miniature nuScenes in the devkit's schema, with MMDetection3D's info files.

    Everything is written to a hidden folder beside it, which becomes ``OUT`` at the end.

    Args:
        out: Folder to make.
        spec: What it shall contain.
        overwrite: Whether a non-empty ``out`` may be replaced.
        step: Called after every key frame.
        workers: Processes that write scenes; the files are the same for any number.

    Returns:
        The folder.

    Raises:
        MdpError: ``out`` exists and is not empty, or the wanted objects do not fit on the road.
        WriteError: It cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise MdpError(f"{out} exists and is not empty; choose another folder, or replace it with --overwrite")
    with new_folder(out) as part:
        for channel in (*CAMERAS, LIDAR):
            (part / "samples" / channel).mkdir(parents=True)
        tables = Tables(spec.seed)
        for channel in (*CAMERAS, LIDAR):
            tables.add("sensor", channel, channel=channel, modality="lidar" if channel == LIDAR else "camera")
        roads: dict[str, list[Road]] = {}
        logs: dict[str, list[str]] = {}
        drives = plan_drives(spec)
        for drive, (rows, road) in zip(drives, _written(spec, drives, part, step, min(workers, len(drives)))):
            tables.extend(rows)
            roads.setdefault(drive.location, []).append(road)
            logs.setdefault(drive.location, []).append(tables.token("log", drive.logfile))
        _write_maps(part, tables, roads, logs)
        tables.write(part / spec.version)
        create_infos(part, spec.version)
    return out


def plan_drives(spec: MiniNuScenesSpec) -> list[Drive]:
    """Name, place and time of every scene; scenes of one place lie side by side."""
    drives = []
    for index, name in enumerate(spec.scene_names):
        column = index // len(LOCATIONS)
        centre = ((column + 0.5) * TILE_M, 0.5 * TILE_M)
        drives.append(Drive(index, name, LOCATIONS[index % len(LOCATIONS)], centre))
    return drives


def _write_scene(spec: MiniNuScenesSpec, drive: Drive, part: Path, step: Callable[[], None]) -> tuple[Tables, Road]:
    """Files of one scene below ``part``; returns its rows, and its road for the map."""
    tables = Tables(spec.seed)
    scene = SceneWriter(spec, drive, tables, part)
    log = tables.add(
        "log",
        drive.logfile,
        logfile=drive.logfile,
        vehicle=drive.logfile.partition("-")[0],
        date_captured=drive.logfile[5:15],
        location=drive.location,
    )
    scene.write(log, step)
    return tables, scene.world.road


def _written(
    spec: MiniNuScenesSpec, drives: list[Drive], part: Path, step: Callable[[], None], workers: int
) -> Iterator[tuple[Tables, Road]]:
    """Rows and road of every scene, in order."""
    if workers <= 1:
        for drive in drives:
            yield _write_scene(spec, drive, part, step)
        return
    context = multiprocessing.get_context("spawn")  # a forked child may inherit the locks of OpenCV's threads
    frames = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (frames,)) as pool:
        futures = [pool.submit(_write_scene_in_worker, spec, drive, part) for drive in drives]
        try:
            _follow(futures, frames, step)
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(futures: list[Future], frames: multiprocessing.Queue, step: Callable[[], None]) -> None:
    """Report frames as they come, until all scenes are written or one failed."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2)
        while True:
            try:
                frames.get_nowait()
            except queue.Empty:
                break
            step()
        for future in done:
            future.result()


_frames: multiprocessing.Queue | None = None  # of a worker process: receives an item per key frame


def _start_worker(frames: multiprocessing.Queue) -> None:
    global _frames
    _frames = frames
    cv2.setNumThreads(1)  # one process per core already


def _write_scene_in_worker(spec: MiniNuScenesSpec, drive: Drive, part: Path) -> tuple[Tables, Road]:
    frames = _frames
    if frames is None:
        raise RuntimeError("the worker was not started by _start_worker")
    return _write_scene(spec, drive, part, lambda: frames.put(None))


def _write_maps(root: Path, tables: Tables, roads: dict[str, list[Road]], logs: dict[str, list[str]]) -> None:
    (root / "maps").mkdir()
    for location, loops in roads.items():
        filename = f"maps/{tables.token('map', location)}.png"
        mask = map_mask(loops, (len(loops) * TILE_M, TILE_M))
        if not cv2.imwrite(str(root / filename), mask):
            raise MdpError(f"could not write {root / filename}; is the disk full?")
        tables.add("map", location, category="semantic_prior", filename=filename, log_tokens=logs[location])
