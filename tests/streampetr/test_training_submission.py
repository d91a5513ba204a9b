"""Submissions are complete, limited, checked and zipped."""

from __future__ import annotations

import errno
import json
import os
import zipfile

import pytest

from mdp_mmdet3d.errors import FileFormatError, WriteError
from projects.streampetr.submission import check_submission, write_submission


def box(token: str, score: float = 0.5, name: str = "car", attribute: str = "vehicle.moving", **changes) -> dict:
    entry = dict(sample_token=token, translation=[600.0, 1600.0, 1.0], size=[1.9, 4.6, 1.7],
                 rotation=[1.0, 0.0, 0.0, 0.0], velocity=[1.0, 0.0], detection_name=name, detection_score=score,
                 attribute_name=attribute)  # fmt: skip
    return entry | changes


def test_every_sample_is_there_and_the_best_500_boxes_stay(tmp_path) -> None:
    results = {"a": [box("a", score=i / 1000) for i in range(600)], "b": [box("b", name="barrier", attribute="")]}
    archive = write_submission(results, ["a", "b", "c"], tmp_path / "submission.json", use_external=True)
    content = json.loads((tmp_path / "submission.json").read_text())
    assert [len(content["results"][token]) for token in "abc"] == [500, 1, 0]
    assert min(entry["detection_score"] for entry in content["results"]["a"]) == 0.1
    assert content["meta"] == {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False,
                               "use_external": True}  # fmt: skip
    with zipfile.ZipFile(archive) as stream:
        assert json.loads(stream.read("submission.json")) == content


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(attribute_name="pedestrian.moving"), "has the attribute 'pedestrian.moving'; allowed are"),
    (dict(detection_name="lorry"), "devkit refuses"),
    (dict(translation=[float("nan"), 0.0, 0.0]), "devkit refuses|is not finite"),
    (dict(velocity=[float("inf"), 0.0]), "is not finite"),
    (dict(size=[0.0, 4.6, 1.7]), "has the size .* must be positive"),
    (dict(detection_score=1.2), "has the score 1.2"),
    (dict(rotation=[0.0, 0.0, 0.0, 0.0]), "has the rotation .* no unit quaternion"),
])  # fmt: skip
def test_what_the_server_would_refuse_is_refused_and_nothing_is_left(tmp_path, wrong, message) -> None:
    with pytest.raises(FileFormatError, match=message):
        write_submission({"a": [box("a", **wrong)]}, ["a"], tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_samples_of_another_split_and_missing_ones_are_refused(tmp_path) -> None:
    with pytest.raises(FileFormatError, match="1 samples with boxes are not in the split"):
        write_submission({"x": [box("x")]}, ["a"], tmp_path / "s.json")
    write_submission({"a": [box("a")]}, ["a"], tmp_path / "s.json")
    with pytest.raises(FileFormatError, match="must hold exactly the samples of the split; 1 are missing"):
        check_submission(tmp_path / "s.json", ["a", "b"])


def test_file_and_archive_are_written_both_or_neither(tmp_path, monkeypatch) -> None:
    write_submission({"a": [box("a")]}, ["a"], tmp_path / "s.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_submission({"a": [box("a", score=0.9)]}, ["a"], tmp_path / "s.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sorted(before) == ["s.json", "s.zip"]
