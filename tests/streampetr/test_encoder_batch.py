"""An image encoder of one camera as a pruning target: priced per run, counted once per camera."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from mmengine.config import Config

from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.latency.backends.fake import FakeBackend
from mdp_mmdet3d.latency.coverage import coverage
from mdp_mmdet3d.latency.measure import measure_latency
from mdp_mmdet3d.latency.predict import LatencyModel, MeasuredNetwork
from mdp_mmdet3d.latency.structures import fit_structures, random_structure
from mdp_mmdet3d.operators.call import CALL_KINDS
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.runner.steps import export_model, frame_engine_files
from mdp_mmdet3d.runner.target import target_model
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.space.builder import InputShape
from mdp_mmdet3d.space.types import PruningSpace
from projects.streampetr.vovnet import SPECS, VoVNetSpec

from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE, tiny_config


def adapter(batch):
    config = Config({"model": tiny_config(), "class_names": CLASS_NAMES})
    return adapter_of(config, InputShape(0, *INPUT_SIZE, batch))


@pytest.fixture(scope="module")
def spaces(deployed_model):
    return {batch: adapter(batch).trace(deployed_model) for batch in (0, 1)}


def test_terms_are_those_of_one_image_and_count_six_times(spaces, tmp_path):
    whole, single = spaces[0], spaces[1]
    assert (single.runs("image_encoder"), single.runs("head"), whole.runs("image_encoder")) == (6, 1, 1)
    for ours, theirs in zip(whole.terms, single.terms, strict=True):
        expected = replace(ours, signature=theirs.signature)
        assert expected == theirs
        attributes = dict(ours.signature.attributes)
        if ours.engine == "image_encoder":
            assert (attributes.pop("batch"), theirs.signature["batch"]) == (6, 1)
        assert attributes.items() <= dict(theirs.signature.attributes).items()
    single.save(tmp_path / "space.json")
    assert PruningSpace.load(tmp_path / "space.json") == single
    assert single.hash != whole.hash and "runs 6 times per frame" in single.describe()
    assert "times per frame" not in whole.describe()


def test_predictions_count_every_run(spaces, tmp_path):
    space = spaces[1]
    table = measure_latency(space, FakeBackend(), tmp_path / "table.json", policy="sparse", progress=False)
    model = target_model(space, table, [])  # sums of operators
    once = LatencyModel(replace(space, repeated=()), table, model.fixed_ms, model.scale)
    structure = random_structure(space, 3, skew=True)
    found, single = (m.predict_engines(structure.widths, structure.removed) for m in (model, once))
    assert found["image_encoder"] == pytest.approx(6 * single["image_encoder"]) and found["image_encoder"] > 0
    assert found["head"] == pytest.approx(single["head"])
    for term in space.frame_terms():
        ours, theirs = (m.cost_array(term)[0] for m in (model, once))
        assert ours == pytest.approx(theirs * (6 if term.engine == "image_encoder" else 1))
    covered, covered_once = ({c.engine: c.priced_ms for c in coverage(m)} for m in (model, once))
    assert covered["image_encoder"] == pytest.approx(6 * covered_once["image_encoder"])
    # Whole networks hold six runs: a fit of what the operators say has scale 1.
    networks = [
        MeasuredNetwork(s.widths, s.removed, model.predict_engines(s.widths, s.removed))
        for s in fit_structures(space, 4)
    ]
    assert LatencyModel.fit(space, table, networks).scale == pytest.approx({"image_encoder": 1, "head": 1})


def test_the_deployment_is_one_of_one_camera_and_an_other_is_not_reused(deployed_model, tmp_path):
    said = []
    for batch in (0, 1, 1):
        export_model(adapter(batch), deployed_model, tmp_path / "dense", None, "random", said.append)
    assert [line.split(" ")[0] for line in said] == ["exported", "exported", "reused:"]
    manifest = DeploymentManifest.load(tmp_path / "dense")
    assert manifest.encoder_batch == 1
    files = [path.name for path in frame_engine_files(tmp_path / "dense", ("position_embedding",))]
    assert files == ["image_encoder.onnx"] * 6 + ["head.onnx"]


def test_what_has_no_encoder_of_one_camera_is_refused():
    with pytest.raises(MdpError, match=r"encoder_batch = 2 must be 1 or all 6"):
        adapter(2)
    with pytest.raises(MdpError, match=r"encoder_batch = 2 is for a streaming model"):
        SingleGraph(Config({}), InputShape(3, 64, 64, 2))
    assert PruneSettings.from_config({"encoder_batch": 1}).input_shape.encoder_batch == 1


def test_gates_and_poolings_of_a_vovnet_are_those_of_one_image(monkeypatch):
    monkeypatch.setitem(SPECS, "small", VoVNetSpec((8, 8, 8), (8, 8, 8, 8), (16, 16, 16, 16), (1, 1, 1, 1), 2))
    model = tiny_config()
    model["img_backbone"] = {"type": "VoVNet", "spec_name": "small"}
    model["img_neck"]["in_channels"] = [16, 16]
    config = Config({"model": model, "class_names": CLASS_NAMES})
    streaming = adapter_of(config, InputShape(0, *INPUT_SIZE, 1))
    space = streaming.trace(streaming.build(None)[0])
    calls = [json.loads(t.signature["call"]) for t in space.frame_terms() if t.signature.kind in CALL_KINDS]
    shapes = [a["input"] for call in calls for a in call["arguments"] if isinstance(a, dict) and "input" in a]
    assert shapes and {shape[0] for shape in shapes} == {1}
