"""The TensorRT runtime's host code, with a CUDA made of host memory and engines that ONNX Runtime executes.

What a GPU does is not tested here: that needs one.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from mdp_mmdet3d.errors import DeploymentError
from mdp_mmdet3d.files import file_sha256
from mdp_mmdet3d.runtime.manifest import DeploymentManifest
from mdp_mmdet3d.runtime.stream import StreamRunner
from mdp_mmdet3d.trt import engine as trt_engine
from mdp_mmdet3d.trt.engine import DeviceArray, TrtEngine

from ..numerics import COLUMNS, assert_close


class HostCuda:
    """Device memory is host memory; copies are recorded; a captured graph is the function itself."""

    def __init__(self, can_capture=True):
        self.can_capture, self.copied, self.launches, self._held = can_capture, {1: 0, 2: 0, 3: 0}, 0, {}

    def stream(self):
        return 1

    def synchronize(self, stream):
        pass

    def device_name(self):
        return "host"

    def capability(self):
        return "8.9"

    def allocate(self, size):
        buffer = ctypes.create_string_buffer(size)
        self._held[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address):
        del self._held[address]

    def copy(self, target, source, size, kind):
        ctypes.memmove(target, source, size)
        self.copied[kind] += size

    def capture(self, enqueue):
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        return enqueue

    def launch(self, executable):
        self.launches += 1
        executable()


class OrtContext:
    def __init__(self, engine):
        self.engine, self.addresses = engine, {}

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        feeds = {value.name: self.view(value) for value in self.engine.session.get_inputs()}
        for value, result in zip(self.engine.session.get_outputs(), self.engine.session.run(None, feeds)):
            self.view(value)[...] = result
        return True

    def view(self, value):
        size = int(np.prod(value.shape))
        buffer = (ctypes.c_float * size).from_address(self.addresses[value.name])
        return np.frombuffer(buffer, np.float32).reshape(value.shape)


class OrtEngineOfTensorRt:
    def __init__(self, plan):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.values = {v.name: v for v in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, index):
        return list(self.values)[index]

    def get_tensor_shape(self, name):
        return self.values[name].shape

    def get_tensor_dtype(self, name):
        return "float"

    def get_tensor_mode(self, name):
        return "input" if name in {v.name for v in self.session.get_inputs()} else "output"

    def create_execution_context(self):
        return OrtContext(self)


class Logger:
    def __init__(self):
        pass


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return None if plan == b"another device" else OrtEngineOfTensorRt(plan)


FAKE_TENSORRT = SimpleNamespace(
    __name__="tensorrt", __version__="10.3.0", Runtime=Runtime, ILogger=Logger, nptype=lambda kind: np.float32,
    TensorIOMode=SimpleNamespace(INPUT="input"),
)  # fmt: skip


@pytest.fixture
def built(tiny_deployment, tmp_path):
    """A deployment whose engines are its ONNX files."""
    folder = tmp_path / "deploy"
    shutil.copytree(tiny_deployment, folder)
    engines = {}
    for name, spec in DeploymentManifest.load(folder).engines.items():
        shutil.copyfile(folder / spec.file, folder / f"{name}.here.engine")
        sha = file_sha256(folder / spec.file)
        engines[name] = {"file": f"{name}.here.engine", "sha256": sha, "onnx_sha256": sha}
    target = {"library": "tensorrt", "version": "10.3.0", "capability": None, "engines": engines}
    (folder / "engines.json").write_text(json.dumps({"schema_version": 1, "targets": {"here": target}}))
    return folder


@pytest.fixture
def cuda(monkeypatch):
    cuda = HostCuda()
    monkeypatch.setattr(trt_engine, "shared_cuda", lambda: cuda)
    monkeypatch.setattr(trt_engine, "import_tensorrt", lambda: FAKE_TENSORRT)
    monkeypatch.setattr(trt_engine, "shared_logger", lambda trt: Logger())
    return cuda


@pytest.mark.numerics
@pytest.mark.parametrize("can_capture", [True, False])
def test_the_stream_equals_onnx_runtime_and_memory_stays_on_the_device(built, cuda, stream, can_capture):
    cuda.can_capture = can_capture
    runner, reference = StreamRunner(built, backend="tensorrt"), StreamRunner(built)
    for index, frame in enumerate(stream):
        before = dict(cuda.copied)
        output, expected = runner.run(frame), reference.run(frame)
        assert_close(output.cls_scores, expected.cls_scores)
        assert_close(output.bbox_preds, expected.bbox_preds, COLUMNS, columns=True)
        if index == 1:  # inside a scene: image, poses and ages go up; logits, boxes and ages come down
            up, down = (cuda.copied[kind] - before[kind] for kind in (1, 2))
            assert up == frame.img.nbytes + 2 * 64 + 4 * 64
            assert down == expected.cls_scores.nbytes + expected.bbox_preds.nbytes + 4 * 80
    assert isinstance(runner.memory.embedding, DeviceArray)
    fetched, here = runner.memory_on_host(), reference.memory_on_host()
    for name in ("embedding", "reference_point", "egopose", "velo"):
        assert_close(getattr(fetched, name), getattr(here, name))
    assert runner.backend_info()["cuda_graph"] is can_capture and (cuda.launches > 0) is can_capture


def test_engines_of_another_version_model_or_device_are_refused(built, cuda):
    path = built / "engines.json"
    text = path.read_text()
    path.write_text(text.replace("10.3.0", "8.6.1"))
    with pytest.raises(DeploymentError, match=r"tensorrt 8\.6\.1, this machine has tensorrt 10\.3\.0"):
        StreamRunner(built, backend="tensorrt")
    path.write_text(text)
    with pytest.raises(DeploymentError, match=r"another head\.onnx"):
        TrtEngine(built, "head", "0" * 64)
    engine = built / "head.here.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-10])
    with pytest.raises(DeploymentError, match="truncated"):
        StreamRunner(built, backend="tensorrt")
    engine.write_bytes(b"another device")
    found = json.loads(text)
    found["targets"]["here"]["engines"]["head"]["sha256"] = file_sha256(engine)
    path.write_text(json.dumps(found))
    with pytest.raises(DeploymentError, match="another GPU or driver"):
        StreamRunner(built, backend="tensorrt")


def test_the_engine_of_this_gpu_is_taken(built, cuda):
    path = built / "engines.json"
    found = json.loads(path.read_text())
    here = found["targets"].pop("here")
    other = json.loads(json.dumps(here).replace(".here.", ".sm86."))
    found["targets"] = {"sm86": {**other, "capability": "8.6"}, "sm89": {**here, "capability": "8.9"}}
    path.write_text(json.dumps(found))
    manifest = DeploymentManifest.load(built)
    assert TrtEngine(built, "head", manifest.checksums["head.onnx"]).path.name == "head.here.engine"
    cuda.capability = lambda: "12.0"
    with pytest.raises(DeploymentError, match=r"for compute capability 8\.6, 8\.9, this GPU has 12\.0"):
        StreamRunner(built, backend="tensorrt")


def test_wrong_feeds_are_refused(built, cuda):
    manifest = DeploymentManifest.load(built)
    engine = TrtEngine(built, "image_encoder", manifest.checksums["image_encoder.onnx"])
    with pytest.raises(DeploymentError, match="missing inputs"):
        engine.run({})
    with pytest.raises(DeploymentError, match="the engine takes"):
        engine.run({"img": np.zeros((1, 6, 3, 64, 100), np.float32)})


def test_without_a_gpu_the_error_says_so(built, stream):
    from mdp_mmdet3d.trt.cuda import Cuda

    try:
        Cuda()
    except RuntimeError:
        with pytest.raises(DeploymentError):
            StreamRunner(built, backend="tensorrt")
    else:
        pytest.skip("this machine has a GPU")
