"""The writer is deterministic, atomic and careful with what is already there."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest

from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, writer

TINY = dict(scenes=2, frames=1, image_size=(64, 32), object_count=15, radius_m=30.0)
ROOT = Path(__file__).resolve().parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path):
    steps = []
    first = writer.write_mini_nuscenes(tmp_path / "a", MiniNuScenesSpec(**TINY), step=lambda: steps.append(1))
    second = writer.write_mini_nuscenes(tmp_path / "b", MiniNuScenesSpec(**TINY))
    third = writer.write_mini_nuscenes(tmp_path / "c", MiniNuScenesSpec(**TINY, seed=1))
    assert digests(first) == digests(second)
    same_names = set(digests(first)) & set(digests(third))
    fixed = {f"v1.0-mini/{name}.json" for name in ("visibility", "scene")}
    differing = {name for name in same_names if digests(first)[name] != digests(third)[name]}
    assert {name for name in same_names if name.startswith("samples/")} <= differing
    assert "v1.0-mini/sample_annotation.json" in differing - fixed
    assert len(steps) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_folder_with_something_in_it_is_refused_unless_overwritten(tmp_path):
    out = tmp_path / "nuscenes"
    out.mkdir()
    precious = out / "precious.txt"
    precious.write_text("mine")
    with pytest.raises(MdpError, match="--overwrite"):
        writer.write_mini_nuscenes(out, MiniNuScenesSpec(**TINY))
    assert precious.read_text() == "mine"
    writer.write_mini_nuscenes(out, MiniNuScenesSpec(**TINY), overwrite=True)
    assert not precious.exists()
    assert (out / "nuscenes_infos_val.pkl").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["nuscenes"]


def test_a_failure_leaves_nothing_at_the_destination_and_the_next_run_starts_afresh(tmp_path, monkeypatch):
    out = tmp_path / "nuscenes"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "create_infos", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.write_mini_nuscenes(out, MiniNuScenesSpec(**TINY))
    assert not out.exists()
    writer.write_mini_nuscenes(out, MiniNuScenesSpec(**TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["nuscenes"]


def load_tool():
    spec = importlib.util.spec_from_file_location("create_mini_nuscenes", ROOT / "tools" / "create_mini_nuscenes.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_an_interrupt_is_no_crash(tmp_path, monkeypatch, capsys):
    tool = load_tool()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "write_mini_nuscenes", interrupted)
    monkeypatch.setattr(sys, "argv", ["create_mini_nuscenes.py", str(tmp_path / "out")])
    assert tool.main() == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenes", "99"], "99 scenes"),
        (["--image-size", "huge"], "WIDTHxHEIGHT"),
        (["--easy", "--image-size", "64x32"], "--easy"),
    ],
)
def test_the_tool_prints_one_line_and_fails_on_bad_arguments(tmp_path, arguments, message, monkeypatch, capsys):
    tool = load_tool()
    monkeypatch.setattr(sys, "argv", ["create_mini_nuscenes.py", str(tmp_path / "out"), *arguments])
    assert tool.main() == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    steps = []
    spec = MiniNuScenesSpec(**{**TINY, "scenes": 3, "frames": 2})
    alone = writer.write_mini_nuscenes(tmp_path / "alone", spec)
    shared = writer.write_mini_nuscenes(tmp_path / "shared", spec, step=lambda: steps.append(1), workers=2)
    assert digests(alone) == digests(shared)
    assert len(steps) == 6


def test_a_scene_that_fails_in_another_process_is_reported(tmp_path):
    crowded = MiniNuScenesSpec(**{**TINY, "object_count": 100_000})
    with pytest.raises(MdpError, match="fit"):
        writer.write_mini_nuscenes(tmp_path / "out", crowded, workers=2)
    assert not (tmp_path / "out").exists()
