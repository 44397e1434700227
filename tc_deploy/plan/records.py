"""The parts of a plan document: what it was made for, what it decided, what was measured of it.

Each is a record of JSON, frozen, and refuses keys that it does not know. Never: reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer

from tc_deploy.bounds import (
    MAX_AXES,
    MAX_BLOCKS,
    MAX_STEPS,
    Count,
    Float32,
    Guidance,
    PositiveCount,
    Size,
    Step,
    Steps,
)
from tc_deploy.bundle import (
    Document,
    canonical_json,
    sha256_of_bytes,
)
from tc_deploy.schedule import PHASES, Schedule, schedule_from_line, tprr
from tc_deploy.types import Attention, FitTarget, GuidanceRule, Reuse, Skip

VARIANT: Final = r"^[A-Za-z0-9_-]+$"
"""What the name of a copy of the weights looks like: it becomes a part of file names."""
RANDOM: Final = "random"
"""Conditions that are drawn although the model takes prompts: for trials and for models with random weights."""
MAX_PROMPTS = 10_000
Prompt: TypeAlias = Annotated[str, Field(max_length=2**14)]
"""A text; longer than any text encoder reads."""
LABELS: Final = "labels"
"""Class labels, which are drawn."""


class ModelRecord(Document):
    """The checkpoint that the plan was made for."""

    source: str
    """Where it was found: a folder, or a hub's ``owner/name``. A hint, not identity. In a plan's file a folder is said
    relative to the plan's, beginning with a dot, or absolute."""
    model_class: str
    config: dict[str, Any]
    weights_sha256: str
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    """0 where the model is taken as one piece, of whose blocks nothing is known."""
    tokens: Size
    width: Size
    latent_size: Annotated[tuple[Size, ...], Field(max_length=MAX_AXES)] | None = None
    """(H, W) or (F, H, W) of the latents where it was chosen; None means the family's default."""
    text_tokens: Size | None = None
    """Prompt embeddings of one sample where their number was chosen; None means the family's default."""
    variant: Annotated[str, Field(pattern=VARIANT)] | None = None
    """Which of several copies of the weights it is, as ``fp16``; None is the one without a name."""
    autoencoder: bool = False
    """Whether the pipeline that it was found in has an autoencoder, so that its latents are no pictures, whatever their
    channels."""
    pipeline: str | None = None
    """The class of that pipeline, where the model is taken as one piece: as it samples, the plan does."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not chosen, so that a plan without choices has the bytes that it always had."""
        fields: dict[str, Any] = handler(self)
        chosen = ("latent_size", "text_tokens", "variant", "autoencoder", "pipeline")
        return {name: value for name, value in fields.items() if name not in chosen or value not in (None, False)}


class SamplingRecord(Document):
    """The sampler that the plan was made for."""

    scheduler_class: str
    scheduler_config: dict[str, Any]
    set_timesteps_kwargs: dict[str, Any]
    timesteps: tuple[Float32, ...]
    guidance_scale: Guidance | None
    """Classifier-free guidance with this scale by default; None means one model call per sample, without guidance."""
    embedded_guidance: Guidance | None = None
    """Strength that a model whose guidance is distilled is told by default, where it was chosen."""
    guidance_rule: GuidanceRule = GuidanceRule.PLAIN
    """How that pipeline combines the two outputs of classifier-free guidance."""
    true_cfg: bool = False
    """Whether the family's pipeline calls classifier-free guidance ``true_cfg_scale``, and ``guidance_scale`` that
    strength; as a recipe does."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what only models with distilled guidance have, so that other plans have the bytes of old."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value != type(self).model_fields[name].default}


class ScheduleRecord(Document):
    """TPRR as stored: the four integers of :func:`tc_deploy.schedule.tprr`."""

    steps: Steps
    phase_start: Step
    cache_interval_early: Steps
    cache_interval_late: Steps

    def schedule(self) -> Schedule:
        """The list that they make.

        Raises:
            PlanError: a number is outside its range.
        """
        return tprr(**self.model_dump())


class ListedScheduleRecord(Document):
    """Any other schedule as stored: its drawing."""

    variants: Annotated[str, Field(max_length=4 * MAX_STEPS)]
    """``F c1 c1 F c2``, one mark for each step."""

    def schedule(self) -> Schedule:
        """The list.

        Raises:
            PlanError: a mark is unknown, or the first step is no full one.
        """
        return schedule_from_line(self.variants)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.variants.replace("|", " ").split())


def _schedule_class(value: Any) -> str:
    listed = "variants" in value if isinstance(value, Mapping) else isinstance(value, ListedScheduleRecord)
    return "ListedScheduleRecord" if listed else "ScheduleRecord"


AnySchedule: TypeAlias = Annotated[
    Annotated[ScheduleRecord, Tag("ScheduleRecord")] | Annotated[ListedScheduleRecord, Tag("ListedScheduleRecord")],
    Discriminator(_schedule_class),
]
"""TPRR where a plan has its integers, a list where it has ``variants``."""


def schedule_record(schedule: Schedule) -> AnySchedule:
    """A schedule as a plan stores it."""
    if schedule.rule is None:
        return ListedScheduleRecord(variants=schedule.line())
    rule = schedule.rule
    return ScheduleRecord(
        steps=schedule.steps,
        phase_start=rule.phase_start,
        cache_interval_early=rule.cache_interval_early,
        cache_interval_late=rule.cache_interval_late,
    )


class CacheRecord(Document):
    """What a cached step takes from earlier steps, and how many tokens it computes."""

    reuse: Reuse
    attention: Attention
    forecast_order: Annotated[int, Field(ge=0, le=2)]
    keep_counts: tuple[tuple[Count, ...], tuple[Count, ...]]
    """Per phase, the tokens that each block computes in a cached step; 0 skips the block, N leaves it whole."""
    skip: Skip = Skip.BLOCKS
    """What a phase does whose keep counts are all 0."""

    def skips_model(self, phase: int) -> bool:
        """Whether the cached steps of ``phase`` do not run the model."""
        return self.skip is Skip.MODEL and not any(self.keep_counts[phase - 1])

    def token_phases(self, schedule: Schedule) -> tuple[int, ...]:
        """The phases whose cached steps compute tokens; what is kept in a phase without cached steps is none."""
        return tuple(phase for phase in PHASES if any(self.keep_counts[phase - 1]) and schedule.cached_steps(phase))


class CostRecord(Document):
    """Multiply-adds of one step for one sample, doubled (FLOPs), counted on the PyTorch modules."""

    full_flops: PositiveCount
    cached_flops: tuple[Count, Count]

    def in_full_steps(self, schedule: Schedule) -> float:
        """What a run under ``schedule`` costs, in full steps."""
        flops = (self.full_flops, *self.cached_flops)
        return sum(flops[variant] for variant in schedule.variants) / self.full_flops


class ConvergedRecord(Document):
    """PSNR to the converged run: the model's own run of many more steps."""

    steps: Steps
    """Of the converged run."""
    psnr_db: float
    full_psnr_db: float
    """The model's own full run's."""
    fewer_steps_psnr_db: float


