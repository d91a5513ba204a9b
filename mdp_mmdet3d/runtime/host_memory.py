"""What a stream keeps between two frames, and how a head's inputs are made of it; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class HostMemory:
    """State between two frames (docs/streampetr.md, section 4.1); L rows, newest first.

    With TensorRT all but the clock are handles of device memory that the head's next run overwrites.

    Attributes:
        embedding: (1, L, C) float32.
        reference_point: (1, L, 3) float32, metres in the frame of ``anchor``.
        egopose: (1, L, 4, 4) float32, anchor <- lidar at the row's time.
        velo: (1, L, 2) float32.
        clock: (1, L, 1) float64: minus the time of each row, in seconds.
        anchor: (4, 4) float64, global <- frame in which points and poses are stored.
    """

    embedding: np.ndarray
    reference_point: np.ndarray
    egopose: np.ndarray
    velo: np.ndarray
    clock: np.ndarray
    anchor: np.ndarray

    @classmethod
    def of_outputs(cls, outputs: Mapping[str, Any], pose: np.ndarray, timestamp: float) -> HostMemory:
        """What a head leaves that was fed `head_inputs` at ``pose`` (4, 4) and ``timestamp`` (s)."""
        return cls(
            embedding=outputs["post_memory_embedding"],
            reference_point=outputs["post_memory_reference_point"],
            egopose=outputs["post_memory_egopose"],
            velo=outputs["post_memory_velo"],
            clock=outputs["post_memory_timestamp"].astype(np.float64) - timestamp,
            anchor=pose,
        )

    def head_inputs(self, length: int, pose: np.ndarray, timestamp: float) -> dict[str, Any]:
        """The head's inputs of memory and pose.

        Args:
            length: Rows that the head takes.
            pose: (4, 4) float64, global <- lidar.
            timestamp: Seconds.
        """
        return {
            # The graph leaves its new memory in this frame's lidar coordinates, see `of_outputs`.
            "data_ego_pose": np.eye(4, dtype=np.float32)[None],
            "data_ego_pose_inv": np.linalg.solve(pose, self.anchor)[None].astype(np.float32),
            "pre_memory_embedding": _first_rows(self.embedding, length),
            "pre_memory_reference_point": _first_rows(self.reference_point, length),
            "pre_memory_timestamp": (self.clock[:, :length] + timestamp).astype(np.float32),
            "pre_memory_egopose": _first_rows(self.egopose, length),
            "pre_memory_velo": _first_rows(self.velo, length),
        }


def _first_rows(value: Any, length: int) -> Any:
    """First rows of an array; an engine that is fed device memory takes as much of it as fits."""
    return value[:, :length] if isinstance(value, np.ndarray) else value
