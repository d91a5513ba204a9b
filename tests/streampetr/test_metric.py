import numpy as np
import pytest
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionMetrics

from projects.streampetr.metric import class_set_scores

UNDEFINED = {("traffic_cone", metric) for metric in ("orient_err", "vel_err", "attr_err")} | {
    ("barrier", "vel_err"),
    ("barrier", "attr_err"),
}


def evaluated(seed: int, empty: frozenset[str] = frozenset()) -> dict:
    """The devkit's summary with random results; ``empty`` classes have none."""
    random = np.random.default_rng(seed)
    config = config_factory("detection_cvpr_2019")
    metrics = DetectionMetrics(config)
    for name in config.class_names:
        for threshold in config.dist_ths:
            metrics.add_label_ap(name, threshold, 0.0 if name in empty else random.uniform())
        for metric in TP_METRICS:
            error = 1.0 if name in empty else random.uniform(0, 1.6)
            metrics.add_label_tp(name, metric, np.nan if (name, metric) in UNDEFINED else error)
    return {**metrics.serialize(), "weight": config.mean_ap_weight}


@pytest.mark.parametrize("seed", range(5))
def test_over_all_classes_it_is_the_devkits_figure(seed):
    summary = evaluated(seed)
    mean_ap, nds = class_set_scores(summary, list(summary["label_aps"]), summary["weight"])
    assert mean_ap == pytest.approx(summary["mean_ap"])
    assert nds == pytest.approx(summary["nd_score"])


def test_absent_classes_do_not_count():
    present = ["car", "truck", "bus", "pedestrian", "traffic_cone"]
    summary = evaluated(0, empty=frozenset({"trailer", "construction_vehicle", "motorcycle", "bicycle", "barrier"}))
    mean_ap, nds = class_set_scores(summary, present, summary["weight"])
    assert mean_ap == pytest.approx(2 * summary["mean_ap"])
    assert nds > summary["nd_score"]


def test_an_error_that_no_class_defines_scores_nothing():
    summary = evaluated(0)
    mean_ap, nds = class_set_scores(summary, ["traffic_cone"], summary["weight"])
    errors = [summary["label_tp_errors"]["traffic_cone"][metric] for metric in ("trans_err", "scale_err")]
    expected = 5 * mean_ap + sum(max(0.0, 1 - error) for error in errors)
    assert nds == pytest.approx(expected / 10)
