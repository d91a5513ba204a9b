"""nuScenes as a stream: frames of a scene in order, with what a temporal detector needs to know about each.

Reads MMDetection3D's v2 info files, with or without the `scene_token` that `tools/create_infos.py` adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np
from mmdet3d.datasets import NuScenesDataset
from mmdet3d.registry import DATASETS
from mmengine.logging import print_log
from numpy.typing import NDArray

from mdp_mmdet3d.datasets.check_infos import check_fields, check_meta, check_steps, check_values
from mdp_mmdet3d.datasets.conventions import INFO_CLASSES
from mdp_mmdet3d.errors import FileFormatError, MdpError, MissingDatasetError
from mdp_mmdet3d.plausible import step_fault

SCENE_GAP_S = 2.0


def lidar_pose(ego2global: Sequence, lidar2ego: Sequence) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lidar-to-global transform and its inverse, in the float32 arithmetic of the official training code.

    Args:
        ego2global: (4, 4) vehicle to global.
        lidar2ego: (4, 4) lidar to vehicle.

    Returns:
        ``ego_pose`` and ``ego_pose_inv``, both (4, 4) float32. The inverse is ``[R^T, -R^T t]``.
    """
    pose = np.asarray(ego2global, np.float32) @ np.asarray(lidar2ego, np.float32)
    inverse = np.eye(4, dtype=np.float32)
    inverse[:3, :3] = pose[:3, :3].T
    inverse[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return pose, inverse


def infer_scene_tokens(records: Sequence[dict[str, Any]]) -> list[str]:
    """Guess scenes of records that carry no ``scene_token``.

    A scene starts where no lidar sweep precedes the frame, after a gap of more than ``SCENE_GAP_S`` seconds, or where
    the vehicle cannot have come from the frame before.

    Args:
        records: v2 info records in any order.

    Returns:
        One made-up token per record, in the order given.
    """
    order = sorted(range(len(records)), key=lambda i: records[i]["timestamp"])
    sweeps_known = any("lidar_sweeps" in record for record in records)
    tokens = [""] * len(records)
    scene = 0
    for rank, index in enumerate(order):
        if rank:
            gap_s = records[index]["timestamp"] - records[order[rank - 1]]["timestamp"]
            first_of_scene = sweeps_known and "lidar_sweeps" not in records[index]
            before, after = (np.asarray(records[i].get("ego2global", np.eye(4))) for i in (order[rank - 1], index))
            scene += gap_s > SCENE_GAP_S or first_of_scene or step_fault(before, after, gap_s) is not None
        tokens[index] = f"inferred-scene-{scene:04d}"
    return tokens


def split_sequences(scene_tokens: Sequence[str], parts: int = 1) -> list[range]:
    """Cut consecutive items of equal scene token into streams.

    Args:
        scene_tokens: Of the items, in stream order.
        parts: Into how many parts of ceil(n / parts) frames a scene is cut; the last one may be shorter, and a scene
            shorter than ``parts`` has fewer.

    Returns:
        Item ranges that follow each other without gaps.
    """
    sequences = []
    start = 0
    for _, items in groupby(scene_tokens):
        frames = len(list(items))
        length = -(-frames // parts)
        sequences += [range(start + i, start + min(i + length, frames)) for i in range(0, frames, length)]
        start += frames
    return sequences


def stream_order(records: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of ``records`` scene by scene (scenes by their first frame), frames by time."""
    start: dict[str, float] = {}
    for record in records:
        token = record["scene_token"]
        start[token] = min(start.get(token, np.inf), record["timestamp"])
    return sorted(
        range(len(records)),
        key=lambda i: (start[records[i]["scene_token"]], records[i]["scene_token"], records[i]["timestamp"]),
    )


@DATASETS.register_module()
class StreamNuScenesDataset(NuScenesDataset):
    """nuScenes key frames, scene by scene and in time order.

    Every record additionally carries ``scene_token`` (str), ``prev_exists`` (bool: the previous item of this data set
    is an earlier frame of the same scene), ``ego_pose`` and ``ego_pose_inv`` ((4, 4) float32, lidar to global and
    back) and ``timestamp`` (Python float, seconds). ``sample_idx`` stays the row of the info file, because
    MMDetection3D's ``NuScenesMetric`` looks tokens up by it.

    Ground truth is loaded with ``test_mode=False``; that mode neither shuffles nor drops frames here.

    Args:
        data_root: Folder of the data set.
        ann_file: v2 info file, relative to ``data_root`` or absolute.
        filter_empty_gt: Whether frames without objects are replaced by random others; off, it would tear streams.
        use_valid_flag: Whether objects without any lidar or radar point are left out of the ground truth.
        scene_parts: Into how many streams a scene is cut; the official streaming training uses 2.
        **kwargs: As for ``NuScenesDataset``.

    Raises:
        MissingDatasetError: The info file is not there; the message names the remedies.
        FileFormatError: The info file is not a v2 info file of nuScenes, or its label order is another one.
    """

    # Without 'version': it has to come from the info file, or NuScenesMetric would load v1.0-trainval for mini.
    METAINFO: ClassVar[dict] = {
        "classes": INFO_CLASSES,
        "palette": NuScenesDataset.METAINFO["palette"],
    }

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        filter_empty_gt: bool = False,
        use_valid_flag: bool = True,
        scene_parts: int = 1,
        **kwargs: Any,
    ) -> None:
        if scene_parts < 1:
            raise MdpError(f"scene_parts={scene_parts} must be at least 1")
        self.scene_parts = scene_parts
        super().__init__(
            data_root=data_root,
            ann_file=ann_file,
            filter_empty_gt=filter_empty_gt,
            use_valid_flag=use_valid_flag,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """Read the info file and order it as a stream."""
        _require_dataset(self.data_root, self.ann_file)
        self._row = 0
        try:
            records = super().load_data_list()
        except (ValueError, TypeError, LookupError, EOFError, AttributeError, ImportError, UnpicklingError) as error:
            raise FileFormatError(
                f"{self.ann_file} is no v2 info file of MMDetection3D ({type(error).__name__}: {error}); "
                "make it with `python tools/create_infos.py DATAROOT`"
            ) from error
        if not records:
            raise FileFormatError(f"{self.ann_file} has no frames; a split without scenes cannot be used")
        check_meta(self._metainfo, self.ann_file)
        check_values(records, self.ann_file)
        self._check_label_order()
        if any("scene_token" not in record for record in records):
            print_log(
                f"{self.ann_file} has no scene tokens: scenes are inferred from gaps and missing sweeps. "
                "Add them with `python tools/create_infos.py DATAROOT --annotate FILE`.",
                "current",
                level=30,
            )
            for record, token in zip(records, infer_scene_tokens(records)):
                record["scene_token"] = token
        for row, record in enumerate(records):
            record["file_row"] = row
            record.pop("lidar_sweeps", None)
            record["ego_pose"], record["ego_pose_inv"] = lidar_pose(
                record["ego2global"], record["lidar_points"]["lidar2ego"]
            )
        ordered = [records[i] for i in stream_order(records)]
        check_steps(ordered, self.ann_file)
        return ordered

    def parse_data_info(self, info: dict) -> dict:
        """Check a raw record and complete its paths; a test split has no ground truth, which a test does not need."""
        check_fields(info, self._row, self.ann_file, annotated=not self.test_mode)
        self._row += 1
        wanted: bool = self.load_eval_anns  # type: ignore[has-type]
        self.load_eval_anns = wanted and "instances" in info
        try:
            return super().parse_data_info(info)
        finally:
            self.load_eval_anns = wanted

    def get_data_info(self, idx: int) -> dict:
        """Record of item ``idx`` with ``prev_exists`` for the order in which this data set is read."""
        info = super().get_data_info(idx)
        position = info["sample_idx"]
        info["sample_idx"] = info["file_row"]
        info["prev_exists"] = False
        if self.scene_parts > 1:
            info["prev_exists"] = position not in self._sequence_starts
        elif position > 0:
            before = super().get_data_info(position - 1)
            info["prev_exists"] = (
                before["scene_token"] == info["scene_token"] and before["timestamp"] < info["timestamp"]
            )
        return info

    @cached_property
    def sequences(self) -> list[range]:
        """Item ranges of the streams, in order; read by `StreamBatchSampler`."""
        self.full_init()
        tokens = [super(StreamNuScenesDataset, self).get_data_info(i)["scene_token"] for i in range(len(self))]
        return split_sequences(tokens, self.scene_parts)

    @cached_property
    def _sequence_starts(self) -> frozenset[int]:
        return frozenset(sequence.start for sequence in self.sequences)

    def _check_label_order(self) -> None:
        """Labels in the file are numbers: make sure that they mean what this class takes them for."""
        categories = self._metainfo.get("categories")
        if categories is None:
            return
        found = {name: label for name, label in categories.items() if label >= 0}
        expected = {name: label for label, name in enumerate(INFO_CLASSES)}
        if found != expected:
            raise FileFormatError(
                f"{self.ann_file} numbers its classes {found}, MMDetection3D's nuScenes numbers them {expected}; "
                "make it again with `python tools/create_infos.py DATAROOT`"
            )


def _require_dataset(data_root: str, ann_file: str) -> None:
    """Raise `MissingDatasetError` with both remedies unless the info file exists."""
    if Path(ann_file).is_file():
        return
    remedies = (
        f"Either write the miniature data set with `python tools/create_mini_nuscenes.py {data_root}` (--easy for "
        "configs/streampetr_mini*.py), or point the environment variable NUSCENES_ROOT "
        "(MINI_NUSCENES_ROOT for configs/streampetr_mini*.py) at your own nuScenes"
    )
    if Path(data_root).is_dir():
        raise MissingDatasetError(
            f"info file {ann_file} does not exist. For the data in {data_root} make it with "
            f"`python tools/create_infos.py {data_root}`. {remedies}."
        )
    raise MissingDatasetError(
        f"no nuScenes data set at {data_root}. {remedies} and run `python tools/create_infos.py $NUSCENES_ROOT` once."
    )
