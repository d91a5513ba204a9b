from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.onnx.export import export_onnx
from mdp_mmdet3d.onnx.initializers import check_initializers
from mdp_mmdet3d.onnx.lint import lint_onnx
from mdp_mmdet3d.runtime.decode import last_level
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner
from projects.streampetr import MemoryState
from projects.streampetr.compare import compare_stream, host_memory, run_reference
from projects.streampetr.export import export_streampetr

from ..numerics import COLUMNS, EPS, NETWORK, UNDECIDED, assert_close, assert_decided, assert_same_memory
from ..tiny_deployment import CLASS_NAMES, INPUT_SIZE, build_tiny

EXPORT = {"class_names": CLASS_NAMES, "input_size": INPUT_SIZE}
ENGINES = ("image_encoder", "position_embedding", "head")


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def prune_by_hand(model):
    """Odd widths, a removed layer and removed sub-layers, as surgery leaves them."""
    from projects.streampetr.attention import MultiheadAttention

    block = model.img_backbone.layer3[1]
    block.conv1 = nn.Conv2d(block.conv1.in_channels, 23, 3, padding=1, bias=False)
    block.norm1.weight = nn.Parameter(torch.ones(23), requires_grad=False)
    block.norm1.bias = nn.Parameter(torch.zeros(23), requires_grad=False)
    block.norm1.running_mean, block.norm1.running_var = torch.zeros(23), torch.ones(23)
    block.norm1.num_features = 23
    block.conv2 = nn.Conv2d(23, block.conv2.out_channels, 3, padding=1, bias=False)
    decoder = model.pts_bbox_head.transformer["decoder"]
    decoder.layers[1] = nn.Identity()
    decoder.layers[0].attentions[0] = nn.Identity()
    decoder.layers[0].attentions[1].attn = MultiheadAttention(256, 3, qk_head_dim=20, v_head_dim=12, scale=32**-0.5)
    decoder.layers[2].ffns[0].layers[0][0] = nn.Linear(256, 77)
    decoder.layers[2].ffns[0].layers[1] = nn.Linear(77, 256)
    model.pts_bbox_head.position_encoder = nn.Sequential(nn.Linear(192, 50), nn.ReLU(), nn.Linear(50, 256))
    return model.eval()


def test_names_and_shapes_of_the_contract(tiny_deployment):
    manifest = DeploymentManifest.load(tiny_deployment)
    signature = {
        name: ({s.name: s.shape for s in engine.inputs}, {s.name: s.shape for s in engine.outputs})
        for name, engine in manifest.engines.items()
    }
    memory = {"embedding": (256,), "reference_point": (3,), "timestamp": (1,), "egopose": (4, 4), "velo": (2,)}
    assert signature == {
        "image_encoder": ({"img": (1, 6, 3, 64, 176)}, {"img_feats": (1, 6, 256, 4, 11)}),
        "position_embedding": (
            {"img_metas_pad": (3,), "intrinsics": (1, 6, 4, 4), "img2lidar": (1, 6, 4, 4)},
            {"pos_embed": (1, 264, 256), "cone": (1, 264, 8)},
        ),
        "head": (
            {
                "x": (1, 6, 256, 4, 11),
                "pos_embed": (1, 264, 256),
                "cone": (1, 264, 8),
                "data_ego_pose": (1, 4, 4),
                "data_ego_pose_inv": (1, 4, 4),
                **{f"pre_memory_{key}": (1, 64, *dims) for key, dims in memory.items()},
            },
            {
                "all_cls_scores": (1, 1, 76, 10),
                "all_bbox_preds": (1, 1, 76, 10),
                **{f"post_memory_{key}": (1, 80, *dims) for key, dims in memory.items()},
            },
        ),
    }
    assert {s.dtype for engine in manifest.engines.values() for s in (*engine.inputs, *engine.outputs)} == {"float32"}
    assert (manifest.memory.pre_length, manifest.memory.post_length, manifest.memory.num_propagated) == (64, 80, 16)
    assert (manifest.levels, manifest.num_queries, manifest.weights, manifest.plan_hash) == (1, 76, "random", None)


def test_manifest_describes_the_images(tiny_deployment):
    image = DeploymentManifest.load(tiny_deployment).image
    assert (image.source_size, image.resized_size, image.crop_offset, image.size) == (
        (900, 1600),
        (99, 176),
        (35, 0),
        (64, 176),
    )
    assert image.channel_order == "RGB"
    np.testing.assert_allclose(image.mean, [123.675, 116.28, 103.53], rtol=1e-6)


