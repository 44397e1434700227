"""The full and the cached step as modules with flat, named tensors: what is exported, and what PyTorch runs as engines.

In: a model and a plan. Out: one :class:`StepGraph` per variant, whose inputs and outputs are tensors in a fixed order
with fixed names. Never: exports, or writes a file.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tc_deploy.groups import TokenGroup, running_variants, token_groups
from tc_deploy.manifest import (
    MODEL_BATCH,
    STEPS,
    Role,
    TensorName,
    cache_rows_tensor,
    cache_tensor,
    model_inputs,
    names_of,
    only_tensor,
    variant_name,
)
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.forward import OUTPUT, cached_tensors, run_cached, run_full, run_open

FOLDED_ELEMENTS = 2**26
"""Largest constant that export computes once, so that no step does: rotary tables and sine-cosine positions follow from
the token grid alone. PyTorch's exporter stops at 2**18, which FLUX's 4608 x 128 exceeds."""


class NamedGraph(nn.Module):
    """What an exporter wants: positional tensors in, a tuple of tensors out, and what they are called.

    What the graph is made of stands in its attribute ``module``, after whose parameters its weights are named.
    """

    inputs: tuple[TensorName, ...]
    outputs: tuple[TensorName, ...]
    title: str
    """What messages call it."""
    batch_axis = MODEL_BATCH
    """Name of the batch axis where it is left open."""
    folded_elements = FOLDED_ELEMENTS

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return names_of(self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        return names_of(self.outputs)

    def is_shared(self, tensor: TensorName) -> bool:  # noqa: ARG002 - a variant has such an input
        """Whether an input has no batch axis."""
        return False

    def open_axes(self, tensor: TensorName) -> dict[int, str]:
        """The axes of an input that can be left open, and their names."""
        return {} if self.is_shared(tensor) else {0: self.batch_axis}

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs by name; the exporter is told that they have one batch.

        Without being told it gives every input a batch of its own, which views that mix two cannot have.
        """
        for named, tensor in zip(self.inputs, tensors, strict=True):
            if not self.is_shared(named):
                torch._check(tensor.shape[0] == tensors[0].shape[0])  # type: ignore[no-untyped-call]
        return dict(zip(self.input_names, tensors, strict=True))


class ModelGraph(NamedGraph):
    """A graph that runs a step of the model."""

    model: DiffusionTransformer
    cache: CacheRecord
    stem: str
    """Of its file."""
    groups: tuple[TokenGroup, ...] = ()
    """Blocks whose number of tokens is open."""

    @property
    def identity(self) -> tuple[Hashable, ...]:
        """Two graphs of one model that have the same compute the same."""
        open_blocks = tuple(group.blocks for group in self.groups)
        return (self.inputs, self.outputs, self.cache.reuse, self.cache.attention, open_blocks)

    def is_shared(self, tensor: TensorName) -> bool:
        """Whether an input has no batch axis: the token index of a family whose samples share it."""
        return tensor.role is Role.TOKEN_INDEX and self.model.family.shares_index

    def history(self, given: Mapping[str, Tensor], names: Sequence[str]) -> list[dict[str, Tensor]]:
        """Of the inputs, the caches of the last full steps, latest first."""
        ages = range(self.cache.forecast_order + 1)
        return [{name: given[cache_tensor(name, age).name] for name in names} for age in ages]


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
            self.inputs = model_inputs(model.input_names)
            self.outputs = (only_tensor(Role.SAMPLE), *map(cache_tensor, self.cache_names))
            return
        self.cache_names = cached_tensors(model, cache, (variant,))
        self.pruned = pruned_blocks(cache.keep_counts[variant - 1], model.geometry.tokens)
        self.inputs = (
            *(() if cache.skips_model(variant) else model_inputs(model.input_names)),
            *((only_tensor(Role.FORECAST_WEIGHTS),) if depth > 1 and self.cache_names else ()),
            *((only_tensor(Role.TOKEN_INDEX),) if self.pruned else ()),
            *(cache_tensor(name, age) for age in range(depth) for name in self.cache_names),
        )
        self.outputs = (only_tensor(Role.SAMPLE),)

    @property
    def identity(self) -> tuple[Hashable, ...]:
        """With the number of tokens of each block, where some are computed and others not."""
        runs_some = self.variant != FULL and not self.cache.skips_model(self.variant)
        return (*super().identity, self.cache.keep_counts[self.variant - 1] if runs_some else None)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the step on tensors in the order of ``input_names``; returns them in the order of ``output_names``."""
        given = self.named(tensors)
        inputs = {name: given[name] for name in self.model.input_names if name in given}
        if self.variant == FULL:
            sample, noted = run_full(self.model, self.cache, inputs)
            return (sample, *(noted[name] for name in self.cache_names))
        history = self.history(given, self.cache_names)
        weights = given.get(Role.FORECAST_WEIGHTS, torch.ones(1, 1))
        sample = run_cached(self.model, self.cache, self.variant, inputs, history, weights, given.get(Role.TOKEN_INDEX))
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
        self._axes = {group.index: group.axis for group in self.groups}
        self.cache_names = cached_tensors(model, cache, phases)
        depth = cache.forecast_order + 1
        # The model's own output is read by cached steps without the model alone.
        self._read = [name for name in self.cache_names if name != OUTPUT]
        self.inputs = (
            *model_inputs(model.input_names),
            *((only_tensor(Role.FORECAST_WEIGHTS),) if depth > 1 and self._read else ()),
            *(tensor for group in self.groups for tensor in group.inputs),
            *(cache_tensor(name, age) for age in range(depth) for name in self._read),
        )
        left = (cache_rows_tensor(name) if name in self._read else cache_tensor(name) for name in self.cache_names)
        self.outputs = (only_tensor(Role.SAMPLE), *left)

    def open_axes(self, tensor: TensorName) -> dict[int, str]:
        """The batch, and of a group's index (batch, blocks, tokens) or (blocks, tokens) the tokens."""
        tokens = {1 if self.is_shared(tensor) else 2: self._axes[tensor]} if tensor in self._axes else {}
        return super().open_axes(tensor) | tokens

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run a step on tensors in the order of ``input_names``; returns them in the order of ``output_names``."""
        given = self.named(tensors)
        inputs = {name: given[name] for name in self.model.input_names}
        history = self.history(given, self._read)
        weights = given.get(Role.FORECAST_WEIGHTS, torch.ones(1, 1))
        sample, noted = run_open(self.model, self.cache, self.groups, inputs, history, weights, given)
        return (sample, *(noted[name] for name in self.cache_names))


def _keep_alike(cache: CacheRecord, one: int, other: int) -> bool:
    return cache.keep_counts[one - 1] == cache.keep_counts[other - 1]


def step_graphs(
    model: DiffusionTransformer, cache: CacheRecord, phases: Sequence[int], *, one_graph: bool
) -> dict[int, ModelGraph]:
    """The graph of every variant in use: one for two phases that keep alike, or with ``one_graph`` for all that run it.

    What differs between such phases, as which tokens are kept and the forecast's weights, a graph takes as input.
    """
    graphs: dict[int, ModelGraph] = {FULL: StepGraph(model, cache, FULL, phases)}
    for phase in phases:
        alike = [graphs[other] for other in phases if other < phase and _keep_alike(cache, other, phase)]
        graphs[phase] = alike[0] if alike else StepGraph(model, cache, phase, phases)
    if one_graph:
        graphs |= dict.fromkeys(running_variants(cache, phases), OpenStepGraph(model, cache, phases))
    return graphs
