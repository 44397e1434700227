"""The full and the cached step as modules with flat, named tensors, and any such module as an ONNX model.

In: a model and a plan. Out: one :class:`StepGraph` per variant, whose inputs and outputs are tensors in a fixed order
with fixed names, and its ONNX model. Never: writes a file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript import optimizer
from torch import Tensor, nn

from tc_deploy.errors import ExportError, first_line
from tc_deploy.groups import TokenGroup, running_variants, token_groups
from tc_deploy.manifest import (
    FORECAST_WEIGHTS,
    MODEL_BATCH,
    MODULE_END,
    SAMPLE,
    STEPS,
    TOKEN_INDEX,
    history_name,
    history_of,
    rows_name,
    variant_name,
)
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.forward import OUTPUT, cached_tensors, run_cached, run_full, run_open
from tc_deploy.types import Precision

OPSETS = {Precision.FP32: 20, Precision.FP16: 20, Precision.BF16: 22}
"""The lowest that knows every operator for the type: Conv takes bf16 from 22 on."""
EXAMPLE_BATCH = 2
"""Samples to export a dynamic batch with: of one the exporter would make a constant."""
FOLDED_ELEMENTS = 2**26
"""Largest constant that export computes once, so that no step does: rotary tables and sine-cosine positions follow from
the token grid alone. PyTorch's exporter stops at 2**18, which FLUX's 4608 x 128 exceeds."""


class NamedGraph(nn.Module):
    """What an exporter wants: positional tensors in, a tuple of tensors out, and what they are called.

    What the graph is made of stands in its attribute ``module``, after whose parameters its weights are named.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    title: str
    """What messages call it."""
    batch_axis = MODEL_BATCH
    """Name of the batch axis where it is left open."""
    folded_elements = FOLDED_ELEMENTS

    def is_shared(self, name: str) -> bool:  # noqa: ARG002 - a variant has such an input
        """Whether an input has no batch axis."""
        return False

    def open_axes(self, name: str) -> dict[int, str]:
        """The axes of an input that can be left open, and their names."""
        return {} if self.is_shared(name) else {0: self.batch_axis}

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs by name; the exporter is told that they have one batch.

        Without being told it gives every input a batch of its own, which views that mix two cannot have.
        """
        given = dict(zip(self.input_names, tensors, strict=True))
        for name, tensor in given.items():
            if not self.is_shared(name):
                torch._check(tensor.shape[0] == tensors[0].shape[0])  # type: ignore[no-untyped-call]
        return given


class ModelGraph(NamedGraph):
    """A graph that runs a step of the model."""

    model: DiffusionTransformer
    cache: CacheRecord
    stem: str
    """Of its file."""
    groups: tuple[TokenGroup, ...] = ()
    """Blocks whose number of tokens is open."""

    def is_shared(self, name: str) -> bool:
        """Whether an input has no batch axis: the token index of a family whose samples share it."""
        return history_of(name)[0] == TOKEN_INDEX and self.model.family.shares_index

    def history(self, given: Mapping[str, Tensor], names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Of the inputs, the caches of the last full steps, latest first."""
        ages = range(self.cache.forecast_order + 1)
        return [{name: given[history_name(name, age)] for name in names} for age in ages]


