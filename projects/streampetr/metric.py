"""nuScenes evaluation of a data set that has only some of the ten detection classes."""

from __future__ import annotations

from pathlib import Path

import mmengine
import numpy as np
from mmdet3d.evaluation.metrics import NuScenesMetric
from mmdet3d.registry import METRICS


@METRICS.register_module()
class ClassSetNuScenesMetric(NuScenesMetric):
    """MMDetection3D's ``NuScenesMetric`` that also gives ``mAP_set`` and ``NDS_set``.

    The devkit averages over its ten classes, and a class without ground truth counts as AP 0. The two figures average
    the devkit's own per-class results over the classes of the data set instead, by the devkit's formulas; for a data
    set with all ten classes they are its mAP and NDS.
    """

    def _evaluate_single(
        self, result_path: str, classes: list[str] | None = None, result_name: str = "pred_instances_3d"
    ) -> dict[str, float]:
        detail = super()._evaluate_single(result_path, classes, result_name)
        summary = mmengine.load(Path(result_path).parent / "metrics_summary.json")
        names = classes or list(summary["label_aps"])
        mean_ap, nds = class_set_scores(summary, names, self.eval_detection_configs.mean_ap_weight)
        return {**detail, f"{result_name}_NuScenes/mAP_set": mean_ap, f"{result_name}_NuScenes/NDS_set": nds}


def class_set_scores(summary: dict, classes: list[str], mean_ap_weight: float) -> tuple[float, float]:
    """mAP and NDS over some classes.

    Args:
        summary: The devkit's ``metrics_summary.json``.
        classes: Names of the classes to average over.
        mean_ap_weight: Weight of mAP in NDS, 5 in the devkit's configurations.

    Returns:
        (mAP, NDS), both between 0 and 1. A true-positive error that no class defines is left out, as in the devkit.
    """
    mean_ap = float(np.mean([list(summary["label_aps"][name].values()) for name in classes]))
    errors = {
        metric: np.array([summary["label_tp_errors"][name][metric] for name in classes], float)
        for metric in summary["tp_errors"]
    }
    scores = [
        max(0.0, 1.0 - float(np.nanmean(error))) if np.isfinite(error).any() else 0.0 for error in errors.values()
    ]
    return mean_ap, (mean_ap_weight * mean_ap + sum(scores)) / (mean_ap_weight + len(scores))
