"""Pruning for another device: its table and its validations count, nothing that this machine measures does."""

import dataclasses
import json

import pytest
from mmengine.config import Config
from rich.console import Console

from mdp_mmdet3d.adapters import InputShape, trace_space
from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.latency import LatencyTable, NotMeasuredError, entries_of, smallest_structure
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.backends.staircases import ONNXRUNTIME_CPU
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.sampling import check_interpolable
from mdp_mmdet3d.report.summary import print_summary, print_target_steps
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runner.steps import find_space
from mdp_mmdet3d.runner.target import load_target_table, target_model, target_networks
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.adapter import StreamPETRAdapter


@pytest.fixture(scope="module")
def settings():
    return PruneSettings(input_size=(64, 192), max_options=4, frames=2, budget=0.5)


@pytest.fixture
def space(tiny_model, settings):
    return trace_space(tiny_model, InputShape(6, 64, 192), settings.space_options)


@pytest.fixture
def table_path(tmp_path, space):
    path = tmp_path / "orin.json"
    measure_latency(space, FakeBackend(processor="Orin"), path, progress=False)
    return path


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def fps_json(path, plan_hash, encoder_ms, head_ms, *, dense=None, precision="float32"):
    figures = lambda pair: {"encoder_p50_ms": pair[0], "head_p50_ms": pair[1]}  # noqa: E731
    path.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "latency": figures((encoder_ms, head_ms)),
                "dense_latency": dense and figures(dense),
                "deployment": {"plan_hash": plan_hash, "precision": precision},
            }
        )
    )
    return path


def test_table_of_another_precision_is_refused(table_path, space):
    assert len(load_target_table(table_path, space, "float32")) > 0
    with pytest.raises(StructureMismatchError, match=r"measured in float32, but prune\.precision is float16"):
        load_target_table(table_path, space, "float16")


def test_missing_operators_are_counted_and_named(table_path, space):
    gone = {}

    def drop(data):
        gone.update(data["operators"].pop(0))

    change(table_path, drop)
    with pytest.raises(NotMeasuredError, match=r"lacks 1 of \d+ operators") as error:
        load_target_table(table_path, space, "float32")
    assert gone["operator"] in str(error.value) and "--bundle" in str(error.value)


def test_without_whole_measurements_the_prediction_is_the_sum(table_path, space):
    table = LatencyTable.load(table_path)
    model = target_model(space, table, [])
    assert model.predict({}) == pytest.approx(
        sum(table.cost_array(space, term)[0].max() for term in space.frame_terms())
    )
    assert "without a fit" in model.explanation[0]


def test_validations_on_the_target_correct(tmp_path, table_path, space):
    table = LatencyTable.load(table_path)
    smallest = smallest_structure(space)
    kept = {d.name: (tuple(range(smallest.widths[d.name])),) * d.copies for d in space.dimensions}
    plan = PruningPlan.from_kept(space, kept, smallest.removed)
    plan.save(tmp_path / "plan.json")
    sums = target_model(space, table, [])
    small, dense = (sums.predict_engines(w, r) for w, r in ((smallest.widths, smallest.removed), ({}, ())))
    truth = {engine: [3 * ms[engine] + 0.5 for ms in (small, dense)] for engine in small}
    pairs = list(zip(truth["image_encoder"], truth["head"], strict=True))
    validation = fps_json(tmp_path / "fps.json", plan.hash, *pairs[0], dense=pairs[1])
    points = target_networks(tmp_path, space, table, validation)
    model = target_model(space, table, points)
    assert model.predict(smallest.widths, smallest.removed) == pytest.approx(sum(pairs[0]))
    assert model.predict({}) == pytest.approx(sum(pairs[1]))
    # Known from now on, also once plan.json is another plan; and the same file counts once.
    PruningPlan.from_kept(space, {}, set()).save(tmp_path / "plan.json")
    assert (
        target_networks(tmp_path, space, table, None) == points == target_networks(tmp_path, space, table, validation)
    )
    change(table_path, lambda data: data["device"].update(processor="Thor"))
    assert target_networks(tmp_path, space, LatencyTable.load(table_path), None) == []


