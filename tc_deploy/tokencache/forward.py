"""Full and cached steps of a token-cached model.

A full step is the model's own forward; on the way each branch's value (and, where needed, keys and values of the
self-attention) is noted: the cache. A cached step computes M of N image tokens per block and takes the others' values
from the caches of the last full steps, extrapolated by given weights. Text tokens are never pruned: a block that
computes any image token computes all text anew; one that computes none takes its text from the caches too, where a
later block reads it. Cached steps only read: caches are written by full steps alone, so a trajectory needs no cache
output, no copy and no run-time decision between two full steps.

Nothing here knows a schedule or a sampler. Everything runs under torch.export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tc_deploy.groups import TokenGroup
from tc_deploy.models.family import Block, DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.cache_points import BLOCK, cache_points
from tc_deploy.tokencache.passes import (
    KEY,
    VALUE,
    Cache,
    CachedPass,
    FullPass,
    OpenPass,
    SuperposedPass,
    cache_name,
    forecast,
    text_is_read,
    text_part,
)
from tc_deploy.types import Attention, Reuse

OUTPUT = "cache.output"
"""The cached tensor that is the model's own output, (B, output channels, ...)."""


def cached_tensors(model: DiffusionTransformer, cache: CacheRecord, phases: Sequence[int]) -> tuple[str, ...]:
    """The cached tensors that the cached steps of ``phases`` read, in the order in which the blocks run.

    A block that keeps all tokens reads none; keys and values are read only where some tokens are kept and others not;
    text rows only where a block keeps none and a later one keeps some.
    """
    tokens = model.geometry.tokens
    names = []
    running = [cache.keep_counts[phase - 1] for phase in phases if not cache.skips_model(phase)]
    for number, (_, block) in enumerate(model.described_blocks):
        image, text = _parts(block, cache.reuse)
        keeps = [keep_counts[number] for keep_counts in running]
        if any(keep < tokens for keep in keeps):
            names += [cache_name(number, part) for part in image]
        if any(not keep_counts[number] and text_is_read(keep_counts, number) for keep_counts in running):
            names += [cache_name(number, text_part(part)) for part in text]
        if cache.attention is Attention.ALL and any(0 < keep < tokens for keep in keeps):
            names += [cache_name(number, item.prefix + part) for item in block.attentions for part in (KEY, VALUE)]
    if len(running) < len(phases):
        names.append(OUTPUT)
    return tuple(names)


def _parts(block: Block, reuse: Reuse) -> tuple[list[str], list[str]]:
    """What is cached of a block's image rows and of its text rows."""
    if reuse is Reuse.RESIDUAL:
        return [BLOCK], [BLOCK] if block.gives.has_text else []
    calls = [(branch.name, rows) for branch in block.branches for rows in branch.calls]
    return [name for name, rows in calls if rows.has_image], [name for name, rows in calls if rows.has_text]


def run_full(
    model: DiffusionTransformer, cache: CacheRecord, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One full step.

    Args:
        model: the model.
        cache: says what a branch is (``reuse``) and whether keys and values are noted (``attention``).
        inputs: the model's inputs by name.

    Returns:
        The model's own output, bit for bit, and the cache.
    """
    points = FullPass(model.geometry.tokens, keys=cache.attention is Attention.ALL)
    with cache_points(model, cache.reuse, points):
        output = model.forward(inputs)
    return output, points.cache | {OUTPUT: output}


def run_cached(
    model: DiffusionTransformer,
    cache: CacheRecord,
    phase: int,
    inputs: Mapping[str, Tensor],
    history: Sequence[Cache],
    weights: Tensor,
    token_index: Tensor | None,
) -> Tensor:
    """One cached step.

    Args:
        model: the model.
        cache: keep counts, reuse, attention, forecast order.
        phase: 1 or 2, whose keep counts hold.
        inputs: the model's inputs by name; not read by a step that skips the model.
        history: caches of the last ``forecast_order + 1`` full steps, latest first.
        weights: (B, forecast_order + 1) float32, how the history is combined: a row of ``StepTables``.
        token_index: (B, sum of M over pruned blocks) int, the tokens each block computes, blocks side by side, or one
            row (sum of M,) for all samples, as a family that ``shares_index`` needs; None where no block is pruned.
            A row's order does not matter; a token must not stand twice.

    Returns:
        The model's output, (B, output channels, ...).
    """
    if cache.skips_model(phase):
        return forecast([step[OUTPUT] for step in history], weights)
    keep_counts = cache.keep_counts[phase - 1]
    pruned = pruned_blocks(keep_counts, model.geometry.tokens)
    index: dict[int, Tensor] = {}
    if pruned:
        assert token_index is not None, "check_plan sees to it that a phase that prunes has an index table"
        rows = token_index.long() if token_index.ndim == 2 else token_index.long()[None]
        parts = torch.split(rows, [keep_counts[block] for block in pruned], dim=1)
        index = dict(zip(pruned, parts, strict=True))
    points = CachedPass(cache, keep_counts, model.geometry.tokens, index, history, weights)
    with cache_points(model, cache.reuse, points):
        return model.forward(inputs)


def run_open(
    model: DiffusionTransformer,
    cache: CacheRecord,
    groups: Sequence[TokenGroup],
    inputs: Mapping[str, Tensor],
    history: Sequence[Cache],
    weights: Tensor,
    given: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of any variant that runs the model: which one, the groups' inputs say.

    Args:
        model: the model.
        cache: reuse, attention, forecast order.
        groups: of the plan's blocks.
        inputs: the model's inputs by name.
        history: as in :func:`run_cached`; a full step reads it and keeps nothing of it.
        weights: as in :func:`run_cached`.
        given: the groups' inputs by name.

    Returns:
        The model's output, and the rows that each block computed, (B, M, D): in a full step the cache, if the index
        names all tokens in order.
    """
    index: dict[int, Tensor] = {}
    computed: dict[int, Tensor] = {}
    for group in groups:
        rows = given[group.index.name].long()
        rows = rows if rows.ndim == 3 else rows[None]
        index |= {block: rows[:, place] for place, block in enumerate(group.blocks)}
        if group.may_keep_none:
            computed |= dict.fromkeys(group.blocks, given[group.computed.name] > 0)
    points = OpenPass(cache, model.geometry.tokens, index, computed, history, weights)
    with cache_points(model, cache.reuse, points):
        output = model.forward(inputs)
    return output, points.noted | {OUTPUT: output}


def run_superposed(
    model: DiffusionTransformer,
    cache: CacheRecord,
    inputs: Mapping[str, Tensor],
    history: Sequence[Cache],
    weights: Tensor,
    importance: Tensor,
) -> Tensor:
    """One step in which every token is computed and mixed with its cached value (method.md section 1).

    Hard pruning has no gradient; this has one with respect to ``importance``, by which the Cache Predictor is trained.

    Args:
        model: the model, frozen.
        cache: reuse, attention, forecast order; the keep counts play no part.
        inputs: the model's inputs by name.
        history: as in :func:`run_cached`.
        weights: as in :func:`run_cached`.
        importance: (L, N) in [0, 1]; 1 takes the computed value, 0 the cached one.

    Returns:
        The model's output, (B, output channels, ...).
    """
    points = SuperposedPass(cache, model.geometry.tokens, importance, history, weights)
    with cache_points(model, cache.reuse, points):
        return model.forward(inputs)
