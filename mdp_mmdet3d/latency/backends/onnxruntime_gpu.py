"""ONNX Runtime's GPU execution providers: wall clock with and without the operator.

On a GPU the profiler sees launches only, and TensorRT runs a whole graph as one node. So an operator
costs what its model takes longer than the same model without it, inputs and outputs lying on the device.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from mdp_mmdet3d.trt.cuda import Cuda

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
TARGET = "target"


class GpuTimer:
    """Measures small models whose tensors are named as in `mdp_mmdet3d.latency.graphs`.

    Args:
        reference: Model of the reference operator (bytes) and the shapes of its inputs.
        provider: ``"cuda"`` or ``"tensorrt"``.
        precision: Element type of the models.
        warmup: Runs that are thrown away.
        runs: Runs that count.

    Raises:
        RuntimeError: The provider is missing or falls back to another one, or there is no GPU.
    """

    def __init__(
        self,
        reference: tuple[bytes, dict[str, Any]],
        provider: str,
        precision: str = "float32",
        *,
        warmup: int = 20,
        runs: int = 50,
    ) -> None:
        self._provider, self._precision, self._warmup, self._runs = provider, precision, warmup, runs
        available = ort.get_available_providers()
        if PROVIDERS[provider] not in available:
            raise RuntimeError(
                f"ONNX Runtime {ort.__version__} here has no {PROVIDERS[provider]}, only "
                f"{', '.join(available)}; install onnxruntime-gpu in place of onnxruntime"
            )
        self.processor = self._device_name()
        self._reference = self._bind(*reference)
        self._before = self.reference_ms()

    def runtime_fields(self) -> dict[str, Any]:
        """The fields of a table's ``device`` that the runtime decides."""
        return {
            "runtime": f"onnxruntime-{self._provider}",
            "runtime_version": ort.__version__,
            "threads": 0,
            "precision": self._precision,
        }

    def protocol(self) -> dict[str, Any]:
        """A table's ``protocol``."""
        return {
            "name": "wall clock with and without the operator",
            "warmup": self._warmup,
            "runs": self._runs,
            "statistic": "difference of the medians",
            "staircase": False,
        }

    def reference_ms(self) -> float:
        """Fastest of a few runs of the reference operator."""
        return min(self._times(self._reference, 2, 8))

    def measure(self, model: bytes, inputs: dict[str, Any], copies: int) -> dict[str, Any]:
        """Measure one model; see `OnnxRuntimeTimer.measure`."""
        whole = self._times(self._bind(model, inputs), self._warmup, self._runs)
        context_ms = 0.0
        context = context_model(model)
        if context is not None:
            kept = {value.name for value in context.graph.input}
            bound = self._bind(context.SerializeToString(), {name: inputs[name] for name in inputs if name in kept})
            context_ms = statistics.median(self._times(bound, self._warmup, self._runs))
        median = statistics.median(whole)
        after = self.reference_ms()
        busiest, self._before = max(self._before, after), after
        return {
            "ms": max(median - context_ms, 0.0) / copies,
            "spread": (max(whole) - min(whole)) / median,
            "runs": self._runs,
            "reference_ms": busiest,
        }

    def _device_name(self) -> str:
        return Cuda().device_name()

    def _bind(self, model: bytes, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """A session on the provider alone, with random inputs and the outputs on the device."""
        name = PROVIDERS[self._provider]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # TensorRT leaves what it cannot run to CUDA; nothing may fall back to the CPU.
        providers = list(dict.fromkeys([name, *([PROVIDERS["cuda"]] if self._provider == "tensorrt" else [])]))
        try:
            session = ort.InferenceSession(model, options, providers=providers)
            if session.get_providers()[0] != name:
                raise RuntimeError(
                    f"{name} cannot be loaded, ONNX Runtime took {session.get_providers()[0]}: are the "
                    "CUDA, cuDNN and TensorRT libraries of its version installed?"
                )
            binding = session.io_binding()
            random = np.random.default_rng(0)
            for key, shape in inputs.items():
                values = random.standard_normal(tuple(shape), dtype=np.float32).astype(self._precision)
                binding.bind_ortvalue_input(key, ort.OrtValue.ortvalue_from_numpy(values, self._memory, 0))
            for output in session.get_outputs():
                binding.bind_output(output.name, self._memory)
        except RuntimeError:
            raise
        except Exception as error:  # ONNX Runtime's errors have no base class of their own
            raise RuntimeError(f"ONNX Runtime {ort.__version__} refuses the model: {error}") from error
        return session, binding

    @property
    def _memory(self) -> str:
        return "cuda"

    def _times(self, bound: tuple[Any, Any], warmup: int, runs: int) -> list[float]:
        """Milliseconds of each run, synchronised."""
        session, binding = bound
        result = []
        for _ in range(warmup + runs):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            result.append(1e3 * (time.perf_counter() - start))
        return result[warmup:]


def context_model(model: bytes) -> onnx.ModelProto | None:
    """The model without the measured operator, ending where its inputs are made; None if nothing is left.

    What the operator reads from other nodes becomes an output behind a global average, as in the whole model.
    """
    whole = onnx.load_from_string(model)
    made_by = {output: node for node in whole.graph.node for output in node.output}
    target = [node for node in whole.graph.node if node.name.startswith(TARGET)]
    gone = {output for node in target for output in node.output}
    kept = [node for node in whole.graph.node if node not in target and not gone.intersection(node.input)]
    ends = dict.fromkeys(name for node in target for name in node.input if name in made_by and name not in gone)
    sinks = []
    for number, name in enumerate(ends):
        kind = "GlobalAveragePool" if made_by[name].op_type == "Conv" else "ReduceMean"
        sinks.append(helper.make_node(kind, [name], [f"sink_context{number}"], name=f"sink_context{number}"))
    nodes = [*kept, *sinks]
    outputs = [
        value.name
        for value in whole.graph.output
        if value.name not in gone and any(value.name in node.output for node in kept)
    ]
    if not nodes:
        return None
    used = {name for node in nodes for name in node.input}
    element = whole.graph.input[0].type.tensor_type.elem_type
    graph = helper.make_graph(
        nodes,
        "context",
        [value for value in whole.graph.input if value.name in used],
        [
            helper.make_tensor_value_info(name, element, None)
            for name in [*outputs, *(node.output[0] for node in sinks)]
        ],
        [tensor for tensor in whole.graph.initializer if tensor.name in used],
    )
    return helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
