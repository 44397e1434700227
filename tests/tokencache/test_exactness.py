"""What the method promises exactly (docs: full steps, all tokens, keys and values, M = 0, independence of samples)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokencache import reference
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.tokencache.cache_points import BLOCK
from tc_deploy.tokencache.forward import OUTPUT, cached_tensors, run_cached, run_full, run_superposed
from tc_deploy.tokencache.passes import KEY, VALUE, cache_name
from tc_deploy.types import Attention, Reuse, Skip

BATCH, BLOCKS, TOKENS, WIDTH = 3, 3, 16, 64
TIMESTEPS = (900.0, 480.5, 3.0)
LABELS = (7, 0, 10)
NOTHING, MIXED, ALL = (0,) * BLOCKS, (0, 5, TOKENS), (TOKENS,) * BLOCKS
SETTINGS = tuple(product(Reuse, Attention, range(3)))
VISIBLE = 1000 * tolerance("torch", "fp32", "max_abs")
"""A difference that no rounding makes."""

each_reuse = pytest.mark.parametrize("reuse", tuple(Reuse))
each_attention = pytest.mark.parametrize("attention", tuple(Attention))
each_order = pytest.mark.parametrize("order", range(3))
each_setting = pytest.mark.parametrize(("reuse", "attention", "order"), SETTINGS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def record(reuse: Reuse, attention: Attention, order: int, keep: tuple[int, ...]) -> CacheRecord:
    """Settings in which phase 1 keeps ``keep``; phase 2 keeps everything and is not looked at."""
    return CacheRecord(reuse=reuse, attention=attention, forecast_order=order, keep_counts=(keep, ALL))


def draw_inputs(seed: int, shift: float = 0.0) -> dict[str, Tensor]:
    """Three samples, each with a timestep, a label (the last: no class) and latents of its own."""
    latents = torch.randn((BATCH, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    timestep = torch.tensor(TIMESTEPS) + shift
    return {"hidden_states": latents, "timestep": timestep, "class_labels": torch.tensor(LABELS, dtype=torch.int32)}


def draw_index(keep: Sequence[int], seed: int) -> tuple[Tensor | None, list[Tensor]]:
    """Random tokens in random order, others for every sample; as an index row and as (B, N) masks per block."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.rand((BATCH, TOKENS), generator=generator).argsort(1)[:, :count] for count in keep]
    masks = [torch.zeros((BATCH, TOKENS)).scatter(1, rows, 1.0).bool() for rows in chosen]
    pruned = [rows for rows, count in zip(chosen, keep, strict=True) if 0 < count < TOKENS]
    return torch.cat(pruned, dim=1) if pruned else None, masks


def draw_weights(order: int, seed: int) -> Tensor:
    """Other ones for every sample; order 0 knows no weight but 1."""
    if order == 0:
        return torch.ones(BATCH, 1)
    return torch.randn((BATCH, order + 1), generator=torch.Generator().manual_seed(seed))


def full_steps(
    model: DiffusionTransformer, cache: CacheRecord
) -> tuple[list[dict[str, Tensor]], list[reference.Noted]]:
    """What the full steps before noted, latest first: by the package, and by hand."""
    earlier = [draw_inputs(seed=100 + age, shift=7.0 + age) for age in range(cache.forecast_order + 1)]
    return (
        [run_full(model, cache, inputs)[1] for inputs in earlier],
        [reference.step(model.module, inputs)[1] for inputs in earlier],
    )


def junk(cache: CacheRecord, value: float) -> dict[str, Tensor]:
    """A cache with ``value`` everywhere."""
    parts = ("attention", "mlp", BLOCK, KEY, VALUE)
    shape = (BATCH, TOKENS, WIDTH)
    return {cache_name(block, part): torch.full(shape, value) for block in range(BLOCKS) for part in parts}


