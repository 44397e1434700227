"""Full and cached steps of a token-cached model.

A full step is the model's own forward; on the way each branch's value (and, where needed, keys and values of the
self-attention) is noted: the cache. A cached step computes M of N tokens per block and takes the others' values from
the caches of the last full steps, extrapolated by given weights. Cached steps only read: caches are written by full
steps alone, so a trajectory needs no cache output, no copy and no run-time decision between two full steps.

Nothing here knows a schedule or a sampler. Everything runs under torch.export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord, pruned_blocks
from tc_deploy.tokencache.points import BLOCK, cache_points
from tc_deploy.types import Attention, Reuse

Cache = Mapping[str, Tensor]
"""What one full step left behind: by :func:`cache_name` (B, N, D) each, keys and values with their heads joined; and
:data:`OUTPUT`."""

KEY, VALUE = "key", "value"
OUTPUT = "cache.output"
"""The cached tensor that is the model's own output, (B, output channels, H, W)."""


def cache_name(block: int, part: str) -> str:
    """Name of one cached tensor: ``cache.3.mlp``; ``part`` is a branch, ``block``, ``key`` or ``value``."""
    return f"cache.{block}.{part}"


def cached_tensors(model: DiffusionTransformer, cache: CacheRecord, phases: Sequence[int]) -> tuple[str, ...]:
    """The cached tensors that the cached steps of ``phases`` read, in the order in which the blocks run.

    A block that keeps all tokens reads none; keys and values are read only where some tokens are kept and others not.
    """
    tokens = model.geometry.tokens
    branches = [BLOCK] if cache.reuse is Reuse.RESIDUAL else [branch.name for branch in model.family.branches]
    names = []
    running = [phase for phase in phases if not cache.skips_model(phase)]
    for block in range(len(model.blocks)):
        keeps = [cache.keep_counts[phase - 1][block] for phase in running]
        if any(keep < tokens for keep in keeps):
            names += [cache_name(block, branch) for branch in branches]
        if cache.attention is Attention.ALL and any(0 < keep < tokens for keep in keeps):
            names += [cache_name(block, KEY), cache_name(block, VALUE)]
    if len(running) < len(phases):
        names.append(OUTPUT)
    return tuple(names)


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
    points = _Full(keys=cache.attention is Attention.ALL)
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
        weights: (B, forecast_order + 1) float32, how the history is combined (``Schedule.forecast_weights``).
        token_index: (B, sum of M over pruned blocks) int, the tokens each block computes, blocks side by side; None
            where no block is pruned. A row's order does not matter; a token must not stand twice.

    Returns:
        The model's output, (B, output channels, H, W).
    """
    if cache.skips_model(phase):
        return forecast([step[OUTPUT] for step in history], weights)
    keep_counts = cache.keep_counts[phase - 1]
    pruned = pruned_blocks(keep_counts, model.geometry.tokens)
    index: dict[int, Tensor] = {}
    if pruned:
        assert token_index is not None, "check_plan sees to it that a phase that prunes has an index table"
        parts = torch.split(token_index.long(), [keep_counts[block] for block in pruned], dim=1)
        index = dict(zip(pruned, parts, strict=True))
    points = _Cached(cache, keep_counts, model.geometry.tokens, index, history, weights)
    with cache_points(model, cache.reuse, points):
        return model.forward(inputs)


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
        The model's output, (B, output channels, H, W).
    """
    points = _Superposed(cache, importance, history, weights)
    with cache_points(model, cache.reuse, points):
        return model.forward(inputs)


