"""Whether what a manifest says can be true, and is what its graphs say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.runtime.onnx_file import onnx_facts

PRECISIONS = ("float32", "float16", "int8")
ENGINES = ("image_encoder", "position_embedding", "head")
LAYOUTS = ("native", "autoware")


def check_names(path: Path, names: Iterator[str] | Sequence[str]) -> None:
    """Raise `FileFormatError` unless every name is that of a file directly in the manifest's folder."""
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise FileFormatError(f"{path} names the file {name!r}, which is not inside its folder; export again")


def check_graphs(path: Path, manifest: Any) -> None:
    """Raise `FileFormatError` if a graph holds weights that are not finite, or is of another precision than stated."""
    if manifest.precision not in PRECISIONS:
        raise FileFormatError(f"{path}: precision is {manifest.precision!r}, none of {', '.join(PRECISIONS)}")
    found = set()
    for engine in manifest.engines.values():
        facts = onnx_facts(path.parent / engine.file)
        if facts.not_finite:
            raise FileFormatError(
                f"{path.parent / engine.file}: {len(facts.not_finite)} weights hold NaN or infinity, the first is "
                f"{facts.not_finite[0]!r}; export again from a checkpoint with finite weights"
            )
        found.add(facts.precision)
    precision = next(name for name in reversed(PRECISIONS) if name in found)
    if precision != manifest.precision:
        raise FileFormatError(f"{path}: precision is {manifest.precision!r}, but the graphs are {precision}")


def check_stream(path: Path, manifest: Any) -> None:
    """Raise `FileFormatError` where the manifest of a StreamPETR contradicts itself or the signatures of its graphs."""
    if complaint := next(_complaints(manifest), None):
        raise FileFormatError(f"{path}: {complaint}; export again")


def _complaints(m: Any) -> Iterator[str]:
    """What is wrong, in words; stops at nothing, so the first is taken."""
    if set(m.engines) != set(ENGINES):
        yield f"engines are {sorted(m.engines)}, not {sorted(ENGINES)}"
    if m.layout not in LAYOUTS:
        yield f"layout is {m.layout!r}, none of {', '.join(LAYOUTS)}"
    for name in ("levels", "num_queries", "max_detections"):
        if not _count(getattr(m, name), 1):
            yield f"{name} is {getattr(m, name)!r}, not a whole number of at least 1"
    for name in ("class_names", "camera_names"):
        names = getattr(m, name)
        if not isinstance(names, tuple) or not names or not all(isinstance(item, str) for item in names):
            yield f"{name} is {names!r}, not a list of names"
        if len(set(names)) != len(names):
            yield f"{name} names one twice: {list(names)}"
    for name in ("pc_range", "post_center_range"):
        limits = getattr(m, name)
        if not _numbers(limits, 6) or not all(low < high for low, high in zip(limits[:3], limits[3:])):
            yield f"{name} is {limits!r}, not x, y, z minimum and maximum in metres"
    threshold = m.score_threshold
    if threshold is not None and not (_number(threshold) and 0 <= threshold <= 1):
        yield f"score_threshold is {threshold!r}, neither None nor in 0..1"
    if m.plan_hash is not None and not isinstance(m.plan_hash, str):
        yield f"plan_hash is {m.plan_hash!r}, neither None nor text"
    yield from _image_complaints(m.image)
    yield from _memory_complaints(m)
    yield from _signature_complaints(m)


def _image_complaints(image: Any) -> Iterator[str]:
    for name in ("source_size", "resized_size", "size", "crop_offset"):
        least = -(1 << 31) if name == "crop_offset" else 1  # a crop may begin outside: those pixels are black
        value = getattr(image, name)
        if not isinstance(value, tuple) or len(value) != 2 or not all(_count(item, least) for item in value):
            yield f"image.{name} is {value!r}, not two whole numbers of pixels"
    if not _numbers(image.mean, 3) or not _numbers(image.std, 3) or min(image.std) <= 0:
        yield f"image.mean {image.mean!r} and image.std {image.std!r} must be three numbers each, std positive"
    if image.channel_order not in ("RGB", "BGR"):
        yield f"image.channel_order is {image.channel_order!r}, neither RGB nor BGR"
    if image.interpolation != "pil_bicubic":
        yield f"image.interpolation is {image.interpolation!r}; this release has pil_bicubic"


def _memory_complaints(m: Any) -> Iterator[str]:
    memory = m.memory
    for name in ("pre_length", "post_length", "num_propagated"):
        if not _count(getattr(memory, name), 0):
            yield f"memory.{name} is {getattr(memory, name)!r}, not a whole number of rows"
    if not memory.num_propagated <= memory.pre_length <= memory.post_length:
        yield (
            f"memory has num_propagated {memory.num_propagated}, pre_length {memory.pre_length} and post_length "
            f"{memory.post_length}, which must not decrease"
        )


def _signature_complaints(m: Any) -> Iterator[str]:
    inputs = {spec.name: spec.shape for engine in m.engines.values() for spec in engine.inputs}
    outputs = {spec.name: spec.shape for engine in m.engines.values() for spec in engine.outputs}
    classes, cameras, rows = len(m.class_names), len(m.camera_names), m.levels * m.num_queries
    of_last = {
        "native": lambda size: (m.levels, 1, m.num_queries, size),
        "autoware": lambda size: (1, size, rows),
    }[m.layout]
    batch = 1 if inputs.get("img", ())[1:2] == (1,) else cameras  # an image encoder may take one camera at a time
    expected: Mapping[str, tuple] = {
        "img": (1, batch, 3, *m.image.size),
        "all_cls_scores": of_last(classes),
        "all_bbox_preds": of_last(10),
    }
    for name, shape in expected.items():
        found = inputs.get(name, outputs.get(name))
        if found != shape:
            yield (
                f"{name} of the graphs has shape {found}, but {classes} classes, {cameras} cameras, "
                f"num_queries {m.num_queries}, levels {m.levels}, layout {m.layout}, size {m.image.size} make {shape}"
            )
    for prefix, specs, length in (
        ("pre_memory_", inputs, m.memory.pre_length),
        ("post_memory_", outputs, m.memory.post_length),
    ):
        for name, shape in specs.items():
            if name.startswith(prefix) and shape[1] != length:
                yield f"memory.{prefix.partition('_')[0]}_length is {length}, {name} of the graphs has {shape[1]} rows"


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, tuple) and len(values) == count and all(_number(value) for value in values)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
