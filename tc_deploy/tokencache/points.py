"""Where a forward pass can be intercepted, over any model, without touching its code.

While :func:`cache_points` is open, the model's own forward runs, and at each block's cache points it asks a
:class:`CachePoints` what to do. Parameter names and the model's class stay as they are; on leaving, the instance is
what it was before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.types import Reuse

BLOCK = "block"
"""Name of the one branch that a block is with residual reuse."""


class CachePoints(Protocol):
    """What a forward pass does where tokens can be pruned and values cached."""

    def gather(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens that go into a branch: (B, N, D) to (B, M, D)."""

    def branch(self, block: int, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A branch's value for all tokens, (B, N, D); ``compute`` gives it for the gathered ones."""

    def residual(self, block: int, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """A block's output for all tokens, (B, N, D); ``compute`` runs the block on the tokens it is given."""

    def attention(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that queries see: (B, heads, M, head width) to (B, heads, M or N, head width)."""


class _SelfAttention(TorchFunctionMode):
    """Passes keys and values of the current block's self-attention through ``points``.

    The call is caught at scaled_dot_product_attention, behind projections, norms and rotary embeddings, so that no
    family needs attention code of its own. Works under torch.export.
    """

    def __init__(self, points: CachePoints) -> None:
        super().__init__()
        self.points = points
        self.block: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.block is None:
            return func(*args, **kwargs)
        query, key, value, *rest = args
        key, value = self.points.attention(self.block, key, value)
        return func(query, key, value, *rest, **kwargs)


def _replace(module: nn.Module, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Let ``wrapper(original_forward, *args, **kwargs)`` stand in for a module's forward; returns how to undo it."""
    original = module.forward
    patched_before = "forward" in vars(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    def undo() -> None:
        if patched_before:
            module.forward = original
        else:
            del module.forward

    module.forward = forward
    return undo


@contextlib.contextmanager
def cache_points(model: DiffusionTransformer, reuse: Reuse, points: CachePoints) -> Iterator[None]:
    """While open, every forward of ``model`` consults ``points``. Not for two threads on one model at once."""
    mode = _SelfAttention(points)

    def self_attention(block: int) -> Callable[..., Any]:
        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mode.block = block
            try:
                return original(*args, **kwargs)
            finally:
                mode.block = None

        return wrapper

    def entry(block: int) -> Callable[..., Any]:
        return lambda original, tokens, *args, **kwargs: original(points.gather(block, tokens), *args, **kwargs)

    def leave(block: int, name: str) -> Callable[..., Any]:
        return lambda original, *args, **kwargs: points.branch(block, name, lambda: original(*args, **kwargs))

    def whole(block: int) -> Callable[..., Any]:
        return lambda original, tokens, *args, **kwargs: points.residual(
            block, tokens, lambda gathered: original(gathered, *args, **kwargs)
        )

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(model.blocks):
            stack.callback(_replace(block.get_submodule(model.family.self_attention), self_attention(index)))
            if reuse is Reuse.RESIDUAL:
                stack.callback(_replace(block, whole(index)))
                continue
            for branch in model.family.branches:
                stack.callback(_replace(block.get_submodule(branch.entry), entry(index)))
                stack.callback(_replace(block.get_submodule(branch.exit), leave(index, branch.name)))
        with mode:
            yield
