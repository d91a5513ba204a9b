"""A host that does what the node of a release does runs the package and finds PyTorch's boxes."""

from __future__ import annotations

import errno
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from mdp_mmdet3d.errors import DeploymentError, WriteError
from mdp_mmdet3d.onnx.reduce import reduce_precision
from mdp_mmdet3d.runtime.decode import decode
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner
from projects.streampetr.autoware import NodeSettings, node_generation, package, package_autoware
from projects.streampetr.autoware.parameters import all_parameters
from projects.streampetr.autoware.shapes import check_shapes
from projects.streampetr.compare import run_reference
from projects.streampetr.export import export_streampetr, image_transform
from projects.streampetr.normalisation import Convert, conversion

from ..autoware_node import GRAPHS, REQUIRED, TYPES, AutowareHost, flat, parameters
from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE, build_tiny, make_frames
from .test_deployment_export import prune_by_hand


@pytest.fixture(scope="module")
def packages(deployed_model, tmp_path_factory):
    """Deployments for a node that wants BGR statistics and one that wants RGB, and the packages of every release."""
    base = tmp_path_factory.mktemp("autoware")
    for node in ("0.52", "0.53"):
        export_streampetr(deployed_model, base / f"deploy-{node}", class_names=CLASS_NAMES, input_size=INPUT_SIZE,
                          layout="autoware", node=node, weights="random")  # fmt: skip
    for node in REQUIRED:
        source = base / f"deploy-{'0.53' if node == '0.53' else '0.52'}"
        package_autoware(source, base / node, node, NodeSettings(anchor_camera=2))
    return base


