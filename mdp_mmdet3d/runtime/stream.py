"""The streaming runtime: what a host does around the three engines, frame after frame.

This module and what it imports need Python 3.8, numpy and one engine, ONNX Runtime or TensorRT; nothing of torch
or MMDetection3D.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.plausible import intrinsics_fault, pose_fault, projection_fault, step_fault, time_fault
from mdp_mmdet3d.runtime.decode import Detections, decode, last_level
from mdp_mmdet3d.runtime.host_memory import HostMemory
from mdp_mmdet3d.runtime.manifest import DeploymentManifest, EngineSpec
from mdp_mmdet3d.runtime.per_camera import PerCamera

BACKENDS = ("onnxruntime", "tensorrt")
BRIGHTEST = 2.0
"""How many times the largest value of a normalised 8-bit image the quadratic mean of an input may be."""

ON_DEVICE = {
    "image_encoder": ("img_feats",),
    "position_embedding": ("pos_embed", "cone"),
    "head": tuple(f"post_memory_{name}" for name in ("embedding", "reference_point", "egopose", "velo")),
}
"""Outputs that only engines read: a GPU keeps them."""


@dataclass(frozen=True)
class Frame:
    """One moment of all cameras.

    Attributes:
        img: (N, 3, H, W) float32, resized, cropped and normalised as the manifest says.
        ego_pose: (4, 4) float64, global <- lidar. Any global frame will do: only relative motion is used.
        timestamp: Seconds; strictly increasing inside a scene.
        intrinsics: (N, 4, 4) camera matrices after resize and crop, padded to 4x4.
        lidar2img: (N, 4, 4) pixels <- lidar, after resize and crop.
        scene_token: The memory is reset when it changes.
        prev_exists: False resets the memory although the scene goes on.
    """

    img: np.ndarray
    ego_pose: np.ndarray
    timestamp: float
    intrinsics: np.ndarray
    lidar2img: np.ndarray
    scene_token: str = ""
    prev_exists: bool = True


@dataclass(frozen=True)
class StreamOutput:
    """What one frame gave.

    Attributes:
        cls_scores: Logits of every exported level, in the manifest's layout.
        bbox_preds: Box codes of every exported level, in the manifest's layout.
        encoder_ms: Wall-clock time of the image encoder.
        head_ms: Wall-clock time of the head, host work on the memory included.
    """

    cls_scores: np.ndarray
    bbox_preds: np.ndarray
    encoder_ms: float
    head_ms: float

    @property
    def engines_ms(self) -> dict[str, float]:
        """Wall-clock milliseconds of the engines that run every frame."""
        return {"image_encoder": self.encoder_ms, "head": self.head_ms}


class StreamRunner:
    """Runs an exported StreamPETR over a stream of frames.

    Points and poses of the memory are kept relative to the previous frame's lidar and the motion between
    frames is computed in float64, so float32 never sees a global coordinate. A reset gives exactly the state
    that the model was trained with.

    Args:
        folder: Deployment folder; its checksums are verified.
        threads: Threads inside one operator (ONNX Runtime).
        backend: ``"onnxruntime"``, or ``"tensorrt"`` for the engines that ``tools/build_engine.py`` wrote.

    Raises:
        FileFormatError: The folder is incomplete or its files have changed.
        DeploymentError: An engine cannot be loaded or does not have the manifest's signature.
    """

    def __init__(self, folder: str | Path, threads: int = 1, backend: str = "onnxruntime") -> None:
        if backend not in BACKENDS:
            raise DeploymentError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
        self.folder = Path(folder)
        self.threads = threads
        self.backend = backend
        self.manifest = DeploymentManifest.load(folder)
        self._pseudo_points = self.manifest.pseudo_reference_points(folder)
        self._encoder, self._position, self._head = (
            self._load(name) for name in ("image_encoder", "position_embedding", "head")
        )
        self._rig: tuple[np.ndarray, np.ndarray] | None = None
        self._rig_outputs: dict[str, Any] = {}
        self._scene: str | None = None
        self._timestamp = -np.inf
        self._pose = np.eye(4)
        self.memory: HostMemory | None = None

    def reset(self) -> None:
        """Forget the past: the next frame is the first of a stream."""
        self.memory = None

    def set_rig(self, intrinsics: np.ndarray, lidar2img: np.ndarray) -> bool:
        """Compute the position embedding of a camera rig; does nothing if the rig has not changed.

        Args:
            intrinsics: (N, 4, 4) camera matrices after resize and crop.
            lidar2img: (N, 4, 4) pixels <- lidar; inverted here in float64.

        Returns:
            Whether it has changed.

        Raises:
            DeploymentError: A shape is wrong, a matrix is not finite or no camera's, or the position embedding is not
                finite; the rig stays as it was.
        """
        try:
            rig = (np.array(intrinsics, np.float64), np.array(lidar2img, np.float64))
        except (TypeError, ValueError) as error:
            raise DeploymentError(f"intrinsics and lidar2img must be (cameras, 4, 4) numbers: {error}") from error
        if self._rig is not None and all(np.array_equal(old, new) for old, new in zip(self._rig, rig)):
            return False
        expected = (len(self.manifest.camera_names), 4, 4)
        if any(matrix.shape != expected for matrix in rig):
            raise DeploymentError(f"intrinsics {rig[0].shape} and lidar2img {rig[1].shape} must both be {expected}")
        for name, camera, projection in zip(self.manifest.camera_names, *rig):
            fault = intrinsics_fault(camera)
            if fault is not None:
                raise DeploymentError(f"intrinsics of {name}: {fault}; check the calibration")
            fault = projection_fault(projection, camera)
            if fault is not None:
                raise DeploymentError(f"lidar2img of {name}: {fault}; check the calibration")
        img2lidar = np.linalg.inv(rig[1])
        height, width = self.manifest.image.size
        feeds = {
            "img_metas_pad": np.array([height, width, 3], np.float32),
            "intrinsics": rig[0][None].astype(np.float32),
            "img2lidar": img2lidar[None].astype(np.float32),
        }
        self._rig = None
        self._rig_outputs = self._position.run({name: feeds[name] for name in self._position.inputs})
        for name, value in self._rig_outputs.items():
            self._require_finite(name, value, self._position, "for this rig")
        self._rig = rig
        return True

    @property
    def rig_outputs(self) -> dict[str, Any]:
        """``pos_embed`` and ``cone`` of the rig that is set; handles of device memory with TensorRT."""
        return dict(self._rig_outputs)

    def start(self, frame: Frame) -> bool:
        """What is computed once, before a stream: the position embedding of the frame's rig; whether it was due."""
        return self.set_rig(frame.intrinsics, frame.lidar2img)

    def run(self, frame: Frame) -> StreamOutput:
        """Set the frame's rig if it differs from the last one, then `step`."""
        self.start(frame)
        return self.step(frame)

    def step(self, frame: Frame) -> StreamOutput:
        """Detect in one frame with the rig of `set_rig`, and update the memory; a refused frame changes nothing.

        Raises:
            DeploymentError: The rig is not set, a shape or dtype is wrong, an image is not finite or not normalised,
                or pose and time cannot be those of a vehicle that drives on from the last frame. Features and outputs
                that are not finite raise too; outputs reset the memory, which may be their cause.
        """
        if self._rig is None:
            raise DeploymentError("the camera rig is not known yet: call set_rig(intrinsics, lidar2img) first")
        pose = self._check_frame(frame)
        memory = self.memory if frame.scene_token == self._scene and frame.prev_exists else None
        goes_on = memory is not None
        if memory is None:
            memory = self.initial_memory(pose, frame.timestamp)
        elif frame.timestamp <= self._timestamp:
            raise DeploymentError(
                f"timestamp {frame.timestamp!r} s does not come after {self._timestamp!r} s in the same scene; "
                "drop the frame, or call reset() at a cut"
            )
        elif (fault := step_fault(self._pose, pose, frame.timestamp - self._timestamp)) is not None:
            raise DeploymentError(
                f"at {frame.timestamp!r} s {fault}. Drop the frame, or call reset() (or give another scene_token) "
                "where the drive is cut or the vehicle was localised anew"
            )
        start = time.perf_counter()
        features = self._encoder.run({"img": frame.img[None]})["img_feats"]
        encoded = time.perf_counter()
        # Activations turn NaN into 0, so that boxes look right: what is between the engines has to be looked at. What
        # stays on a GPU is fetched for it where a stream starts.
        looked_at = not goes_on or isinstance(features, np.ndarray)
        if looked_at:
            self._require_finite("img_feats", features, self._encoder, f"at {frame.timestamp!r} s")
        feeds = self._head_inputs(features, memory, pose, frame.timestamp)
        if "prev_exists" in self._head.inputs:
            feeds["prev_exists"] = np.array([goes_on], np.float32)
        outputs = self._head.run(feeds)
        remembered = ("post_memory_embedding",) if looked_at and self._remembers else ()
        names = ("all_cls_scores", "all_bbox_preds", *remembered)
        try:
            for name in names:
                self._require_finite(name, outputs[name], self._head, f"at {frame.timestamp!r} s")
        except DeploymentError:
            self.reset()
            raise
        self.memory = self._next_memory(outputs, pose, frame.timestamp)
        self._scene, self._timestamp, self._pose = frame.scene_token, frame.timestamp, pose
        done = time.perf_counter()
        return StreamOutput(
            outputs["all_cls_scores"],
            outputs["all_bbox_preds"],
            encoder_ms=1e3 * (encoded - start),
            head_ms=1e3 * (done - encoded),
        )

    def gpu_used_mib(self) -> float | None:
        """Memory of the GPU in use, by all processes, in MiB; None with ONNX Runtime."""
        return self._head.gpu_used_mib() if self.backend == "tensorrt" else None

    def backend_info(self) -> dict[str, Any]:
        """What runs the engines, with its version."""
        return {"name": self.backend, **self._head.info()}

    def memory_on_host(self) -> HostMemory:
        """A copy of the memory in host arrays, whatever the engines run on.

        Raises:
            DeploymentError: There is none: no frame has been run since the last reset.
        """
        if self.memory is None:
            raise DeploymentError("the stream has no memory yet: run a frame first")
        fields = ("embedding", "reference_point", "egopose", "velo")
        return replace(self.memory, **{name: self._head.to_host(getattr(self.memory, name)) for name in fields})

    def decode(self, output: StreamOutput) -> Detections:
        """Boxes of the last level, best first."""
        logits, codes = last_level(
            output.cls_scores, output.bbox_preds, self.manifest.layout, self.manifest.num_queries
        )
        return decode(
            logits,
            codes,
            max_detections=self.manifest.max_detections,
            post_center_range=self.manifest.post_center_range,
            score_threshold=self.manifest.score_threshold,
        )

    def initial_memory(self, ego_pose: np.ndarray, timestamp: float) -> HostMemory:
        """State before the first frame: pseudo points and identity poses in front, zeros behind, age zero.

        Anchoring it at the first frame's own pose makes it exact: no rounding by a pose.
        """
        length, propagated = self.manifest.memory.pre_length, self.manifest.memory.num_propagated
        shape = self._head.inputs["pre_memory_embedding"].shape if self._remembers else (1, 0, 0)
        reference_point = np.zeros((1, length, 3), np.float32)
        reference_point[0, :propagated] = self._pseudo_points
        egopose = np.zeros((1, length, 4, 4), np.float32)
        egopose[0, :propagated] = np.eye(4)
        return HostMemory(
            embedding=np.zeros(shape, np.float32),
            reference_point=reference_point,
            egopose=egopose,
            velo=np.zeros((1, length, 2), np.float32),
            clock=np.full((1, length, 1), -timestamp, np.float64),
            anchor=ego_pose,
        )

    def _check_frame(self, frame: Frame) -> np.ndarray:
        """The pose of a frame whose own values are plausible; raises `DeploymentError`."""
        if (fault := pose_fault(frame.ego_pose)) is not None:
            raise DeploymentError(f"ego_pose {fault}")
        if (fault := time_fault(frame.timestamp)) is not None:
            raise DeploymentError(f"timestamp {fault}")
        if not isinstance(frame.prev_exists, (bool, np.bool_)):
            raise DeploymentError(f"prev_exists is {frame.prev_exists!r}; it must be True or False")
        image = self.manifest.image
        limit = BRIGHTEST * max(
            max(abs(value - mean) for value in (0.0, 255.0)) / std for mean, std in zip(image.mean, image.std)
        )
        for name, img in zip(self.manifest.camera_names, frame.img):
            values = np.ravel(img)
            # One pass that sees a NaN, an infinity and a single huge pixel, in a quarter of the time of three.
            if np.dot(values, values) <= limit**2 * values.size:
                continue
            if not np.isfinite(values).all():
                raise DeploymentError(f"'img' of {name} holds NaN or infinity; drop the frame")
            raise DeploymentError(
                f"'img' of {name} reaches {np.abs(values).max():.6g}, a normalised image {limit / BRIGHTEST:.3g} at "
                "most: subtract the manifest's mean and divide by its std"
            )
        return np.array(frame.ego_pose, np.float64)

    def _require_finite(self, name: str, output: Any, engine: Any, where: str) -> None:
        values = output if isinstance(output, np.ndarray) else engine.to_host(output)
        # A sum is finite only if everything is, and takes a fifth of the time.
        if not np.isfinite(np.sum(values)) and not np.isfinite(values).all():
            raise DeploymentError(
                f"{name} is not finite {where} in precision {self.manifest.precision}: drop the frame and check images "
                "and calibration (the memory is reset where it may be the cause). If it happens again export with "
                "--precision float32"
            )

    def _head_inputs(self, features: Any, memory: HostMemory, pose: np.ndarray, timestamp: float) -> dict[str, Any]:
        seen = {"x": features, **{name: self._rig_outputs[name] for name in ("pos_embed", "cone")}}
        if not self._remembers:
            return seen
        return {**seen, **memory.head_inputs(self.manifest.memory.pre_length, pose, timestamp)}

    @property
    def _remembers(self) -> bool:
        """Whether a frame says something to the next; a model without a memory has no inputs and outputs for one."""
        return self.manifest.memory.post_length > 0

    def _next_memory(self, outputs: dict[str, Any], pose: np.ndarray, timestamp: float) -> HostMemory:
        if not self._remembers:
            return self.initial_memory(pose, timestamp)
        return HostMemory.of_outputs(outputs, pose, timestamp)

    def _load(self, name: str) -> Any:
        spec = self.manifest.engines[name]
        engine = self._open(name, spec)
        for listed, found in ((spec.inputs, engine.inputs), (spec.outputs, engine.outputs)):
            if set(listed) != set(found.values()):
                raise DeploymentError(
                    f"{engine.path} has {sorted(found)}, deployment.json lists {listed}; export again"
                )
        if name == "image_encoder" and self._camera_by_camera:
            return PerCamera(engine, len(self.manifest.camera_names))
        return engine

    @property
    def _camera_by_camera(self) -> bool:
        return self.manifest.encoder_batch < len(self.manifest.camera_names)

    def _open(self, name: str, spec: EngineSpec) -> Any:
        # Imported here: a vehicle has one of the two.
        if self.backend == "tensorrt":
            from mdp_mmdet3d.trt.engine import TrtEngine

            gathered = name == "image_encoder" and self._camera_by_camera  # on the host
            kept = () if gathered else ON_DEVICE[name]
            return TrtEngine(self.folder, name, self.manifest.checksums[spec.file], kept)
        from mdp_mmdet3d.runtime.ort_engine import OrtEngine

        return OrtEngine(self.folder / spec.file, self.threads)
