import io

import pytest
from rich.console import Console

from mdp_mmdet3d import progress
from mdp_mmdet3d.progress import PlainProgress, step_bar


@pytest.mark.parametrize("terminal, lines", [(False, 2), (True, 0)])
def test_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, terminal, lines):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    line = PlainProgress(Console(file=out, force_terminal=terminal), "importance", 20, "frames", done=5)
    for done in range(6, 13):
        now[0] += 4.0
        line(done)
    said = out.getvalue().splitlines()
    assert len(said) == lines
    if said:  # 3 frames in 12 s, 12 frames left
        assert said[0].strip() == "importance: 8 of 20 frames, about 48 s left"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_leaves_nothing_where_there_is_no_terminal(terminal):
    out = io.StringIO()
    with step_bar(Console(file=out, force_terminal=terminal)) as bar:
        bar.update(bar.add_task("end to end", total=2), completed=2)
    assert bool(out.getvalue()) is terminal
