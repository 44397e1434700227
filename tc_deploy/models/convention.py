"""What a family's text-to-image pipelines of diffusers decide about sampling, beside the scheduler.

In: a scheduler, a step count, the tokens of one picture. Out: the arguments with which the pipeline calls
``set_timesteps``. A record is data, as a family is; each rule is read off the pipeline of its name (diffusers 0.42.1).
Never: runs a pipeline, or asks a user for what a pipeline computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from tc_deploy.errors import ModelError
from tc_deploy.types import GuidanceRule

BASE_TOKENS, MAX_TOKENS, BASE_SHIFT = 256, 4096, 0.5
"""What pipelines take where a scheduler's configuration does not say."""


class Shift(Enum):
    """When a pipeline hands its scheduler ``mu``, a shift that depends on the picture's size."""

    NEVER = "never"
    DYNAMIC = "where the scheduler's use_dynamic_shifting says so"
    ALWAYS = "always"


# ---------------------------------------------------------- the grid of a run: (configuration, T) -> arguments
def own_grid(config: Mapping[str, Any], steps: int) -> dict[str, Any]:  # noqa: ARG001
    """The scheduler's own."""
    return {}


def flow_sigmas(config: Mapping[str, Any], steps: int) -> dict[str, Any]:  # noqa: ARG001
    """The sigmas 1 to 1/T."""
    return {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()}


def flow_sigmas_unless_own(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same, unless the scheduler makes flow sigmas itself."""
    return {} if config.get("use_flow_sigmas") else flow_sigmas(config, steps)


def single_flow_sigmas(config: Mapping[str, Any], steps: int) -> dict[str, Any]:  # noqa: ARG001
    """The same in single precision."""
    return {"sigmas": torch.linspace(1.0, 1 / steps, steps).tolist()}


def whole_timesteps(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Timesteps without a fraction, and their sigmas."""
    most = config["num_train_timesteps"]
    timesteps = np.linspace(most, 1.0, steps).astype(np.int64).astype(np.float32)
    return {"timesteps": timesteps.tolist(), "sigmas": (timesteps / most).tolist()}


# ------------------------------------------------------- mu, a shift by size: (configuration, defaults, N, T) -> mu
def linear_shift(config: Mapping[str, Any], convention: Convention, tokens: int, steps: int) -> float:  # noqa: ARG001
    """``calculate_shift`` of most pipelines, in their order, so that the same bits come out."""
    fewest, most = config.get("base_image_seq_len", BASE_TOKENS), config.get("max_image_seq_len", MAX_TOKENS)
    least, largest = config.get("base_shift", BASE_SHIFT), config.get("max_shift", convention.max_shift)
    slope = (largest - least) / (most - fewest)
    return float(tokens * slope + (least - slope * fewest))


def root_shift(config: Mapping[str, Any], convention: Convention, tokens: int, steps: int) -> float:  # noqa: ARG001
    """``calculate_shift`` of CogView4."""
    root = (tokens / config.get("base_image_seq_len", BASE_TOKENS)) ** 0.5
    return float(root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25))


