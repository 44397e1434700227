"""Training of the Cache Predictor by superposition, on the model's own sampling trajectories.

In: a frozen model, a sampler, a schedule. Out: scores (T, L, N). Every random choice is a function of (seed,
iteration), and the state is saved as it goes, so a run that was killed continues and ends in the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tc_deploy.bundle import write_state
from tc_deploy.calibrate.recipe import PredictorRecipe
from tc_deploy.errors import NotFiniteError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import FULL, Schedule
from tc_deploy.tokencache.forward import run_full, run_superposed
from tc_deploy.tokencache.predictor import CachePredictor
from tc_deploy.tokencache.sampler import OWN_REMEDY, Sampling, denoise, device_of, finite_steps

SAVE_EVERY = 20


def record_trajectories(
    model: DiffusionTransformer,
    sampling: Sampling,
    seeds: range,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Tensor]:
    """Sample, and keep what went into the model.

    Args:
        model: the model.
        sampling: the sampler.
        seeds: one sample each.
        on_step: told the number of each step that is done.

    Raises:
        NotFiniteError: the model's own run comes to values that are not finite; names the step.

    Returns:
        ``hidden_states`` (T, model batch, C, H, W), ``timestep`` (T,), and each condition (model batch, ...).
    """
    noise, conditions = draw_batch(model, sampling, seeds)
    check = finite_steps(f"{model.source}: the model's own run", sampling.steps, OWN_REMEDY)
    seen: list[Mapping[str, Tensor]] = []

    def note(step: int, inputs: Mapping[str, Tensor], latents: Tensor) -> None:
        check(step, inputs, latents)
        seen.append(inputs)
        on_step(step)

    denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs), note)
    return {
        "hidden_states": torch.stack([inputs["hidden_states"].cpu() for inputs in seen]),
        "timestep": torch.stack([inputs["timestep"][0].cpu() for inputs in seen]),
        **{item.name: seen[0][item.name].cpu() for item in model.geometry.conditions},
    }


def train_predictor(
    model: DiffusionTransformer,
    cache: CacheRecord,
    schedule: Schedule,
    keep_ratio: tuple[float, float],
    trajectories: Mapping[str, Tensor],
    recipe: PredictorRecipe,
    seed: int,
    state: Path,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
) -> Tensor:
    """Train g(l, t), then score every step.

    The loss of one iteration is the error that superposition leaves in the tokens behind the last block, relative to
    that of taking every value from the cache, plus ``budget_weight * (mean importance - keep ratio) ** 2``.

    Args:
        model: the model, frozen.
        cache: reuse, attention, forecast order.
        schedule: which steps are cached, and from which full steps.
        keep_ratio: wanted mean importance per phase.
        trajectories: from :func:`record_trajectories`.
        recipe: iterations, batch, learning rate, budget weight.
        seed: of initial weights and of every draw.
        state: file to save to and to continue from; one that does not fit is not read.
        on_iteration: told the number of iterations done and the last loss.

    Returns:
        (T, L, N) importance in (0, 1), for every step.

    Raises:
        NotFiniteError: the loss, or a score in the end, is not finite; names the iteration and what to change.
    """
    tokens, blocks, device = model.geometry.tokens, len(model.blocks), device_of(model)
    timesteps = trajectories["timestep"].to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = CachePredictor(blocks, tokens, float(timesteps.max()), sum(keep_ratio) / 2).to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=recipe.learning_rate)
    # Not a plan's own: what is forecast here are branches, which no fit is made for, and a fit wants the tokens first.
    weights = torch.from_numpy(schedule.polynomial_weights(cache.forecast_order)).to(device)
    cached_steps = [step for step, variant in enumerate(schedule.variants) if variant != FULL]
    done = _load(state, predictor, optimizer)
    on_iteration(done, float("nan"))
    for iteration in range(done, recipe.iterations if cached_steps else 0):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        step = cached_steps[int(torch.randint(len(cached_steps), (), generator=generator))]
        rows = torch.randperm(trajectories["hidden_states"].shape[1], generator=generator)[: recipe.batch_size]
        history = _history(model, cache, schedule, trajectories, step, rows)
        inputs = _inputs(model, trajectories, step, rows)
        combine = weights[step].expand(len(rows), -1)

        def last_tokens(
            importance: Tensor,
            inputs: Mapping[str, Tensor] = inputs,
            history: list[dict[str, Tensor]] = history,
            combine: Tensor = combine,
        ) -> Tensor:
            return _last_tokens(model, lambda: run_superposed(model, cache, inputs, history, combine, importance))

        with torch.no_grad():
            wanted = last_tokens(torch.ones(blocks, tokens, device=device))
            all_cached_error = (
                (last_tokens(torch.zeros(blocks, tokens, device=device)) - wanted).pow(2).mean().clamp_min(1e-12)
            )
        importance = predictor(timesteps[step])
        error = (last_tokens(importance) - wanted).pow(2).mean() / all_cached_error
        budget = (importance.mean() - keep_ratio[schedule.variants[step] - 1]) ** 2
        loss = error + recipe.budget_weight * budget
        if not math.isfinite(loss.item()):
            raise _not_finite("the loss", iteration, recipe)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not all(weight.isfinite().all() for weight in predictor.parameters()):
            raise _not_finite("a weight", iteration, recipe)
        if (iteration + 1) % SAVE_EVERY == 0 or iteration + 1 == recipe.iterations:
            _save(state, predictor, optimizer, iteration + 1)
        on_iteration(iteration + 1, float(loss.detach()))
    with torch.no_grad():
        scores = torch.stack([predictor(timestep) for timestep in timesteps]).cpu()
    if not scores.isfinite().all():
        raise _not_finite("a score", recipe.iterations, recipe)
    return scores


def _not_finite(what: str, iteration: int, recipe: PredictorRecipe) -> NotFiniteError:
    return NotFiniteError(
        f"training the Cache Predictor: {what} is not finite at iteration {iteration} of {recipe.iterations}; lower"
        f" predictor.learning_rate ({recipe.learning_rate:g}) or predictor.budget_weight ({recipe.budget_weight:g})"
    )


def _history(
    model: DiffusionTransformer,
    cache: CacheRecord,
    schedule: Schedule,
    trajectories: Mapping[str, Tensor],
    step: int,
    rows: Tensor,
) -> list[dict[str, Tensor]]:
    """Caches of the full steps before ``step``, latest first, as they stand on the true trajectory."""
    depth = cache.forecast_order + 1
    full = [earlier for earlier in range(step) if schedule.variants[earlier] == FULL][-depth:][::-1]
    with torch.no_grad():
        history = [run_full(model, cache, _inputs(model, trajectories, earlier, rows))[1] for earlier in full]
    return history + [history[0]] * (depth - len(history))


def _inputs(
    model: DiffusionTransformer, trajectories: Mapping[str, Tensor], step: int, rows: Tensor
) -> dict[str, Tensor]:
    conditions = {item.name: trajectories[item.name][rows] for item in model.geometry.conditions}
    timestep = trajectories["timestep"][step].expand(len(rows))
    inputs = {"hidden_states": trajectories["hidden_states"][step, rows], "timestep": timestep, **conditions}
    return {name: value.to(device_of(model)) for name, value in inputs.items()}


def _last_tokens(model: DiffusionTransformer, run: Callable[[], Tensor]) -> Tensor:
    """The image tokens behind the last block, (B, N, D), while ``run`` runs the model."""
    seen: list[Tensor] = []
    module, block = model.described_blocks[-1]

    def note(module: nn.Module, arguments: object, output: object) -> None:  # noqa: ARG001
        image = block.gives.split(output, model.geometry.tokens).image
        assert image is not None
        seen.append(image)

    hook = module.register_forward_hook(note)
    try:
        run()
    finally:
        hook.remove()
    return seen[-1]


def _save(path: Path, predictor: CachePredictor, optimizer: torch.optim.Adam, iteration: int) -> None:
    tensors = {f"predictor/{name}": value for name, value in predictor.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in moments.items()}
    write_state(path, save({**tensors, "iteration": torch.tensor(iteration)}))


def _load(path: Path, predictor: CachePredictor, optimizer: torch.optim.Adam) -> int:
    """Continue from a saved state; returns the iterations done, 0 where there is none that fits."""
    try:
        stored = load_file(path)
    except (OSError, SafetensorError):
        return 0
    expected = {f"predictor/{name}": value.shape for name, value in predictor.state_dict().items()}
    found = {name: value.shape for name, value in stored.items() if name.startswith("predictor/")}
    if found != expected or "iteration" not in stored:
        return 0
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in stored.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
    prefix = "predictor/"
    predictor.load_state_dict({name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)})
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return int(stored["iteration"])
