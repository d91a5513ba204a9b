"""What the vehicle's runtime is fed: frames, manifests, drives, images, command lines."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .case import Assets, Case, edited, run_tool


def frames(assets: Assets) -> Iterator[Case]:
    """One frame of a stream, after a good one."""
    from mdp_mmdet3d.runtime.stream import StreamRunner
    from mdp_mmdet3d.runtime.synthetic import synthetic_frames

    runner = StreamRunner(assets.deployment)
    first, good = synthetic_frames(runner.manifest, 2)
    nan, inf = float("nan"), float("inf")

    def feed(**changes: Any) -> Callable[[], str]:
        def run() -> str:
            runner.reset()
            runner.run(first)
            found = runner.decode(runner.run(replace(good, **changes)))
            return f"{len(found.scores)} boxes, best {found.scores.max():.3f}"

        return run

    rig, projection, pose = good.intrinsics, good.lidar2img, good.ego_pose
    yield Case("a good frame", feed())
    yield Case("NaN in lidar2img of one camera", feed(lidar2img=edited(projection, (2, 0, 0), nan)), ("lidar2img",))
    yield Case("infinity in lidar2img", feed(lidar2img=edited(projection, (2, 0, 3), inf)), ("lidar2img",))
    yield Case("NaN focal length", feed(intrinsics=edited(rig, (2, 0, 0), nan)), ("intrinsics", "CAM_FRONT_LEFT"))
    yield Case("focal length 0", feed(intrinsics=edited(rig, (2, 0, 0), 0)), ("focal",))
    yield Case("negative focal length", feed(intrinsics=edited(rig, (2, 1, 1), -5)), ("focal",))
    yield Case("intrinsics transposed", feed(intrinsics=rig.transpose(0, 2, 1)), ("intrinsics",))
    yield Case("intrinsics (N, 3, 3)", feed(intrinsics=rig[:, :3, :3]), ("intrinsics", "(6, 3, 3)"))
    yield Case("intrinsics as text", feed(intrinsics="x"), ("intrinsics",))
    yield Case("intrinsics of the uncropped image", feed(intrinsics=edited(rig, (0, 0, 0), 1260)), ("lidar2img",))
    yield Case("lidar2img of five cameras", feed(lidar2img=projection[:5]), ("(5, 4, 4)",))
    yield Case("lidar2img all zero", feed(lidar2img=0 * projection), ("lidar2img",))
    yield Case("ego pose 100 km on", feed(ego_pose=edited(pose, (0, 3), 1e5)), ("ego_pose", "100000"))
    yield Case("ego pose with NaN", feed(ego_pose=edited(pose, (0, 3), nan)), ("ego_pose",))
    yield Case("ego pose scaled", feed(ego_pose=np.diag([2.0, 2, 2, 1])), ("ego_pose",))
    yield Case("ego pose mirrored", feed(ego_pose=np.diag([1.0, 1, -1, 1])), ("ego_pose",))
    yield Case("ego pose of shape (3, 4)", feed(ego_pose=pose[:3]), ("ego_pose", "(3, 4)"))
    yield Case("ego pose None", feed(ego_pose=None), ("ego_pose",))
    for unit, factor in (("milliseconds", 1e3), ("microseconds", 1e6), ("nanoseconds", 1e9)):
        yield Case(f"time stamp in {unit}", feed(timestamp=1.5e9 * factor), ("timestamp", unit))
    yield Case("integer microseconds", feed(timestamp=1533151603547590), ("timestamp", "microseconds"))
    yield Case("relative milliseconds", feed(timestamp=500.0), ("time stamp", "seconds"))
    yield Case("time stamp NaN", feed(timestamp=nan), ("timestamp",))
    yield Case("time stamp as text", feed(timestamp="0.5"), ("timestamp",))
    yield Case("time stands still", feed(timestamp=first.timestamp), ("timestamp",))
    yield Case("prev_exists 'false'", feed(prev_exists="false"), ("prev_exists",))
    yield Case("prev_exists 0.0", feed(prev_exists=0.0), ("prev_exists",))
    yield Case("image not normalised", feed(img=np.full_like(good.img, 128)), ("img", "mean"))
    for value in (1e5, inf, nan):
        yield Case(f"one pixel {value}", feed(img=edited(good.img, (3, 1, 5, 5), value)), ("img", "CAM_BACK"))
    yield Case("five images", feed(img=good.img[:5]), ("img",))
    yield Case("uint8 images", feed(img=good.img.astype(np.uint8)), ("img", "uint8"))
    yield Case("float64 images", feed(img=good.img.astype(float)), ("img", "float64"))


def camera_frames(assets: Assets) -> Iterator[Case]:
    """What cameras deliver, before preprocessing."""
    from mdp_mmdet3d.runtime.manifest import DeploymentManifest
    from mdp_mmdet3d.runtime.preprocess import CameraFrame, preprocess

    manifest = DeploymentManifest.load(assets.deployment)
    names = manifest.camera_names
    camera = np.array([[1260.0, 0, 800, 0], [0, 1260, 450, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = np.zeros((*manifest.image.source_size, 3), np.uint8)
    good = CameraFrame(
        dict.fromkeys(names, image), dict.fromkeys(names, camera), dict.fromkeys(names, np.eye(4)), np.eye(4), 0.0
    )

    def feed(what: str, value: Any, name: str = "CAM_BACK") -> Callable[[], Any]:
        changed = replace(good, **{what: {**getattr(good, what), name: value}})
        return lambda: preprocess(changed, manifest).img.shape

    def three_by_three() -> str:
        found = preprocess(replace(good, intrinsics=dict.fromkeys(names, camera[:3, :3])), manifest)
        assert np.array_equal(found.intrinsics, preprocess(good, manifest).intrinsics), "other intrinsics"
        return "as (4, 4)"

    yield Case("intrinsics (3, 3)", three_by_three)
    yield Case("intrinsics (2, 3)", feed("intrinsics", camera[:2, :3]), ("intrinsics", "CAM_BACK"))
    yield Case("intrinsics NaN", feed("intrinsics", np.nan * camera), ("intrinsics", "CAM_BACK"))
    yield Case("intrinsics None", feed("intrinsics", None), ("intrinsics", "CAM_BACK"))
    yield Case("lidar2cam NaN", feed("lidar2cam", np.nan * np.eye(4)), ("lidar2cam", "CAM_BACK"))
    yield Case("lidar2cam (3, 4)", feed("lidar2cam", np.eye(4)[:3]), ("lidar2cam", "CAM_BACK"))
    yield Case("image of another size", feed("images", image[:-1]), ("CAM_BACK",))
    yield Case("grey image", feed("images", image[..., 0]), ("CAM_BACK",))
    yield Case("float image", feed("images", image.astype(np.float32)), ("CAM_BACK", "float32"))
    yield Case("unknown camera", feed("images", image, "CAM_TOP"), ("CAM_TOP",))


def manifests(assets: Assets) -> Iterator[Case]:
    """``deployment.json`` as no export writes it."""
    from mdp_mmdet3d.runtime.stream import StreamRunner

    def load(edit: Callable[[dict], Any], *, keep_digest: bool = False) -> Callable[[], str]:
        def run() -> str:
            folder = assets.folder("manifest") / "deployment"
            shutil.copytree(assets.deployment, folder)
            (folder.parent / "x.onnx").write_bytes((folder / "head.onnx").read_bytes())
            path = folder / "deployment.json"
            data = json.loads(path.read_text())
            if not keep_digest:
                data.pop("digest", None)
            edit(data)
            path.write_text(json.dumps(data))
            return f"loaded, {StreamRunner(folder).manifest.precision}"

        return run

    def outside(data: dict) -> None:
        data["engines"]["head"]["file"] = "../x.onnx"
        data["checksums"]["../x.onnx"] = data["checksums"]["head.onnx"]

    yield Case("of the first release, unsigned", load(lambda data: data.update(precision="fp32")))
    yield Case("plan hash changed", load(lambda d: d.update(plan_hash="0123"), keep_digest=True), ("changed",))
    yield Case("engine outside the folder", load(outside), ("x.onnx", "inside"))
    yield Case("memory outside the folder", load(lambda d: d["memory"].update(init_file="/etc/hostname")), ("inside",))
    for key, value, names in (
        ("precision", "int8", ("precision", "int8")),
        ("precision", "float16", ("precision", "float16")),
        ("precision", 16, ("precision", "16")),
        ("layout", "nchw", ("layout",)),
        ("layout", "autoware", ("layout",)),
        ("levels", 3, ("levels",)),
        ("num_queries", 7, ("num_queries",)),
        ("num_queries", "76", ("num_queries",)),
        ("max_detections", -3, ("max_detections",)),
        ("max_detections", 0, ("max_detections",)),
        ("max_detections", 2.5, ("max_detections",)),
        ("score_threshold", 2, ("score_threshold",)),
        ("score_threshold", "0.3", ("score_threshold",)),
        ("class_names", "car", ("class_names",)),
        ("class_names", ["car"], ("classes",)),
        ("camera_names", ["a", "b"], ("cameras",)),
        ("pc_range", [1, 1, 1, 0, 0, 0], ("pc_range",)),
        ("post_center_range", [1, 2, 3], ("post_center_range",)),
        ("post_center_range", "far", ("post_center_range",)),
        ("post_center_range", None, ("post_center_range",)),
        ("engines", {}, ("deployment.json",)),
        ("engines", [], ("deployment.json",)),
        ("checksums", {}, ("checksum",)),
        ("image", None, ("deployment.json",)),
        ("memory", 3, ("deployment.json",)),
        ("kind", "other", ("deployment.json",)),
        ("schema_version", 9, ("schema_version",)),
    ):
        yield Case(f"{key} {value!r}", load(lambda data, k=key, v=value: data.update({k: v})), names)
    for section, key, value in (
        ("memory", "pre_length", 3),
        ("memory", "pre_length", "64"),
        ("memory", "post_length", 64),
        ("memory", "num_propagated", -1),
        ("image", "size", [64, 64]),
        ("image", "source_size", [0, 0]),
        ("image", "resized_size", "x"),
        ("image", "crop_offset", [0.5, 0]),
        ("image", "mean", [1]),
        ("image", "std", [0, 1, 1]),
        ("image", "channel_order", "GBR"),
        ("image", "interpolation", "nearest"),
    ):
        edit = load(lambda data, s=section, k=key, v=value: data[s].update({k: v}))
        yield Case(f"{section}.{key} {value!r}", edit, (key.partition("_")[0],))


def drives(assets: Assets) -> Iterator[Case]:
    """``drive.json`` of a recorded drive."""
    from mdp_mmdet3d.runtime.drive import load_drive, write_drive
    from mdp_mmdet3d.runtime.manifest import DeploymentManifest
    from mdp_mmdet3d.runtime.preprocess import CameraFrame, preprocess
    from mdp_mmdet3d.runtime.stream import StreamRunner

    manifest = DeploymentManifest.load(assets.deployment)
    names = manifest.camera_names
    camera = np.array([[1260.0, 0, 800, 0], [0, 1260, 450, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = np.zeros((*manifest.image.source_size, 3), np.uint8)
    good = [
        CameraFrame(
            dict.fromkeys(names, image),
            dict.fromkeys(names, camera),
            dict.fromkeys(names, np.eye(4)),
            np.eye(4),
            0.5 * index,
        )
        for index in range(2)
    ]
    write_drive(assets.folder("good_drive"), good)
    runner = StreamRunner(assets.deployment)

    def play(edit: Callable[[list, Path], Any]) -> Callable[[], str]:
        def run() -> str:
            folder = assets.folder("drive")
            shutil.copytree(assets.work / "good_drive", folder, dirs_exist_ok=True)
            data = json.loads((folder / "drive.json").read_text())
            edit(data["frames"], folder)
            (folder / "drive.json").write_text(json.dumps(data))
            runner.reset()
            outputs = [runner.run(preprocess(frame, manifest)) for frame in load_drive(folder)]
            return f"{len(outputs)} frames"

        return run

    yield Case("as recorded", play(lambda f, _: None))
    yield Case("prev_exists 'false'", play(lambda f, _: f[1].update(prev_exists="false")), ("frame 1", "prev_exists"))
    yield Case("prev_exists 1", play(lambda f, _: f[1].update(prev_exists=1)), ("frame 1", "prev_exists"))
    yield Case("no frames", play(lambda f, _: f.clear()), ("no frames",))
    yield Case("a frame null", play(lambda f, _: f.__setitem__(1, None)), ("frame 1",))
    yield Case("no pose", play(lambda f, _: f[1].pop("ego_pose")), ("frame 1", "ego_pose"))
    yield Case("pose of NaN", play(lambda f, _: f[1].update(ego_pose=[[float("nan")] * 4] * 4)), ("ego_pose",))
    yield Case("time as text", play(lambda f, _: f[1].update(timestamp_s="soon")), ("frame 1",))
    yield Case("time in ns", play(lambda f, _: f[0].update(timestamp_s=1533151603547590000)), ("timestamp", "nano"))
    yield Case("camera null", play(lambda f, _: f[1]["cameras"].update(CAM_BACK=None)), ("frame 1",))
    yield Case("camera missing", play(lambda f, _: f[1]["cameras"].pop("CAM_BACK")), ("CAM_BACK",))
    yield Case("intrinsics empty", play(lambda f, _: f[1]["cameras"]["CAM_BACK"].update(intrinsics=[])), ("CAM_BACK",))
    yield Case("image gone", play(lambda f, d: (d / "000001_CAM_BACK.png").unlink()), ("000001_CAM_BACK.png",))


def _png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and has none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def images(assets: Assets) -> Iterator[Case]:
    """Image files, read by training and by the deployed runtime."""
    from mdp_mmdet3d.runtime import drive
    from projects.streampetr import transforms

    folder = assets.folder("images")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
    files = {}
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"EXIF orientation {orientation}"] = folder / f"o{orientation}.jpg"
        Image.fromarray(pixels).save(folder / f"o{orientation}.jpg", exif=exif)
    grey = Image.fromarray(rng.integers(0, 65536, (40, 60)).astype(np.uint16))
    for suffix in ("png", "tiff"):
        files[f"16-bit grey {suffix}"] = folder / f"g16.{suffix}"
        grey.save(folder / f"g16.{suffix}")
    for mode, name in (("L", "g8.png"), ("RGBA", "a.png"), ("P", "p.png"), ("LA", "la.png"), ("1", "b.png")):
        files[f"mode {mode}"] = folder / name
        Image.fromarray(pixels).convert(mode).save(folder / name)
    for name, path in files.items():

        def same(path: Path = path) -> str:
            trained, deployed = transforms.read_image(path)[..., ::-1], drive._image(path)
            assert trained.shape == deployed.shape, f"training reads {trained.shape}, the runtime {deployed.shape}"
            gap = np.abs(trained.astype(int) - deployed).max()
            assert gap == 0, f"training and runtime differ by {gap} of 255"
            return f"equal, {trained.shape}"

        yield Case(name, same)
    whole = (folder / "g8.png").read_bytes()
    for name, content in (
        ("decompression bomb", _png(60000, 60000)),
        ("144 megapixels", _png(12000, 12000)),
        ("truncated", whole[: len(whole) // 2]),
        ("empty", b""),
        ("a web page", b"<!DOCTYPE html><html>login</html>"),
        ("no pixels", _png(40, 40)),
    ):
        path = folder / f"{name.replace(' ', '_')}.png"
        path.write_bytes(content)
        yield Case(f"{name}, training", lambda path=path: transforms.read_image(path).shape, (path.name,))
        yield Case(f"{name}, runtime", lambda path=path: drive._image(path).shape, (path.name,))


def validations(assets: Assets) -> Iterator[Case]:
    """Command lines of tools/validate_fps.py."""
    folder = assets.folder("validate")
    (folder / "file").write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "report.json").write_text('{"pruned": {"predicted_ms": NaN}}')

    def tool(*arguments: Any) -> Callable[[], str]:
        given = list(arguments)
        for option, value in (("--fps", "0.001"), ("--num-frames", "2"), ("--warmup", "0")):
            if option not in given:
                given += [option, value]
        return lambda: run_tool("validate_fps", assets.deployment, *given)

    yield Case("as it should be", tool("--json", folder / "fps.json"))
    for option, value, names in (
        ("--fps", "nan", ("fps",)),
        ("--fps", "0", ("fps",)),
        ("--fps", "-3", ("fps",)),
        ("--fps", "inf", ("fps",)),
        ("--deadline-ms", "nan", ("deadline",)),
        ("--deadline-ms", "0", ("deadline",)),
        ("--allowed-misses", "2", ("allowed_misses",)),
        ("--allowed-misses", "nan", ("allowed_misses",)),
        ("--num-frames", "1000000000000", ("frames",)),
        ("--num-frames", "1", ("frames",)),
        ("--warmup", "-1", ("warm-up",)),
        ("--threads", "2000", ("threads",)),
        ("--threads", "0", ("threads",)),
        ("--predicted-ms", "0", ("prediction", "positive")),
        ("--predicted-ms", "-4", ("prediction", "positive")),
        ("--predicted-ms", "nan", ("prediction", "positive")),
        ("--report", folder / "report.json", ("prediction",)),
        ("--report", folder / "none.json", ("none.json",)),
        ("--json", folder / "pipe", ("pipe",)),  # not /dev/full: an earlier release replaced the device
        ("--json", folder, (str(folder),)),
        ("--json", folder / "file" / "fps.json", ("file",)),
        ("--plot", folder / "file" / "trace.png", ("file",)),
        ("--frames", folder / "none", ("none",)),
        ("--dense", folder / "none", ("none",)),
        ("--backend", "cuda", ("backend",)),
    ):
        yield Case(f"{option} {Path(value).name}", tool(option, value), names)
