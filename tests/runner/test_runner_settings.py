"""Budgets and the prune section: every mistake is named with its remedy."""

from dataclasses import replace

import pytest
from mmengine.config import ConfigDict

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
        {"encoder_batch": -1},
        {"encoder_batch": "1"},
        {"input_size": "256x704"},
    ],
)
def test_bad_values_are_refused(section):
    with pytest.raises(MdpError, match=next(iter(section))):
        PruneSettings.from_config(section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, r"^prune = None must be a dict of settings$"),
        ({"frames": 2.5}, r"^prune\.frames = 2\.5 must be a whole number$"),
        ({"frames": True}, r"^prune\.frames = True must be a whole number$"),
        ({"frames": 0}, r"^prune\.frames = 0 must be at least 1$"),
        ({"min_keep": 2}, r"^prune\.min_keep = 2 must be at most 1$"),
        ({"time_limit_s": float("inf")}, r"^prune\.time_limit_s = inf must be a finite number$"),
        ({"evaluate": 1}, r"^prune\.evaluate = 1 must be True or False$"),
        ({"sampling": "dense"}, r"^prune\.sampling = 'dense' must be 'sparse' or 'grid'$"),
        ({"freeze": [1]}, r"^prune\.freeze\[0\] = 1 must be text, e\.g\. freeze=\['backbone\.\*'\]$"),
        ({"input_size": "256x704"}, r"^prune\.input_size = '256x704' must be a list, e\.g\. input_size=\(256, 704\)$"),
        ({"input_size": [256]}, r"^prune\.input_size\[1\] is missing in \[256\], e\.g\. input_size=\(256, 704\)$"),
        ({"tolerance": -1, "rounds": 1}, r"^prune\.tolerance = -1 must be .* 0; prune\.rounds = 1 must be at least 2$"),
        ({"repair": {"stride": 0}}, r"^prune\.repair\.stride = 0 must be at least 1$"),
        ({"importance": {"type": "loss", "frames": "x"}}, r"^prune\.importance\.frames = 'x' must be a whole number$"),
    ],
)
def test_an_error_tells_where_the_value_and_what_it_must_be(section, message):
    with pytest.raises(MdpError, match=message):
        PruneSettings.from_config(section)


def test_a_section_stays_as_it_was_given():
    """Nested sections may hold what pydantic knows nothing of, and are shown in reports as they were written."""
    adapter = ConfigDict(type="SingleGraph", nested=ConfigDict(a=1))
    settings = PruneSettings.from_config(ConfigDict(adapter=adapter, budget="55%", repair=dict(frames=60)))
    assert settings.adapter is adapter and settings.budget == "55%" and settings.repair == dict(frames=60)
    assert replace(settings, frames=3).frames == 3
    with pytest.raises(MdpError, match=r"prune\.frames = 0"):
        replace(settings, frames=0).check()


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
