"""What an ONNX file asks an engine for, seen without the onnx library, which a machine that serves has not.

In: a graph's file. Out: nothing, or one line: it names another file than the bundle's weights, whose checksum nobody
knows; its tensors are others than the manifest's; it uses operators that are not ONNX's own, which may open files too.
The file is walked as the protocol buffer that it is (field numbers as in onnx.proto), and every place in which a tensor
can stand is visited. Never: reads a weight.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tc_deploy.errors import BundleError
from tc_deploy.manifest import WEIGHTS, GraphRecord, TensorRecord

_MAX_DEPTH: Final = 64
_HOLDS: Final = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
"""The messages that can hold a tensor, by the field in which they stand."""
_MODEL_GRAPH, _GRAPH_TENSOR, _GRAPH_INPUT, _GRAPH_OUTPUT, _NODE_DOMAIN, _TENSOR_EXTERNAL = 7, 5, 11, 12, 7, 13
_OWN_DOMAINS: Final = (b"", b"ai.onnx")
_TYPES: Final = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


def check_graph_file(path: Path, graphs: Sequence[GraphRecord]) -> None:
    """Check an ONNX file before an engine opens it.

    Args:
        path: the file, beside the bundle's weights.
        graphs: what the manifest says of it; several where variants share it.

    Raises:
        BundleError: it is no ONNX file, names another file, or is another graph than the manifest says.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            weights = path.with_name(WEIGHTS)
            _check_tensors(data, weights.stat().st_size if weights.is_file() else 0)
            inputs, outputs = _signature(data)
        for graph in graphs:
            for what, found, said in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
                _check_signature(what, found, said)
    except (OSError, ValueError, IndexError) as error:
        raise BundleError(f"{path}: {error}; do not use it, export again") from None


