"""What a recipe asks for as live objects: its model on a device, its sampler, its schedule.

In: a recipe. Out: what calibration and a search work with. Never: samples, or writes a file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from tc_deploy.calibrate.placing import check_number
from tc_deploy.calibrate.recipe import Recipe, SamplingRecipe
from tc_deploy.errors import PlanError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.hub import local_folder
from tc_deploy.models.loading import load_model, load_scheduler, model_folder, pipeline_of
from tc_deploy.models.pixels import latent_size_of
from tc_deploy.planned.prompts import prompts_for
from tc_deploy.schedule import Schedule, schedule_from_line, tprr
from tc_deploy.tokencache.sampler import Sampling

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
"""(what is being done, done, of how many)."""

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
PHASE_2_STARTS_AT = 0.5
"""Default start of phase 2 as a share of the steps; docs/quality.md shows what it was chosen by."""


def schedule_from_recipe(recipe: Recipe) -> Schedule | None:
    """The list of steps that a recipe writes out, or makes by TPRR; None where full steps are to be placed.

    Raises:
        UsageError: it does not fit the step count, or is no schedule.
    """
    asked, steps = recipe.schedule, recipe.sampling.num_inference_steps
    if asked.full_steps is not None:
        check_number(asked.full_steps, steps)
        return None
    if asked.variants is not None:
        try:
            listed = schedule_from_line(asked.variants)
        except PlanError as error:
            raise UsageError(f"schedule.variants: {str(error).removeprefix('schedule: ')}") from None
        if listed.steps != steps:
            raise UsageError(
                f"schedule.variants: expected {steps} marks (sampling.num_inference_steps), found"
                f" {listed.steps}; say how many steps there are with --steps {listed.steps}"
            )
        return listed
    if asked.phase_start is not None and asked.phase_start > steps:
        raise UsageError(
            f"schedule.phase_start (--phase-start): must lie in 0..{steps} (sampling.num_inference_steps), found"
            f" {asked.phase_start}; where phase 2 is to be empty, give the step count"
        )
    phase_start = round(PHASE_2_STARTS_AT * steps) if asked.phase_start is None else asked.phase_start
    return tprr(
        steps=steps,
        phase_start=phase_start,
        cache_interval_early=asked.cache_interval_early,
        cache_interval_late=asked.cache_interval_late,
    )


def check_device(device: str) -> None:
    """Check that PyTorch can run a model there.

    Raises:
        UsageError: it is no device that is known here, or there is no such one.
    """
    if device not in DEVICES:
        raise UsageError(f"device: expected {' or '.join(DEVICES)}, found {device}")
    if device == CUDA and not torch.cuda.is_available():
        raise UsageError(
            f"device cuda: PyTorch {torch.__version__} sees no GPU; run on --device {CPU}, or install PyTorch's CUDA"
            " build and NVIDIA's driver (tc-deploy doctor shows what is there)"
        )


def model_from_recipe(recipe: Recipe, device: str = CPU) -> DiffusionTransformer:
    """The model that a recipe asks for, on a device.

    Raises:
        ModelError: the checkpoint cannot be loaded, or a size does not fit it.
        UsageError: a size in pixels cannot be one of latents.
    """
    path, size = Path(recipe.model), recipe.latent_size
    pipeline = pipeline_of(model_folder(local_folder(path, recipe.variant)))
    if recipe.height is not None and recipe.width is not None:
        size = latent_size_of(pipeline, recipe.height, recipe.width, recipe.num_frames)
    options = ModelOptions(latent_size=size, text_tokens=recipe.text_tokens, variant=recipe.variant)
    model = load_model(path, options)
    if recipe.height is not None and not (pipeline.has_autoencoder or model.geometry.pixels):
        raise UsageError(
            f"{recipe.model}: the model makes latents, and how many pixels one covers its autoencoder says, which is"
            " not there; name the whole pipeline's folder, or say latent_size in a recipe"
        )
    model.module.to(device)
    return model


def sampling_from_recipe(
    recipe: Recipe, model: DiffusionTransformer, report: Report = lambda what, done, total: None
) -> Sampling:
    """The sampler that a recipe asks for, and what it conditions the model on.

    Raises:
        ModelError: the checkpoint has no scheduler that can be loaded.
        UsageError: the model needs prompts and the recipe names none, or the file does not fit the model.
    """
    wanted = recipe.sampling
    cfg, embedded = guidance_from_recipe(wanted, model)
    scheduler = load_scheduler(Path(recipe.model), recipe.variant)
    return Sampling(
        scheduler=scheduler,
        steps=wanted.num_inference_steps,
        guidance_scale=cfg,
        set_timesteps_kwargs=model.family.convention.with_own(
            scheduler, wanted.num_inference_steps, model.geometry.tokens, wanted.set_timesteps_kwargs
        ),
        prompts=prompts_for(
            model,
            recipe.conditioned_on,
            guided=cfg is not None,
            embedded_guidance=embedded,
            progress=lambda what: report(what, 0, 1),
        ),
        guidance_rule=model.family.convention.guidance,
        embedded_guidance=embedded,
    )


def guidance_from_recipe(wanted: SamplingRecipe, model: DiffusionTransformer) -> tuple[float | None, float | None]:
    """What a recipe's guidance means to the model's pipeline.

    Returns:
        The scale of classifier-free guidance, None for none, and the strength that the model is told of a guidance
        that was distilled, None where the recipe says nothing of it or the model takes none.

    Raises:
        UsageError: the pipeline has no guidance of that name, or the model nothing to be guided by.
    """
    convention, embedded = model.family.convention, None
    if convention.true_cfg:
        cfg, embedded = wanted.true_cfg_scale, wanted.guidance_scale
        if embedded is not None and not model.geometry.embeds_guidance:
            log.warning("guidance_scale %g is ignored: no guidance was distilled into %s", embedded, model.source)
            embedded = None
    elif wanted.true_cfg_scale is None:
        cfg = wanted.guidance_scale
    else:
        raise UsageError(
            f"true_cfg_scale: the pipeline of a {model.family.model_class} has none; its guidance is guidance_scale"
        )
    if cfg is not None and cfg <= convention.guidance.none:
        log.warning("a guidance scale of %g is none, as in diffusers: one model call per sample", cfg)
        cfg = None
    if cfg is not None and not model.geometry.conditions:
        raise UsageError(
            f"guidance_scale: {model.source} takes no condition, so it has nothing to be guided by; leave it out"
        )
    return cfg, embedded
