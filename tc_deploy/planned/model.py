"""The checkpoint and the sampler that a plan was made for, loaded.

In: a plan. Out: the model, checked to be that very one, and a live diffusers scheduler. Never: changes either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tc_deploy.errors import ModelError, PlanError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.hub import is_hub_id
from tc_deploy.models.loading import load_model, scheduler_from_config
from tc_deploy.models.lora import Lora, fuse_lora
from tc_deploy.plan import Plan
from tc_deploy.tokencache.sampler import Sampling


def model_of_plan(
    plan: Plan,
    where: str,
    model_path: Path | None = None,
    variant: str | None = None,
    loras: Sequence[Lora] = (),
) -> DiffusionTransformer:
    """Load the checkpoint that a plan was made for.

    Args:
        plan: the plan.
        where: its folder, for messages.
        model_path: the checkpoint, where it is not where the plan says.
        variant: which copy of its weights, where it is not the plan's.
        loras: made part of its weights, once it is known to be the plan's.

    Raises:
        ModelError: the checkpoint or a LoRA is missing, cannot be loaded, or does not fit the other.
        PlanError: it is another than the plan was made for.
    """
    path = model_path or Path(plan.model.source)
    if model_path is None and not path.exists() and not is_hub_id(path):
        raise ModelError(
            f"{where}: the plan was made for the checkpoint {path}, which is not there; name where it is with --model"
        )
    options = ModelOptions.of(plan.model)
    model = load_model(path, options if variant is None else dataclasses.replace(options, variant=variant))
    check_model(plan, model, where)
    for lora in loras:
        fuse_lora(model, lora)
    return model


def check_model(plan: Plan, model: DiffusionTransformer, where: str) -> None:
    """Check that a plan belongs to a checkpoint.

    Raises:
        PlanError: class, configuration or weights are others.
    """
    found = model.record()
    fields = ("model_class", "weights_sha256", "blocks", "tokens", "width")
    facts = {field: (getattr(plan.model, field), getattr(found, field)) for field in fields}
    # A newer diffusers may save settings that the older one did not know.
    for key in sorted(plan.model.config.keys() & found.config.keys()):
        facts[f"config.{key}"] = (plan.model.config[key], found.config[key])
    if model.geometry.image_like:
        # What is a picture was measured as one.
        facts["autoencoder"] = (plan.model.autoencoder, found.autoencoder)
    for what, (expected, present) in facts.items():
        if expected != present:
            raise PlanError(
                f"{where}: the plan was made for another model: {what} expected {expected}, found {present} in"
                f" {model.source}; calibrate this checkpoint, or name the right one with --model"
            )


def sampling_from_plan(plan: Plan) -> Sampling:
    """The sampler that a plan was made for, as a live diffusers scheduler.

    Raises:
        ModelError: diffusers does not know the scheduler.
    """
    return Sampling(
        scheduler=scheduler_from_config(plan.sampling.scheduler_class, plan.sampling.scheduler_config, "plan"),
        steps=plan.schedule.steps,
        guidance_scale=plan.sampling.guidance_scale,
        guidance_rule=plan.sampling.guidance_rule,
        embedded_guidance=plan.sampling.embedded_guidance,
        set_timesteps_kwargs=plan.sampling.set_timesteps_kwargs,
    )
