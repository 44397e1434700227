"""What one forward pass does at a model's cache points: note everything, reuse what is cached, or mix the two.

Each class here is a :class:`~tc_deploy.tokencache.cache_points.CachePoints` for one pass. In: the settings of the plan
and, but for a full pass, the caches of earlier full steps. Never: knows a model, a schedule or a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tc_deploy.models.rows import Rows, Streams
from tc_deploy.plan import CacheRecord
from tc_deploy.tokencache.cache_points import BLOCK, CachePoints
from tc_deploy.types import Attention

Cache = Mapping[str, Tensor]
"""What one full step left behind, by :func:`cache_name`: (B, N, D) each, (B, T, D) of text rows; keys and values with
their heads joined; and the model's own output."""

KEY, VALUE = "key", "value"


def cache_name(block: int, part: str) -> str:
    """Name of one cached tensor: ``cache.3.mlp``; ``part`` is a branch, ``block``, ``key``, ``value``."""
    return f"cache.{block}.{part}"


def text_part(part: str) -> str:
    """Name of a branch's text rows."""
    return f"text_{part}"


def text_is_read(keep_counts: Sequence[int], block: int) -> bool:
    """Whether the text behind a block reaches the picture: a later block must compute something to see it."""
    return any(keep_counts[block + 1 :])


