"""A module with flat, named tensors as an ONNX model.

In: a :class:`tc_deploy.tokencache.graphs.NamedGraph` and example tensors. Out: its ONNX model. Never: writes a file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript import optimizer
from torch import Tensor

from tc_deploy.errors import ExportError, first_line
from tc_deploy.export.folding import folded_program
from tc_deploy.manifest import MODULE_END
from tc_deploy.precisions import PRECISIONS
from tc_deploy.tokencache.graphs import NamedGraph
from tc_deploy.types import Precision

_FIXED = re.compile(r"marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
"""What PyTorch says of an axis that was to be left open."""
_BOUNDED = re.compile(r"\w+ = Dim\('\w+', max=\d+\)")
"""What it suggests where a forward asks whether such an axis is large."""
EXAMPLE_BATCH = 2
"""Samples to export a dynamic batch with: of one the exporter would make a constant."""


def onnx_from_graph(
    graph: NamedGraph,
    example: Mapping[str, Tensor],
    *,
    dynamic_batch: bool,
    precision: Precision = Precision.FP32,
) -> ir.Model:
    """Export one graph.

    Args:
        graph: the graph, such as a variant of a step.
        example: a tensor for each of ``graph.input_names``; at least 2 samples where the batch is dynamic.
        dynamic_batch: leave the batch axis open; otherwise it is fixed to the example's. Token counts are static,
            unless the graph itself leaves them open.
        precision: what the model's products are in now (``half_products``); nothing is converted here.

    Returns:
        The model with its weights still in memory (they are the module's own tensors, not copies), inputs and
        outputs in order and named, without the exporter's notes on local files.

    Raises:
        ExportError: PyTorch's exporter refuses the graph, or fixes an axis that was to be left open.
        MemoryError: the exporter got no memory.
    """
    axes = _open_axes(graph, dynamic_batch=dynamic_batch)
    arguments = tuple(example[name] for name in graph.input_names)
    try:
        with _quiet(), torch.no_grad():
            traced = _traced(graph.eval(), arguments, (axes,) if any(axes) else None)
            traced = folded_program(traced, graph.folded_elements)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=PRECISIONS[precision].opset,
                input_names=list(graph.input_names),
                output_names=list(graph.output_names),
                dynamic_shapes=(axes,) if any(axes) else None,
                custom_translation_table=_TRANSLATIONS,
                external_data=False,
                optimize=True,
            )
    except torch._dynamo.exc.UserError as error:
        fixed = _FIXED.search(str(error))
        if fixed is None:
            raise ExportError(f"PyTorch cannot export {graph.title}: {first_line(error)}") from error
        _refuse_fixed(graph, axes, fixed.group(1), fixed.group(2), error)
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError(f"exporting {graph.title}") from error  # nothing is wrong with the graph
        # The exporter's own words are advice on how to report a defect; what it met is the cause.
        raise ExportError(f"PyTorch cannot export {graph.title}: {first_line(error.__cause__ or error)}") from error
    if program is None:
        raise ExportError(f"PyTorch exported nothing for {graph.title}")
    model: ir.Model = program.model
    _check_dynamic(model, graph, axes)
    with _quiet():
        optimizer.optimize(model, input_size_limit=graph.folded_elements, output_size_limit=graph.folded_elements)
    _strip_notes(model)
    return model


def _traced(graph: NamedGraph, arguments: tuple[Tensor, ...], axes: Any) -> Any:
    """PyTorch's program; where a forward takes another way for large batches, that of small ones.

    So does diffusers' upsampling from 64 on, which changes how it computes and nothing else.
    """
    try:
        return torch.export.export(graph, arguments, dynamic_shapes=axes, strict=False)
    except torch._dynamo.exc.UserError as error:
        bound = _BOUNDED.search(str(error))
        if bound is None:
            raise
        refine = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes
        bounded = refine(f"Suggested fixes:\n{bound[0]}", axes)
        return torch.export.export(graph, arguments, dynamic_shapes=bounded, strict=False)


def _open_axes(graph: NamedGraph, *, dynamic_batch: bool) -> tuple[dict[int, Any], ...]:
    """The axes of each input that the exporter is to leave open."""
    opened = [graph.open_axes(tensor) for tensor in graph.inputs]
    # At least one, and never a range that some operator could narrow.
    dims = {size: torch.export.Dim(size, min=1) for axes in opened for size in axes.values()}
    return tuple(
        {axis: dims[size] for axis, size in axes.items() if dynamic_batch or size != graph.batch_axis}
        for axes in opened
    )


def _check_dynamic(model: ir.Model, graph: NamedGraph, axes: Sequence[Mapping[int, Any]]) -> None:
    """See that the axes are open: the exporter fixes one without a word where a forward asks for its number."""
    shapes = {str(value.name): list(value.shape or []) for value in model.graph.inputs}
    for name, opened in zip(graph.input_names, axes, strict=True):
        fixed = [axis for axis in opened if isinstance(shapes[name][axis], int)]
        if fixed:
            _refuse_fixed(graph, axes, opened[fixed[0]].__name__, shapes[name][fixed[0]])


def _refuse_fixed(
    graph: NamedGraph, axes: Sequence[Mapping[int, Any]], axis: str, size: object, cause: Exception | None = None
) -> NoReturn:
    """Say that a forward asks for a number that was to be left open.

    Raises:
        ExportError: always.
    """
    names = zip(graph.input_names, axes, strict=True)
    name = next(name for name, opened in names if any(dim.__name__ == axis for dim in opened.values()))
    if axis == graph.batch_axis:
        raise ExportError(
            f"{graph.title}: the batch axis of {name} came out fixed at {size}; the model's forward asks for the batch"
            " size as a number (len(x), int(...)), x.shape[0] leaves it open; mend that, or export with --static-batch"
        ) from cause
    raise ExportError(
        f"{graph.title}: the number of tokens of {name} came out fixed at {size}, so the model's forward asks for it as"
        " a number; mend that, or export without --one-graph"
    ) from cause


def _strip_notes(model: ir.Model) -> None:
    """Remove stack traces and docs: they are twelve times the graph's size, name local files and vary by machine.

    What is worth keeping of them, the module that a node came from, becomes part of the node's name.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.name = f"{_module_of(node)}{MODULE_END}{node.outputs[0].name}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _module_of(node: ir.Node) -> str:
    """The innermost module whose forward made a node: ``transformer_blocks.1.attn1.to_q``; empty outside of all."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    modules = [scope for scope in scopes if scope.startswith("module.")]
    return modules[-1].removeprefix("module.") if modules else ""


def _squeeze_dim(self: Any, dim: int) -> Any:
    """aten::squeeze.dim leaves an axis that is not 1 alone; onnxscript 0.7.2 emits Squeeze all the same."""
    if len(self.shape) == 0 or self.shape[dim] != 1:
        return op.Identity(self)
    return op.Squeeze(self, [dim])  # type: ignore[arg-type]  # becomes a constant


def _masked_fill(self: Any, mask: Any, value: float) -> Any:
    """aten::masked_fill of booleans: ONNX Runtime has no Where for them."""
    if self.dtype == ir.DataType.BOOL:
        return op.Or(self, mask) if value else op.And(self, op.Not(mask))
    return op.Where(mask, op.CastLike(op.Constant(value_float=float(value)), self), self)  # type: ignore[type-var]


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:  # noqa: ARG001 - aten's
    """A single-operand permutation (unpatchify) is a Transpose: engines run it faster, and Einsum has no bf16."""
    left, _, right = equation.replace(" ", "").partition("->")
    if "," not in left and len(set(left)) == len(left) and sorted(left) == sorted(right):
        return op.Transpose(tensors[0], perm=[left.index(axis) for axis in right])
    return op.Einsum(*tensors, equation=equation)


def _pad_sequence(
    sequences: Sequence[Any], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Any:
    """aten::pad_sequence of fixed lengths: PyTorch's own parts end in ScatterElements, which TensorRT-RTX refuses."""
    longest = max(sequence.shape[0] for sequence in sequences)
    batch_axis = [0 if batch_first else 1]
    rows = []
    for sequence in sequences:
        missing, others = longest - sequence.shape[0], [0] * (len(sequence.shape) - 1)
        if missing:
            before, after = (missing, 0) if padding_side == "left" else (0, missing)
            value = op.CastLike(op.Constant(value_float=float(padding_value)), sequence)  # type: ignore[type-var]
            pads = [before, *others, after, *others]
            sequence = op.Pad(sequence, pads, value)  # type: ignore[arg-type]  # noqa: PLW2901
        rows.append(op.Unsqueeze(sequence, batch_axis))  # type: ignore[arg-type]  # becomes a constant
    return op.Concat(*rows, axis=batch_axis[0])


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.squeeze.dim: _squeeze_dim,
    torch.ops.aten.einsum.default: _einsum,
    torch.ops.aten.masked_fill.Scalar: _masked_fill,
    torch.ops.aten.pad_sequence.default: _pad_sequence,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and deprecation warnings of its own code away from the user.

    And the tracebacks of what it passes over, as where memory runs out: what fails in the end is raised.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
