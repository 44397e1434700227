"""What a plan's figures say of each other, as far as it can be told without the checkpoint.

In: numbers of a plan. Out: nothing, or what contradicts what. Never: says that figures are right; an export, which has
the checkpoint, counts again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def contradiction_of_model(
    config: Mapping[str, Any], latent_size: tuple[int, ...] | None, tokens: int, width: int
) -> str | None:
    """What contradicts a model's size; None where nothing does.

    Args:
        config: the model's, in which diffusers' own names mean what they mean there.
        latent_size: of the latents where it was chosen; else ``sample_size`` says it where it is there.
        tokens: N.
        width: D.
    """
    heads, each = _count(config, "num_attention_heads"), _count(config, "attention_head_dim")
    if heads and each and width != heads * each:
        return f"model.width: expected {heads * each}, {heads} heads of {each} as model.config says, found {width}"
    side = _count(config, "sample_size")
    size = latent_size or (side, side)
    if not all(size):
        return None
    positions, patch = math.prod(size), _patch(config.get("patch_size"))
    # Some pipelines pack latents before the model cuts them, so that a token may hold several patches.
    if positions % (tokens * patch):
        return (
            f"model.tokens: latents of {' x '.join(map(str, size))} in patches of {patch} do not make {tokens} tokens"
        )
    return None


def contradiction_of_cost(
    full_flops: int, cached_flops: Sequence[int], keep_counts: Sequence[Sequence[int]], tokens: int
) -> str | None:
    """What contradicts the costs of steps; None where nothing does.

    A step that computes no fewer tokens in any block costs no less. One of which each block computes a share of at
    least s costs at least s^2 of a full step: nothing in a block grows faster than attention does.
    """
    phases = list(zip(cached_flops, keep_counts, strict=True))
    for number, (flops, kept) in enumerate(phases, start=1):
        least = full_flops * min(kept, default=0) ** 2 // tokens**2
        if not least <= flops <= full_flops:
            return f"cost.cached_flops: phase {number}: expected {least} to {full_flops}, found {flops}"
    (first, fewer), (second, more) = sorted(phases)
    if first < second and all(a >= b for a, b in zip(fewer, more, strict=True)):
        return (
            f"cost.cached_flops: {first} and {second}, and the phase that computes no fewer tokens is the cheaper one"
        )
    return None


def other_timesteps(planned: Sequence[float], found: Sequence[float]) -> str:
    """Where timesteps are not the planned ones, in words."""
    if len(planned) != len(found):
        return f"timesteps: expected {len(planned)}, as the plan has them, found {len(found)}"
    step = next(step for step, (one, other) in enumerate(zip(planned, found, strict=True)) if one != other)
    return f"timesteps: expected {planned[step]:.9g} at step {step}, as the plan has it, found {found[step]:.9g}"


def _patch(size: Any) -> int:
    """Latents in a patch."""
    sides = (size, size) if isinstance(size, int) else size
    if isinstance(sides, Sequence) and all(type(side) is int and side > 0 for side in sides):
        return math.prod(sides)
    return 1


def _count(config: Mapping[str, Any], key: str) -> int:
    """A number of a configuration; 0 where it is none."""
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0
