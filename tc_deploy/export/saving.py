"""A graph to its file, and to what the manifest says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from tc_deploy.golden import GoldenGraph
from tc_deploy.manifest import ONNX_FOLDER, GraphRecord, TensorName, TensorRecord


@dataclass(frozen=True, kw_only=True)
class ExportedPart:
    """A graph that was exported beside the steps'."""

    graph: GraphRecord
    samples: GoldenGraph | None
    """What engines are validated by; None where there is nothing to compare with."""


def saved_graph(model: ir.Model, path: Path, tensors: Iterable[TensorName]) -> GraphRecord:
    """Write a graph whose weights are packed.

    Args:
        model: the graph.
        path: the file.
        tensors: what its inputs and outputs are for.

    Returns:
        How the manifest names it, not compared with anything yet.
    """
    ir.save(model, path)
    names = {tensor.name: tensor for tensor in tensors}
    inputs, outputs = (
        tuple(_tensor(value, names) for value in values) for values in (model.graph.inputs, model.graph.outputs)
    )
    return GraphRecord(file=f"{ONNX_FOLDER}/{path.name}", inputs=inputs, outputs=outputs, max_abs_error=None)


def _tensor(value: ir.Value, names: Mapping[str, TensorName]) -> TensorRecord:
    assert value.dtype is not None, "the exporter writes a type"
    assert value.shape is not None, "and a shape"
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    named = names[str(value.name)]
    return TensorRecord(**dict(named), dtype=str(value.dtype.numpy()), shape=shape)
