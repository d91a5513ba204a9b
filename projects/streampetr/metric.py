"""nuScenes evaluation that says what is wrong, also of a data set that has only some of the ten detection classes."""

from __future__ import annotations

import json
from pathlib import Path

import mmengine
import numpy as np
from mmdet3d.evaluation.metrics import NuScenesMetric
from mmdet3d.registry import METRICS
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionConfig, DetectionMetrics

from mdp_mmdet3d.errors import MdpError


@METRICS.register_module()
class ClassSetNuScenesMetric(NuScenesMetric):
    """MMDetection3D's ``NuScenesMetric`` that also gives ``mAP_set`` and ``NDS_set``.

    The devkit averages over its ten classes, and a class without ground truth counts as AP 0. The two figures average
    the devkit's own per-class results over the classes of the data set instead, by the devkit's formulas; for a data
    set with all ten classes they are its mAP and NDS.

    The devkit's own figures for predictions without a single box are AP 0 and every error 1; its code fails there.

    Raises:
        MdpError: There is no ground truth, or the devkit refuses the results, e.g. because the info file has not all
            frames of the split.
    """

    def _evaluate_single(
        self, result_path: str, classes: list[str] | None = None, result_name: str = "pred_instances_3d"
    ) -> dict[str, float]:
        if self.version == "v1.0-test":
            raise MdpError(
                f"{self.ann_file} is of nuScenes' test split, whose ground truth is not public: make a submission with "
                "tools/submit_nuscenes.py --split test"
            )
        results = json.loads(Path(result_path).read_text(encoding="utf-8"))["results"]
        classes = classes or list(self.eval_detection_configs.class_names)
        prefix = f"{result_name}_NuScenes"
        if not any(results.values()):
            summary = no_boxes(self.eval_detection_configs)
            detail = {f"{prefix}/{name}": 0.0 for name in ("NDS", "mAP")}
            for name in classes:
                detail |= {f"{prefix}/{name}_AP_dist_{k}": v for k, v in summary["label_aps"][name].items()}
                detail |= {f"{prefix}/{name}_{k}": v for k, v in summary["label_tp_errors"][name].items()}
            detail |= {f"{prefix}/{self.ErrNameMapping[k]}": v for k, v in summary["tp_errors"].items()}
        else:
            try:
                detail = super()._evaluate_single(result_path, classes, result_name)
            except AssertionError as error:
                raise MdpError(
                    f"the nuScenes devkit refuses to evaluate {self.ann_file}, which has {len(results)} frames of "
                    f"{self.version}: {error} Evaluate all frames of the split; make the info file with "
                    "`python tools/create_infos.py DATAROOT`"
                ) from error
            except Exception as error:  # the devkit raises nothing more special
                if "Invalid box type" not in str(error):
                    raise
                raise MdpError(f"{self.data_root} ({self.version}) has no ground truth to evaluate against") from error
            summary = mmengine.load(Path(result_path).parent / "metrics_summary.json")
        mean_ap, nds = class_set_scores(summary, classes, self.eval_detection_configs.mean_ap_weight)
        return {**detail, f"{prefix}/mAP_set": mean_ap, f"{prefix}/NDS_set": nds}


def no_boxes(config: DetectionConfig) -> dict:
    """The devkit's summary for predictions without a box, as its documentation defines it."""
    metrics = DetectionMetrics(config)
    metrics.add_runtime(0.0)
    for name in config.class_names:
        for distance_m in config.dist_ths:
            metrics.add_label_ap(name, distance_m, 0.0)
        undefined = {
            "traffic_cone": ("attr_err", "vel_err", "orient_err"),
            "barrier": ("attr_err", "vel_err"),
        }.get(name, ())
        for metric in TP_METRICS:
            metrics.add_label_tp(name, metric, float("nan") if metric in undefined else 1.0)
    return metrics.serialize()


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
