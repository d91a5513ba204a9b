"""Autoware's node as each release is: the parameters that it declares, and a host that does what its code does."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import yaml

MEMORY = ("embedding", "reference_point", "timestamp", "egopose", "velo")
GRAPHS = {"simplify_extract_img_feat.onnx", "simplify_pts_head_memory.onnx", "simplify_position_embedding.onnx"}

# What `declare_parameter` asks for in src/node.cpp of each release; a key of a default is listed where that default is
# not the model's. s: string, b: bool, i: integer, d: double, capitals: array.
SHAPES = {
    "class_names": "S", "detection_range": "D", "input_image_height": "i", "input_image_width": "i",
    "num_proposals": "i", "rois_number": "i", "pre_memory_length": "i", "post_memory_length": "i",
}  # fmt: skip
BUILD = {
    "trt_precision": "s", "use_temporal": "b", "workspace_size": "i", "backbone_path": "s", "head_path": "s",
    "position_embedding_path": "s", "backbone_engine_path": "s", "head_engine_path": "s",
    "position_embedding_engine_path": "s",
}  # fmt: skip
POST_PROCESS = {
    "confidence_threshold": "D", "circle_nms_dist_threshold": "d", "iou_nms_search_distance_2d": "d",
    "iou_nms_threshold": "d", "yaw_norm_thresholds": "D",
}  # fmt: skip
NODE = {
    "max_camera_time_diff": "d", "multithreading": "b", "anchor_camera_id": "i", "debug_mode": "b",
    "is_compressed_image": "b", "is_distorted_image": "b",
}  # fmt: skip
DIAGNOSTICS = {
    "max_allowed_processing_time_ms": "d", "max_acceptable_consecutive_delay_ms": "d", "max_image_age_ms": "d",
    "validation_callback_interval_ms": "d",
}  # fmt: skip
OLD = {"model_params": {**SHAPES, **BUILD}, "post_process_params": POST_PROCESS, **NODE}
REQUIRED = {
    "0.48": {
        "tensorrt_stream_petr.param.yaml": {**OLD, "post_process_params": {**POST_PROCESS, "confidence_threshold": "d"}}
    },
    "0.49": {"tensorrt_stream_petr.param.yaml": OLD},
    "0.51": {
        "ml_package_camera_streampetr.param.yaml": {"model_params": SHAPES},
        "camera_streampetr.param.yaml": {"model_params": BUILD, "post_process_params": POST_PROCESS, **NODE},
    },
    "0.52": {
        "ml_package_camera_streampetr.param.yaml": {
            "model_params": {**SHAPES, **BUILD}, "post_process_params": POST_PROCESS,
        },
        "camera_streampetr.param.yaml": NODE,
    },
    "0.53": {
        "ml_package_camera_streampetr.param.yaml": {
            "model_params": {**SHAPES, **BUILD}, "post_process_params": POST_PROCESS,
        },
        "camera_streampetr.param.yaml": {**NODE, "diagnostics": DIAGNOSTICS},
    },
}  # fmt: skip
TYPES = {"s": str, "b": bool, "i": int, "d": float, "S": str, "D": float}


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parameters(folder, file):
    return yaml.safe_load((folder / file).read_text())["/**"]["ros__parameters"]


class AutowareHost:
    """The node's host code: flat byte buffers, zero reset, poses relative to the first translation.

    Images are normalised as its preprocessing kernel does it: before 0.53 channel by channel as they come, with BGR
    statistics; since then as RGB.
    """

    def __init__(self, folder, node, frame):
        def session(name):
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            return ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])

        files = REQUIRED[node]
        self.parameters = {k: v for file in files for k, v in parameters(folder, file).get("model_params", {}).items()}
        self.mean, self.std = np.array([103.53, 116.28, 123.675]), np.array([57.375, 57.12, 58.395])
        if node == "0.53":
            self.mean, self.std = self.mean[::-1], self.std[::-1]
        self.encoder, self.head = session("simplify_extract_img_feat.onnx"), session("simplify_pts_head_memory.onnx")
        self.shapes = {value.name: value.shape for value in self.head.get_inputs()}
        self.buffers = {name: bytearray(4 * int(np.prod(shape))) for name, shape in self.shapes.items()}
        self.position_embedding = session("simplify_position_embedding.onnx")
        self.set_rig(frame)
        self.reset()

    def set_rig(self, frame):
        """The node does this once, at its start."""
        size = [self.parameters["input_image_height"], self.parameters["input_image_width"], 3]
        rig = frame.intrinsics[None].astype(np.float32), np.linalg.inv(frame.lidar2img)[None].astype(np.float32)
        found = self.position_embedding.run(
            ["pos_embed", "cone"],
            {"img_metas_pad": np.array(size, np.float32), "intrinsics": rig[0], "img2lidar": rig[1]},
        )
        self.write("pos_embed", found[0])
        self.write("cone", found[1])

    def reset(self):
        for name in MEMORY:
            self.buffers[f"pre_memory_{name}"][:] = bytes(len(self.buffers[f"pre_memory_{name}"]))
        self.clock = np.zeros(self.parameters["post_memory_length"], np.float32)
        self.start = self.origin = None

    def write(self, name, array):
        target = self.buffers[name]
        target[:] = np.ascontiguousarray(array, np.float32).tobytes()[: len(target)]

    def run(self, pixels, frame):
        """``pixels``: (N, H, W, 3) uint8 as an rgb8 camera sends them."""
        if self.start is None:
            self.start, self.origin = frame.timestamp, frame.ego_pose[:3, 3].copy()
        now = np.float32(frame.timestamp - self.start)
        pose = frame.ego_pose.copy()
        pose[:3, 3] -= self.origin
        img = ((pixels - self.mean) / self.std).astype(np.float32).transpose(0, 3, 1, 2)
        self.write("x", self.encoder.run(["img_feats"], {"img": img[None]})[0])
        self.write("data_ego_pose", pose)
        self.write("data_ego_pose_inv", np.linalg.inv(pose))
        self.write("pre_memory_timestamp", self.clock[: self.parameters["pre_memory_length"]] + now)
        feeds = {n: np.frombuffer(self.buffers[n], np.float32).reshape(s) for n, s in self.shapes.items()}
        names = [value.name for value in self.head.get_outputs()]
        results = dict(zip(names, self.head.run(names, feeds)))
        self.clock = results["post_memory_timestamp"].ravel() - now
        for name in set(MEMORY) - {"timestamp"}:
            self.write(f"pre_memory_{name}", results[f"post_memory_{name}"])
        return results["all_cls_scores"].ravel(), results["all_bbox_preds"].ravel()

    def boxes(self, scores, codes):
        """One per query, as the node's postprocessing reads them."""
        count, classes = self.parameters["num_proposals"], self.parameters["class_names"]
        found = []
        for j in range(count):
            values = [1 / (1 + np.exp(-scores[c * count + j])) for c in range(len(classes))]
            label = int(np.argmax(values))
            box = [codes[k * count + j] for k in range(10)]
            yaw = np.arctan2(box[6], box[7])
            found.append((label, values[label], [*box[:3], *np.exp(box[3:6]), np.sin(yaw), np.cos(yaw), *box[8:]]))
        return found
