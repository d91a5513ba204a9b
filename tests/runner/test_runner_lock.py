from __future__ import annotations

import subprocess
import sys

import pytest

from mdp_mmdet3d.config_file import default_work_dir
from mdp_mmdet3d.errors import MdpError, WriteError
from mdp_mmdet3d.runner.lock import locks_work_dir, work_dir_lock

HOLD = """
import sys, time
from mdp_mmdet3d.runner.lock import work_dir_lock
with work_dir_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends_however_it_does(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "w")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(MdpError, match=rf"w is in use by another run \(process {first.pid} on .*--work-dir"),
            work_dir_lock(tmp_path / "w"),
        ):
            pass
    finally:
        first.kill()
        first.wait()
    with work_dir_lock(tmp_path / "w"), work_dir_lock(tmp_path / "other"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"), work_dir_lock(tmp_path / "file" / "w"):
        pass


def test_a_method_holds_the_folder(tmp_path):
    class Job:
        work_dir = tmp_path

        @locks_work_dir
        def run(self, value):
            with pytest.raises(MdpError, match="in use"), work_dir_lock(tmp_path):
                pass
            return value

    assert Job().run(3) == 3


def test_every_pruned_model_has_a_default_folder_of_its_own(tmp_path):
    found = set()
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "plan.json").write_text("{}")
        found.add(default_work_dir(tmp_path / run / "pruned_config.py", "training"))
    assert found == {tmp_path / "a" / "training", tmp_path / "b" / "training"}
    assert str(default_work_dir("configs/streampetr_mini.py", "training")) == "work_dirs/streampetr_mini"