def error_between(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert error_between(found, expected) <= tolerance("torch", "fp32", "max_abs")


def one_token_more(model: DiffusionTransformer) -> DiffusionTransformer:
    """The model, said to have N + 1 tokens, so that a block with N kept tokens counts as pruned and gathers them."""
    return dataclasses.replace(model, geometry=dataclasses.replace(model.geometry, tokens=TOKENS + 1))


# ----------------------------------------------------------------------------------------------------------- full steps
@each_reuse
@each_attention
def test_a_full_step_is_the_model_bit_for_bit(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention
) -> None:
    inputs = draw_inputs(seed=1)
    plain = tiny_dit.module(
        inputs["hidden_states"], timestep=inputs["timestep"], class_labels=inputs["class_labels"].long()
    ).sample
    output, _ = run_full(tiny_dit, record(reuse, attention, 0, NOTHING), inputs)
    assert torch.equal(output, plain)


@each_reuse
@each_attention
def test_a_full_step_notes_what_the_blocks_computed(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention
) -> None:
    inputs = draw_inputs(seed=1)
    output, noted = run_full(tiny_dit, record(reuse, attention, 0, NOTHING), inputs)
    expected_output, expected = reference.step(tiny_dit.module, inputs)
    assert_close(output, expected_output)
    parts = ["block"] if reuse is Reuse.RESIDUAL else ["attention", "mlp"]
    parts += ["key", "value"] if attention is Attention.ALL else []
    assert set(noted) == {OUTPUT, *(f"cache.{block}.{part}" for block in range(BLOCKS) for part in parts)}
    assert noted[OUTPUT] is output
    for block, part in product(range(BLOCKS), parts):
        assert_close(noted[f"cache.{block}.{part}"], expected[block][part])


# --------------------------------------------------------------------------------------------------------- cached steps
@each_setting
@pytest.mark.parametrize("keep", [NOTHING, MIXED, (5, 5, 5), (TOKENS, 1, 0)], ids=str)
def test_a_cached_step_is_the_formula(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, order: int, keep: tuple[int, ...]
) -> None:
    cache = record(reuse, attention, order, keep)
    inputs, weights = draw_inputs(seed=1), draw_weights(order, seed=2)
    index, masks = draw_index(keep, seed=3)
    history, noted = full_steps(tiny_dit, cache)
    expected, _ = reference.step(
        tiny_dit.module,
        inputs,
        masks,
        reference.combined(noted, weights),
        residual=reuse is Reuse.RESIDUAL,
        keys=attention is Attention.ALL,
    )
    # It reads nothing but what cached_tensors names: that is all that an engine is given.
    named = cached_tensors(tiny_dit, cache, phases=(1,))
    history = [{name: earlier[name] for name in named} for earlier in history]
    assert_close(run_cached(tiny_dit, cache, 1, inputs, history, weights, index), expected)


@each_setting
def test_all_tokens_in_any_order_are_the_model_whatever_the_cache_holds(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, order: int
) -> None:
    cache = record(reuse, attention, order, ALL)
    inputs = draw_inputs(seed=1)
    generator = torch.Generator().manual_seed(4)
    index = torch.rand((BATCH, BLOCKS, TOKENS), generator=generator).argsort(2).flatten(1)
    history = [junk(cache, torch.nan)] * (order + 1)
    output = run_cached(one_token_more(tiny_dit), cache, 1, inputs, history, draw_weights(order, seed=2), index)
    assert_close(output, tiny_dit.forward(inputs))


@each_reuse
@each_order
@settings(max_examples=15)
@given(data=st.data())
def test_with_keys_and_values_at_the_same_input_any_tokens_are_the_model(
    tiny_dit: DiffusionTransformer, reuse: Reuse, order: int, data: st.DataObject
) -> None:
    keep = data.draw(st.tuples(*[st.integers(0, TOKENS)] * BLOCKS), "keep")
    orders = st.permutations(range(TOKENS))
    rows = [
        [token for count in keep if 0 < count < TOKENS for token in data.draw(orders)[:count]] for _ in range(BATCH)
    ]
    cache = record(reuse, Attention.ALL, order, keep)
    inputs = draw_inputs(seed=1)
    output, noted = run_full(tiny_dit, cache, inputs)
    weights = torch.tensor([[1.0], [1.5, -0.5], [3.0, -3.0, 1.0]][order]).expand(BATCH, -1)
    index = torch.tensor(rows) if rows[0] else None
    assert_close(run_cached(tiny_dit, cache, 1, inputs, [noted] * (order + 1), weights, index), output)


@each_reuse
def test_without_keys_and_values_some_tokens_are_not_the_model(tiny_dit: DiffusionTransformer, reuse: Reuse) -> None:
    cache = record(reuse, Attention.KEPT, 0, (5, 5, 5))
    inputs = draw_inputs(seed=1)
    output, noted = run_full(tiny_dit, cache, inputs)
    index, _ = draw_index((5, 5, 5), seed=3)
    found = run_cached(tiny_dit, cache, 1, inputs, [noted], torch.ones(BATCH, 1), index)
    assert error_between(found, output) > VISIBLE


def test_nothing_kept_with_residuals_is_whole_step_caching(tiny_dit: DiffusionTransformer) -> None:
    """What FORA does, at the level of blocks: the embedded input plus every cached residual, through the head."""
    cache = record(Reuse.RESIDUAL, Attention.KEPT, 0, NOTHING)
    earlier, inputs = draw_inputs(seed=100, shift=7.0), draw_inputs(seed=1)
    residuals: list[Tensor] = []

    def note(block: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        residuals.append(output - arguments[0])

    hooks = [block.register_forward_hook(note) for block in tiny_dit.blocks]
    tiny_dit.forward(earlier)
    for hook in hooks:
        hook.remove()
    tokens = tiny_dit.module.pos_embed(inputs["hidden_states"])
    for residual in residuals:
        tokens = tokens + residual
    expected = reference.head(tiny_dit.module, tokens, inputs)
    _, noted = run_full(tiny_dit, cache, earlier)
    assert_close(run_cached(tiny_dit, cache, 1, inputs, [noted], torch.ones(BATCH, 1), None), expected)


def test_nothing_kept_with_branches_applies_the_present_gates(tiny_dit: DiffusionTransformer) -> None:
    earlier, inputs = draw_inputs(seed=100, shift=7.0), draw_inputs(seed=1)
    noted_by_hand = reference.step(tiny_dit.module, earlier)[1]

    def with_gates_at(timestep: Tensor) -> Tensor:
        tokens = tiny_dit.module.pos_embed(inputs["hidden_states"])
        for block, noted in zip(tiny_dit.blocks, noted_by_hand, strict=True):
            modulated = block.norm1(tokens, timestep, inputs["class_labels"].long(), hidden_dtype=tokens.dtype)
            gate_attention, gate_mlp = modulated[1][:, None], modulated[4][:, None]
            tokens = tokens + gate_attention * noted["attention"] + gate_mlp * noted["mlp"]
        return reference.head(tiny_dit.module, tokens, inputs)

    cache = record(Reuse.BRANCH, Attention.KEPT, 0, NOTHING)
    _, noted = run_full(tiny_dit, cache, earlier)
    output = run_cached(tiny_dit, cache, 1, inputs, [noted], torch.ones(BATCH, 1), None)
    assert_close(output, with_gates_at(inputs["timestep"]))
    assert error_between(output, with_gates_at(earlier["timestep"])) > VISIBLE


@each_setting
def test_an_entry_of_weight_zero_plays_no_part(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, order: int
) -> None:
    cache = record(reuse, attention, order, MIXED)
    inputs = draw_inputs(seed=1)
    index, _ = draw_index(MIXED, seed=3)
    history, _ = full_steps(tiny_dit, cache)
    weights = torch.eye(order + 1)[:1].expand(BATCH, -1)
    expected = run_cached(tiny_dit, cache, 1, inputs, history, weights, index)
    history[1:] = [junk(cache, 1e30)] * order
    assert torch.equal(run_cached(tiny_dit, cache, 1, inputs, history, weights, index), expected)


@each_setting
def test_a_sample_does_not_depend_on_its_companions(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, order: int
) -> None:
    cache = record(reuse, attention, order, MIXED)
    inputs, weights = draw_inputs(seed=1), draw_weights(order, seed=2)
    index, _ = draw_index(MIXED, seed=3)
    assert index is not None
    history, _ = full_steps(tiny_dit, cache)
    together = run_cached(tiny_dit, cache, 1, inputs, history, weights, index)
    together_full, _ = run_full(tiny_dit, cache, inputs)

    def only(tensors: Mapping[str, Tensor], sample: int) -> dict[str, Tensor]:
        return {name: tensor[sample : sample + 1] for name, tensor in tensors.items()}

    for sample in range(BATCH):
        row = slice(sample, sample + 1)
        past = [only(earlier, sample) for earlier in history]
        alone = run_cached(tiny_dit, cache, 1, only(inputs, sample), past, weights[row], index[row])
        assert_close(alone, together[row])
        assert_close(run_full(tiny_dit, cache, only(inputs, sample))[0], together_full[row])


# -------------------------------------------------------------------------------------------------------- superposition
@each_setting
def test_superposition_is_the_model_at_1_and_the_cache_at_0(
    tiny_dit: DiffusionTransformer, reuse: Reuse, attention: Attention, order: int
) -> None:
    cache = record(reuse, attention, order, NOTHING)
    inputs, weights = draw_inputs(seed=1), draw_weights(order, seed=2)
    history, _ = full_steps(tiny_dit, cache)

    def superposed(importance: float) -> Tensor:
        scores = torch.full((BLOCKS, TOKENS), importance)
        return run_superposed(tiny_dit, cache, inputs, history, weights, scores)

    assert_close(superposed(1.0), tiny_dit.forward(inputs))
    assert_close(superposed(0.0), run_cached(tiny_dit, cache, 1, inputs, history, weights, None))


@each_reuse
@each_order
def test_superposition_of_zeros_and_ones_is_pruning(tiny_dit: DiffusionTransformer, reuse: Reuse, order: int) -> None:
    cache = record(reuse, Attention.ALL, order, MIXED)
    inputs, weights = draw_inputs(seed=1), draw_weights(order, seed=2)
    index, masks = draw_index(MIXED, seed=3)
    assert index is not None
    history, _ = full_steps(tiny_dit, cache)
    same_tokens = torch.stack([mask[0] for mask in masks]).float()
    pruned = run_cached(tiny_dit, cache, 1, inputs, history, weights, index[:1].expand(BATCH, -1))
    assert_close(run_superposed(tiny_dit, cache, inputs, history, weights, same_tokens), pruned)


# ------------------------------------------------------------------------------------------------------ skipped steps
@each_order
def test_a_step_that_skips_the_model_combines_its_outputs(tiny_dit: DiffusionTransformer, order: int) -> None:
    cache = record(Reuse.BRANCH, Attention.ALL, order, NOTHING).model_copy(update={"skip": Skip.MODEL})
    outputs, history = zip(*(run_full(tiny_dit, cache, draw_inputs(seed)) for seed in range(order + 1)), strict=True)
    weights = draw_weights(order, seed=9)
    # Without any input the model cannot run.
    found = run_cached(tiny_dit, cache, 1, {}, history, weights, None)
    assert_close(found, torch.einsum("abchw,ba->bchw", torch.stack(outputs), weights))


@pytest.mark.parametrize("skip", tuple(Skip))
def test_a_phase_that_keeps_a_token_runs_the_model_whatever_skip_says(
    tiny_dit: DiffusionTransformer, skip: Skip
) -> None:
    cache = record(Reuse.BRANCH, Attention.ALL, 0, MIXED).model_copy(update={"skip": skip})
    index, _ = draw_index(MIXED, seed=3)
    inputs = draw_inputs(seed=1)
    output, noted = run_full(tiny_dit, cache, inputs)
    assert_close(run_cached(tiny_dit, cache, 1, inputs, [noted], torch.ones(BATCH, 1), index), output)


# -------------------------------------------------------------------------------------------------- what is left behind
def test_only_what_a_cached_step_reads_is_named(tiny_dit: DiffusionTransformer) -> None:
    def named(reuse: Reuse, attention: Attention, *keeps: tuple[int, ...], skip: Skip = Skip.BLOCKS) -> tuple[str, ...]:
        both = (keeps[0], keeps[-1])
        cache = CacheRecord(reuse=reuse, attention=attention, forecast_order=0, keep_counts=both, skip=skip)
        return cached_tensors(tiny_dit, cache, phases=tuple(range(1, len(keeps) + 1)))

    assert named(Reuse.BRANCH, Attention.ALL, ALL) == ()
    assert named(Reuse.RESIDUAL, Attention.KEPT, MIXED) == ("cache.0.block", "cache.1.block")
    assert named(Reuse.RESIDUAL, Attention.ALL, MIXED) == (
        "cache.0.block",
        "cache.1.block",
        "cache.1.key",
        "cache.1.value",
    )
    assert named(Reuse.BRANCH, Attention.KEPT, (TOKENS, 0, TOKENS), (TOKENS, TOKENS, 8)) == (
        "cache.1.attention",
        "cache.1.mlp",
        "cache.2.attention",
        "cache.2.mlp",
    )
    assert named(Reuse.RESIDUAL, Attention.ALL, NOTHING, (0, TOKENS, TOKENS), skip=Skip.MODEL) == (
        "cache.0.block",
        OUTPUT,
    )
    assert named(Reuse.RESIDUAL, Attention.ALL, ALL, skip=Skip.MODEL) == ()


def patched(model: DiffusionTransformer) -> list[str]:
    return [name for name, module in model.module.named_modules() if "forward" in vars(module)]


@each_reuse
def test_the_model_is_left_as_it_was(tiny_dit: DiffusionTransformer, reuse: Reuse) -> None:
    cache = record(reuse, Attention.ALL, 0, MIXED)
    inputs = draw_inputs(seed=1)
    names, before = list(tiny_dit.module.state_dict()), tiny_dit.forward(inputs)
    index, _ = draw_index(MIXED, seed=3)
    _, noted = run_full(tiny_dit, cache, inputs)
    run_cached(tiny_dit, cache, 1, draw_inputs(seed=5), [noted], torch.ones(BATCH, 1), index)
    assert not patched(tiny_dit)
    assert list(tiny_dit.module.state_dict()) == names
    assert torch.equal(tiny_dit.forward(inputs), before)


@each_reuse
@pytest.mark.parametrize("fail", ["a label that no class has", "an index that no token has"])
def test_the_model_is_left_as_it_was_after_an_error(tiny_dit: DiffusionTransformer, reuse: Reuse, fail: str) -> None:
    cache = record(reuse, Attention.ALL, 0, MIXED)
    inputs = draw_inputs(seed=1)
    before = tiny_dit.forward(inputs)
    _, noted = run_full(tiny_dit, cache, inputs)
    index, _ = draw_index(MIXED, seed=3)
    assert index is not None
    runs: dict[str, Callable[[], object]] = {
        "a label that no class has": lambda: run_full(
            tiny_dit, cache, inputs | {"class_labels": torch.full((BATCH,), 99)}
        ),
        "an index that no token has": lambda: run_cached(
            tiny_dit, cache, 1, inputs, [noted], torch.ones(BATCH, 1), index + BATCH * TOKENS
        ),
    }
    with pytest.raises(IndexError):
        runs[fail]()
    assert not patched(tiny_dit)
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(tiny_dit.forward(inputs), before)