@pytest.mark.parametrize("node", REQUIRED)
def test_the_host_of_each_release_finds_the_boxes_of_pytorch(deployed_model, packages, node):
    frames = make_frames(6, reset_at=3)
    host = AutowareHost(packages / node, node, frames[0])
    trained = image_transform(deployed_model.data_preprocessor, INPUT_SIZE, (900, 1600))
    assert trained.channel_order == "RGB"
    rng, memory = np.random.default_rng(0), None
    for index, frame in enumerate(frames):
        if index == 3:
            memory = None
            host.reset()
        pixels = rng.integers(0, 256, (6, *INPUT_SIZE, 3), dtype=np.uint8)
        img = ((pixels - np.array(trained.mean)) / np.array(trained.std)).astype(np.float32).transpose(0, 3, 1, 2)
        # Any global frame will do; near its origin float32 is fine.
        near = frame.ego_pose.copy()
        near[:3, 3] -= frames[3 * (index // 3)].ego_pose[:3, 3]
        with torch.no_grad():
            queries, memory = run_reference(deployed_model, replace(frame, img=img, ego_pose=near), memory)
        expected = decode(queries.logits, queries.boxes, max_detections=queries.logits.size,
                          post_center_range=(-1e9,) * 3 + (1e9,) * 3)  # fmt: skip
        yaw = expected.boxes[:, 6:7]
        rows = np.concatenate([expected.boxes[:, :6], np.sin(yaw), np.cos(yaw), expected.boxes[:, 7:]], axis=1)
        for label, score, box in host.boxes(*host.run(pixels, frame)):
            same = expected.labels == label
            gaps = np.abs(rows[same] - box).max(axis=1)
            assert gaps.min() < 5e-3
            assert abs(expected.scores[same][gaps.argmin()] - score) < 1e-3


@pytest.mark.parametrize("node", REQUIRED)
def test_every_key_that_a_release_declares_is_there_and_of_its_type(packages, node):
    folder = packages / node
    assert {path.name for path in folder.iterdir()} == {*GRAPHS, *REQUIRED[node], "streampetr.launch.xml", "README.md"}
    values = {}
    for file, tree in REQUIRED[node].items():
        found, expected = dict(flat(parameters(folder, file))), dict(flat(tree))
        assert found.keys() == expected.keys()
        values |= found
        for key, kind in expected.items():
            items = found[key] if kind.isupper() else [found[key]]
            assert isinstance(items, list) and {type(item) for item in items} == {TYPES[kind]}, key
    model = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("model_params")}
    assert (model["num_proposals"], model["pre_memory_length"], model["post_memory_length"]) == (76, 64, 80)
    assert (model["rois_number"], model["input_image_height"], model["input_image_width"]) == (6, 64, 176)
    assert model["class_names"][0] == "CAR" and len(model["detection_range"]) == 6
    assert {model[key].rpartition("/")[2] for key in model if key.endswith("_path") and model[key]} == GRAPHS
    assert values["post_process_params.yaw_norm_thresholds"][CLASS_NAMES.index("pedestrian")] == 0.0
    assert values["anchor_camera_id"] == 2


@pytest.mark.parametrize("node", REQUIRED)
def test_the_launch_file_names_all_cameras_and_the_package(packages, node):
    root = ElementTree.parse(packages / node / "streampetr.launch.xml").getroot()
    arguments = {item.get("name"): item.get("default") for item in root.findall("arg")}
    assert arguments["model_path"] == "$(dirname)"
    started = root.find("node")
    files = [item.get("from") for item in started.findall("param") if item.get("from")]
    assert files == [f"$(var model_path)/{file}" for file in REQUIRED[node]]
    remaps = {item.get("from"): item.get("to") for item in started.findall("remap")}
    for slot in range(6):
        assert remaps[f"~/input/camera{slot}/image"] == f"$(var camera{slot}_image)"
        assert remaps[f"~/input/camera{slot}/image/compressed"] == f"$(var camera{slot}_image)/compressed"
        assert remaps[f"~/input/camera{slot}/camera_info"] == f"$(var camera{slot}_info)"
    used = {text.split(")")[0] for item in started.iter() for value in item.attrib.values()
            for text in value.split("$(var ")[1:]}  # fmt: skip
    assert used <= arguments.keys() and len(remaps) == 18


def test_a_range_of_integers_becomes_floats(packages):
    manifest = DeploymentManifest.load(packages / "deploy-0.53")
    manifest = replace(manifest, post_center_range=(-61, -61, -10, 61, 61, 10))
    found = all_parameters(manifest, NodeSettings(iou_nms_threshold=0), node_generation("0.53"))
    assert {type(value) for value in found["model_params.detection_range"]} == {float}
    assert type(found["post_process_params.iou_nms_threshold"]) is float


def test_the_readme_tells_what_the_parameters_cannot(packages):
    old, new = ((packages / node / "README.md").read_text() for node in ("0.49", "0.53"))
    assert "0.49 and 0.50" in old and "must publish **rgb8**" in old and "rgb8 or bgr8" in new
    assert "construction_vehicle become UNKNOWN" in new and "0. CAM_FRONT" in new


def test_releases_and_unknown_ones():
    assert node_generation("0.50.2").name == "0.49" and node_generation("0.53.0").name == "0.53"
    for release in ("0.47", "0.54", "newest", ""):
        with pytest.raises(
            DeploymentError, match=r"not known: this version packages for 0.48, 0.49, 0.50, 0.51, 0.52, 0.53"
        ):
            node_generation(release)


def test_what_the_node_cannot_run_is_refused(packages, deployed_model, tiny_deployment, tmp_path):
    deployment, out = packages / "deploy-0.52", tmp_path / "out"
    for source, node, settings, message in (
        (tiny_deployment, "0.52", NodeSettings(), "--layout autoware"),
        (deployment, "0.52", NodeSettings(precision="int8"), "int8"),
        (deployment, "0.52", NodeSettings(anchor_camera=6), "none of the 6 cameras"),
        (deployment, "0.53", NodeSettings(), r"BGR|no parameter of it changes that: export .* --node 0.53"),
        (deployment, "0.44", NodeSettings(), "0.44"),
    ):
        with pytest.raises(DeploymentError, match=message):
            package_autoware(source, out, node, settings)
    with pytest.raises(DeploymentError, match="not empty"):
        package_autoware(deployment, packages / "0.52", "0.52")
    for options, message in (
        ({"node": "0.53"}, "layout"),
        ({"layout": "autoware", "node": "2"}, "'2' is not known"),
        ({"layout": "autoware", "node": "0.52", "camera_encoding": "yuv422"}, "yuv422"),
    ):
        with pytest.raises(DeploymentError, match=message):
            export_streampetr(deployed_model, out, class_names=CLASS_NAMES, input_size=INPUT_SIZE, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rois_number", 5, "image_encoder.img holds"),
        ("num_proposals", 77, "all_cls_scores holds 760"),
        ("pre_memory_length", 60, "pre_memory_timestamp"),
        ("class_names", ["CAR"], "all_cls_scores"),
        ("detection_range", [0.0], "six numbers"),
    ],
)
def test_parameters_of_another_model_are_refused(packages, key, value, message):
    manifest = DeploymentManifest.load(packages / "deploy-0.53")
    graphs = {n: onnx.load(str(packages / "deploy-0.53" / s.file)) for n, s in manifest.engines.items()}
    found = all_parameters(manifest, NodeSettings(), node_generation("0.53"))
    check_shapes(graphs, found)
    with pytest.raises(DeploymentError, match=message):
        check_shapes(graphs, {**found, f"model_params.{key}": value})


@pytest.mark.parametrize("value", [2.0, -1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(value):
    with pytest.raises(DeploymentError, match=f"confidence_threshold={value} must be 0 to 1"):
        NodeSettings(confidence_threshold=value).check(6)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("node", ["0.52", "0.53"])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_the_first_layer_gives_what_the_model_was_trained_with(deployed_model, order, node, encoding):
    trained = image_transform(deployed_model.data_preprocessor, INPUT_SIZE, (900, 1600))
    if order == "BGR":
        trained = replace(trained, channel_order="BGR", mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0))
    rgb = np.random.default_rng(0).integers(0, 256, (1, 6, 3, 8, 8)).astype(np.float64)
    statistics = np.array([[103.53, 116.28, 123.675], [57.375, 57.12, 58.395]])
    sent = rgb if node == "0.53" or encoding == "rgb8" else rgb[:, :, ::-1]
    mean, std = (row.reshape(1, 1, 3, 1, 1) for row in (statistics[:, ::-1] if node == "0.53" else statistics))
    fed = torch.from_numpy(((sent - mean) / std).astype(np.float32))
    own = rgb if order == "RGB" else rgb[:, :, ::-1]
    expected = (own - np.reshape(trained.mean, (3, 1, 1))) / np.reshape(trained.std, (3, 1, 1))
    affine = conversion(node_generation(node).normalised(trained, encoding), trained)
    found = fed if affine is None else Convert(affine)(fed)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * np.abs(expected).max())
    assert (affine is None) == (order == "RGB" and node == "0.53")