@pytest.mark.parametrize("name", ENGINES)
def test_graphs_are_clean(tiny_deployment, name):
    graph = onnx.load(tiny_deployment / f"{name}.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert lint_onnx(graph) == []
    assert not [node.name for node in graph.graph.node if node.op_type == "BatchNormalization"]


def test_every_weight_is_in_a_graph(tiny_deployment, deployed_model):
    shapes = shapes_of(deployed_model)
    compared = set.union(*(check_initializers(tiny_deployment / f"{name}.onnx", shapes) for name in ENGINES))
    rest = {key for key, shape in shapes.items() if len(shape) > 1} - compared
    aliases = {key for key in rest if ".cls_branches." in key or ".reg_branches." in key}
    assert rest - aliases == {
        "pts_bbox_head.reference_points.weight",
        "pts_bbox_head.pseudo_reference_points.weight",
    }


def assert_streams_equal(model, folder, frames):
    """Engine by engine and as a whole, up to rounding; logits are below 16, coordinates below 64 metres."""
    runner = StreamRunner(folder)
    forced = compare_stream(model, runner, frames)
    assert len(forced.logits) == len(forced.boxes) == len(forced.memory) == len(frames)
    assert forced.max_logits < NETWORK * EPS * 16
    assert max(forced.max_boxes, forced.max_memory) < NETWORK * EPS * 64
    assert sum(forced.near_ties) <= UNDECIDED * 16 * len(frames)
    assert_clear_choices(model, runner, frames)
    free = compare_stream(model, runner, frames, "free_running")
    assert free.max_logits < NETWORK * EPS * 16
    assert free.max_boxes < NETWORK * EPS * 64


def assert_clear_choices(model, runner, frames):
    """Without near-ties at the end of the memory's choice a free-running stream is the same on every device."""
    memory = scene = None
    for frame in frames:
        with torch.no_grad():
            queries, memory = run_reference(model, frame, memory if frame.scene_token == scene else None)
        scene = frame.scene_token
        output = runner.run(frame)
        manifest = runner.manifest
        found = last_level(output.cls_scores, output.bbox_preds, manifest.layout, manifest.num_queries)[0]
        assert_decided(found, queries.logits, [16], aligned=60)


@pytest.mark.numerics
def test_stream_equals_pytorch(tiny_deployment, deployed_model, stream):
    assert_streams_equal(deployed_model, tiny_deployment, stream)


@pytest.mark.numerics
def test_comparison_notices_another_model(tiny_deployment, stream):
    assert compare_stream(build_tiny(seed=1), tiny_deployment, stream[:1]).max_logits > 1e-2


@pytest.mark.numerics
def test_memory_after_a_frame_equals_pytorch(tiny_deployment, deployed_model, stream):
    """In global coordinates, which `compare_stream` avoids."""
    runner = StreamRunner(tiny_deployment)
    with torch.no_grad():
        _, before = run_reference(deployed_model, stream[0], None)
        queries, after = run_reference(deployed_model, stream[1], before)
    runner.run(stream[0])
    runner.memory = host_memory(before)
    output = runner.run(stream[1])
    memory = runner.memory
    found = MemoryState(
        embedding=memory.embedding,
        reference_point=memory.reference_point @ memory.anchor[:3, :3].T + memory.anchor[:3, 3],
        timestamp=memory.clock,
        egopose=memory.anchor @ memory.egopose,
        velo=memory.velo,
    )
    assert_same_memory(found, after, output.cls_scores[-1], queries.logits[None], 16)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    model = prune_by_hand(build_tiny(seed=2))
    folder = tmp_path_factory.mktemp("pruned") / "deploy"
    export_streampetr(model, folder, **EXPORT, plan_hash="abc", layout="autoware", levels="all")
    return model, folder


@pytest.mark.numerics
def test_pruned_model_streams_like_pytorch(pruned, stream):
    assert_streams_equal(*pruned, stream)


def test_pruned_engines_have_the_pruned_shapes(pruned, deployed_model):
    model, folder = pruned
    compared = set.union(*(check_initializers(folder / f"{name}.onnx", shapes_of(model)) for name in ENGINES))
    assert "img_backbone.layer3.1.conv1.weight" in compared
    assert "pts_bbox_head.transformer.decoder.layers.0.attentions.1.attn.in_proj_weight" in compared
    with pytest.raises(DeploymentError, match=r"layer3\.1\.conv1"):
        check_initializers(folder / "image_encoder.onnx", shapes_of(deployed_model))
    with pytest.raises(DeploymentError, match="state dict"):
        check_initializers(folder / "head.onnx", shapes_of(deployed_model))


@pytest.mark.numerics
def test_autoware_layout_of_all_levels(pruned, stream):
    model, folder = pruned
    manifest = DeploymentManifest.load(folder)
    assert (manifest.layout, manifest.levels, manifest.plan_hash) == ("autoware", 2, "abc")
    output = StreamRunner(folder).run(stream[0])
    assert output.cls_scores.shape == output.bbox_preds.shape == (1, 10, 2 * 76)
    from projects.streampetr import FrameInputs

    frame = stream[0]
    with torch.no_grad():
        expected, _ = model.run_frame(
            model.extract_img_feat(torch.from_numpy(frame.img)[None]),
            FrameInputs(
                pad_hw=INPUT_SIZE,
                intrinsics=torch.from_numpy(frame.intrinsics)[None].float(),
                img2lidar=torch.from_numpy(np.linalg.inv(frame.lidar2img))[None].float(),
                ego_pose=torch.from_numpy(frame.ego_pose)[None].float(),
                ego_pose_inv=torch.from_numpy(np.linalg.inv(frame.ego_pose))[None].float(),
                timestamp=torch.tensor([frame.timestamp], dtype=torch.float64),
                prev_exists=torch.zeros(1),
            ),
            None,
        )
    for level in range(2):
        columns = slice(76 * level, 76 * (level + 1))
        assert_close(output.cls_scores[0, :, columns].T, expected.all_cls_scores[level, 0])
        assert_close(output.bbox_preds[0, :, columns].T, expected.all_bbox_preds[level, 0], COLUMNS, columns=True)


def test_initial_memory_json_equals_the_npz(tiny_deployment):
    points = DeploymentManifest.load(tiny_deployment).pseudo_reference_points(tiny_deployment)
    data = json.loads((tiny_deployment / "init_memory.json").read_text())
    np.testing.assert_array_equal(np.array(data["pseudo_reference_points"], np.float32), points)


def test_export_is_reproducible(deployed_model, tiny_deployment, tmp_path):
    again = export_streampetr(deployed_model, tmp_path / "again", **EXPORT)
    assert again.checksums == DeploymentManifest.load(tiny_deployment).checksums


def test_export_leaves_mode_and_stream_of_the_model_alone(tmp_path):
    model = build_tiny()
    model.train()
    model.memory = marker = object()
    export_streampetr(model, tmp_path / "out", **EXPORT)
    assert model.training and model.memory is marker
    assert not model.img_backbone.bn1.training


def test_interrupted_export_leaves_nothing_or_the_old_one(deployed_model, tiny_deployment, tmp_path):
    class StopError(Exception):
        pass

    def stop_at_head(engine):
        if engine == "head":
            raise StopError

    out = tmp_path / "out"
    with pytest.raises(StopError):
        export_streampetr(deployed_model, out, **EXPORT, on_engine=stop_at_head)
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(tiny_deployment, out)
    with pytest.raises(StopError):
        export_streampetr(deployed_model, out, **EXPORT, weights="second", on_engine=stop_at_head)
    assert DeploymentManifest.load(out).weights == "random"
    export_streampetr(deployed_model, out, **EXPORT, weights="second")
    assert DeploymentManifest.load(out).weights == "second"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_with_other_things_is_not_replaced(deployed_model, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(DeploymentError, match="no deployment folder"):
        export_streampetr(deployed_model, tmp_path, **EXPORT)
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("car",)}, "1 class names for a head of 10"),
        ({"input_size": (64, 170)}, "multiples of 16"),
        ({"layout": "channels"}, "layout='channels'"),
        ({"levels": "first"}, "levels='first'"),
    ],
)
def test_wrong_arguments_are_refused(deployed_model, tmp_path, change, message):
    with pytest.raises(DeploymentError, match=message):
        export_streampetr(deployed_model, tmp_path / "out", **{**EXPORT, **change})
    assert list(tmp_path.iterdir()) == []


def test_half_precision_model_is_refused(tmp_path):
    with pytest.raises(DeploymentError, match=r"float16.*float32 model"):
        export_streampetr(build_tiny().half(), tmp_path / "out", **EXPORT)


class Masked(nn.Module):
    def forward(self, x):
        return x[x > 0]


class UsesOne(nn.Module):
    def forward(self, x, y):
        return x + 1


class Double(nn.Module):
    def forward(self, x):
        return x.double().sin().float()


class Inverse(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x)


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Masked(), ("x",), "NonZero|data-dependent"),
        (UsesOne(), ("x", "y"), r"does not depend on its inputs \['y'\]"),
        (Double(), ("x",), "float64"),
        (Inverse(), ("x",), r"g\.onnx"),
    ],
)
def test_modules_that_must_not_be_deployed_are_refused(tmp_path, module, inputs, message):
    with pytest.raises(DeploymentError, match=message):
        export_onnx(module, {name: torch.rand(3, 3) for name in inputs}, ["out"], tmp_path / "g.onnx")
