"""Accuracy of exported engines: the config's test data and metric, with the streaming runtime in place of the model."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import as_tensor, nn

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runtime.decode import Detections
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import Frame, StreamRunner

from .export import image_transform
from .frames import frame_of
from .normalisation import converted

NEEDED = ("test_dataloader", "test_evaluator")
FIGURES = ("mAP", "NDS", "mAP_set", "NDS_set")


class HostRunner(Protocol):
    """The calls of `StreamRunner` that are needed here."""

    folder: Path
    manifest: DeploymentManifest

    def reset(self) -> None:
        """Forget the past."""

    def run(self, frame: Frame) -> Any:
        """Detect in a frame."""

    def decode(self, output: Any) -> Detections:
        """Boxes, best first."""


def evaluate_deployment(
    config: Config,
    preprocessor: nn.Module,
    deployment: HostRunner | str | Path,
    on_frame: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run a deployment over ``config.test_dataloader`` and judge its boxes with ``config.test_evaluator``.

    Images come from the data set's pipeline and the model's data preprocessor, as in ``tools/test.py``, so that the
    engines are all that differs; memory, decoding and boxes are the runtime's (ONNX Runtime). A deployment that takes
    another normalisation gets it.

    Args:
        config: Of the model, with test data and metric.
        preprocessor: The model's ``data_preprocessor``.
        deployment: Folder, or whatever runs frames as a host does.
        on_frame: Called with (frames done, frames in all).

    Returns:
        Those of `FIGURES` that the metric gives, ``metric``, ``data`` and ``frames``.

    Raises:
        MdpError: The config has no test data or no metric, or the deployment detects other classes.
        MissingDatasetError: The data set is not there.
    """
    if missing := [key for key in NEEDED if config.get(key) is None]:
        raise MdpError(f"the config has no {' and no '.join(missing)}: accuracy needs a data set and its metric")
    runner: HostRunner = StreamRunner(deployment) if isinstance(deployment, str | Path) else deployment
    settings = copy.deepcopy(config.test_dataloader)
    settings.batch_size = 1  # one stream
    loader = Runner.build_dataloader(settings, seed=0)
    meta = loader.dataset.metainfo
    if tuple(meta["classes"]) != runner.manifest.class_names:
        raise MdpError(
            f"the data set has the classes {list(meta['classes'])}, {runner.folder} detects "
            f"{list(runner.manifest.class_names)}"
        )
    evaluator = Evaluator(copy.deepcopy(config.test_evaluator))
    evaluator.dataset_meta = meta
    frames = len(loader.dataset)
    image = runner.manifest.image
    trained = image_transform(preprocessor, image.size, image.source_size)
    runner.reset()
    for index, batch in enumerate(loader):
        data = preprocessor(dict(batch), False)
        for images, sample in zip(data["inputs"]["imgs"], data["data_samples"]):
            frame = converted(frame_of(images, sample.metainfo), trained, image)
            sample.pred_instances_3d = _instances(runner.decode(runner.run(frame)))
            sample.pred_instances = InstanceData()
        evaluator.process(data_samples=data["data_samples"], data_batch=batch)
        if on_frame:
            on_frame(index + 1, frames)
    runner.reset()
    with contextlib.redirect_stdout(io.StringIO()):  # the devkit prints tables
        values = {name.rpartition("/")[2]: float(value) for name, value in evaluator.evaluate(frames).items()}
    return {
        **{name: values[name] for name in FIGURES if name in values},
        "metric": str(config.test_evaluator["type"]),
        "data": str(config.test_dataloader.dataset.get("ann_file", "")),
        "frames": frames,
    }


def _instances(found: Detections) -> InstanceData:
    boxes = LiDARInstance3DBoxes(as_tensor(found.boxes), box_dim=9, origin=(0.5, 0.5, 0.5))
    return InstanceData(bboxes_3d=boxes, scores_3d=as_tensor(found.scores), labels_3d=as_tensor(found.labels))
