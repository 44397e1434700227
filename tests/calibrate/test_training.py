"""The Cache Predictor finds what was planted: one block that matters, some tokens that change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from tc_deploy.calibrate.recipe import PredictorRecipe
from tc_deploy.calibrate.training import SAVE_EVERY, record_trajectories, train_predictor
from tc_deploy.errors import NotFiniteError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model, load_scheduler
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import tprr
from tc_deploy.tokencache.forward import run_cached, run_full
from tc_deploy.tokencache.sampler import Sampling, denoise
from tc_deploy.tokencache.selection import keep_counts_from_importance, select_tokens, spread_importance
from tc_deploy.types import Attention, Reuse

BLOCKS, TOKENS, WIDTH, BATCH = 3, 16, 64, 4
SCHEDULE = tprr(steps=6, phase_start=3, cache_interval_early=3, cache_interval_late=3)
CACHED_STEPS = [1, 2, 4, 5]
TIMESTEPS = torch.tensor([900.0, 750.0, 600.0, 450.0, 300.0, 150.0])
MOVING = [5, 6, 9, 10]
"""The four tokens in the middle of the picture."""
CORNERS = [0, 3, 12, 15]
STILL = [token for token in range(TOKENS) if token not in MOVING]
CHOICES = [(Reuse.BRANCH, Attention.ALL), (Reuse.RESIDUAL, Attention.KEPT)]
SaveDit = Callable[..., Path]


def close_gates(module: Any, but: int) -> None:
    """No block but one adds anything."""
    for number, block in enumerate(module.transformer_blocks):
        if number != but:
            for part in (2, 5):  # the gates of attention and MLP, of adaLN's six outputs
                rows = slice(part * WIDTH, (part + 1) * WIDTH)
                block.norm1.linear.weight[rows] = 0
                block.norm1.linear.bias[rows] = 0


def part_tokens(module: Any) -> None:
    """What a block adds to a token depends on that token alone, and not on the timestep."""
    for block in module.transformer_blocks:
        block.attn1.to_out[0].weight.zero_()
        block.norm1.emb.timestep_embedder.linear_2.weight.zero_()


def make_record(
    reuse: Reuse, attention: Attention, keep: tuple[int, ...] = (0,) * BLOCKS, order: int = 0
) -> CacheRecord:
    return CacheRecord(reuse=reuse, attention=attention, forecast_order=order, keep_counts=(keep, keep))


def make_trajectories(*, moving: list[int]) -> dict[str, Tensor]:
    """Latents of which ``moving`` tokens are new at every step, the corners once, at the second full step."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((1, BATCH, 4, 8, 8), generator=generator)
    change = torch.randn((len(TIMESTEPS), BATCH, 4, 8, 8), generator=generator)
    change[4:] = torch.where(pixels_of(moving) > 0, change[4:], change[3])
    late = (torch.arange(len(TIMESTEPS)) >= 3)[:, None, None, None, None]
    latents = base + change * torch.maximum(pixels_of(moving), pixels_of(CORNERS) * late)
    labels = torch.tensor([1, 2, 3, 10], dtype=torch.int32)
    return {"hidden_states": latents, "timestep": TIMESTEPS, "class_labels": labels}


def pixels_of(tokens: list[int]) -> Tensor:
    """(H, W), 1 in the patches of ``tokens``."""
    mask = torch.zeros(TOKENS)
    mask[tokens] = 1
    return mask.reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)


def train(
    model: DiffusionTransformer,
    cache: CacheRecord,
    trajectories: dict[str, Tensor],
    state: Path,
    ratio: float,
    iterations: int = 40,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
) -> Tensor:
    recipe = PredictorRecipe(iterations=iterations, batch_size=BATCH)
    return train_predictor(model, cache, SCHEDULE, (ratio, ratio), trajectories, recipe, 0, state, on_iteration)


