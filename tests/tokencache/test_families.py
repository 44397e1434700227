"""What the method promises exactly, on every family: joint text, two self-attentions, rotary tables, single blocks.

``test_exactness`` compares DiT with the formulas written out by hand; here the reference is the untouched model, and
hooks on it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import zoo
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.errors import ModelError
from tc_deploy.groups import group_inputs, token_groups
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.rows import Streams
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.cache_points import cache_points
from tc_deploy.tokencache.forward import OUTPUT, cached_tensors, run_cached, run_full, run_open, run_superposed
from tc_deploy.tokencache.passes import CachedPass
from tc_deploy.types import Attention, Reuse, Skip

BATCH = 3
VISIBLE = 1000 * tolerance("torch", "fp32", "max_abs")
"""A difference that no rounding makes."""

each_family = pytest.mark.parametrize("name", zoo.NAMES)
each_reuse = pytest.mark.parametrize("reuse", tuple(Reuse))
each_setting = pytest.mark.parametrize(("reuse", "attention"), tuple(product(Reuse, Attention)))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def record(
    model: DiffusionTransformer, keep: Sequence[int], reuse: Reuse, attention: Attention, order: int = 0
) -> CacheRecord:
    everything = (model.geometry.tokens,) * len(model.blocks)
    return CacheRecord(reuse=reuse, attention=attention, forecast_order=order, keep_counts=(tuple(keep), everything))


def draw_index(model: DiffusionTransformer, keep: Sequence[int], seed: int) -> Tensor | None:
    """Random tokens in random order; others for every sample where the family allows it."""
    tokens = model.geometry.tokens
    counts = [keep[block] for block in pruned_blocks(tuple(keep), tokens)]
    if not counts:
        return None
    generator = torch.Generator().manual_seed(seed)

    def row() -> Tensor:
        return torch.cat([torch.randperm(tokens, generator=generator)[:count] for count in counts])

    return row() if model.family.shares_index else torch.stack([row() for _ in range(BATCH)])


def ones(order: int = 0) -> Tensor:
    return torch.ones(BATCH, order + 1) / (order + 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= scale * tolerance("torch", "fp32", "max_abs")


def differs(found: Tensor, expected: Tensor, least: float = VISIBLE) -> bool:
    return float((found - expected).abs().max()) > least


def mixtures(model: DiffusionTransformer) -> list[tuple[int, ...]]:
    """Keep counts in which blocks that keep nothing, some and all of the tokens follow each other in every order."""
    kinds = (0, 5, model.geometry.tokens)
    return [keep for keep in product(kinds, repeat=len(model.blocks)) if len(set(keep)) > 1 or keep[0] == 5]


# ---------------------------------------------------------------------------------------------------------- full steps
@each_family
@each_setting
def test_a_full_step_is_the_model_bit_for_bit(name: str, reuse: Reuse, attention: Attention) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    nothing = record(model, (0,) * len(model.blocks), reuse, attention)
    output, noted = run_full(model, nothing, inputs)
    assert torch.equal(output, model.forward(inputs))
    for keep in ((0,) * len(model.blocks), *mixtures(model)):
        names = cached_tensors(model, record(model, keep, reuse, attention), phases=(1,))
        assert set(names) <= set(noted)
    rows = {model.geometry.tokens, model.geometry.text_tokens}
    assert {tensor.shape[1] for part, tensor in noted.items() if part != OUTPUT} <= rows


# -------------------------------------------------------------------------------------------------------- cached steps
@each_family
@each_setting
def test_all_tokens_in_any_order_are_the_model_whatever_the_cache_holds(
    name: str, reuse: Reuse, attention: Attention
) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    tokens, blocks = model.geometry.tokens, len(model.blocks)
    cache = record(model, (tokens,) * blocks, reuse, attention)
    _, noted = run_full(model, cache, inputs)
    junk = {part: torch.full_like(tensor, torch.nan) for part, tensor in noted.items()}
    generator = torch.Generator().manual_seed(4)
    rows = 1 if model.family.shares_index else BATCH
    order = {block: torch.rand((rows, tokens), generator=generator).argsort(1) for block in range(blocks)}
    points = CachedPass(cache, (tokens,) * blocks, tokens, order, [junk], ones())
    with cache_points(model, reuse, points):
        output = model.forward(inputs)
    assert_close(output, model.forward(inputs))


@each_family
@each_reuse
def test_with_keys_and_values_at_the_same_input_any_tokens_are_the_model(name: str, reuse: Reuse) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    for seed, keep in enumerate([(0,) * len(model.blocks), *mixtures(model)]):
        cache = record(model, keep, reuse, Attention.ALL, order=1)
        output, noted = run_full(model, cache, inputs)
        # It reads nothing but what cached_tensors names: that is all that an engine is given.
        noted = {part: noted[part] for part in cached_tensors(model, cache, phases=(1,))}
        weights = torch.tensor([[1.5, -0.5]]).expand(BATCH, -1)
        index = draw_index(model, keep, seed)
        assert_close(run_cached(model, cache, 1, inputs, [noted, noted], weights, index), output)


@each_family
@each_reuse
def test_without_keys_and_values_some_tokens_are_not_the_model(name: str, reuse: Reuse) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    keep = (5,) * len(model.blocks)
    cache = record(model, keep, reuse, Attention.KEPT)
    output, noted = run_full(model, cache, inputs)
    assert differs(run_cached(model, cache, 1, inputs, [noted], ones(), draw_index(model, keep, 3)), output)


@each_family
def test_nothing_kept_with_residuals_is_whole_step_caching(name: str) -> None:
    """What FORA does, at the level of blocks: the embedded input plus every cached residual, through the head."""
    model = zoo.model(name)
    cache = record(model, (0,) * len(model.blocks), Reuse.RESIDUAL, Attention.ALL)
    earlier, inputs = (zoo.inputs_of(model, BATCH, seed) for seed in (1, 2))
    expected = with_residuals_of(model, earlier, inputs, skipped=range(len(model.blocks)))
    _, noted = run_full(model, cache, earlier)
    assert_close(run_cached(model, cache, 1, inputs, [noted], ones(), None), expected)


@each_family
def test_a_skipped_block_hands_its_text_on_to_one_that_is_not(name: str) -> None:
    model = zoo.model(name)
    last = len(model.blocks) - 1
    keep = (0,) * last + (model.geometry.tokens,)
    cache = record(model, keep, Reuse.RESIDUAL, Attention.ALL)
    earlier, inputs = (zoo.inputs_of(model, BATCH, seed) for seed in (1, 2))
    # A prompt, and so what of it counts, stays the same through a run.
    inputs |= {name: value for name, value in earlier.items() if name.endswith("mask")}
    expected = with_residuals_of(model, earlier, inputs, skipped=range(last))
    _, noted = run_full(model, cache, earlier)
    assert_close(run_cached(model, cache, 1, inputs, [noted], ones(), None), expected)


def with_residuals_of(
    model: DiffusionTransformer, earlier: Mapping[str, Tensor], inputs: Mapping[str, Tensor], skipped: Sequence[int]
) -> Tensor:
    """The model on ``inputs``, where ``skipped`` blocks add what they added on ``earlier``: by hooks on the model."""
    added: dict[int, Streams] = {}

    def streams(number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        module, block = model.described_blocks[number]
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        values = tuple(given[argument] for argument in block.arguments)
        image, text = block.takes.split(values if len(values) > 1 else values[0], model.geometry.tokens)
        assert image is not None
        return image, text

    def note(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            image, text = streams(number, args, kwargs)
            after = model.described_blocks[number][1].gives.split(output, model.geometry.tokens)
            assert after.image is not None
            added[number] = Streams(
                after.image - image, None if text is None or after.text is None else after.text - text
            )

        return hook

    def reuse(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            image, text = streams(number, args, kwargs)
            more = added[number]
            assert more.image is not None
            other = text if text is None or more.text is None else text + more.text
            return model.described_blocks[number][1].gives.join(Streams(image + more.image, other))

        return hook

    for make, given in ((note, earlier), (reuse, inputs)):
        hooks = [model.blocks[number].register_forward_hook(make(number), with_kwargs=True) for number in skipped]
        output = model.forward(given)
        for hook in hooks:
            hook.remove()
    return output


@each_family
@each_setting
def test_a_sample_does_not_depend_on_its_companions(name: str, reuse: Reuse, attention: Attention) -> None:
    model = zoo.model(name)
    keep = mixtures(model)[len(mixtures(model)) // 2]
    cache = record(model, keep, reuse, attention)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    index = draw_index(model, keep, seed=3)
    assert index is not None
    _, noted = run_full(model, cache, zoo.inputs_of(model, BATCH, seed=2))
    together = run_cached(model, cache, 1, inputs, [noted], ones(), index)

    def only(tensors: Mapping[str, Tensor], sample: int) -> dict[str, Tensor]:
        return {part: tensor[sample : sample + 1] for part, tensor in tensors.items()}

    for sample in range(BATCH):
        row = slice(sample, sample + 1)
        rows = index if model.family.shares_index else index[row]
        alone = run_cached(model, cache, 1, only(inputs, sample), [only(noted, sample)], ones()[row], rows)
        assert_close(alone, together[row])


@each_family
@each_reuse
def test_superposition_of_ones_is_the_model(name: str, reuse: Reuse) -> None:
    model = zoo.model(name)
    blocks, tokens = len(model.blocks), model.geometry.tokens
    cache = record(model, (0,) * blocks, reuse, Attention.ALL)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    _, noted = run_full(model, cache, zoo.inputs_of(model, BATCH, seed=2))
    output = run_superposed(model, cache, inputs, [noted], ones(), torch.ones(blocks, tokens))
    assert_close(output, model.forward(inputs))
    other = run_superposed(model, cache, inputs, [noted], ones(), torch.full((blocks, tokens), 0.5))
    assert differs(other, output)


# ----------------------------------------------------------------------------------------------------- what is cached
def parts(model: DiffusionTransformer, keep: Sequence[int], reuse: Reuse, attention: Attention) -> list[str]:
    names = cached_tensors(model, record(model, keep, reuse, attention), phases=(1,))
    return [name.removeprefix("cache.") for name in names]


def test_text_is_cached_where_a_block_is_skipped_and_a_later_one_is_not() -> None:
    flux = zoo.model("flux")
    tokens = flux.geometry.tokens
    assert parts(flux, (0, 0, 5, 0), Reuse.BRANCH, Attention.ALL) == [
        *("0.attention", "0.mlp", "0.text_attention", "0.text_mlp"),
        *("1.attention", "1.mlp", "1.text_attention", "1.text_mlp"),
        *("2.parallel", "2.key", "2.value"),
        "3.parallel",
    ]
    assert parts(flux, (0, 5, 0, tokens), Reuse.RESIDUAL, Attention.KEPT) == [
        *("0.block", "0.text_block"),
        "1.block",
        *("2.block", "2.text_block"),
    ]
    assert parts(flux, (5, 0, 0, 0), Reuse.RESIDUAL, Attention.KEPT) == ["0.block", "1.block", "2.block", "3.block"]


def test_two_self_attentions_have_keys_and_values_each() -> None:
    sd35 = zoo.model("sd35")
    assert parts(sd35, (5, 0, 5), Reuse.BRANCH, Attention.ALL) == [
        *("0.attention", "0.dual_attention", "0.mlp", "0.key", "0.value", "0.dual_key", "0.dual_value"),
        *("1.attention", "1.dual_attention", "1.mlp", "1.text_attention", "1.text_mlp"),
        *("2.attention", "2.mlp", "2.key", "2.value"),
    ]


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_a_prompt_by_cross_attention_is_no_token(name: str) -> None:
    model = zoo.model(name)
    assert parts(model, (0, 5), Reuse.BRANCH, Attention.ALL) == [
        *("0.attention", "0.cross_attention", "0.mlp"),
        *("1.attention", "1.cross_attention", "1.mlp", "1.key", "1.value"),
    ]


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "uvit"])
@each_reuse
def test_cached_text_is_read(name: str, reuse: Reuse) -> None:
    model = zoo.model(name)
    keep = (0,) * (len(model.blocks) - 1) + (model.geometry.tokens,)
    cache = record(model, keep, reuse, Attention.ALL)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    output, noted = run_full(model, cache, inputs)
    for part in cached_tensors(model, cache, phases=(1,)):
        other = {**noted, part: noted[part].flip(2)}
        found = run_cached(model, cache, 1, inputs, [other], ones(), None)
        assert differs(found, output, VISIBLE / 10), part


@each_family
@each_reuse
def test_the_model_is_left_as_it_was(name: str, reuse: Reuse) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    before, names = model.forward(inputs), list(model.module.state_dict())
    keep = (5,) * len(model.blocks)
    cache = record(model, keep, reuse, Attention.ALL)
    _, noted = run_full(model, cache, inputs)
    run_cached(model, cache, 1, inputs, [noted], ones(), draw_index(model, keep, 3))
    assert not [path for path, module in model.module.named_modules() if "forward" in vars(module)]
    assert list(model.module.state_dict()) == names
    assert torch.equal(model.forward(inputs), before)


def test_an_attention_that_is_not_seen_is_refused() -> None:
    """Another attention backend would leave keys and values uncached without a word."""
    model = zoo.model("wan")
    cache = record(model, (5, 5), Reuse.BRANCH, Attention.ALL)
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    attention = model.blocks[0].get_submodule("attn1")
    original = attention.forward
    attention.forward = lambda hidden_states, *others, **more: hidden_states
    attention.forward.__signature__ = inspect.signature(original)
    try:
        with pytest.raises(ModelError, match=r"block 0: attn1 called scaled_dot_product_attention 0 times"):
            run_full(model, cache, inputs)
    finally:
        del attention.forward


@each_family
def test_a_phase_that_skips_the_model_reads_its_output_alone(name: str) -> None:
    model = zoo.model(name)
    nothing = (0,) * len(model.blocks)
    cache = record(model, nothing, Reuse.BRANCH, Attention.ALL).model_copy(update={"skip": Skip.MODEL})
    assert cached_tensors(model, cache, phases=(1,)) == (OUTPUT,)
    output, noted = run_full(model, cache, zoo.inputs_of(model, BATCH, seed=1))
    assert torch.equal(run_cached(model, cache, 1, {}, [noted], ones(), None), output)


# --------------------------------------------------------------------------------------- all variants with open numbers
@each_family
@each_setting
@pytest.mark.parametrize("order", [0, 1, 2])
def test_with_open_numbers_of_tokens_every_variant_is_itself(
    name: str, reuse: Reuse, attention: Attention, order: int
) -> None:
    model = zoo.model(name)
    tokens, shared = model.geometry.tokens, model.family.shares_index
    # Groups whose blocks keep nothing in one phase or the other, in both, or everything in one.
    counts = [((5, 0), (0, 5), (0, 0), (tokens, 3), (5, tokens))[block % 5] for block in range(len(model.blocks))]
    first, second = zip(*counts, strict=True)
    cache = CacheRecord(reuse=reuse, attention=attention, forecast_order=order, keep_counts=(first, second))
    groups = token_groups(cache, (1, 2), tokens)
    names = cached_tensors(model, cache, (1, 2))
    inputs = zoo.inputs_of(model, BATCH, seed=1)
    output, noted = run_full(model, cache, inputs)

    def run(variant: int, history: Sequence[Mapping[str, Tensor]], row: Any) -> tuple[Tensor, dict[str, Tensor]]:
        given = {}
        for key, values in group_inputs(groups, cache, tokens, variant, row).items():
            value = torch.from_numpy(values.copy())
            given[key] = value if shared and value.ndim else value.expand(BATCH, *value.shape)
        # It reads nothing but what cached_tensors names.
        history = [{part: step[part] for part in names} for step in history]
        return run_open(model, cache, groups, inputs, history, weights, given)

    weights = torch.tensor([[[1.0], [1.5, -0.5], [2.0, -1.5, 0.5]][order]]).expand(BATCH, -1)
    junk = {part: torch.full_like(tensor, torch.nan) for part, tensor in noted.items()}
    found, rows = run(FULL, [junk] * (order + 1), None)
    assert_close(found, output)
    for part in names:
        assert_close(rows[part], noted[part])

    history = [run_full(model, cache, zoo.inputs_of(model, BATCH, seed=7 + age))[1] for age in range(order + 1)]
    for variant, keep in ((1, first), (2, second)):
        generator = torch.Generator().manual_seed(variant)
        kept = [torch.randperm(tokens, generator=generator)[: keep[block]] for block in pruned_blocks(keep, tokens)]
        row = torch.cat(kept).int() if kept else None
        index = None if row is None else model.index_row(row, BATCH)
        expected = run_cached(model, cache, variant, inputs, history, weights, index)
        found, _ = run(variant, history, None if row is None else row.numpy())
        assert_close(found, expected)
        assert differs(expected, output)
