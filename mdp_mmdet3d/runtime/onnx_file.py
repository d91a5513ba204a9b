"""What an ONNX file says about itself, read without the onnx package, which a vehicle does not have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdp_mmdet3d.errors import FileFormatError

# Field numbers of onnx.proto3: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_OP_TYPE, _ATTRIBUTE, _TENSOR = 4, 5, 5
_DATA_TYPE, _FLOATS, _NAME, _RAW = 2, 4, 8, 9
_FLOAT, _FLOAT16, _DOUBLE = 1, 10, 11
_NUMPY = {_FLOAT: "<f4", _FLOAT16: "<f2", _DOUBLE: "<f8"}
_QUANTISED = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class OnnxFacts:
    """What `onnx_facts` found.

    Attributes:
        precision: ``"int8"`` if it quantises, ``"float16"`` if it holds weights of that type, else ``"float32"``.
        not_finite: Names of tensors that hold NaN or, as no mask and no bound does, infinity.
    """

    precision: str
    not_finite: tuple[str, ...]


def onnx_facts(path: str | Path) -> OnnxFacts:
    """Precision of a graph, and its weights that are not finite.

    Raises:
        FileFormatError: It is no ONNX file.
    """
    types: set[int] = set()
    operators: set[str] = set()
    not_finite = []
    data = memoryview(Path(path).read_bytes())
    try:
        graphs = [value for field, value in _fields(data) if field == _GRAPH]
        for field, value in _fields(graphs[-1]):
            if field == _NODE:
                node = list(_fields(value))
                operators |= {bytes(item).decode() for number, item in node if number == _OP_TYPE}
                tensors = [
                    tensor
                    for number, item in node
                    if number == _ATTRIBUTE
                    for kind, tensor in _fields(item)
                    if kind == _TENSOR
                ]
            elif field == _INITIALIZER:
                tensors = [value]
            else:
                continue
            for tensor in tensors:
                kind, name, finite = _tensor(tensor)
                types.add(kind)
                if not finite:
                    not_finite.append(name)
    except (IndexError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path} is no ONNX file ({type(error).__name__}: {error}); export again") from error
    quantised = not operators.isdisjoint(_QUANTISED)
    return OnnxFacts("int8" if quantised else "float16" if _FLOAT16 in types else "float32", tuple(not_finite))


def _tensor(data: memoryview) -> tuple[int, str, bool]:
    """Data type, name, and whether all values are finite, of a TensorProto."""
    fields: dict[int, list] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    kind = fields.get(_DATA_TYPE, [0])[0]
    name = bytes(fields.get(_NAME, [b""])[0]).decode()
    stored = fields.get(_RAW, []) if kind in _NUMPY else []
    values = [np.frombuffer(part, _NUMPY[kind]) for part in stored]
    values += [np.frombuffer(part, "<f4") for part in fields.get(_FLOATS, []) if isinstance(part, memoryview)]
    return kind, name, all(_finite(part) for part in values)


def _finite(values: np.ndarray) -> bool:
    """Whether these can be weights: minus infinity masks attentions, and a single infinity is a bound."""
    if np.isfinite(values).all():
        return True
    return not np.isnan(values).any() and (values.size == 1 or not (values == np.inf).any())


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message; numbers of fixed width as bytes."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + length > end:
            raise ValueError(f"it ends inside a field at byte {position}")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