def test_pruned_attention_of_unequal_heads_is_padded_where_the_node_builds_float16(tmp_path):
    model = prune_by_hand(build_tiny(seed=2))
    export_streampetr(model, tmp_path / "deploy", class_names=CLASS_NAMES, input_size=INPUT_SIZE, layout="autoware",
                      node="0.53")  # fmt: skip
    frame = make_frames(1)[0]
    pixels = np.random.default_rng(0).integers(0, 256, (6, *INPUT_SIZE, 3), dtype=np.uint8)
    found = {}
    for precision in ("fp16", "fp32"):
        out = tmp_path / precision
        package_autoware(tmp_path / "deploy", out, "0.53", NodeSettings(precision))
        host = AutowareHost(out, "0.53", frame)
        found[precision] = host.boxes(*host.run(pixels, frame))
        shapes = [tuple(t.dims) for t in onnx.load(str(out / "simplify_pts_head_memory.onnx")).graph.initializer]
        assert (shapes != [tuple(t.dims) for t in onnx.load(str(tmp_path / "deploy/head.onnx")).graph.initializer]) == (
            precision == "fp16"
        )
        text = (out / "README.md").read_text()
        assert ("heads padded with zeros" in text) == (precision == "fp16")
    for (label, score, box), (other_label, other_score, other_box) in zip(found["fp16"], found["fp32"]):
        assert label == other_label and score == pytest.approx(other_score, abs=1e-4)
        np.testing.assert_allclose(box, other_box, atol=1e-3)


def test_an_encoder_of_one_camera_is_packaged_only_where_it_is_asked_for(packages, deployed_model, tmp_path):
    """It gives, image by image, the features of the encoder of all; the runtime gets the same boxes from both."""
    source = tmp_path / "deploy"
    export_streampetr(deployed_model, source, class_names=CLASS_NAMES, input_size=INPUT_SIZE, layout="autoware",
                      node="0.53", encoder_batch=1)  # fmt: skip
    with pytest.raises(DeploymentError, match=r"takes 1 of 6 images at a time, asked for is 6: .*--encoder-batch"):
        package_autoware(source, tmp_path / "out", "0.53")
    with pytest.raises(DeploymentError, match="takes 6 of 6 images at a time, asked for is 1"):
        package_autoware(packages / "deploy-0.53", tmp_path / "out", "0.53", NodeSettings(encoder_batch=1))
    with pytest.raises(DeploymentError, match="takes 1 image or all 6"):
        export_streampetr(deployed_model, tmp_path / "out", class_names=CLASS_NAMES, input_size=INPUT_SIZE,
                          encoder_batch=2)  # fmt: skip
    assert not (tmp_path / "out").exists()
    package_autoware(source, tmp_path / "out", "0.53", NodeSettings(encoder_batch=1))
    assert "**One camera per run**" in (tmp_path / "out" / "README.md").read_text()
    assert "All cameras in one run" in (packages / "0.53" / "README.md").read_text()

    frames = make_frames(3)
    one, all_cameras = (
        ort.InferenceSession(str(folder / "simplify_extract_img_feat.onnx"), providers=["CPUExecutionProvider"])
        for folder in (tmp_path / "out", packages / "0.53")
    )
    assert one.get_inputs()[0].shape == [1, 1, 3, *INPUT_SIZE]
    images = frames[0].img[None]
    expected = all_cameras.run(None, {"img": images})[0]
    found = np.concatenate([one.run(None, {"img": images[:, i : i + 1]})[0] for i in range(6)], axis=1)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

    assert DeploymentManifest.load(source).encoder_batch == 1
    runners = StreamRunner(source), StreamRunner(packages / "deploy-0.53")
    for frame in frames:
        ours, theirs = (runner.run(frame) for runner in runners)
        assert np.abs(ours.cls_scores - theirs.cls_scores).max() < 1e-3
    with pytest.raises(DeploymentError, match="the model has 6 cameras"):
        runners[0].run(replace(frames[2], img=frames[2].img[:5], timestamp=frames[2].timestamp + 1))
    with pytest.raises(DeploymentError, match="int8 needs at least"):
        reduce_precision(source, tmp_path / "int8", "int8", frames[:1])


def test_a_package_that_cannot_be_written_is_not_there(packages, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(package, "readme", full)
        with pytest.raises(WriteError, match=r"cannot write .*package: No space left on device"):
            package_autoware(packages / "deploy-0.53", tmp_path / "package", "0.53")
    assert not list(tmp_path.iterdir())
    assert len(package_autoware(packages / "deploy-0.53", tmp_path / "package", "0.53")) == 7
