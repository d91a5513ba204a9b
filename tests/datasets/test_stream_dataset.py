"""The data set yields scenes as streams, with exact times and poses, and its labels survive the official metric."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmcv", reason="mmcv is needed by mmdet3d")

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mdp_mmdet3d.datasets.conventions import CAMERAS
from mdp_mmdet3d.errors import FileFormatError, MissingDatasetError
from mdp_mmdet3d.simdata.mini_nuscenes import MiniNuScenesSpec, write_mini_nuscenes
from projects.streampetr import dataset as stream
from projects.streampetr import transforms  # noqa: F401  registers them

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "_base_" / "datasets"


def load(path):
    with Path(path).open("rb") as stream_:
        return pickle.load(stream_)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet3d")


@pytest.fixture
def config(mini_root, monkeypatch):
    monkeypatch.setenv("NUSCENES_ROOT", str(mini_root))
    return Config.fromfile(CONFIGS / "nuscenes_704x256.py")


def build(settings, **changes):
    from mmdet3d.registry import DATASETS

    settings = copy.deepcopy(settings)
    settings.update(changes)
    return DATASETS.build(settings)


@pytest.fixture
def shuffled(mini_root, tmp_path):
    """The training info file with its rows shuffled, and one without scene tokens."""
    content = load(mini_root / "nuscenes_infos_train.pkl")
    random.Random(2).shuffle(content["data_list"])
    (tmp_path / "shuffled.pkl").write_bytes(pickle.dumps(content))
    bare = copy.deepcopy(content)
    for record in bare["data_list"]:
        for key in ("scene_token", "prev", "next"):
            del record[key]
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(bare))
    return tmp_path


def test_frames_come_scene_by_scene_in_time_order(config, shuffled):
    settings = config.importance_dataloader.dataset
    data = build(settings, ann_file=str(shuffled / "shuffled.pkl"))
    rows = load(shuffled / "shuffled.pkl")["data_list"]
    infos = [data.get_data_info(i) for i in range(len(data))]
    assert len(infos) == len(rows) == 6
    assert [info["prev_exists"] for info in infos] == [False, True, True, False, True, True]
    assert len({info["scene_token"] for info in infos[:3]}) == 1
    assert infos[0]["timestamp"] < infos[1]["timestamp"] < infos[2]["timestamp"] < infos[3]["timestamp"]
    for info in infos:
        assert rows[info["sample_idx"]]["token"] == info["token"]


def test_scenes_of_stock_files_are_inferred_with_a_warning(config, shuffled, monkeypatch):
    settings = config.importance_dataloader.dataset
    warnings = []
    monkeypatch.setattr(stream, "print_log", lambda text, *args, **kwargs: warnings.append(text))
    bare = build(settings, ann_file=str(shuffled / "bare.pkl"))
    full = build(settings, ann_file=str(shuffled / "shuffled.pkl"))
    assert len(warnings) == 1
    assert "--annotate" in warnings[0]
    for i in range(len(full)):
        found, expected = bare.get_data_info(i), full.get_data_info(i)
        assert found["token"] == expected["token"]
        assert found["prev_exists"] == expected["prev_exists"]


def test_scenes_without_a_gap_are_told_apart_by_missing_sweeps():
    records = [{"timestamp": 10 + 0.5 * i} for i in range(6)]
    for i in (1, 2, 4, 5):
        records[i]["lidar_sweeps"] = [{}]
    tokens = stream.infer_scene_tokens(records[::-1])[::-1]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3] == tokens[4] == tokens[5]


def test_a_subset_starts_a_stream_of_its_own(config):
    settings = config.importance_dataloader.dataset
    data = build(settings, indices=[1, 2, 4])
    whole = build(settings)
    assert [data.get_data_info(i)["prev_exists"] for i in range(3)] == [False, True, False]
    assert [data.get_data_info(i)["token"] for i in range(3)] == [whole.get_data_info(i)["token"] for i in (1, 2, 4)]


def test_a_packed_frame_keeps_the_contract(config):
    data = build(config.importance_dataloader.dataset)
    frame = data[1]
    sample, raw = frame["data_samples"], load(data.ann_file)["data_list"][1]
    assert frame["inputs"]["img"].shape == (6, 3, 256, 704)
    assert frame["inputs"]["img"].dtype == torch.uint8
    meta = sample.metainfo
    assert meta["timestamp"] == raw["timestamp"]
    assert isinstance(meta["timestamp"], float)
    assert meta["prev_exists"] is True
    assert isinstance(meta["scene_token"], str)
    assert meta["img_shape"] == (256, 704)
    for key, shape in (
        ("intrinsics", (6, 4, 4)),
        ("extrinsics", (6, 4, 4)),
        ("lidar2img", (6, 4, 4)),
        ("ego_pose", (4, 4)),
        ("ego_pose_inv", (4, 4)),
    ):
        assert meta[key].shape == shape
        assert meta[key].dtype == np.float32
    np.testing.assert_allclose(meta["lidar2img"], meta["intrinsics"] @ meta["extrinsics"], rtol=1e-4, atol=1e-2)
    assert [Path(path).parent.name for path in meta["img_path"]] == list(CAMERAS)
    boxes = sample.gt_instances_3d.bboxes_3d
    assert boxes.tensor.shape == (len(sample.gt_instances_3d.labels_3d), 9)
    assert sample.gt_instances_3d.labels_3d.dtype == torch.int64
    assert len(boxes) > 5


def test_poses_follow_the_official_float32_recipe(config):
    data = build(config.val_dataloader.dataset)
    info = data.get_data_info(0)
    ego2global = np.array(info["ego2global"])
    lidar2ego = np.array(info["lidar_points"]["lidar2ego"])
    np.testing.assert_allclose(info["ego_pose"], ego2global @ lidar2ego, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(info["ego_pose_inv"] @ info["ego_pose"], np.eye(4), atol=2e-4)
    np.testing.assert_array_equal(info["ego_pose_inv"][:3, :3], info["ego_pose"][:3, :3].T)


def test_test_mode_has_no_ground_truth_and_import_mode_has_it(config):
    assert "bboxes_3d" not in build(config.val_dataloader.dataset)[0]["data_samples"].gt_instances_3d
    truth = build(config.importance_dataloader.dataset)[0]["data_samples"].gt_instances_3d
    raw = load(build(config.importance_dataloader.dataset).ann_file)["data_list"][0]
    names = config.class_names
    own = [
        "car",
        "truck",
        "trailer",
        "bus",
        "construction_vehicle",
        "bicycle",
        "motorcycle",
        "pedestrian",
        "traffic_cone",
        "barrier",
    ]
    kept = [i for i in raw["instances"] if i["bbox_3d_isvalid"] and np.abs(i["bbox_3d"][:2]).max() < 51.2]
    assert [names[label] for label in truth.labels_3d] == [own[i["bbox_label_3d"]] for i in kept]
    np.testing.assert_allclose(truth.bboxes_3d.gravity_center, [i["bbox_3d"][:3] for i in kept], atol=1e-3)
    np.testing.assert_allclose(truth.bboxes_3d.dims, [i["bbox_3d"][3:6] for i in kept], atol=1e-4)
    np.testing.assert_allclose(truth.bboxes_3d.tensor[:, 7:], np.nan_to_num([i["velocity"] for i in kept]), atol=1e-4)


def test_ground_truth_through_the_official_metric_is_perfect(config, tmp_path):
    """Labels, row numbers, box origin, yaw and velocity conventions all have to be right for this."""
    from mmdet3d.registry import METRICS
    from mmdet3d.structures import Det3DDataSample
    from mmengine.structures import InstanceData

    settings = copy.deepcopy(config.val_dataloader.dataset)
    settings.update(test_mode=False, pipeline=config.importance_pipeline, use_valid_flag=True)
    data = build(settings)
    metric = METRICS.build({**config.val_evaluator, "jsonfile_prefix": str(tmp_path / "out")})
    metric.dataset_meta = data.metainfo
    for i in range(len(data)):
        frame = data[i]["data_samples"]
        truth = frame.gt_instances_3d
        result = Det3DDataSample(metainfo={"sample_idx": frame.sample_idx})
        result.pred_instances_3d = InstanceData(
            bboxes_3d=truth.bboxes_3d, labels_3d=truth.labels_3d, scores_3d=torch.ones(len(truth.labels_3d))
        )
        result.pred_instances = InstanceData()
        metric.process({}, [result.to_dict()])
    scores = metric.evaluate(len(data))
    found = {name.rpartition("/")[2]: value for name, value in scores.items()}
    assert found["mAP"] > 0.99
    assert found["mATE"] < 0.01
    assert found["mAOE"] < 0.01
    assert found["mAVE"] < 0.5


@pytest.mark.parametrize("present", [False, True])
def test_a_missing_data_set_names_both_remedies(tmp_path, monkeypatch, present):
    root = tmp_path / "nuscenes"
    if present:
        root.mkdir()
    monkeypatch.setenv("NUSCENES_ROOT", str(root))
    config = Config.fromfile(CONFIGS / "nuscenes_704x256.py")
    with pytest.raises(MissingDatasetError) as caught:
        build(config.val_dataloader.dataset)
    for text in ("create_mini_nuscenes.py", "NUSCENES_ROOT", "create_infos.py", str(root)):
        assert text in str(caught.value)


def test_files_of_another_kind_are_refused(config, mini_root, tmp_path):
    settings = config.val_dataloader.dataset
    other = tmp_path / "other.pkl"
    content = load(mini_root / "nuscenes_infos_val.pkl")
    for broken, message in (
        ({"infos": [], "metadata": {}}, "no v2 info file"),
        ({**content, "data_list": []}, "no frames"),
        ({**content, "metainfo": {**content["metainfo"], "categories": {"car": 3}}}, "numbers its classes"),
        ({**content, "data_list": content["data_list"] + content["data_list"][:1]}, "same timestamp"),
    ):
        other.write_bytes(pickle.dumps(broken))
        with pytest.raises(FileFormatError, match=message):
            build(settings, ann_file=str(other))


def test_missing_and_broken_images_and_cameras_are_named(config, mini_root, tmp_path):
    content = load(mini_root / "nuscenes_infos_val.pkl")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a jpeg")
    infos = tmp_path / "infos.pkl"

    def frame(change):
        changed = copy.deepcopy(content)
        change(changed["data_list"][0]["images"])
        infos.write_bytes(pickle.dumps(changed))
        return build(config.val_dataloader.dataset, ann_file=str(infos))[0]

    with pytest.raises(FileFormatError, match=r"broken\.jpg"):
        frame(lambda images: images["CAM_BACK"].update(img_path=str(broken)))
    with pytest.raises(MissingDatasetError, match=r"absent\.jpg"):
        frame(lambda images: images["CAM_BACK"].update(img_path="/nowhere/absent.jpg"))
    with pytest.raises(FileFormatError, match="CAM_BACK_LEFT"):
        frame(lambda images: images.pop("CAM_BACK_LEFT"))


@pytest.mark.parametrize("name", ["nuscenes_704x256", "nuscenes_800x320"])
def test_configs_build_and_give_their_size(name, mini_root, monkeypatch):
    monkeypatch.setenv("NUSCENES_ROOT", str(mini_root))
    config = Config.fromfile(CONFIGS / f"{name}.py")
    width, height = (int(value) for value in name.rpartition("_")[2].split("x"))
    for loader in ("importance_dataloader", "val_dataloader", "test_dataloader"):
        assert build(config[loader].dataset)[0]["inputs"]["img"].shape == (6, 3, height, width)


def test_cuboids_of_the_easy_variant_are_seen_where_the_matrices_say(tmp_path):
    """From the simulated world through JPEG, tables, info file and matrices: the colour tells the class."""
    from mdp_mmdet3d.simdata.mini_nuscenes.shapes import CLASS_COLOURS

    spec = MiniNuScenesSpec(
        scenes=2,
        frames=2,
        image_size=(352, 128),
        classes=("car", "truck", "bus", "pedestrian", "traffic_cone"),
        object_count=12,
        radius_m=20.0,
        cuboids=True,
        min_visible_pixels=30,
    )
    root = write_mini_nuscenes(tmp_path / "easy", spec)
    config = Config.fromfile(CONFIGS / "nuscenes_704x256.py")
    for step in config.importance_pipeline:
        if step.type == "ResizeCropImages":
            step.final_shape = (64, 176)
    data = build(config.importance_dataloader.dataset, data_root=str(root), pipeline=config.importance_pipeline)
    names = config.class_names
    palette = {
        name: np.array(colour) / np.linalg.norm(colour)
        for name, colour in CLASS_COLOURS.items()
        if name in spec.classes
    }
    right = seen = 0
    for i in range(len(data)):
        frame = data[i]
        truth = frame["data_samples"].gt_instances_3d
        centres = np.pad(truth.bboxes_3d.gravity_center.numpy(), ((0, 0), (0, 1)), constant_values=1)
        # Nearest first: a centre whose pixel a nearer box may cover does not count.
        taken = []
        for k in np.argsort(np.linalg.norm(centres[:, :2], axis=1)):
            for camera in range(6):
                x, y, depth, _ = frame["data_samples"].metainfo["lidar2img"][camera] @ centres[k]
                u, v = round(x / depth), round(y / depth)
                if depth < 1 or not (4 <= u < 172 and 4 <= v < 60):
                    continue
                bearing = np.arctan2(centres[k, 1], centres[k, 0])
                if any(abs((bearing - other + np.pi) % (2 * np.pi) - np.pi) < 0.35 for other in taken):
                    continue
                colour = frame["inputs"]["img"][camera, :, v, u].numpy().astype(float)
                nearest = max(palette, key=lambda name, c=colour: palette[name] @ c / np.linalg.norm(c))
                right += nearest == names[truth.labels_3d[k]]
                seen += 1
            taken.append(np.arctan2(centres[k, 1], centres[k, 0]))
    assert seen >= 6
    assert right / seen >= 0.8, (right, seen)