def forecast(history: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Combine what the last full steps cached.

    Args:
        history: tensors (B, ...) of one kind, latest first.
        weights: (B, len(history)) float32; unused and not read where there is one tensor, which is taken as it is.
    """
    if len(history) == 1:
        return history[0]
    shape = (-1, *(1,) * (history[0].ndim - 1))
    total = history[0] * weights[:, 0].reshape(shape)
    for column, earlier in enumerate(history[1:], start=1):
        total = total + earlier * weights[:, column].reshape(shape)
    return total


def _flat_rows(index: Tensor, tokens: int) -> Tensor:
    """(P, M) token numbers to (P * M,) row numbers of a (P * N, ...) tensor.

    One leading axis is what engines gather and scatter fastest: a plain Gather and a ScatterND without transposes.
    """
    positions = torch.arange(index.shape[0], device=index.device)
    return (index + positions[:, None] * tokens).reshape(-1)


def _put_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write (P, M, D) ``rows`` over the tokens ``index`` (P, M) of ``base`` (P, N, D)."""
    width = base.shape[2]
    flat = _flat_rows(index, base.shape[1])
    return base.reshape(-1, width).index_put((flat,), rows.reshape(-1, width)).reshape(base.shape)


def _heads_joined(tokens: Tensor) -> Tensor:
    """(B, heads, N, D/heads) to (B, N, D).

    Rows as wide as a branch's: one index table serves them all, and a row is one piece of memory.
    """
    return tokens.transpose(1, 2).flatten(2)


def _heads_split(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, D) to (B, heads, N, D/heads)."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count, heads, width // heads).transpose(1, 2)


class _Full:
    """Notes what a full step computes and changes nothing."""

    def __init__(self, *, keys: bool) -> None:
        self.keys = keys
        self.cache: dict[str, Tensor] = {}

    def gather(self, block: int, tokens: Tensor) -> Tensor:  # noqa: ARG002 - no block is pruned
        return tokens

    def branch(self, block: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        value = self.cache[cache_name(block, name)] = compute()
        return value

    def residual(self, block: int, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        output = compute(tokens)
        self.cache[cache_name(block, BLOCK)] = output - tokens
        return output

    def attention(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys:
            self.cache |= {cache_name(block, KEY): _heads_joined(key), cache_name(block, VALUE): _heads_joined(value)}
        return key, value


class _Cached:
    """Computes the kept tokens and takes the others from the history."""

    def __init__(
        self,
        cache: CacheRecord,
        keep_counts: tuple[int, ...],
        tokens: int,
        index: Mapping[int, Tensor],
        history: Sequence[Cache],
        weights: Tensor,
    ) -> None:
        self.keep_counts, self.tokens, self.index = keep_counts, tokens, index
        self.history, self.weights = history, weights
        self.keys = cache.attention is Attention.ALL

    def _forecast(self, block: int, part: str) -> Tensor:
        name = cache_name(block, part)
        return forecast([step[name] for step in self.history], self.weights)

    def gather(self, block: int, tokens: Tensor) -> Tensor:
        # A block that keeps nothing still runs its adaLN for the gates; what it does with the tokens is never read.
        if block not in self.index:
            return tokens
        index, width = self.index[block], tokens.shape[2]
        rows = tokens.reshape(-1, width).index_select(0, _flat_rows(index, tokens.shape[1]))
        return rows.reshape(*index.shape, width)

    def branch(self, block: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if self.keep_counts[block] == self.tokens:
            return compute()
        cached = self._forecast(block, name)
        if block not in self.index:
            return cached
        return _put_rows(cached, self.index[block], compute())

    def residual(self, block: int, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        if self.keep_counts[block] == self.tokens:
            return compute(tokens)
        gathered = self.gather(block, tokens)
        return tokens + self.branch(block, BLOCK, lambda: compute(gathered) - gathered)

    def attention(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self.keys or block not in self.index:
            return key, value
        return self._with_cached(block, KEY, key), self._with_cached(block, VALUE, value)

    def _with_cached(self, block: int, part: str, rows: Tensor) -> Tensor:
        merged = _put_rows(self._forecast(block, part), self.index[block], _heads_joined(rows))
        return _heads_split(merged, rows.shape[1])


class _Superposed:
    """Mixes every computed value with its cached one by the token's importance."""

    def __init__(self, cache: CacheRecord, importance: Tensor, history: Sequence[Cache], weights: Tensor) -> None:
        self.importance, self.history, self.weights = importance, history, weights
        self.keys = cache.attention is Attention.ALL

    def _mix(self, block: int, part: str, fresh: Tensor) -> Tensor:
        name = cache_name(block, part)
        cached = forecast([step[name] for step in self.history], self.weights)
        return torch.lerp(cached, fresh, self.importance[block][:, None])

    def gather(self, block: int, tokens: Tensor) -> Tensor:  # noqa: ARG002 - no block is pruned
        return tokens

    def branch(self, block: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        return self._mix(block, name, compute())

    def residual(self, block: int, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return tokens + self._mix(block, BLOCK, compute(tokens) - tokens)

    def attention(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # With kept-only attention a pruned token's keys drop out; a soft mask would change the graph that is trained
        # for, so the mix of the branch alone carries the gradient there.
        if not self.keys:
            return key, value
        heads = key.shape[1]
        mixed = (self._mix(block, part, _heads_joined(fresh)) for part, fresh in ((KEY, key), (VALUE, value)))
        key, value = (_heads_split(tokens, heads) for tokens in mixed)
        return key, value
