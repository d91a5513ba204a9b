"""Cases of `benchmarks/bad_input.py`, by what is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import checkpoints, data, disks, folders, newest, runtime, settings
from .case import Assets, Case, make_assets

GROUPS: dict[str, Callable[[Assets], Iterator[Case]]] = {
    "frame": runtime.frames,
    "camera frame": runtime.camera_frames,
    "manifest": runtime.manifests,
    "drive": runtime.drives,
    "image": runtime.images,
    "validate_fps": runtime.validations,
    "info file": data.info_files,
    "metric and submission": data.submissions,
    "data identity": data.identities,
    "checkpoint": checkpoints.files,
    "foreign checkpoint": checkpoints.foreign,
    "setting": settings.sections,
    "budget": settings.budgets,
    "config": settings.configs,
    "target": settings.targets,
    "folder": folders.targets,
    "disk": disks.disks,
    "tool": folders.tools,
    "comparison": newest.comparisons,
    "report": newest.reports,
    "newest setting": newest.settings,
    "encoder and example": newest.encoders,
    "place": folders.places,
}

TESTS = {
    "frame": "tests/runtime/test_runtime_guard.py",
    "camera frame": "tests/runtime/test_runtime_validate.py",
    "manifest": "tests/runtime/test_runtime_manifest.py",
    "drive": "tests/runtime/test_runtime_validate.py",
    "image": "tests/runtime/test_runtime_images.py",
    "validate_fps": "tests/runtime/test_runtime_validate.py",
    "info file": "tests/datasets/test_check_infos.py",
    "metric and submission": "tests/datasets/test_nuscenes_metric.py, tests/streampetr/test_training_submission.py",
    "data identity": "tests/runner/test_runner_shipped_configs.py",
    "checkpoint": "tests/streampetr/test_model_checkpoint.py",
    "foreign checkpoint": "tests/streampetr/test_model_checkpoint.py",
    "setting": "tests/runner/test_runner_settings.py",
    "budget": "tests/runner/test_runner_settings.py",
    "config": "tests/runner/test_runner_settings.py",
    "target": "tests/runner/test_runner_job_target.py",
    "folder": "tests/onnx/test_onnx_folders.py, tests/test_together.py",
    "tool": "tests/runner/test_runner_lock.py, tests/streampetr/test_deployment_export_tool.py",
    "disk": "tests/onnx/test_onnx_folders.py, tests/trt/test_trt_build.py, tests/runner/test_runner_full_disk.py",
    "comparison": "tests/compare/test_compare.py",
    "report": "tests/report/test_report_html.py",
    "newest setting": "tests/runner/test_runner_settings.py, tests/runner/test_runner_prune_hook.py",
    "encoder and example": "tests/streampetr/test_deployment_export.py, tests/examples/test_own_detector.py",
    "place": "this benchmark only",
}
"""Where a case of each group is tested."""

__all__ = ["GROUPS", "TESTS", "Assets", "Case", "make_assets"]