def weights_of(path: Path) -> dict[int, tuple[int, int]]:
    """The weights that a graph reads from the bundle's file: by where each begins, its bytes and its numbers.

    Args:
        path: a graph's file that has been checked.
    """
    found: dict[int, tuple[int, int]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for graph in _messages(data, 0, len(data), _MODEL_GRAPH):
            for start, end in _messages(data, *graph, _GRAPH_TENSOR):
                fields = list(_fields(data, start, end))
                entries = dict(_entry(data, field[2], field[3]) for field in fields if field[0] == _TENSOR_EXTERNAL)
                if entries:
                    numbers = math.prod(value for number, value, begin, _ in fields if number == 1 and not begin)
                    found[int(entries.get(b"offset", b"0"))] = (int(entries[b"length"]), numbers)
    return found


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: number, value, and where its bytes begin and end (of numbers nowhere).

    Raises:
        ValueError: it is no such message.
    """
    while start < end:
        key, start = _varint(data, start, end)
        number, kind = key >> 3, key & 7
        value = begin = 0
        match kind:  # 0: a varint, 1: 64 bits, 2: bytes behind their length, 5: 32 bits
            case 0:
                value, start = _varint(data, start, end)
            case 1:
                start += 8
            case 2:
                size, begin = _varint(data, start, end)
                start = begin + size
            case 5:
                start += 4
            case _:
                raise ValueError("no ONNX file")
        if start > end:
            raise ValueError("no ONNX file, or cut short")
        yield number, value, begin, start if begin else 0


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            break
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("no ONNX file, or cut short")


def _check_tensors(data: mmap.mmap, weights_bytes: int) -> None:
    """Visit every tensor and every operator, however deep.

    Raises:
        ValueError: one refers to another file, or outside of the weights; an operator is not ONNX's own.
    """
    todo = [("Model", 0, len(data), 0)]
    while todo:
        kind, start, end, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"graphs are nested more than {_MAX_DEPTH} deep")
        entries = {}
        for number, _, begin, stop in _fields(data, start, end):
            inner = _HOLDS.get(kind, {}).get(number)
            if inner is not None and begin:
                todo.append((inner, begin, stop, depth + 1))
            elif kind == "Node" and number == _NODE_DOMAIN and data[begin:stop] not in _OWN_DOMAINS:
                raise ValueError(f"an operator of {data[begin:stop]!r}, which is not ONNX's own")
            elif kind == "Tensor" and number == _TENSOR_EXTERNAL:
                key, value = _entry(data, begin, stop)
                if key in entries:
                    raise ValueError(f"a tensor says {key!r} of its data twice")
                entries[key] = value
        if entries:
            _check_external(entries, weights_bytes)


def _entry(data: mmap.mmap, start: int, end: int) -> tuple[bytes, bytes]:
    parts = {number: data[begin:stop] for number, _, begin, stop in _fields(data, start, end)}
    return parts.get(1, b""), parts.get(2, b"")


def _check_external(entries: dict[bytes, bytes], weights_bytes: int) -> None:
    location = entries.get(b"location", b"")
    if location != WEIGHTS.encode():
        raise ValueError(f"a tensor's data lies in {location.decode(errors='replace')!r}, expected {WEIGHTS}")
    places = [entries.get(key, b"0") for key in (b"offset", b"length")]
    # To Python "1_0" is ten, to an engine one.
    if not all(place.isdigit() for place in places):
        raise ValueError(f"a tensor's data lies at {b', '.join(places).decode(errors='replace')}, expected two numbers")
    offset, length = map(int, places)
    if offset + length > weights_bytes:
        raise ValueError(
            f"a tensor's data lies at {offset}..{offset + length} of {WEIGHTS}, which has {weights_bytes} bytes"
        )


_Signature = dict[str, tuple[str, tuple[int | str, ...]]]


def _signature(data: mmap.mmap) -> tuple[_Signature, _Signature]:
    """The graph's inputs and outputs, type and shape by name.

    Raises:
        ValueError: one is there twice.
    """
    inputs: _Signature = {}
    outputs: _Signature = {}
    for graph in _messages(data, 0, len(data), _MODEL_GRAPH):
        for field, _, begin, stop in _fields(data, *graph):
            if field in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                name, kind = _value(data, begin, stop)
                tensors = inputs if field == _GRAPH_INPUT else outputs
                if name in tensors:
                    raise ValueError(f"the tensor {name} is there twice")
                tensors[name] = kind
    return inputs, outputs


def _value(data: mmap.mmap, start: int, end: int) -> tuple[str, tuple[str, tuple[int | str, ...]]]:
    """A ValueInfoProto: name = 1, type = 2 with tensor_type = 1, of that elem_type = 1 and shape = 2 with dim = 1."""
    name, element, shape = "", 0, []
    for number, _, begin, stop in _fields(data, start, end):
        if number == 1:
            name = data[begin:stop].decode()
        elif number == 2:
            for tensor in _messages(data, begin, stop, 1):
                for field, value, first, last in _fields(data, *tensor):
                    if field == 1:
                        element = value
                    elif field == 2:
                        shape = [_size(data, *size) for size in _messages(data, first, last, 1)]
    return name, (_TYPES.get(element, f"type {element}"), tuple(shape))


def _messages(data: mmap.mmap, start: int, end: int, wanted: int) -> list[tuple[int, int]]:
    return [(begin, stop) for number, _, begin, stop in _fields(data, start, end) if number == wanted and begin]


def _size(data: mmap.mmap, start: int, end: int) -> int | str:
    for number, value, begin, stop in _fields(data, start, end):
        if number == 1:
            return value
        if number == 2:
            return data[begin:stop].decode()
    return ""


def _check_signature(what: str, found: _Signature, said: Sequence[TensorRecord]) -> None:
    """Check that a graph has the tensors that the manifest gives it, where the file fixes a size of that size.

    Raises:
        ValueError: it has others.
    """
    names = {tensor.name for tensor in said}
    if names != found.keys():
        other = min(names ^ found.keys())
        raise ValueError(f"{what}: {other} is not in both, the graph and the manifest")
    for tensor in said:
        kind, shape = found[tensor.name]
        fits = len(shape) == len(tensor.shape) and all(
            mine == size or isinstance(mine, str) for mine, size in zip(shape, tensor.shape, strict=True)
        )
        if kind != tensor.dtype or not fits:
            raise ValueError(
                f"{what}: {tensor.name} is {kind} {shape}, and {tensor.dtype} {tensor.shape} by the manifest"
            )
