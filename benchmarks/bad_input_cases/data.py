"""Info files of other makers, results, and what a cache knows its data by."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .case import ROOT, Assets, Case


def _config(assets: Assets) -> Any:
    from mmengine.config import Config

    import projects.streampetr  # noqa: F401

    config = Config.fromfile(ROOT / "configs/_base_/datasets/nuscenes_704x256.py")
    for name in ("importance_dataloader", "val_dataloader"):
        config[name].dataset.data_root = str(assets.nuscenes)
    return config


def info_files(assets: Assets) -> Iterator[Case]:
    """``data_list`` and ``metainfo`` of a v2 info file."""
    from mmdet3d.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet3d")
    config = _config(assets)
    content = pickle.loads((assets.nuscenes / "nuscenes_infos_train.pkl").read_bytes())
    path = assets.folder("infos") / "infos.pkl"

    def read(edit: Callable[[dict], Any], loader: str = "importance_dataloader", raw: Any = None) -> Callable[[], str]:
        def run() -> str:
            changed = copy.deepcopy(content)
            edit(changed)
            path.write_bytes(raw if raw is not None else pickle.dumps(changed))
            settings = {**config[loader].dataset, "ann_file": str(path)}
            data = DATASETS.build(settings)
            first = data[0]["data_samples"].metainfo
            return f"{len(data)} frames, first {first['token'][:6]}"

        return run

    def each(change: Callable[[dict], Any], only: int | None = 1) -> Callable[[dict], None]:
        def edit(content: dict) -> None:
            for row, record in enumerate(content["data_list"]):
                if only is None or row == only:
                    change(record)

        return edit

    token = content["data_list"][1]["token"]
    yield Case("as made here", read(lambda _: None))
    yield Case("unsorted", read(lambda c: c["data_list"].reverse()))
    relative = each(lambda r: r.update(timestamp=r["timestamp"] - content["data_list"][0]["timestamp"]), None)
    yield Case("relative time", read(relative))
    absolute = each(lambda r: r["images"]["CAM_FRONT"].update(img_path=str(_path(assets, r))), None)
    yield Case("absolute image paths", read(absolute))
    yield Case("without scene tokens", read(each(lambda r: r.pop("scene_token"), None)))
    yield Case("matrices as float32 arrays", read(each(lambda r: r.update(ego2global=_f32(r["ego2global"])), None)))
    yield Case("a test split", read(each(lambda r: r.pop("instances"), None), "val_dataloader"))
    for field, names in (
        ("ego2global", ("ego2global", token)),
        ("lidar_points", ("lidar_points", token)),
        ("images", ("images", token)),
        ("timestamp", ("timestamp", token)),
        ("token", ("token", "row 1")),
        ("instances", ("instances", token)),
    ):
        yield Case(f"no {field}", read(each(lambda r, f=field: r.pop(f))), names)
        yield Case(f"{field} null", read(each(lambda r, f=field: r.update({f: None}))), names)
    yield Case("scene_token null", read(each(lambda r: r.update(scene_token=None))), ("scene_token", token))
    yield Case("a record null", read(lambda c: c["data_list"].__setitem__(1, None)), ("row 1",))
    yield Case("no lidar2ego", read(each(lambda r: r["lidar_points"].pop("lidar2ego"))), ("lidar2ego", token))
    yield Case("no lidar2cam", read(each(lambda r: r["images"]["CAM_BACK"].pop("lidar2cam"))), ("lidar2cam", token))
    yield Case("no cam2img", read(each(lambda r: r["images"]["CAM_BACK"].pop("cam2img"))), ("cam2img", token))
    yield Case("camera null", read(each(lambda r: r["images"].update(CAM_BACK=None))), ("CAM_BACK", token))
    no_path = each(lambda r: r["images"]["CAM_BACK"].update(img_path=None))
    yield Case("image path null", read(no_path), ("img_path", "CAM_BACK", token))
    yield Case("camera missing", read(each(lambda r: r["images"].pop("CAM_BACK"), None)), ("CAM_BACK",))
    nan = [[float("nan")] * 4] * 4
    yield Case("pose of NaN", read(each(lambda r: r.update(ego2global=nan))), ("ego2global", token))
    yield Case("pose (3, 4)", read(each(lambda r: r.update(ego2global=r["ego2global"][:3]))), ("ego2global", token))
    yield Case("lidar2ego of NaN", read(each(lambda r: r["lidar_points"].update(lidar2ego=nan))), ("lidar2ego", token))
    yield Case("focal length 0", read(each(lambda r: _set(r, "cam2img", (0, 0), 0.0))), ("cam2img", token))
    yield Case("cam2img NaN", read(each(lambda r: _set(r, "cam2img", (0, 0), float("nan")))), ("cam2img", token))
    yield Case("lidar2cam NaN", read(each(lambda r: _set(r, "lidar2cam", (0, 3), float("nan")))), ("lidar2cam", token))
    micro = each(lambda r: r.update(timestamp=int(r["timestamp"] * 1e6)), None)
    yield Case("integer microseconds", read(micro), ("timestamp", "microseconds"))
    yield Case("time as text", read(each(lambda r: r.update(timestamp=str(r["timestamp"])))), ("timestamp", token))
    jump = each(lambda r: _shift(r, 1e5))
    yield Case("pose jumps 100 km", read(jump), ("ego_pose", token))
    yield Case("no version", read(lambda c: c["metainfo"].pop("version")), ("version",))
    yield Case("version null", read(lambda c: c["metainfo"].update(version=None)), ("version",))
    yield Case("no frames", read(lambda c: c["data_list"].clear()), ("no frames",))
    yield Case("metainfo null", read(lambda c: c.update(metainfo=None)), ("infos.pkl",))
    yield Case("data_list null", read(lambda c: c.update(data_list=None)), ("infos.pkl",))
    yield Case("an image file", read(lambda _: None, raw=b"\x89PNG\r\n\x1a\n"), ("infos.pkl",))
    yield Case("truncated", read(lambda _: None, raw=pickle.dumps(content)[:500]), ("infos.pkl",))
    yield Case("empty", read(lambda _: None, raw=b""), ("infos.pkl",))


def _path(assets: Assets, record: dict) -> Any:
    return assets.nuscenes / "samples" / "CAM_FRONT" / record["images"]["CAM_FRONT"]["img_path"]


def _f32(matrix: Any) -> np.ndarray:
    return np.asarray(matrix, np.float32)


def _set(record: dict, key: str, index: tuple[int, int], value: float) -> None:
    matrix = np.array(record["images"]["CAM_BACK"][key], float)
    matrix[index] = value
    record["images"]["CAM_BACK"][key] = matrix.tolist()


def _shift(record: dict, metres: float) -> None:
    matrix = np.array(record["ego2global"], float)
    matrix[0, 3] += metres
    record["ego2global"] = matrix.tolist()


def submissions(assets: Assets) -> Iterator[Case]:
    """Boxes for the leaderboard, and evaluation."""
    from projects.streampetr.metric import ClassSetNuScenesMetric
    from projects.streampetr.submission import write_submission

    folder = assets.folder("submission")
    box = {
        "sample_token": "a",
        "translation": [1.0, 2, 3],
        "size": [1.0, 2, 3],
        "rotation": [1.0, 0, 0, 0],
        "velocity": [0.0, 0],
        "detection_name": "car",
        "detection_score": 0.5,
        "attribute_name": "",
    }

    def write(**changes: Any) -> Callable[[], Any]:
        return lambda: write_submission({"a": [{**box, **changes}]}, ["a"], folder / "s.json").name

    yield Case("a good box", write())
    yield Case("no box", lambda: write_submission({}, ["a"], folder / "s.json").name)
    yield Case("size 0", write(size=[0.0, 1, 1]), ("size",))
    yield Case("size -1", write(size=[1.0, -1, 1]), ("size",))
    yield Case("score 1.2", write(detection_score=1.2), ("score",))
    yield Case("score -0.1", write(detection_score=-0.1), ("score",))
    yield Case("rotation 0", write(rotation=[0.0, 0, 0, 0]), ("rotation",))
    yield Case("rotation not a unit", write(rotation=[2.0, 0, 0, 0]), ("rotation",))
    yield Case("NaN centre", write(translation=[float("nan"), 0, 0]), ("NaN",))
    yield Case("unknown class", write(detection_name="tank"), ("devkit",))
    yield Case("wrong attribute", write(attribute_name="pedestrian.moving"), ("attribute",))
    yield Case("size of two numbers", write(size=[1.0, 1]), ("devkit",))

    infos = assets.nuscenes / "nuscenes_infos_val.pkl"
    val = pickle.loads(infos.read_bytes())["data_list"]

    def evaluate(tokens: list[str], boxes: list, version: str = "v1.0-mini") -> Callable[[], Any]:
        def run() -> Any:
            metric = ClassSetNuScenesMetric(str(assets.nuscenes), str(infos))
            metric.version = version
            results = {token: [{**one, "sample_token": token} for one in boxes] for token in tokens}
            path = folder / "results" / "results_nusc.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"meta": {"use_camera": True}, "results": results}))
            found = metric._evaluate_single(str(path), ["car"])
            assert found["pred_instances_3d_NuScenes/mAP"] == 0.0, found
            return "mAP 0"

        return run

    tokens = [record["token"] for record in val]
    yield Case("evaluation without a box", evaluate(tokens, []))
    yield Case("evaluation of one frame too few", evaluate(tokens[1:], [box]), ("frames", "split"))
    yield Case("evaluation of the test split", evaluate(tokens, [box], "v1.0-test"), ("submit_nuscenes",))


def identities(assets: Assets) -> Iterator[Case]:
    """Data that are replaced at their path."""
    from mmengine.config import Config

    from mdp_mmdet3d.adapters import InputShape
    from mdp_mmdet3d.adapters.single_graph import SingleGraph

    root = assets.folder("identity")
    shutil.copyfile(assets.nuscenes / "nuscenes_infos_val.pkl", root / "infos.pkl")
    dataset = dict(data_root=str(root), ann_file="infos.pkl")
    config = Config(dict(model=dict(type="A"), importance_dataloader=dict(dataset=dataset)))

    def identity() -> str:
        return SingleGraph(config, InputShape(6, 64, 176)).data_identity()

    def replaced() -> str:
        before = identity()
        shutil.copyfile(assets.nuscenes / "nuscenes_infos_train.pkl", root / "infos.pkl")
        assert identity() != before, "other data at the same path have the same identity"
        return "another identity"

    yield Case("data replaced at the same path", replaced)