def empirical_shift(config: Mapping[str, Any], convention: Convention, tokens: int, steps: int) -> float:  # noqa: ARG001
    """``compute_empirical_mu`` of FLUX.2: two lines over the size, at 10 and at 200 steps, and what lies between."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a family's pipelines sample."""

    pipelines: tuple[str, ...] = ()
    """The classes that sample so; empty where diffusers has none."""
    sigmas: Callable[[Mapping[str, Any], int], dict[str, Any]] = own_grid
    """The sigmas or timesteps that it hands its scheduler."""
    shift: Shift = Shift.NEVER
    mu: Callable[[Mapping[str, Any], Convention, int, int], float] = linear_shift
    """The shift, where there is one."""
    max_shift: float = 1.15
    """``mu`` at the largest picture where the scheduler's configuration does not say."""
    scheduler_has: tuple[str, ...] = ()
    """What the pipeline uses of its scheduler that some schedulers lack."""
    scales_noise: bool = False
    """Whether it multiplies its noise by the scheduler's ``init_noise_sigma``, and scales what the model sees."""
    timestep_divisor: float = 1.0
    """What it divides the scheduler's timesteps by."""
    embedded_guidance: float | None = None
    """Strength that a model whose guidance is distilled is told by default. Such a pipeline's ``guidance_scale`` is
    this strength, and classifier-free guidance, where it has any, its ``true_cfg_scale``."""
    true_cfg: bool = False
    """Whether classifier-free guidance goes by the name ``true_cfg_scale``."""
    guidance: GuidanceRule = GuidanceRule.PLAIN
    """How it combines the two outputs of classifier-free guidance."""

    def set_timesteps_kwargs(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        """What the pipeline hands ``set_timesteps`` beside the step count, or in its place.

        Args:
            scheduler: a diffusers scheduler.
            steps: T.
            tokens: N, image tokens of one sample.
        """
        config = scheduler.config
        arguments = self.sigmas(config, steps)
        if self.shift is Shift.ALWAYS or (self.shift is Shift.DYNAMIC and config.get("use_dynamic_shifting")):
            arguments["mu"] = self.mu(config, self, tokens, steps)
        return arguments

    def with_own(self, scheduler: Any, steps: int, tokens: int, own: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of ``set_timesteps`` with a user's own on top; a list of timesteps replaces that of sigmas.

        Raises:
            ModelError: the pipeline itself could not use the scheduler.
        """
        arguments = self.set_timesteps_kwargs(scheduler, steps, tokens)
        if "timesteps" in own:
            arguments.pop("sigmas", None)
        self._check_scheduler(scheduler, arguments)
        return {**arguments, **own}

    def check_pipeline(self, index: Mapping[str, Any], where: str) -> None:
        """Check that a pipeline folder is of a pipeline that samples so.

        Args:
            index: its ``model_index.json``; empty where there is none.
            where: the folder.

        Raises:
            ModelError: it is of another: image to image, inpainting, editing.
        """
        name = index.get("_class_name")
        if name is None or not self.pipelines or name in self.pipelines:
            return
        known = " or ".join(self.pipelines)
        raise ModelError(
            f"{where}: model_index.json names a {name}, which samples otherwise than {known}; to deploy its model by"
            f" itself save it as one: {self.pipelines[-1]}.from_pipe(pipe).save_pretrained(FOLDER)"
        )

    def check_noise(self, index: Mapping[str, Any], scheduler: Any, *, unit: bool) -> None:
        """Check that a pipeline folder's own pipeline can make pictures with its scheduler.

        Args:
            index: its ``model_index.json``; empty where there is none, and nobody's pipeline is followed.
            scheduler: the scheduler.
            unit: whether its noise has deviation 1 and the model sees latents as they are.

        Raises:
            ModelError: it wants its noise or the model's inputs scaled, and the pipeline does not do it.
        """
        if index.get("_class_name") in self.pipelines and not self.scales_noise and not unit:
            raise ModelError(
                f"{index['_class_name']} does not scale noise and latents as {type(scheduler).__name__} wants, so its"
                " own pictures with it are noise; save another scheduler in the folder, such as"
                f" {'FlowMatchEulerDiscrete' if self.shift is not Shift.NEVER else 'DDIM, DPMSolverMultistep'} or"
                " UniPCMultistep"
            )

    def _check_scheduler(self, scheduler: Any, arguments: Mapping[str, Any]) -> None:
        name, pipeline = type(scheduler).__name__, " or ".join(self.pipelines)
        taken = inspect.signature(scheduler.set_timesteps).parameters
        missing = [argument for argument in arguments if argument not in taken]
        missing += [attribute for attribute in self.scheduler_has if not hasattr(scheduler, attribute)]
        if missing:
            flow = "or UniPCMultistep, or one with use_flow_sigmas=True and use_dynamic_shifting=True"
            raise ModelError(
                f"{name} has no {missing[0]}, which {pipeline} needs of its scheduler; save another in the folder:"
                f" FlowMatchEulerDiscrete {flow}"
            )


CONVENTIONS: Mapping[str, Convention] = {
    "AuraFlowPipeline": Convention(
        pipelines=("AuraFlowPipeline",), scheduler_has=("set_begin_index",), timestep_divisor=1000.0
    ),
    "Flux2KleinPipeline": Convention(
        pipelines=("Flux2KleinPipeline",),
        sigmas=flow_sigmas_unless_own,
        shift=Shift.ALWAYS,
        mu=empirical_shift,
        scheduler_has=("set_begin_index",),
        timestep_divisor=1000.0,
    ),
    "SanaPipeline": Convention(pipelines=("SanaPipeline",)),
    "SanaVideoPipeline": Convention(pipelines=("SanaVideoPipeline",)),
}
"""Of single pipelines: where a family's others sample otherwise, or their transformer has no family."""
