"""Budgets and the prune section: every mistake is named with its remedy."""

import pytest

from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runner.settings import LossSettings, PruneSettings, budget_ms


@pytest.mark.parametrize(
    "budget,expected",
    [
        (0.5, 100),
        ("0.55", 110),
        ("120ms", 120),
        (" 120 ms ", 120),
        ("8fps", 125),
        ("8 FPS", 125),
        (".5", 100),
        ("5e-1", 100),
        ("55%", 110),
        ("1e2ms", 100),
    ],
)
def test_budgets_are_understood(budget, expected):
    assert budget_ms(budget, 200.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "budget,message",
    [
        ("fast", "not understood"),
        ("-3ms", "not understood"),
        (0, "not understood"),
        ("nan", "not understood"),
        ("0%", "not understood"),
        ("150%", "must not exceed 1"),
        (1.5, "write 1.5ms"),
        ("250ms", "not below"),
        ("4fps", "not below"),
        (1, "not below"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget, message):
    with pytest.raises(MdpError, match=message):
        budget_ms(budget, 200.0)


def test_unknown_key_names_the_nearest():
    with pytest.raises(MdpError, match=r"'budgets'.*did you mean 'budget'"):
        PruneSettings.from_config({"budgets": 0.5})
    with pytest.raises(MdpError, match="known: budget, frames"):
        PruneSettings.from_config({"zzz": 1})


@pytest.mark.parametrize(
    "section",
    [
        {"frames": 0},
        {"frames": "many"},
        {"input_size": (0, 704)},
        {"freeze": "all"},
        {"min_keep": 2},
        {"rounds": 1},
        {"budget": "1x"},
        {"max_options": True},
        {"importance": "fisher"},
        {"importance": 3},
        {"importance": {"frames": 32}},
        {"importance": {"type": "taylor", "frames": 32}},
        {"importance": {"type": "loss", "frames": 2}},
        {"importance": {"type": "loss", "width": 2}},
        {"importance": {"type": "loss", "frames": 64, "max_frames": 32}},
        {"importance": {"type": "loss", "corrections": -1}},
        {"frames": 2.5},
        {"tolerance": -1},
        {"tolerance": "2%"},
        {"refinements": -1},
        {"time_limit_s": float("nan")},
        {"freeze": [1]},
        {"min_keep": "0.5"},
        {"channel_multiple": 8.5},
        {"input_size": [256]},
        {"tie_head_widths": "auto"},
        {"input_size": "256x704"},
    ],
)
def test_bad_values_are_refused(section):
    with pytest.raises(MdpError, match=next(iter(section))):
        PruneSettings.from_config(section)


def test_importance_is_measured_unless_the_config_says_otherwise():
    assert PruneSettings().loss_values == LossSettings()
    assert PruneSettings(importance="taylor").loss_values is None
    given = PruneSettings(importance={"type": "loss", "widths": 2}).loss_values
    assert given is not None and (given.widths, given.frames) == (2, 32)


def test_whole_numbers_are_numbers():
    assert PruneSettings.from_config({"time_limit_s": 10, "tolerance": 1}).time_limit_s == 10


def test_lists_of_a_config_become_tuples():
    settings = PruneSettings.from_config({"freeze": ["a.*"], "input_size": [64, 192]})
    assert settings.freeze == ("a.*",) and settings.input_size == (64, 192)


@pytest.mark.parametrize("text", ["model = dict(", '_base_ = ["./none.py"]', "1 / 0", "\0"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(MdpError, match=r"config .*mine\.py cannot be read: \w+Error"):
        read_config(tmp_path / "mine.py")


def test_options_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "mine.py").write_text("prune = dict(budget=0.5)")
    assert read_config(tmp_path / "mine.py", {"prune.budget": 0.4}).prune.budget == 0.4
    with pytest.raises(MdpError, match="--cfg-options do not fit"):
        read_config(tmp_path / "mine.py", {"prune.budget.share": 1})
