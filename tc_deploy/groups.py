"""Blocks that keep equally many tokens in every variant share an axis where one graph holds all variants.

In: a plan's cache settings. Out: the groups, and what a step gives to their inputs. In such a graph a full step keeps
all tokens, and a block that keeps none computes the first one, and the text, only for both to be thrown away. Never:
knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tc_deploy.manifest import Role, TensorName, group_tensor
from tc_deploy.plan import CacheRecord, Plan
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.types import IntArray


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """One group."""

    number: int
    blocks: tuple[int, ...]
    keep_counts: Mapping[int, int] = field(hash=False)
    """By variant, the tokens that each of the blocks keeps."""

    @property
    def index(self) -> TensorName:
        """Input (model batch, blocks, tokens) int32, or (blocks, tokens) for all samples: what each block computes."""
        return group_tensor(Role.TOKEN_INDEX, self.number)

    @property
    def computed(self) -> TensorName:
        """Input (model batch,) int32: 1, or 0 where the blocks keep nothing."""
        return group_tensor(Role.COMPUTED, self.number)

    @property
    def axis(self) -> str:
        """Name of the open axis."""
        return f"tokens_{self.number}"

    @property
    def may_keep_none(self) -> bool:
        """Whether the blocks keep nothing in some variant, so that they have the input that says so."""
        return 0 in self.keep_counts.values()

    @property
    def inputs(self) -> tuple[TensorName, ...]:
        """Its inputs."""
        return (self.index, self.computed) if self.may_keep_none else (self.index,)

    def size(self, variant: int) -> int:
        """Of the open axis."""
        return max(self.keep_counts[variant], 1)


def running_variants(cache: CacheRecord, phases: Sequence[int]) -> tuple[int, ...]:
    """The full step, and the cached steps that run the model."""
    return (FULL, *(phase for phase in phases if not cache.skips_model(phase)))


def token_groups(cache: CacheRecord, phases: Sequence[int], tokens: int) -> tuple[TokenGroup, ...]:
    """The groups of a plan's blocks; blocks that always keep all tokens are in none.

    Args:
        cache: keep counts.
        phases: those in use.
        tokens: N.
    """
    variants = running_variants(cache, phases)
    by_variant = [(tokens,) * len(cache.keep_counts[0]) if v == FULL else cache.keep_counts[v - 1] for v in variants]
    blocks_of: dict[tuple[int, ...], list[int]] = {}
    for block, keep_counts in enumerate(zip(*by_variant, strict=True)):
        if set(keep_counts) != {tokens}:
            blocks_of.setdefault(keep_counts, []).append(block)
    return tuple(
        TokenGroup(number=number, blocks=tuple(blocks), keep_counts=dict(zip(variants, keep_counts, strict=True)))
        for number, (keep_counts, blocks) in enumerate(blocks_of.items())
    )


def group_inputs(
    groups: Sequence[TokenGroup], cache: CacheRecord, tokens: int, variant: int, row: IntArray | None
) -> dict[str, IntArray]:
    """What a step gives to the groups' inputs, without the batch axis.

    Args:
        groups: as :func:`token_groups` makes them.
        cache: keep counts.
        tokens: N.
        variant: which the step runs.
        row: (sum of M over pruned blocks,) the step's row of its phase's index table; None where there is none.

    Returns:
        By name, (blocks, tokens of the axis) and () int32.
    """
    kept: dict[int, IntArray] = {}
    pruned = () if variant == FULL else pruned_blocks(cache.keep_counts[variant - 1], tokens)
    if row is not None and pruned:
        keep_counts = cache.keep_counts[variant - 1]
        ends = np.cumsum([keep_counts[block] for block in pruned])
        kept = dict(zip(pruned, np.split(row, ends[:-1]), strict=True))
    found: dict[str, IntArray] = {}
    for group in groups:
        rest = np.arange(group.size(variant), dtype=np.int32)
        found[group.index.name] = np.stack([kept.get(block, rest) for block in group.blocks])
        if group.may_keep_none:
            found[group.computed.name] = np.asarray(group.keep_counts[variant] > 0, np.int32)
    return found


def planned_group_inputs(plan: Plan, variant: int, row: IntArray | None) -> dict[str, IntArray]:
    """:func:`group_inputs` of a plan's own groups."""
    cache, tokens = plan.cache, plan.model.tokens
    return group_inputs(token_groups(cache, plan.phases_used(), tokens), cache, tokens, variant, row)
