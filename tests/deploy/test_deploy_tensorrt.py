from __future__ import annotations

import pytest

trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError, reason="tensorrt_rtx or its bindings are not installed")

pytestmark = pytest.mark.tensorrt


class Recorder(trt.ILogger):
    """TensorRT keeps the first logger of a process, so there is one."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.problems: list[str] = []

    def log(self, severity, message):
        # Without a driver TensorRT reports that it cannot ask the GPU; building does not need it.
        if severity <= trt.ILogger.Severity.WARNING and "CUDA" not in message:
            self.problems.append(message)


@pytest.fixture(scope="module")
def recorder():
    return Recorder()


@pytest.mark.parametrize("name", ["image_encoder", "position_embedding", "head"])
@pytest.mark.parametrize("capability", ["SM86", "SM89"])
def test_engines_parse_and_build(tiny_deployment, recorder, name, capability):
    recorder.problems.clear()
    builder = trt.Builder(recorder)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, recorder)
    assert parser.parse_from_file(str(tiny_deployment / f"{name}.onnx")), [
        str(parser.get_error(index)) for index in range(parser.num_errors)
    ]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None and engine.nbytes > 0
    assert recorder.problems == []