def forecast(history: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Combine what the last full steps cached.

    Args:
        history: tensors (B, ...) of one kind, latest first; fp32 or half.
        weights: (B, len(history)) float32; unused and not read where there is one tensor, which is taken as it is.

    Returns:
        (B, ...) of the history's type; added up in fp32.
    """
    if len(history) == 1:
        return history[0]
    shape = (-1, *(1,) * (history[0].ndim - 1))
    total = history[0] * weights[:, 0].reshape(shape)
    for column, earlier in enumerate(history[1:], start=1):
        total = total + earlier * weights[:, column].reshape(shape)
    return total.to(history[0].dtype)


class FullPass(CachePoints):
    """Notes what a full step computes and changes nothing."""

    def __init__(self, tokens: int, *, keys: bool) -> None:
        super().__init__(tokens)
        self.keys = keys
        self.cache: dict[str, Tensor] = {}

    def _note(self, block: int, part: str, image: Tensor | None, text: Tensor | None) -> None:
        if image is not None:
            self.cache[cache_name(block, part)] = image
        if text is not None:
            self.cache[cache_name(block, text_part(part))] = text

    def branch(self, block: int, name: str, rows: Rows, compute: Callable[[], Streams]) -> Streams:  # noqa: ARG002
        """Note the value."""
        value = compute()
        self._note(block, name, *value)
        return value

    def residual(self, block: int, image: Tensor, text: Tensor | None, compute: Callable[[Tensor], Streams]) -> Streams:
        """Note what the block adds."""
        output = compute(image)
        self._note(block, BLOCK, _difference(output.image, image), _difference(output.text, text))
        return output

    def attention(self, block: int, prefix: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Note keys and values, where they are wanted."""
        if self.keys:
            self._note(block, prefix + KEY, _heads_joined(key), None)
            self._note(block, prefix + VALUE, _heads_joined(value), None)
        return key, value


class CachedPass(CachePoints):
    """Computes the kept tokens and takes the others from the history.

    Args:
        cache: whether keys and values are cached.
        keep_counts: M per block.
        tokens: N.
        index: of each block that gathers tokens, which: (B, M), or (1, M) for all samples.
        history: caches of the last full steps, latest first.
        weights: (B, len(history)), how they are combined.
    """

    def __init__(
        self,
        cache: CacheRecord,
        keep_counts: tuple[int, ...],
        tokens: int,
        index: Mapping[int, Tensor],
        history: Sequence[Cache],
        weights: Tensor,
    ) -> None:
        super().__init__(tokens)
        self.keep_counts, self.index = keep_counts, index
        self.history, self.weights = history, weights
        self.keys = cache.attention is Attention.ALL

    def _forecast(self, block: int, part: str) -> Tensor:
        name = cache_name(block, part)
        return forecast([step[name] for step in self.history], self.weights)

    def computed(self, block: int) -> int:
        """M of the plan."""
        return self.keep_counts[block]

    def gather(self, block: int, tokens: Tensor) -> Tensor:
        """The kept tokens."""
        if not self.keep_counts[block]:
            return tokens[:, :1]
        if block not in self.index:
            return tokens
        return _take_rows(tokens, self.index[block].expand(tokens.shape[0], -1))

    def table(self, block: int, table: Tensor, axis: int) -> Tensor:
        """The kept tokens' rows."""
        if block not in self.index:
            return table
        index = self.index[block]
        if axis == 0:
            assert index.shape[0] == 1, "a family whose tables have no batch axis has one index for all samples"
            return table.index_select(0, index[0])
        # Of the first sample, whose positions all have.
        return table[0].index_select(0, index.reshape(-1)).reshape(*index.shape, *table.shape[2:])

    def is_pruned(self, block: int) -> bool:
        """Whether the index names it."""
        return block in self.index

    def branch(self, block: int, name: str, rows: Rows, compute: Callable[[], Streams]) -> Streams:
        """Computed over cached, all computed, or all cached."""
        if block in self.index:
            image, text = compute()
            return Streams(None if image is None else self._put(block, name, image), text)
        if self.keep_counts[block]:
            return compute()
        return Streams(self._forecast(block, name) if rows.has_image else None, self._text(block, name, rows))

    def residual(self, block: int, image: Tensor, text: Tensor | None, compute: Callable[[Tensor], Streams]) -> Streams:
        """Tokens plus what the block adds: computed over cached, all computed, or all cached."""
        if block in self.index:
            gathered = self.gather(block, image)
            output = compute(gathered)
            assert output.image is not None
            return Streams(image + self._put(block, BLOCK, output.image - gathered), output.text)
        if self.keep_counts[block]:
            return compute(image)
        added = None if text is None else self._text(block, BLOCK, Rows.TEXT)
        return Streams(image + self._forecast(block, BLOCK), text if text is None or added is None else text + added)

    def attention(self, block: int, prefix: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Computed over cached, where they are cached."""
        if not self.keys or block not in self.index:
            return key, value
        return self._with_cached(block, prefix + KEY, key), self._with_cached(block, prefix + VALUE, value)

    def _text(self, block: int, part: str, rows: Rows) -> Tensor | None:
        if not rows.has_text or not text_is_read(self.keep_counts, block):
            return None
        return self._forecast(block, text_part(part))

    def _put(self, block: int, part: str, rows: Tensor) -> Tensor:
        """The cached values with the computed ``rows`` (B, M, D) over them, (B, N, D)."""
        return _put_rows(self._forecast(block, part), self.index[block].expand(rows.shape[0], -1), rows)

    def _with_cached(self, block: int, part: str, rows: Tensor) -> Tensor:
        return _heads_split(self._put(block, part, _heads_joined(rows)), rows.shape[1])


class OpenPass(CachedPass):
    """A cached pass whose numbers of tokens are open: with all of them it is a full one. Notes what it computes.

    Args:
        cache: whether keys and values are cached.
        tokens: N.
        index: of each block that may prune, which tokens it computes: (B, M), or (1, M) for all samples.
        computed: of each block that may keep none, (B,) bool: False takes everything from the history all the same.
        history: caches of the last full steps, latest first.
        weights: (B, len(history)), how they are combined.
    """

    def __init__(
        self,
        cache: CacheRecord,
        tokens: int,
        index: Mapping[int, Tensor],
        computed: Mapping[int, Tensor],
        history: Sequence[Cache],
        weights: Tensor,
    ) -> None:
        super().__init__(cache, (tokens,) * len(cache.keep_counts[0]), tokens, index, history, weights)
        self._is_computed = computed
        self.noted: dict[str, Tensor] = {}
        """The computed rows, (B, M, D) by :func:`cache_name`."""

    def computed(self, block: int) -> int:
        """M of the index."""
        return self.index[block].shape[1] if block in self.index else self.tokens

    def branch(self, block: int, name: str, rows: Rows, compute: Callable[[], Streams]) -> Streams:
        """Computed over cached, or all computed."""
        image, text = super().branch(block, name, rows, compute)
        return Streams(image, text if text is None else self._text_or_cached(block, name, text))

    def residual(self, block: int, image: Tensor, text: Tensor | None, compute: Callable[[Tensor], Streams]) -> Streams:
        """Tokens plus what the block adds, likewise."""
        output = super().residual(block, image, text, compute)
        added = _difference(output.text, text)
        if text is None or added is None or not self._is_cached(block, text_part(BLOCK)):
            return output
        return Streams(output.image, text + self._text_or_cached(block, BLOCK, added))

    def attention(self, block: int, prefix: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Computed over cached, where they are cached."""
        return super().attention(block, prefix, key, value) if self._is_cached(block, prefix + KEY) else (key, value)

    def _is_cached(self, block: int, part: str) -> bool:
        return cache_name(block, part) in self.history[0]

    def _text_or_cached(self, block: int, part: str, text: Tensor) -> Tensor:
        """Text that a block computed, or what is cached where it computes nothing and a later block reads it."""
        if not self._is_cached(block, text_part(part)):
            return text
        self.noted[cache_name(block, text_part(part))] = text
        return torch.where(self._is_computed[block][:, None, None], text, self._forecast(block, text_part(part)))

    def _put(self, block: int, part: str, rows: Tensor) -> Tensor:
        self.noted[cache_name(block, part)] = rows
        base, index = self._forecast(block, part), self.index[block].expand(rows.shape[0], -1)
        if block in self._is_computed:
            rows = torch.where(self._is_computed[block][:, None, None], rows, _take_rows(base, index))
        return _put_rows(base, index, rows)


class SuperposedPass(CachePoints):
    """Computes every value and mixes the picture's with the cached ones, by the token's importance."""

    def __init__(
        self, cache: CacheRecord, tokens: int, importance: Tensor, history: Sequence[Cache], weights: Tensor
    ) -> None:
        super().__init__(tokens)
        self.importance, self.history, self.weights = importance, history, weights
        self.keys = cache.attention is Attention.ALL

    def _mix(self, block: int, part: str, fresh: Tensor) -> Tensor:
        name = cache_name(block, part)
        cached = forecast([step[name] for step in self.history], self.weights)
        return torch.lerp(cached, fresh, self.importance[block][:, None])

    def branch(self, block: int, name: str, rows: Rows, compute: Callable[[], Streams]) -> Streams:  # noqa: ARG002
        """The value, mixed."""
        image, text = compute()
        return Streams(None if image is None else self._mix(block, name, image), text)

    def residual(
        self,
        block: int,
        image: Tensor,
        text: Tensor | None,  # noqa: ARG002 - computed anew
        compute: Callable[[Tensor], Streams],
    ) -> Streams:
        """Tokens plus what the block adds, mixed."""
        output = compute(image)
        assert output.image is not None
        return Streams(image + self._mix(block, BLOCK, output.image - image), output.text)

    def attention(self, block: int, prefix: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, mixed, where they are cached."""
        # With kept-only attention a pruned token's keys drop out; a soft mask would change the graph that is trained
        # for, so the mix of the branch alone carries the gradient there.
        if not self.keys:
            return key, value
        heads = key.shape[1]
        parts = ((prefix + KEY, key), (prefix + VALUE, value))
        key, value = (_heads_split(self._mix(block, part, _heads_joined(fresh)), heads) for part, fresh in parts)
        return key, value


def _difference(output: Tensor | None, tokens: Tensor | None) -> Tensor | None:
    return None if output is None or tokens is None else output - tokens


def _flat_rows(index: Tensor, tokens: int) -> Tensor:
    """(P, M) token numbers to (P * M,) row numbers of a (P * N, ...) tensor.

    One leading axis is what engines gather and scatter fastest: a plain Gather and a ScatterND without transposes.
    """
    positions = torch.arange(index.shape[0], device=index.device)
    return (index + positions[:, None] * tokens).reshape(-1)


def _take_rows(base: Tensor, index: Tensor) -> Tensor:
    """The tokens ``index`` (P, M) of ``base`` (P, N, D), (P, M, D)."""
    width = base.shape[2]
    return base.reshape(-1, width).index_select(0, _flat_rows(index, base.shape[1])).reshape(*index.shape, width)


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
