"""Where a forward pass can be intercepted, over any model, without touching its code.

While :func:`cache_points` is open, the model's own forward runs, and at each block's cache points it asks a
:class:`CachePoints` what to do. Parameter names and the model's class stay as they are; on leaving, the instance is
what it was before.

Image rows can be pruned and cached; text rows, where a model has them among its tokens, are computed anew by every
block that computes anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tc_deploy.errors import ModelError
from tc_deploy.models.family import Block, Branch, DiffusionTransformer, Rotary, SelfAttention
from tc_deploy.models.rows import Rows, Streams
from tc_deploy.types import Reuse

BLOCK = "block"
"""Name of the one branch that a block is with residual reuse."""


class CachePoints(ABC):
    """What a forward pass does where tokens can be pruned and values cached; by itself it prunes nothing.

    Args:
        tokens: N, image tokens of a sample.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def computed(self, block: int) -> int:  # noqa: ARG002 - overridden
        """M, image tokens that the block computes: 0 .. N."""
        return self.tokens

    def gather(self, block: int, tokens: Tensor) -> Tensor:  # noqa: ARG002
        """Image tokens that a block computes: (B, N, D) to (B, M, D).

        A block that computes none gets the first one: reshapes with -1 refuse an empty tensor, and what such a block
        does with it, beside its adaLN for the gates, is never read.
        """
        return tokens

    def table(self, block: int, table: Tensor, axis: int) -> Tensor:  # noqa: ARG002
        """Rows of a rotary table that belong to them: (N, ...) to (M, ...), or (1, N, ...) to (1 or B, M, ...)."""
        return table

    def is_pruned(self, block: int) -> bool:  # noqa: ARG002
        """Whether the block computes image tokens by an index, which may be fewer than there are."""
        return False

    @abstractmethod
    def branch(self, block: int, name: str, rows: Rows, compute: Callable[[], Streams]) -> Streams:
        """A branch's value for all tokens; ``compute`` gives it for the gathered ones. Text that nobody reads: None."""

    @abstractmethod
    def residual(self, block: int, image: Tensor, text: Tensor | None, compute: Callable[[Tensor], Streams]) -> Streams:
        """A block's output for all tokens; ``compute`` runs the block on the image tokens it is given, (B, M, D)."""

    @abstractmethod
    def attention(self, block: int, prefix: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Image keys and values that queries see: (B, heads, M, head width) to (B, heads, M or N, head width)."""


class _SelfAttention(TorchFunctionMode):
    """Passes keys and values of the current self-attention through ``points``.

    The call is caught at scaled_dot_product_attention, behind projections, norms and rotary embeddings, so that no
    family needs attention code of its own. Works under torch.export.
    """

    def __init__(self, points: CachePoints) -> None:
        super().__init__()
        self.points = points
        self.current: tuple[int, SelfAttention] | None = None
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or self.current is None:
            return func(*args, **kwargs)
        self.calls += 1
        # Positional or by name, as the caller likes.
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        block, attention = self.current
        images = self.points.computed(block)
        key, value = (attention.keys.split(given[name], images, axis=2) for name in ("key", "value"))
        seen = self.points.attention(block, attention.prefix, _present(key.image), _present(value.image))
        given["key"], given["value"] = (
            attention.keys.join(Streams(image, fresh.text), axis=2)
            for image, fresh in zip(seen, (key, value), strict=True)
        )
        mask = given.get("attn_mask")
        texts = 0 if key.text is None else key.text.shape[2]
        if mask is not None and not images:
            del given["attn_mask"]  # Nothing of a block that computes nothing is read.
        elif mask is not None and self.points.is_pruned(block):
            for axis, rows in ((-1, seen[0].shape[2]), (-2, images)):
                mask = _mask_of(attention.keys, mask, axis, texts, rows)
            given["attn_mask"] = mask
        return func(*(given.pop(name) for name in ("query", "key", "value")), *args[4:], **given)

    def run(self, block: int, attention: SelfAttention, compute: Callable[[], Any]) -> Any:
        """Run a self-attention.

        Raises:
            ModelError: it did not call scaled_dot_product_attention once, so nothing could be cached.
        """
        self.current, self.calls = (block, attention), 0
        try:
            result = compute()
        finally:
            self.current = None
        if self.calls != 1:
            raise ModelError(
                f"block {block}: {attention.module} called scaled_dot_product_attention {self.calls} times, expected"
                " once; leave the attention processor and the attention backend at their defaults"
            )
        return result


@contextlib.contextmanager
def cache_points(model: DiffusionTransformer, reuse: Reuse, points: CachePoints) -> Iterator[None]:
    """While open, every forward of ``model`` consults ``points``. Not for two threads on one model at once."""
    mode = _SelfAttention(points)
    with contextlib.ExitStack() as stack:
        for number, (module, block) in enumerate(model.described_blocks):
            wrap = _Wrappers(number, block, points, mode, model.geometry.tokens)
            for attention in block.attentions:
                stack.callback(replace_forward(module.get_submodule(attention.module), wrap.self_attention(attention)))
            for rotary in block.rotaries:
                stack.callback(replace_forward(module.get_submodule(rotary.module), wrap.with_tables(rotary)))
            if reuse is Reuse.RESIDUAL:
                stack.callback(replace_forward(module, wrap.whole))
                continue
            stack.callback(replace_forward(module, wrap.begin))
            for entry in block.entries:
                stack.callback(replace_forward(module.get_submodule(entry), wrap.entry))
            for branch in block.branches:
                stack.callback(replace_forward(module.get_submodule(branch.exit), wrap.leave(branch)))
        with mode:
            yield


class _Wrappers:
    """What stands in for the forwards of one block and of its submodules; each takes the original first."""

    def __init__(self, number: int, block: Block, points: CachePoints, mode: _SelfAttention, tokens: int) -> None:
        self.number, self.block, self.points, self.mode, self.tokens = number, block, points, mode, tokens
        self.text: Tensor | None = None
        self.exits: dict[str, int] = {}
        """How often each branch was left so far."""

    def begin(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of the block with branch reuse: note its text, whose shape a branch may need.

        Raises:
            ModelError: a branch ended more or fewer times than its family says.
        """
        self.text, self.exits = self._streams(_bound(original, args, kwargs)).text, {}
        try:
            output = original(*args, **kwargs)
        finally:
            self.text = None
        for branch in self.block.branches:
            if self.exits.get(branch.exit, 0) != len(branch.calls):
                raise ModelError(
                    f"block {self.number}: {branch.exit} ran {self.exits.get(branch.exit, 0)} times, expected"
                    f" {len(branch.calls)}, as its family says; name where each branch ends, and what a second call of"
                    " one submodule holds"
                )
        return output

    def entry(self, original: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of a submodule that tokens enter: only those that the block computes."""
        return original(self._gathered(tokens, self.block.entry_rows), *args, **kwargs)

    def leave(self, branch: Branch) -> Callable[..., Any]:
        """Of a submodule that a branch leaves: its value for all tokens."""

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            done = self.exits.get(branch.exit, 0)
            self.exits[branch.exit] = done + 1
            rows = branch.calls[min(done, len(branch.calls) - 1)]

            def compute() -> Streams:
                return rows.split(original(*args, **kwargs), self.points.computed(self.number))

            image, text = self.points.branch(self.number, branch.name, rows, compute)
            if rows.has_text and text is None:
                text = torch.zeros_like(_present(self.text))
            return rows.join(Streams(image, text))

        return wrapper

    def whole(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of the block with residual reuse: its output for all tokens."""
        bound = _bound(original, args, kwargs)
        image, text = self._streams(bound)

        def compute(gathered: Tensor) -> Streams:
            value = self.block.takes.join(Streams(gathered, text))
            names = self.block.arguments
            bound.arguments.update(zip(names, value if len(names) > 1 else (value,), strict=True))
            for name in self.block.per_token:
                if isinstance(bound.arguments.get(name), Tensor):
                    bound.arguments[name] = self._gathered(bound.arguments[name], self.block.takes)
            output = original(*bound.args, **bound.kwargs)
            return self.block.gives.split(output, self.points.computed(self.number))

        return self.block.gives.join(self.points.residual(self.number, _present(image), text, compute))

    def self_attention(self, attention: SelfAttention) -> Callable[..., Any]:
        """Of a self-attention: rotary tables as the tokens are, keys and values through ``points``."""
        tabled = None if attention.rotary is None else self.with_tables(attention.rotary, attention.module)

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = original if tabled is None else functools.partial(tabled, original)
            return self.mode.run(self.number, attention, lambda: run(*args, **kwargs))

        return wrapper

    def with_tables(self, rotary: Rotary, module: str = "") -> Callable[..., Any]:
        """Of a submodule that is given rotary tables: those of the tokens that the block computes.

        Raises:
            ModelError: it is not given them.
        """

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            bound = _bound(original, args, kwargs)
            holder = _holder(bound, rotary.argument)
            if holder is None:
                raise ModelError(
                    f"block {self.number}: {module or rotary.module} is given no {rotary.argument!r}, which its family"
                    " names as its rotary tables; name the argument that it is given"
                )
            given = holder[rotary.argument]
            if given is not None:
                holder[rotary.argument] = self._tables(given, rotary)
            return original(*bound.args, **bound.kwargs)

        return wrapper

    def _tables(self, given: Any, rotary: Rotary) -> Any:
        """The tables of what the block computes, in the same form."""
        if rotary.rows in (Rows.IMAGE_AND_TEXT, Rows.TEXT_AND_IMAGE):
            image, text = rotary.rows.split(given, self.tokens)
            own = dataclasses.replace(rotary, rows=Rows.IMAGE)
            return rotary.rows.join(Streams(self._tables(image, own), text))
        if isinstance(given, tuple | list):
            return tuple(self._table(table, rotary) for table in given)
        return self._table(given, rotary)

    def _gathered(self, tokens: Tensor, rows: Rows) -> Tensor:
        """The rows that the block computes, and its text where it computes any."""
        image, text = rows.split(tokens, self.tokens)
        if text is not None and not self.points.computed(self.number):
            text = text[:, :0]
        joined: Tensor = rows.join(Streams(self.points.gather(self.number, _present(image)), text))
        return joined

    def _table(self, table: Tensor, rotary: Rotary) -> Tensor:
        if self.points.computed(self.number) == 0:
            return table.narrow(rotary.axis, 0, 1)
        image, text = rotary.rows.split(table, self.tokens, axis=rotary.axis)
        rows = self.points.table(self.number, _present(image), rotary.axis)
        joined: Tensor = rotary.rows.join(Streams(rows, text), axis=rotary.axis)
        return joined

    def _streams(self, bound: inspect.BoundArguments) -> Streams:
        values = tuple(bound.arguments[name] for name in self.block.arguments)
        return self.block.takes.split(values if len(values) > 1 else values[0], self.tokens)


def replace_forward(module: nn.Module, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Let ``wrapper(original_forward, *args, **kwargs)`` stand in for a module's forward; returns how to undo it."""
    original = module.forward
    patched_before = "forward" in vars(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    # A second wrapper around this one still sees the names of the arguments.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]

    def undo() -> None:
        if patched_before:
            module.forward = original
        else:
            del module.forward

    module.forward = forward
    return undo


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    return inspect.signature(function).bind(*args, **kwargs)


def _holder(bound: inspect.BoundArguments, name: str) -> dict[str, Any] | None:
    """Where an argument stands: among those with a name, or in what ``**kwargs`` took; None where it was not given."""
    others = [item.name for item in bound.signature.parameters.values() if item.kind is item.VAR_KEYWORD]
    holders = [bound.arguments, *(bound.arguments.get(other, {}) for other in others)]
    return next((holder for holder in holders if name in holder), None)


def _mask_of(keys: Rows, mask: Tensor, axis: int, texts: int, rows: int) -> Tensor:
    """A mask of attention as a block that is pruned needs it, along one of its axes.

    Masks hide text; to the picture's tokens all are alike, so any of them stands for the others.

    Args:
        keys: how image and text rows stand.
        mask: (B, 1, 1 or rows of queries, rows of keys).
        axis: -1 for keys, -2 for queries.
        texts: text rows.
        rows: image rows that there are to be.
    """
    size = mask.shape[axis]
    if axis == -2 and size == 1:
        return mask
    image, text = keys.split(mask, size - texts, axis=axis)
    first = _present(image).narrow(axis, 0, 1)
    shape = list(first.shape)
    shape[axis] = rows
    joined: Tensor = keys.join(Streams(first.expand(shape), text), axis=axis)
    return joined


def _present(rows: Tensor | None) -> Tensor:
    assert rows is not None, "the family says that there are rows of this kind"
    return rows