class StepGraph(ModelGraph):
    """One variant of a step.

    Args:
        model: the model.
        cache: keep counts, reuse, attention, forecast order.
        variant: 0 for the full step, 1 or 2 for the cached step of that phase.
        phases: the phases in use; the full step's outputs are what their cached steps read.
    """

    def __init__(self, model: DiffusionTransformer, cache: CacheRecord, variant: int, phases: Sequence[int]) -> None:
        super().__init__()
        self.module = model.module
        self.model, self.cache, self.variant = model, cache, variant
        self.title, self.stem = f"variant {variant}", variant_name(variant)
        depth = cache.forecast_order + 1
        if variant == FULL:
            self.cache_names = cached_tensors(model, cache, phases)
            self.input_names = model.input_names
            self.output_names = (SAMPLE, *self.cache_names)
            return
        self.cache_names = cached_tensors(model, cache, (variant,))
        self.history_names = tuple(history_name(name, age) for age in range(depth) for name in self.cache_names)
        self.pruned = pruned_blocks(cache.keep_counts[variant - 1], model.geometry.tokens)
        self.input_names = (
            *(() if cache.skips_model(variant) else model.input_names),
            *((FORECAST_WEIGHTS,) if depth > 1 and self.cache_names else ()),
            *((TOKEN_INDEX,) if self.pruned else ()),
            *self.history_names,
        )
        self.output_names = (SAMPLE,)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the step on tensors in the order of ``input_names``; returns them in the order of ``output_names``."""
        given = self.named(tensors)
        inputs = {name: given[name] for name in self.model.input_names if name in given}
        if self.variant == FULL:
            sample, noted = run_full(self.model, self.cache, inputs)
            return (sample, *(noted[name] for name in self.cache_names))
        history = self.history(given, self.cache_names)
        weights = given.get(FORECAST_WEIGHTS, torch.ones(1, 1))
        sample = run_cached(self.model, self.cache, self.variant, inputs, history, weights, given.get(TOKEN_INDEX))
        return (sample,)


class OpenStepGraph(ModelGraph):
    """All variants that run the model as one graph, whose token counts are open.

    Args:
        model: the model.
        cache: keep counts, reuse, attention, forecast order.
        phases: the phases in use.
    """

    title, stem = "the graph of all variants", STEPS

    def __init__(self, model: DiffusionTransformer, cache: CacheRecord, phases: Sequence[int]) -> None:
        super().__init__()
        self.module = model.module
        self.model, self.cache = model, cache
        self.groups = token_groups(cache, phases, model.geometry.tokens)
        self._axes = {group.index_name: group.axis for group in self.groups}
        self.cache_names = cached_tensors(model, cache, phases)
        depth = cache.forecast_order + 1
        # The model's own output is read by cached steps without the model alone.
        self._read = [name for name in self.cache_names if name != OUTPUT]
        given = [name for group in self.groups for name in group.input_names]
        self.input_names = (
            *model.input_names,
            *((FORECAST_WEIGHTS,) if depth > 1 and self._read else ()),
            *given,
            *(history_name(name, age) for age in range(depth) for name in self._read),
        )
        self.output_names = (SAMPLE, *(rows_name(name) if name in self._read else name for name in self.cache_names))

    def open_axes(self, name: str) -> dict[int, str]:
        """The batch, and of a group's index (batch, blocks, tokens) or (blocks, tokens) the tokens."""
        tokens = {1 if self.is_shared(name) else 2: self._axes[name]} if name in self._axes else {}
        return super().open_axes(name) | tokens

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run a step on tensors in the order of ``input_names``; returns them in the order of ``output_names``."""
        given = self.named(tensors)
        inputs = {name: given[name] for name in self.model.input_names}
        history = self.history(given, self._read)
        weights = given.get(FORECAST_WEIGHTS, torch.ones(1, 1))
        sample, noted = run_open(self.model, self.cache, self.groups, inputs, history, weights, given)
        return (sample, *(noted[name] for name in self.cache_names))


def step_graphs(
    model: DiffusionTransformer, cache: CacheRecord, phases: Sequence[int], *, one_graph: bool
) -> dict[int, ModelGraph]:
    """The graph of every variant in use; with ``one_graph`` those that run the model have the same one."""
    graphs: dict[int, ModelGraph] = {variant: StepGraph(model, cache, variant, phases) for variant in (FULL, *phases)}
    if one_graph:
        graphs |= dict.fromkeys(running_variants(cache, phases), OpenStepGraph(model, cache, phases))
    return graphs


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
            program = torch.onnx.export(
                graph.eval(),
                arguments,
                dynamo=True,
                opset_version=OPSETS[precision],
                input_names=list(graph.input_names),
                output_names=list(graph.output_names),
                dynamic_shapes=(axes,) if any(axes) else None,
                custom_translation_table=_TRANSLATIONS,
                external_data=False,
                optimize=True,
            )
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


def _open_axes(graph: NamedGraph, *, dynamic_batch: bool) -> tuple[dict[int, Any], ...]:
    """The axes of each input that the exporter is to leave open."""
    opened = [graph.open_axes(name) for name in graph.input_names]
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
        if fixed and fixed[0] == 0:
            raise ExportError(
                f"{graph.title}: the batch axis of {name} came out fixed at {shapes[name][0]}; the model's forward"
                " asks for the batch size as a number (len(x), int(...)), x.shape[0] leaves it open; mend that, or"
                " export with --static-batch"
            )
        if fixed:
            raise ExportError(
                f"{graph.title}: the number of tokens of {name} came out fixed at {shapes[name][fixed[0]]}, so the"
                " model's forward asks for it as a number; mend that, or export without --one-graph"
            )


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


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:  # noqa: ARG001 - aten's
    """A single-operand permutation (unpatchify) is a Transpose: engines run it faster, and Einsum has no bf16."""
    left, _, right = equation.replace(" ", "").partition("->")
    if "," not in left and len(set(left)) == len(left) and sorted(left) == sorted(right):
        return op.Transpose(tensors[0], perm=[left.index(axis) for axis in right])
    return op.Einsum(*tensors, equation=equation)


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.squeeze.dim: _squeeze_dim,
    torch.ops.aten.einsum.default: _einsum,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and deprecation warnings of its own code away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
