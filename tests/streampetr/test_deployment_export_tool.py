from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from mmengine import Config

from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner
from mdp_mmdet3d.runtime.synthetic import synthetic_frames

from ..tiny_deployment import CLASS_NAMES

TOOL = Path(__file__).resolve().parents[2] / "tools/export.py"


def export(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stopped.value.code


@pytest.fixture
def config(tiny_config, tmp_path):
    path = tmp_path / "tiny.py"
    Config({"model": tiny_config(), "class_names": list(CLASS_NAMES), "prune": {"input_size": (64, 176)}}).dump(path)
    return path


def test_a_config_becomes_a_checked_float16_folder(monkeypatch, config, tmp_path):
    out = tmp_path / "out"
    options = ("--precision", "float16", "--frames", "synthetic", "--num-frames", 2, "--prev-exists")
    assert export(monkeypatch, config, "--out", out, *options) == 0
    manifest = DeploymentManifest.load(out)
    assert manifest.precision == "float16" and manifest.weights == "random" and manifest.image.size == (64, 176)
    assert manifest.checks["float32_against_pytorch"]["teacher_forced"]["logits"] < 1e-3
    assert manifest.checks["boxes_against_float32"]["frames"] == 2
    assert (out / "mdp_runtime.pyz").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.py"]
    runner = StreamRunner(out)
    assert len(runner.decode(runner.run(synthetic_frames(manifest, 1)[0])).scores) > 0


def test_bad_input_is_status_two(monkeypatch, config, tmp_path, capsys):
    assert export(monkeypatch, tmp_path / "nothing.py") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "unfinished").mkdir()
    assert export(monkeypatch, tmp_path / "unfinished") == 2
    assert "pruned_config.py" in capsys.readouterr().err
    assert export(monkeypatch, config, "--out", tmp_path, "--frames", "synthetic") == 2
    assert "no deployment folder" in capsys.readouterr().err
    assert export(monkeypatch, config, "--out", tmp_path / "o", "--num-frames", 10**12, "--frames", "synthetic") == 2
    assert "--num-frames must be in 1..10000" in capsys.readouterr().err


def test_a_stop_after_the_graphs_leaves_nothing(monkeypatch, config, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("projects.streampetr.deployment.check_against_pytorch", stop)
    assert export(monkeypatch, config, "--out", tmp_path / "out", "--frames", "synthetic", "--num-frames", 1) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped; nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]


def test_int8_wants_frames_and_warns_where_boxes_are_gone(monkeypatch, config, tmp_path, capsys):
    from projects.streampetr import deployment

    monkeypatch.setattr(deployment, "FEW_MATCHES", 1.1)
    out = tmp_path / "out"
    options = ("--out", out, "--precision", "int8", "--frames", "synthetic", "--num-frames", 2)
    assert export(monkeypatch, config, *options, "--calibration-frames", 1) == 2
    assert "at least 2 calibration frames, got 1" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.py"]
    assert export(monkeypatch, config, *options, "--calibration-frames", 3, "--int8-exclude", "*/layer4/*") == 0
    assert DeploymentManifest.load(out).precision == "int8" and "WARNING: many boxes" in capsys.readouterr().out


def test_a_source_size_of_nothing_is_named(monkeypatch, config, tmp_path, capsys):
    options = ("--out", tmp_path / "o", "--frames", "synthetic", "--source-size", 0, 0)
    assert export(monkeypatch, config, *options) == 2
    assert "source" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.py"]


def test_an_unknown_node_stops_before_anything_is_exported(monkeypatch, config, tmp_path, capsys):
    options = ("--out", tmp_path / "out", "--layout", "autoware", "--frames", "synthetic")
    assert export(monkeypatch, config, *options, "--node", "1.0") == 2
    assert "node release '1.0' is not known" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.py"]
