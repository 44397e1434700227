"""Several graphs, one weights file: initializers go to ``weights.bin`` by content, once each.

A tensor that stands in three graphs (or twice in one) is written once, at a page boundary so that engines can map it.
Graphs are packed one after the other, so only one is in memory at a time; the decoder's and the text encoders' weights
are appended when the transformer is out of memory, and not compared with what is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

PAGE_BYTES = 4096
INLINE_BYTES = 1024
"""Smaller initializers (scales, shapes, axes) stay in the graph: engines fold them, and a page each would be waste."""

_Content: TypeAlias = tuple[str, tuple[int, ...]]
"""SHA-256 and shape."""


class WeightsFile:
    """The shared weights file while a bundle is written; use as a context manager.

    Args:
        path: the file to make, or to go on with; the graphs that refer to it must stand in the same folder.
        parameters: the model's parameters by name, after which folded copies are named (``<name>.T``).
    """

    def __init__(self, path: Path, parameters: Mapping[str, Tensor]) -> None:
        self.path = path
        self._parameters = parameters.keys()
        self._names = _names_by_content(parameters)
        self._offsets: dict[str, int] = {}
        self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def pack(self, model: ir.Model) -> None:
        """Move the initializers of ``model`` into the file; they are replaced by references into it."""
        taken = {name.removeprefix("module.") for name in model.graph.initializers}
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None:
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).hexdigest()
            name = self._name(str(value.name), (digest, tuple(tensor.shape.numpy())), taken)
            taken.add(name)
            value.name = name
            if tensor.nbytes < INLINE_BYTES:
                continue
            if digest not in self._offsets:
                self._file.write(bytes(-self._file.tell() % PAGE_BYTES))
                self._offsets[digest] = self._file.tell()
                self._file.write(data)
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._offsets[digest],
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=self.path.parent,
            )

    def _name(self, given: str, content: _Content, taken: Container[str]) -> str:
        """The parameter that an initializer is; one that the exporter folded and renamed is known by its content."""
        own = given.removeprefix("module.")
        if own in self._parameters:
            return own
        return next((name for name in self._names.get(content, ()) if name not in taken), own)


def _names_by_content(parameters: Mapping[str, Tensor]) -> dict[_Content, list[str]]:
    """Parameter names by content; a matrix also by its transpose, which exporters fold into the graph."""
    names: dict[_Content, list[str]] = {}
    for name, parameter in parameters.items():
        views = [(name, parameter)] + ([(f"{name}.T", parameter.t())] if parameter.ndim == 2 else [])
        for view_name, view in views:
            # Flat first: of a matrix of one row PyTorch takes the transpose for contiguous, whatever its strides.
            data = view.contiguous().flatten().view(torch.uint8)
            digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
            names.setdefault((digest, tuple(view.shape)), []).append(view_name)
    return names