def test_whole_networks_of_the_bundle_make_the_first_prediction_right(tmp_path, table_path, space):
    """Operators and a constant that the sum does not see: as on a device where small operators cost."""
    unit = target_model(space, LatencyTable.load(table_path), [])
    small = smallest_structure(space)
    structures = [({}, ()), (dict(small.widths), tuple(small.removed))]
    true_ms = [
        {engine: 1.2 * ms + 2.0 for engine, ms in unit.predict_engines(widths, removed).items()}
        for widths, removed in structures
    ]

    def add(data, digest=space.model_digest):
        data["networks"] = [
            {"name": str(i), "model_digest": digest, "widths": w, "removed": list(r), "engines_ms": ms}
            for i, ((w, r), ms) in enumerate(zip(structures, true_ms))
        ]

    change(table_path, add)
    table = LatencyTable.load(table_path)
    model = target_model(space, table, target_networks(tmp_path, space, table, None))
    assert len(model.networks) == 2
    half = {d.name: d.options[len(d.options) // 2] for d in space.dimensions}
    expected = sum(1.2 * ms + 2.0 for ms in unit.predict_engines(half).values())
    assert model.predict(half) == pytest.approx(expected, rel=0.01)
    assert unit.predict(half) < 0.9 * expected
    change(table_path, lambda data: add(data, "another model"))
    assert target_networks(tmp_path, space, LatencyTable.load(table_path), None) == []
    change(table_path, lambda data: data["networks"][0].update(model_digest=space.model_digest, widths=3))
    with pytest.raises(FileFormatError, match="damaged"):
        target_networks(tmp_path, space, LatencyTable.load(table_path), None)


def test_a_validation_that_another_machine_answered_is_refused(tmp_path, table_path, space):
    change(table_path, lambda data: data["device"].update(runtime="onnxruntime-cpu"))
    path = fps_json(tmp_path / "fps.json", None, 1.0, 1.0)
    change(path, lambda data: data.update(host={"processor": "this desk"}))
    with pytest.raises(StructureMismatchError, match=r"not of one device .processor: 'this desk' and 'Orin'"):
        target_networks(tmp_path, space, LatencyTable.load(table_path), path)
    change(path, lambda data: data.update(host={"processor": "Orin"}))
    assert len(target_networks(tmp_path, space, LatencyTable.load(table_path), path)) == 1


def test_foreign_validations_are_refused(tmp_path, table_path, space):
    table = LatencyTable.load(table_path)
    with pytest.raises(MdpError, match=r"of plan abc, but .*plan\.json does not exist"):
        target_networks(tmp_path, space, table, fps_json(tmp_path / "a.json", "abc", 1, 1))
    with pytest.raises(StructureMismatchError, match="is of float16, the latency table of float32"):
        target_networks(tmp_path, space, table, fps_json(tmp_path / "b.json", None, 1, 1, precision="float16"))
    damaged = fps_json(tmp_path / "c.json", None, 1, 1)
    change(damaged, lambda data: data["latency"].pop("head_p50_ms"))
    with pytest.raises(FileFormatError, match=r"c\.json is damaged"):
        target_networks(tmp_path, space, table, damaged)
    assert not (tmp_path / "target_whole_latency.json").exists()


def test_options_without_a_table_are_refused(tmp_path, settings):
    job = PruneJob(None, settings, tmp_path, target_latency=tmp_path / "fps.json")
    with pytest.raises(MdpError, match="--target-latency needs the latency table of the target"):
        job._target_table(None)
    with pytest.raises(MdpError, match=r"prune\.precision = 'int8' must be 'float32' or 'float16'"):
        PruneSettings.from_config({"precision": "int8"})


def test_table_of_this_machine_is_measured_on(tmp_path, space, settings, monkeypatch):
    """Its entries join the work directory's table, newer ones win, and no target is set."""
    here = FakeBackend(processor="here")
    monkeypatch.setattr("mdp_mmdet3d.runner.job.OnnxRuntimeBackend", lambda: here)
    given = tmp_path / "given.json"
    measure_latency(space, here, given, progress=False)
    job = PruneJob(None, settings, tmp_path / "w", console=Console(quiet=True), latency_table=given)
    job.work_dir.mkdir()
    assert job._target_table(space) is None
    assert len(LatencyTable.load(tmp_path / "w" / "latency_table.json")) == len(LatencyTable.load(given))
    with pytest.raises(MdpError, match="is of this machine"):
        PruneJob(None, settings, tmp_path / "w", latency_table=given, target_latency=given)._target_table(space)
    elsewhere = tmp_path / "orin.json"
    measure_latency(space, FakeBackend(processor="Orin"), elsewhere, progress=False)
    found = PruneJob(None, settings, tmp_path / "w", console=Console(quiet=True), latency_table=elsewhere)
    assert found._target_table(space).device.processor == "Orin"
    assert LatencyTable.load(tmp_path / "w" / "latency_table.json").device.processor == "here"


@pytest.mark.slow
def test_whole_line_for_a_target(tmp_path, tiny_job_config, monkeypatch, capsys):
    config = tiny_job_config
    settings = PruneSettings.from_config({**config.prune, "budget": 0.5})
    space_of = {}
    original = PruneJob._target_table

    def with_table(job, space):
        space_of["space"] = space
        if not job.latency_table.exists():
            measure_latency(space, FakeBackend(processor="Orin"), job.latency_table, progress=False)
        return original(job, space)

    def measured_here(*_, **__):
        raise AssertionError("something was measured on this machine")

    monkeypatch.setattr(PruneJob, "_target_table", with_table)
    monkeypatch.setattr("mdp_mmdet3d.runner.steps.measure_interleaved", measured_here)
    monkeypatch.setattr("mdp_mmdet3d.runner.job.measure_latency", measured_here)
    monkeypatch.setattr("mdp_mmdet3d.runner.optimise.measure_latency", measured_here)
    table_path = tmp_path / "orin.json"

    def prune(**options):
        return PruneJob(config, settings, tmp_path / "w", None, Console(quiet=True), table_path, **options).run()

    report = prune()
    space, table = space_of["space"], LatencyTable.load(table_path)
    assert not report["measured_end_to_end"] and report["speedup"] is None
    assert report["dense"]["latency_ms"] is None and report["pruned"]["latency_ms"] is None
    assert report["device"]["processor"] == "Orin" == report["latency_table"]["device"]["processor"]
    assert (
        report["pruned"]["predicted_ms"] <= report["budget_ms"] == pytest.approx(0.5 * report["dense"]["predicted_ms"])
    )
    plan = PruningPlan.load(tmp_path / "w" / "plan.json")
    assert plan.info["latency_table"]["sha256"] == report["latency_table"]["sha256"]
    used = entries_of(space, plan.widths(space), set(plan.removed))
    lacking = [[s.key, list(w)] for s, w in used if table.get(s, w) is None]
    assert sorted(lacking) == sorted([e["operator"], e["widths"]] for e in report["interpolated"])
    assert not (tmp_path / "w" / "latency_table.json").exists()
    assert not (tmp_path / "w" / "whole_latency.json").exists()

    console = Console(soft_wrap=True)
    print_summary(report, console)
    print_target_steps(report, "CONFIG", tmp_path / "w", console)
    out = capsys.readouterr().out
    for text in ("Orin", "prediction", "mdp_runtime.pyz validate_fps", *(["--lacking"] if lacking else [])):
        assert text in out

    assert prune()["plan_hash"] == report["plan_hash"]
    sums = target_model(space, table, [])
    twice = [
        [2 * sums.predict_engines(*structure)[engine] for engine in ("image_encoder", "head")]
        for structure in ((plan.widths(space), set(plan.removed)), ({}, ()))
    ]
    corrected = prune(target_latency=fps_json(tmp_path / "fps.json", report["plan_hash"], *twice[0], dense=twice[1]))
    assert corrected["fitted_networks"] == 2
    assert corrected["dense"]["predicted_ms"] == pytest.approx(2 * report["dense"]["predicted_ms"])
    assert corrected["plan_hash"] == report["plan_hash"]


def test_one_disturbed_measurement_does_not_spoil_the_fit(tmp_path, table_path, space, monkeypatch):
    from mdp_mmdet3d.runner.optimise import PlanSearch

    monkeypatch.setattr(PlanSearch, "plan", lambda self: PruningPlan.from_kept(space, {}, set()))
    model = target_model(space, LatencyTable.load(table_path), [])
    search = PlanSearch(space, None, model, None, table_path, 1.0, 1.0, Console(quiet=True))
    once = model.predict_engines({}, ())
    for factor, expected in ((1.05, 1.05), (1.01, 1.03), (1.5, 1.05), (1.02, 1.035)):
        search.correct({engine: factor * ms for engine, ms in once.items()})
        assert search.dense_predicted_ms == pytest.approx(expected * sum(once.values()))
    assert search.corrections == 4


def test_a_validation_on_another_device_is_refused(tmp_path, table_path, space):
    table = LatencyTable.load(table_path)
    validation = fps_json(tmp_path / "fps.json", None, 1, 1)
    for host, backend, message in (
        ({"processor": "Xeon"}, {}, "processor: 'Xeon' and 'Orin'"),
        ({}, {"device": "Orin", "library": "tensorrt"}, "runtime: 'tensorrt' and 'fake'"),
        ({}, {"threads": 8}, "threads: 8 and 1"),
    ):
        change(validation, lambda data, h=host, b=backend: data.update(host=h, backend=b))
        with pytest.raises(StructureMismatchError, match=f"not of one device.*{message}"):
            target_networks(tmp_path, space, table, validation)
    change(validation, lambda data: data.update(host={"processor": "Orin"}, backend={}))
    assert len(target_networks(tmp_path, space, table, validation)) == 1


@pytest.mark.parametrize("ms", [-4.0, 0.0, float("nan"), float("inf")])
def test_latencies_that_are_none_are_refused(tmp_path, table_path, space, ms):
    with pytest.raises(FileFormatError, match="not a latency"):
        target_networks(tmp_path, space, LatencyTable.load(table_path), fps_json(tmp_path / "f.json", None, ms, 1))


def test_channels_that_cannot_be_priced_are_named_before_anything_is_measured(tiny_model, settings):
    odd = dataclasses.replace(settings.space_options, channel_multiple=7)
    with pytest.raises(MdpError, match=r"may keep 14 channels.*channel_multiple be a multiple of 4"):
        check_interpolable(trace_space(tiny_model, InputShape(6, 64, 192), odd), ONNXRUNTIME_CPU)
    check_interpolable(trace_space(tiny_model, InputShape(6, 64, 192), settings.space_options), ONNXRUNTIME_CPU)


def test_nothing_left_to_prune_is_said(tiny_model, tmp_path):
    settings = PruneSettings(input_size=(64, 192), freeze=("*",))
    adapter = StreamPETRAdapter(Config(), InputShape(6, 64, 192))
    with pytest.raises(MdpError, match="nothing of StreamPETR is left to prune"):
        find_space(adapter, tiny_model, settings, tmp_path / "space.json", print)