@pytest.mark.parametrize(("reuse", "attention"), CHOICES)
@pytest.mark.parametrize("planted", range(BLOCKS))
def test_the_block_that_matters_is_found(
    save_dit: SaveDit, tmp_path: Path, reuse: Reuse, attention: Attention, planted: int
) -> None:
    model = load_model(save_dit(tmp_path / "dit", edit=lambda module: close_gates(module, but=planted)))
    losses: list[float] = []
    trajectories = make_trajectories(moving=list(range(TOKENS)))
    importance = train(
        model,
        make_record(reuse, attention),
        trajectories,
        tmp_path / "state",
        ratio=0.2,
        on_iteration=lambda _, loss: losses.append(loss),
    )
    assert importance.shape == (len(TIMESTEPS), BLOCKS, TOKENS)
    per_block = importance[CACHED_STEPS].mean(dim=(0, 2))
    assert per_block.argmax() == planted
    assert per_block[planted] > 2 * per_block.sum() / BLOCKS
    assert losses[-1] < losses[1] / 4
    counts = keep_counts_from_importance(per_block.numpy(), 0.2, TOKENS, 1)
    assert counts[planted] > sum(counts) - counts[planted]


@pytest.mark.parametrize(("reuse", "attention"), CHOICES)
def test_the_tokens_that_change_are_found_and_computing_them_alone_is_exact(
    save_dit: SaveDit, tmp_path: Path, reuse: Reuse, attention: Attention
) -> None:
    def edit(module: Any) -> None:
        close_gates(module, but=1)
        part_tokens(module)

    model = load_model(save_dit(tmp_path / "dit", edit=edit))
    trajectories = make_trajectories(moving=MOVING)
    importance = train(model, make_record(reuse, attention), trajectories, tmp_path / "state", ratio=0.25)
    for step in CACHED_STEPS:
        assert importance[step, 1, MOVING].min() > importance[step, 1, STILL].max()

    cache = make_record(reuse, attention, keep=(0, len(MOVING), 0))

    def error_with(scores: Tensor, step: int) -> float:
        inputs = [
            {
                "hidden_states": trajectories["hidden_states"][at],
                "timestep": TIMESTEPS[at].expand(BATCH),
                "class_labels": trajectories["class_labels"],
            }
            for at in (3 * (step // 3), step)
        ]
        index = torch.from_numpy(select_tokens(scores.numpy(), (0, len(MOVING), 0))).expand(BATCH, -1)
        _, noted = run_full(model, cache, inputs[0])
        found = run_cached(model, cache, 1, inputs[1], [noted], torch.ones(BATCH, 1), index)
        return float((found - model.forward(inputs[1])).abs().max())

    with torch.no_grad():
        for step in CACHED_STEPS:
            assert error_with(importance[step], step) <= tolerance("torch", "fp32", "max_abs")
            spread = torch.from_numpy(spread_importance(BLOCKS, TOKENS, step))
            assert error_with(spread, step) > 1000 * tolerance("torch", "fp32", "max_abs")


def test_without_gain_the_budget_is_what_is_learned(save_dit: SaveDit, tmp_path: Path) -> None:
    model = load_model(save_dit(tmp_path / "dit", edit=lambda module: close_gates(module, but=-1)))
    importance = train(
        model,
        make_record(Reuse.BRANCH, Attention.ALL),
        make_trajectories(moving=[]),
        tmp_path / "state",
        ratio=0.3,
    )
    assert abs(float(importance[CACHED_STEPS].mean()) - 0.3) < 0.05


@pytest.mark.parametrize("order", range(3))
def test_a_state_is_continued_to_the_same_scores(tiny_dit: DiffusionTransformer, tmp_path: Path, order: int) -> None:
    cache = make_record(Reuse.BRANCH, Attention.ALL, order=order)
    trajectories = make_trajectories(moving=MOVING)
    iterations = SAVE_EVERY + 3

    def kill(iteration: int, loss: float) -> None:
        if iteration == SAVE_EVERY + 2:
            raise KeyboardInterrupt

    whole = train(tiny_dit, cache, trajectories, tmp_path / "whole", 0.25, iterations)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_dit, cache, trajectories, tmp_path / "state", 0.25, iterations, kill)
    seen: list[int] = []
    continued = train(
        tiny_dit, cache, trajectories, tmp_path / "state", 0.25, iterations, lambda iteration, _: seen.append(iteration)
    )
    assert seen == [SAVE_EVERY, *range(SAVE_EVERY + 1, iterations + 1)]
    assert torch.equal(continued, whole)


def test_a_state_of_another_size_is_not_read(save_dit: SaveDit, tiny_dit: DiffusionTransformer, tmp_path: Path) -> None:
    cache, trajectories = make_record(Reuse.BRANCH, Attention.ALL), make_trajectories(moving=MOVING)
    deeper = load_model(save_dit(tmp_path / "dit", num_layers=BLOCKS + 1))
    train(deeper, cache, trajectories, tmp_path / "state", 0.25, 1)
    seen: list[int] = []
    train(tiny_dit, cache, trajectories, tmp_path / "state", 0.25, 1, lambda iteration, _: seen.append(iteration))
    assert seen == [0, 1]


def test_training_leaves_the_callers_random_numbers_alone(tiny_dit: DiffusionTransformer, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(tiny_dit, make_record(Reuse.BRANCH, Attention.ALL), make_trajectories(moving=MOVING), tmp_path / "s", 0.25, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_trajectories_are_what_went_into_the_model(
    tiny_dit: DiffusionTransformer, tiny_dit_folder: Path, guidance_scale: float | None
) -> None:
    sampling = Sampling(
        scheduler=load_scheduler(tiny_dit_folder), steps=4, guidance_scale=guidance_scale, set_timesteps_kwargs={}
    )
    steps: list[int] = []
    found = record_trajectories(tiny_dit, sampling, range(5, 8), steps.append)
    batch = 3 if guidance_scale is None else 6
    assert steps == [0, 1, 2, 3]
    assert found["hidden_states"].shape == (4, batch, 4, 8, 8)
    assert found["timestep"].tolist() == sampling.fresh_scheduler().timesteps.tolist()
    assert found["class_labels"].shape == (batch,)
    assert (found["class_labels"][3:] == 10).all()

    seen: list[Tensor] = []
    denoise(
        tiny_dit,
        sampling,
        found["hidden_states"][0, :3],
        {"class_labels": found["class_labels"][:3]},
        lambda _, inputs: (seen.append(inputs["hidden_states"]), tiny_dit.forward(inputs))[1],
    )
    assert torch.equal(torch.stack(seen), found["hidden_states"])


def test_a_seed_gives_its_sample_whatever_stands_beside_it(
    tiny_dit: DiffusionTransformer, tiny_dit_folder: Path
) -> None:
    sampling = Sampling(
        scheduler=load_scheduler(tiny_dit_folder), steps=2, guidance_scale=None, set_timesteps_kwargs={}
    )
    several, one = (record_trajectories(tiny_dit, sampling, seeds) for seeds in (range(5, 8), range(6, 7)))
    assert torch.equal(several["hidden_states"][0, 1], one["hidden_states"][0, 0])
    assert several["class_labels"][1] == one["class_labels"][0]
    assert not torch.equal(several["hidden_states"][0, 0], several["hidden_states"][0, 1])


def test_training_that_diverges_names_the_iteration_and_the_key(tiny_dit: DiffusionTransformer, tmp_path: Path) -> None:
    trajectories = make_trajectories(moving=MOVING)
    trajectories["hidden_states"][3] = float("inf")
    recipe = PredictorRecipe(iterations=40, batch_size=BATCH, learning_rate=0.5)
    record = make_record(Reuse.BRANCH, Attention.ALL)
    with pytest.raises(NotFiniteError, match=r"the loss is not finite at iteration \d+ of 40; lower predictor"):
        train_predictor(tiny_dit, record, SCHEDULE, (0.5, 0.5), trajectories, recipe, 0, tmp_path / "state")


def test_a_step_out_of_float32_leaves_no_plan(tiny_dit: DiffusionTransformer, tmp_path: Path) -> None:
    """What a recipe refuses already; the training does not rely on it."""
    recipe = PredictorRecipe.model_construct(
        iterations=40, batch_size=BATCH, learning_rate=1e30, budget_weight=10.0, trajectories=4
    )
    record, trajectories = make_record(Reuse.BRANCH, Attention.ALL), make_trajectories(moving=MOVING)
    with pytest.raises(NotFiniteError, match=r"at iteration \d+ of 40; lower predictor\.learning_rate \(1e\+30\)"):
        train_predictor(tiny_dit, record, SCHEDULE, (0.5, 0.5), trajectories, recipe, 0, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_model_s_own_run_that_comes_to_nothing_names_its_step(save_dit: SaveDit, tmp_path: Path) -> None:
    folder = save_dit(tmp_path / "dit")
    model = load_model(folder)
    model.module.proj_out_2.bias[0] = torch.nan
    sampling = Sampling(scheduler=load_scheduler(folder), steps=4, guidance_scale=None, set_timesteps_kwargs={})
    with pytest.raises(NotFiniteError, match=r"own run is not finite from step 0 on .*0 to 3.*another checkpoint"):
        record_trajectories(model, sampling, range(2))
