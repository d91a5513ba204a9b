"""Pruned models of other families through the public entries of MMDetection, MMPretrain and MMDetection3D."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mdp_mmdet3d.adapters import Adapter, InputShape, adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.runner.outputs import new_pruned_model
from mdp_mmdet3d.space.builder import SpaceOptions
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VOXEL = [0.78125, 0.78125, 8]
FAMILIES = {
    "retinanet/retinanet_r50_mdp.py": {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": 16,
        "model.backbone.stem_channels": 16,
        "model.neck.in_channels": [16, 32, 64, 128],
        "model.neck.out_channels": 32,
        "model.bbox_head.in_channels": 32,
        "model.bbox_head.feat_channels": 32,
    },
    "resnet/resnet50_mdp.py": {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": 16,
        "model.backbone.stem_channels": 16,
        "model.head.in_channels": 128,
    },
    "pointpillars/pointpillars_secfpn_nus_mdp.py": {
        "model.data_preprocessor.voxel_layer.voxel_size": VOXEL,
        "model.pts_voxel_encoder.voxel_size": VOXEL,
        "model.pts_middle_encoder.output_shape": [128, 128],
        "model.pts_backbone.layer_nums": [1, 1, 1],
        "model.pts_backbone.out_channels": [32, 32, 32],
        "model.pts_neck.in_channels": [32, 32, 32],
        "model.pts_neck.out_channels": [32, 32, 32],
        "model.pts_bbox_head.in_channels": 96,
        "model.pts_bbox_head.feat_channels": 96,
    },
    "fcos3d/fcos3d_r101_mdp.py": {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": 16,
        "model.backbone.stem_channels": 16,
        "model.neck.in_channels": [16, 32, 64, 128],
        "model.neck.out_channels": 64,
        "model.bbox_head.in_channels": 64,
        "model.bbox_head.feat_channels": 64,
        "model.bbox_head.stacked_convs": 1,
        "model.bbox_head.cls_branch": [64],
        "model.bbox_head.reg_branch": [[64], [64], [64], [64], []],
        "model.bbox_head.dir_branch": [64],
        "model.bbox_head.attr_branch": [64],
    },
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Function: config -> (path of the pruned config, of the checkpoint, its weights); half of every dimension."""
    done = {}

    def make(name: str) -> tuple[str, str, dict[str, torch.Tensor]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("pruned")
            config = read_config(CONFIGS / name, FAMILIES[name])
            adapter = adapter_of(config, InputShape(1, 32, 32))
            model, weights = adapter.build(None)
            space = Adapter.trace(adapter, model, SpaceOptions(3, 16))  # without verification, for time
            kept = {d.name: (tuple(range(d.options[0])),) * d.copies for d in space.dimensions}
            plan = PruningPlan.from_kept(space, kept, frozenset())
            cut = apply_plan(model, plan)
            with new_pruned_model(folder, cut, plan, weights, config, adapter.class_names):
                pass
            done[name] = str(folder / "pruned_config.py"), str(folder / "pruned.pth"), cut.state_dict()
        return done[name]

    return make


def same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_pruned_detector_of_mmdet(pruned):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    config, checkpoint, weights = pruned("retinanet/retinanet_r50_mdp.py")
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    model = init_detector(config, checkpoint, device="cpu")
    assert same(model, weights)
    scores = inference_detector(model, image).pred_instances.scores.tolist()
    inferencer = DetInferencer(config, checkpoint, device="cpu", show_progress=False)
    assert inferencer(image, no_save_vis=True)["predictions"][0]["scores"] == pytest.approx(scores)


def test_a_pruned_classifier_of_mmpretrain(pruned):
    from mmpretrain import FeatureExtractor, ImageClassificationInferencer, get_model

    config, checkpoint, weights = pruned("resnet/resnet50_mdp.py")
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    assert same(get_model(config, checkpoint, device="cpu"), weights)
    found = ImageClassificationInferencer(config, checkpoint, device="cpu")(image)[0]
    assert len(found["pred_scores"]) == 1000 and found["pred_scores"].sum() == pytest.approx(1, rel=1e-4)
    (features,) = FeatureExtractor(config, checkpoint, device="cpu")(image)[0]
    assert features.shape == weights["head.fc.weight"].shape[1:]


def test_a_pruned_lidar_detector_of_mmdet3d(pruned, mini_root, tmp_path):
    from mmdet3d.apis import LidarDet3DInferencer, init_model

    config, checkpoint, weights = pruned("pointpillars/pointpillars_secfpn_nus_mdp.py")
    assert same(init_model(config, checkpoint, device="cpu"), weights)
    points = (np.random.default_rng(0).random((400, 5)) * [80, 80, 6, 1, 1] - [40, 40, 4, 0, 0]).astype(np.float32)
    points.tofile(tmp_path / "points.bin")
    inferencer = LidarDet3DInferencer(config, checkpoint, device="cpu")
    assert same(inferencer.model, weights)
    found = inferencer({"points": str(tmp_path / "points.bin")}, no_save_vis=True)["predictions"][0]
    assert len(found["scores_3d"]) == len(found["bboxes_3d"])
    runner = Runner.from_cfg(read_config(config, {"work_dir": str(tmp_path)}))
    runner.load_or_resume()
    assert same(runner.model, weights)


def test_a_pruned_detector_of_one_camera_of_mmdet3d(pruned, mini_root, tmp_path):
    from mmdet3d.apis import MonoDet3DInferencer, inference_mono_3d_detector, init_model

    config, checkpoint, weights = pruned("fcos3d/fcos3d_r101_mdp.py")
    infos = pickle.loads((mini_root / "nuscenes_infos_val.pkl").read_bytes())
    camera = infos["data_list"][0]["images"]["CAM_FRONT"]
    image = str(mini_root / "samples" / "CAM_FRONT" / Path(camera["img_path"]).name)
    (tmp_path / "one.pkl").write_bytes(pickle.dumps({"data_list": infos["data_list"][:1]}))
    model = init_model(config, checkpoint, device="cpu")
    assert same(model, weights)
    model.bbox_head.test_cfg.score_thr = 0.0  # random weights are sure of nothing
    scores = inference_mono_3d_detector(model, image, str(tmp_path / "one.pkl")).pred_instances_3d.scores_3d
    inferencer = MonoDet3DInferencer(config, checkpoint, device="cpu")
    assert same(inferencer.model, weights)
    inferencer.model.bbox_head.test_cfg.score_thr = 0.0
    # MMDetection3D 1.4 looks for KITTI's camera whatever cam_type says, and multiplies 3x3 by 4x4 without lidar2img.
    cam2img = np.eye(4)
    cam2img[:3, :3] = camera["cam2img"]
    camera["lidar2img"] = (cam2img @ camera["lidar2cam"]).tolist()
    (tmp_path / "kitti.pkl").write_bytes(pickle.dumps({"data_list": [{"images": {"CAM2": camera}}]}))
    found = inferencer({"img": image, "infos": str(tmp_path / "kitti.pkl")}, no_save_vis=True)["predictions"][0]
    assert len(found["scores_3d"]) == len(found["bboxes_3d"]) == len(scores) > 0
    np.testing.assert_allclose(sorted(found["scores_3d"]), sorted(scores.tolist()), rtol=1e-4)
