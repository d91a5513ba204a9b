"""A deployment and recorded frames as the public C++ application for StreamPETR reads them (docs/deployment.md, 1.4).

Written from what ``AV-Solutions/streampetr-trt/inference_app`` of NVIDIA/DL4AGX reads; its code is not used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import atomic_path
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner
from mdp_mmdet3d.together import new_folder

MEMORY_ROWS = (512, 640)
"""Rows read and written that the application's ``memory.cu`` and ``memory.cuh`` have as constants."""
MOST_FRAMES = 9999
UNREAD = "0000"
"""The application counts the entries of ``data`` and reads from 1 to one less than that."""
ONNX_FILES = {"image_encoder": "simplify_extract_img_feat.onnx", "head": "simplify_pts_head_memory.onnx"}


def package_cpp(
    deployment: str | Path, frames: Iterable[Frame], out_dir: str | Path, *, memory_edited: bool = False
) -> int:
    """Write the application's working folder: ``onnxfiles/``, ``data/`` and a README.

    ``data/0001``, ``data/0002``, ... hold the inputs of the engines and what ONNX Runtime makes of them. Poses are what
    `StreamRunner` feeds, relative to the frame before: the application has them in float32.

    Args:
        deployment: Folder of `export_streampetr` in the native layout.
        frames: Of one scene, in order; read one by one, 17 MB on disk each at 704x256.
        out_dir: Folder to make; it must not exist or be empty.
        memory_edited: `MEMORY_ROWS` were set to this model's in the application's source.

    Returns:
        Number of frames.

    Raises:
        DeploymentError: The deployment is not what the application runs, there is no frame or too many, a second scene
            begins, a frame is refused by `StreamRunner.run`, or ``out_dir`` is not empty.
        FileFormatError: The deployment is incomplete or has changed.
        WriteError: ``out_dir`` cannot be written.
    """
    deployment, out_dir = Path(deployment), Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DeploymentError(f"{out_dir} is not an empty folder; give another one")
    runner = StreamRunner(deployment)
    _check(runner.manifest, deployment, memory_edited)
    with new_folder(out_dir) as part:
        (part / "onnxfiles").mkdir()
        for name, file in ONNX_FILES.items():
            shutil.copyfile(deployment / runner.manifest.engines[name].file, part / "onnxfiles" / file)
        count = 0
        for count, arrays in enumerate(_tensors(runner, frames), start=1):
            _write(part / "data" / f"{count:04d}", arrays)
        if not count:
            raise DeploymentError("there is no frame to write; give a drive with at least one")
        _write_text(
            part / "data" / UNREAD / "README.txt", "The application does not read this folder, but counts it.\n"
        )
        _write_text(part / "README.md", _readme(runner.manifest, count))
    return count


def _check(manifest: DeploymentManifest, deployment: Path, memory_edited: bool) -> None:
    """Raise `DeploymentError` unless the application can run the deployment."""
    if manifest.layout != "native":
        raise DeploymentError(f"{deployment} has the layout {manifest.layout!r}; export without --layout")
    if any(spec.name == "prev_exists" for spec in manifest.engines["head"].inputs):
        raise DeploymentError(
            f"{deployment} has a prev_exists input, which the application does not feed; export without it"
        )
    if manifest.encoder_batch != len(manifest.camera_names):
        raise DeploymentError(
            f"{deployment} encodes one camera at a time, the application all at once; export with --encoder-batch "
            f"{len(manifest.camera_names)}"
        )
    rows = (manifest.memory.pre_length, manifest.memory.post_length)
    if rows != MEMORY_ROWS and not memory_edited:
        raise DeploymentError(
            f"the memory of {deployment} has {rows[0]} rows read and {rows[1]} written, the application has "
            f"{MEMORY_ROWS[0]} and {MEMORY_ROWS[1]} as constants and would write past its buffers: set them in "
            "kernels/memory.cu and include/memory.cuh and say so (--memory-edited)"
        )


def _tensors(runner: StreamRunner, frames: Iterable[Frame]) -> Iterator[dict[str, np.ndarray]]:
    """Content of one frame's files by name, float32 but for the times."""
    before: Frame | None = None
    for number, frame in enumerate(frames, start=1):
        if number > MOST_FRAMES:
            raise DeploymentError(
                f"more than {MOST_FRAMES} frames: the application's folders have four digits; give fewer"
            )
        if before is not None and (frame.scene_token != before.scene_token or not frame.prev_exists):
            raise DeploymentError(
                f"frame {number} begins another scene, and the application never resets its memory: write each scene "
                f"into a folder of its own (this one has {number - 1} frames)"
            )
        pose = np.asarray(frame.ego_pose, np.float64)
        output = runner.run(frame)
        anchor = pose if before is None else np.asarray(before.ego_pose, np.float64)
        tensors = {
            "img": frame.img,
            **runner.rig_outputs,
            "data_ego_pose": np.eye(4),
            "data_ego_pose_inv": np.linalg.solve(pose, anchor),
            "all_cls_scores": output.cls_scores,
            "all_bbox_preds": output.bbox_preds,
        }
        if before is None:
            memory = runner.initial_memory(pose, frame.timestamp)
            names = ("embedding", "reference_point", "egopose", "velo")
            tensors.update({f"init_memory_{name}": getattr(memory, name) for name in names})
        tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
        tensors["data_timestamp"] = np.array([frame.timestamp], np.float64)
        if before is None:
            tensors["prev_memory_timestamp"] = memory.clock + frame.timestamp  # ages, float64
        yield tensors
        before = frame


def _write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        (folder / f"{name}.bin").write_bytes(np.ascontiguousarray(array).tobytes())


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _readme(manifest: DeploymentManifest, count: int) -> str:
    head = next(spec for spec in manifest.engines["head"].outputs if spec.name == "all_cls_scores")
    typed = "" if manifest.precision == "float32" else " --stronglyTyped"
    commands = "\n".join(
        f"trtexec --onnx=onnxfiles/{file} --saveEngine=engines/{Path(file).stem}.engine{typed}"
        for file in ONNX_FILES.values()
    )
    return f"""# StreamPETR for the C++ application of NVIDIA/DL4AGX

Precision {manifest.precision}, plan {manifest.plan_hash or "none (dense)"}, weights {manifest.weights}; {count} frames.
On the vehicle, in this folder, with its own TensorRT:

```
mkdir -p engines
{commands}
streampetr_app
```

The application reads `data/0001` to `data/{count:04d}` and writes `all_cls_scores_trt.bin` and
`all_bbox_preds_trt.bin` beside `all_cls_scores.bin` and `all_bbox_preds.bin`, which ONNX Runtime computed
here: float32, {list(head.shape)} and the same with 10 in place of {head.shape[-1]}.
`data/{UNREAD}` is counted and not read. Put nothing else into `data`.

* Classes: {", ".join(manifest.class_names)}.
* Images: {", ".join(manifest.camera_names)}.
* The memory has {manifest.memory.pre_length} rows that are read and {manifest.memory.post_length} that are written.
  The application has {MEMORY_ROWS[0]} and {MEMORY_ROWS[1]} in `kernels/memory.cu` and `include/memory.cuh`.
* `data_ego_pose_inv` is the motion from the frame before, `data_ego_pose` the identity: the memory stays in the
  coordinates of the last frame, so that float32 never sees a global position.
"""
