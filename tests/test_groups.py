"""Groups of blocks in the graph of all variants: which blocks, and what a step gives to their inputs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.groups import group_inputs, running_variants, token_groups
from tc_deploy.manifest import names_of
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.types import Attention, Reuse, Skip

TOKENS = 6


def cache(*keep_counts: tuple[int, ...], skip: Skip = Skip.BLOCKS) -> CacheRecord:
    first, second = keep_counts
    return CacheRecord(
        reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=1, keep_counts=(first, second), skip=skip
    )


def test_blocks_with_equal_counts_in_every_variant_are_a_group() -> None:
    groups = token_groups(cache((0, 4, 6, 4, 0), (4, 6, 6, 6, 4)), (1, 2), TOKENS)
    assert [group.blocks for group in groups] == [(0, 4), (1, 3)]
    assert [group.keep_counts for group in groups] == [{FULL: 6, 1: 0, 2: 4}, {FULL: 6, 1: 4, 2: 6}]
    assert [group.size(variant) for group in groups for variant in (FULL, 1, 2)] == [6, 1, 4, 6, 4, 6]
    assert [names_of(group.inputs) for group in groups] == [("token_index.0", "computed.0"), ("token_index.1",)]


def test_equal_groups_are_one_and_the_same_key() -> None:
    """Graphs that are to be exported are looked up by what they compute."""
    one, same = (token_groups(cache((0, 4), (4, 6)), (1, 2), TOKENS) for _ in range(2))
    other = token_groups(cache((0, 3), (4, 6)), (1, 2), TOKENS)
    assert {one: "graph"}.get(same) == "graph"
    assert {one: "graph"}.get(other) is None


def test_a_phase_that_skips_the_model_or_has_no_cached_step_plays_no_part() -> None:
    skipping = cache((0, 0), (4, 0), skip=Skip.MODEL)
    assert running_variants(skipping, (1, 2)) == (FULL, 2)
    for phases in ((1, 2), (2,)):
        assert [group.keep_counts for group in token_groups(skipping, phases, TOKENS)] == [
            {FULL: 6, 2: 4},
            {FULL: 6, 2: 0},
        ]
    assert token_groups(skipping, (1,), TOKENS) == ()


@given(
    st.lists(st.tuples(*[st.integers(0, TOKENS)] * 2), min_size=1, max_size=5),
    st.sampled_from([FULL, 1, 2]),
    st.randoms(),
)
def test_every_block_is_given_its_own_tokens(counts: list[tuple[int, int]], variant: int, random: st.Random) -> None:
    first, second = zip(*counts, strict=True)
    settings = cache(first, second)
    chosen: dict[int, list[int]] = {}
    row = None
    if variant != FULL:
        keep_counts = settings.keep_counts[variant - 1]
        for block in pruned_blocks(keep_counts, TOKENS):
            chosen[block] = sorted(random.sample(range(TOKENS), keep_counts[block]))
        row = np.asarray([token for block in chosen.values() for token in block], np.int32) if chosen else None
    groups = token_groups(settings, (1, 2), TOKENS)
    found = group_inputs(groups, settings, TOKENS, variant, row)
    assert set(found) == {name for group in groups for name in names_of(group.inputs)}
    for group in groups:
        kept = group.keep_counts[variant]
        for place, block in enumerate(group.blocks):
            tokens = chosen.get(block, list(range(TOKENS)) if kept else [0])
            assert found[group.index.name][place].tolist() == tokens
        if group.may_keep_none:
            assert found[group.computed.name].shape == ()
            assert found[group.computed.name] == (kept > 0)
    assert {array.dtype for array in found.values()} <= {np.dtype(np.int32)}
    grouped = [block for group in groups for block in group.blocks]
    assert sorted(grouped) == [block for block, counts_of in enumerate(counts) if set(counts_of) != {TOKENS}]


def test_a_phase_that_prunes_no_block_needs_no_row() -> None:
    settings = cache((0, 6), (6, 4))
    groups = token_groups(settings, (1, 2), TOKENS)
    for row in (None, np.zeros(0, np.int32)):
        found = group_inputs(groups, settings, TOKENS, 1, row)
        assert {name: array.tolist() for name, array in found.items()} == {
            "token_index.0": [[0]],
            "computed.0": 0,
            "token_index.1": [list(range(TOKENS))],
        }
