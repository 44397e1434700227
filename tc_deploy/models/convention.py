"""What a family's text-to-image pipelines of diffusers decide about sampling, beside the scheduler.

In: a scheduler, a step count, the tokens of one picture. Out: the arguments with which the pipeline calls
``set_timesteps``. A record is data, as a family is; each rule is read off the pipeline of its name (diffusers 0.42.1).
Never: runs a pipeline, or asks a user for what a pipeline computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from tc_deploy.errors import ModelError

BASE_TOKENS, MAX_TOKENS, BASE_SHIFT = 256, 4096, 0.5
"""What pipelines take where a scheduler's configuration does not say."""


class Shift(Enum):
    """When a pipeline hands its scheduler ``mu``, a shift that depends on the picture's size."""

    NEVER = "never"
    DYNAMIC = "where the scheduler's use_dynamic_shifting says so"
    ALWAYS = "always"


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a family's pipelines sample."""

    pipelines: tuple[str, ...] = ()
    """The classes that sample so; empty where diffusers has none."""
    flow_sigmas: bool = False
    """Whether the pipeline hands its scheduler the sigmas 1 to 1/T, unless the scheduler makes flow sigmas itself."""
    shift: Shift = Shift.NEVER
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
    this strength, and classifier-free guidance is its ``true_cfg_scale``; None where ``guidance_scale`` is that."""

    @property
    def true_cfg(self) -> bool:
        """Whether classifier-free guidance goes by the name ``true_cfg_scale``."""
        return self.embedded_guidance is not None

    def set_timesteps_kwargs(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        """What the pipeline hands ``set_timesteps`` beside the step count, or in its place.

        Args:
            scheduler: a diffusers scheduler.
            steps: T.
            tokens: N, image tokens of one sample.
        """
        config = scheduler.config
        arguments: dict[str, Any] = {}
        if self.flow_sigmas and not config.get("use_flow_sigmas"):
            arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
        if self.shift is Shift.ALWAYS or (self.shift is Shift.DYNAMIC and config.get("use_dynamic_shifting")):
            fewest, most = config.get("base_image_seq_len", BASE_TOKENS), config.get("max_image_seq_len", MAX_TOKENS)
            least, largest = config.get("base_shift", BASE_SHIFT), config.get("max_shift", self.max_shift)
            # The order of diffusers' calculate_shift, so that the same bits come out.
            slope = (largest - least) / (most - fewest)
            arguments["mu"] = tokens * slope + (least - slope * fewest)
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
    "SanaPipeline": Convention(pipelines=("SanaPipeline",)),
    "SanaVideoPipeline": Convention(pipelines=("SanaVideoPipeline",)),
}
"""Of pipelines whose transformer has no family, by their class."""