class MeasuredRecord(Document):
    """What calibration measured in PyTorch on seeds that training did not see."""

    plan_sha256: str
    """Of the plan that was measured (:func:`content_sha256`): of another one these figures say nothing."""
    seeds: tuple[Count, ...]
    psnr_db: float
    """PSNR to the model's own full run: of pictures clipped to [-1, 1] (peak 2) where the latents are pictures, else of
    the final latents (the peak is their range in the full run)."""
    fewer_steps: Steps
    """The step count at which running every step in full costs what the plan costs, rounded up."""
    fewer_steps_psnr_db: float
    converged: ConvergedRecord | None = None
    """The same to the converged run, where the plan was fitted towards that."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the converged run out of a plan that has nothing to do with it."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "converged" or value is not None}

    @property
    def margin_db(self) -> float:
        """How much nearer the plan is than fewer steps, to what it was fitted towards."""
        found = self.converged or self
        return found.psnr_db - found.fewer_steps_psnr_db


class PromptsRecord(Document):
    """The file of prompt embeddings that a plan was made with."""

    file: str
    """A path, said as the checkpoint's is. A hint, not identity."""
    sha256: str
    prompts: PositiveCount


class TextsRecord(Document):
    """The prompts that a plan was made with, as the pipeline's own text encoders read them."""

    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=MAX_PROMPTS)]
    negative_prompt: Prompt = ""
    """What guidance goes away from."""

    @property
    def sha256(self) -> str:
        """Of the texts."""
        return sha256_of_bytes(canonical_json(self.model_dump(mode="json")).encode("utf-8"))


class ForecastRecord(Document):
    """What forecast weights were fitted on; see :mod:`tc_deploy.calibrate.fitting`."""

    fitted_for: str
    """Of what they are for (:func:`fitted_for_sha256`): for another sampler, say, they are no better than any."""
    first_seed: Count
    samples: PositiveCount
    """One for each seed from the first on."""
    converged_steps: Steps | None = None
    """Steps of the converged run that the fit is towards; None: it is towards the full run."""
    solver_fitted: bool = False
    """Whether the plan has a solver's table of its own (:data:`tc_deploy.tables.SOLVER_COEFFICIENTS`)."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what only a fit towards the converged run has, so that others have the bytes of old."""
        fields: dict[str, Any] = handler(self)
        own = ("converged_steps", "solver_fitted")
        return {name: value for name, value in fields.items() if name not in own or value not in (None, False)}

    @property
    def target(self) -> FitTarget:
        """What the plan's run is to end at."""
        return FitTarget.FULL if self.converged_steps is None else FitTarget.CONVERGED

    @property
    def target_in_words(self) -> str:
        """The same, and whether the solver is fitted too."""
        steps, solver = self.converged_steps, ", with a solver of its own" if self.solver_fitted else ""
        return ("towards the full run" if steps is None else f"towards a converged run of {steps} steps") + solver


class OriginRecord(Document):
    """How the plan came to be."""

    method: Literal["predictor", "manual", "search", "baseline"]
    seed: Count
    settings: dict[str, Any]
    conditions: PromptsRecord | TextsRecord | Literal["random"] | None = None
    """What samples were conditioned on; None for labels, which are drawn."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the conditions out where they are labels, so that such a plan has the bytes that it always had."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "conditions" or value is not None}
