"""FLOPs of a step, against the formula."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.types import Attention, Reuse

BLOCKS, N, D = 3, 16, 64
FREQUENCIES, PATCH, CHANNELS, OUTPUT_CHANNELS = 256, 4, 4, 8


def by_hand(keep_counts: tuple[int, ...], reuse: Reuse, attention: Attention) -> int:
    """Twice the multiply-adds of one sample's step: every matrix product, once."""
    embedding = 2 * FREQUENCIES * D + 2 * D * D
    modulation = 2 * D * 6 * D
    total = 2 * N * PATCH * CHANNELS * D  # patches to tokens
    for keep in keep_counts:
        seen = keep if attention is Attention.KEPT else N
        projections = 4 * 2 * keep * D * D
        products = 2 * 2 * keep * seen * D
        mlp = 2 * 2 * keep * D * 4 * D
        # A skipped block computes its gates where they are applied to cached branches, and nothing otherwise.
        if keep or reuse is Reuse.BRANCH:
            total += embedding + modulation
        total += projections + products + mlp
    return total + embedding + 2 * D * 2 * D + 2 * N * D * PATCH * OUTPUT_CHANNELS


def count(model: DiffusionTransformer, keep: tuple[int, ...], reuse: Reuse, attention: Attention) -> tuple[int, int]:
    cache = CacheRecord(reuse=reuse, attention=attention, forecast_order=1, keep_counts=(keep, (N,) * BLOCKS))
    cost = count_flops(model, cache)
    assert cost.cached_flops[1] == cost.full_flops
    return cost.full_flops, cost.cached_flops[0]


@pytest.mark.parametrize("reuse", tuple(Reuse))
@pytest.mark.parametrize("attention", tuple(Attention))
@pytest.mark.parametrize("keep", [(0, 0, 0), (0, 5, N), (1, 8, 15), (N, N, N)], ids=str)
def test_flops_are_the_formula(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, keep: tuple[int, ...]
) -> None:
    full, cached = count(tiny_dit, keep, reuse, attention)
    assert full == by_hand((N,) * BLOCKS, reuse, attention)
    assert cached == by_hand(keep, reuse, attention)


@settings(max_examples=10)
@given(
    pair=st.tuples(*[st.tuples(st.integers(0, N), st.integers(0, N)).map(sorted)] * BLOCKS),
    reuse=st.sampled_from(Reuse),
    attention=st.sampled_from(Attention),
)
def test_keeping_more_tokens_never_costs_less(
    tiny_dit: DiffusionTransformer, pair: tuple[list[int], ...], reuse: Reuse, attention: Attention
) -> None:
    fewer, more = (count(tiny_dit, tuple(counts[end] for counts in pair), reuse, attention)[1] for end in (0, 1))
    assert fewer <= more


@pytest.mark.parametrize("reuse", tuple(Reuse))
def test_a_step_that_keeps_nothing_is_not_free_but_small(tiny_dit: DiffusionTransformer, reuse: Reuse) -> None:
    full, cached = count(tiny_dit, (0,) * BLOCKS, reuse, Attention.ALL)
    assert 0 < cached < full / 10
