"""What a user asks calibration for: a TOML file with command-line overrides, validated at the edge.

    model = "../../examples/digits-dit"     # relative to the recipe

    [sampling]
    num_inference_steps = 50
    guidance_scale = 2.0

    [schedule]
    phase_start = 25
    cache_interval_early = 4
    cache_interval_late = 2

    [cache]
    keep_ratio = [0.0, 0.25]                # phase 1, phase 2: share of all tokens that a cached step computes
    attention = "all"
    forecast_order = 1

    [predictor]
    iterations = 200

Every key but ``model`` has a default; an unknown key is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from tc_deploy.bounds import MAX_AXES, MAX_STEPS, Count, Guidance, Size, Step, Steps
from tc_deploy.bundle import Document, first_problem, path_beside, read_toml
from tc_deploy.errors import UsageError
from tc_deploy.plan import MAX_PROMPTS, RANDOM, VARIANT, Prompt, TextsRecord
from tc_deploy.types import Attention, FitTarget, Reuse, Skip

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_SEED = 500_000
"""Training and fits draw a sample per seed from the recipe's on, measurement from a million on; they must not meet."""


LEAST_FIT_SAMPLES = 8
"""With fewer a fit is one to their noise."""
USUAL_FIT_SAMPLES = 32
MAX_LISTED = 100
"""Values in a list of a search: each is a plan that is built."""

_ROUND_ROBIN = ("schedule.phase_start", "schedule.cache_interval_early", "schedule.cache_interval_late")
_PLACED = ("schedule.full_steps", "schedule.budget_minutes")
_ALTERNATIVES = {
    "cache.keep_ratio": ("cache.keep_counts",),
    "cache.keep_counts": ("cache.keep_ratio",),
    "prompts": ("conditions",),
    "conditions": ("prompts", "negative_prompt"),
    "height": ("latent_size",),
    "schedule.variants": (*_PLACED, *_ROUND_ROBIN),
    "schedule.full_steps": ("schedule.variants", *_ROUND_ROBIN),
    **dict.fromkeys(_ROUND_ROBIN, ("schedule.variants", *_PLACED)),
}
"""What an option says in other words than these keys of a recipe."""


class SamplingRecipe(Document):
    """The sampling run that the plan is for."""

    num_inference_steps: Steps = 50
    guidance_scale: Guidance | None = None
    """As the family's pipeline of diffusers means it: classifier-free guidance, where 1 and less are none (one model
    call per sample); for FLUX the strength of the distilled guidance."""
    true_cfg_scale: Guidance | None = None
    """Classifier-free guidance of FLUX, by its pipeline's name; 1 and less are none."""
    set_timesteps_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the scheduler's set_timesteps on top of what the family's pipeline passes."""


class ScheduleRecipe(Document):
    """TPRR, whose defaults are those of docs/quality.md; or a list, step by step; or full steps that are placed."""

    phase_start: Step | None = None
    """First step of phase 2; None means half of the steps."""
    cache_interval_early: Steps = 4
    cache_interval_late: Steps = 2
    variants: Annotated[str, Field(max_length=4 * MAX_STEPS)] | None = None
    """``F c1 c1 F c2``: one mark for each step, set by hand."""
    full_steps: Steps | None = None
    """How many steps are full, placed where the run ends nearest to the model's own; the forecasts are fitted."""
    budget_minutes: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """After so long the best places so far are taken; None: when no full step is left that is better elsewhere."""

    @model_validator(mode="after")
    def _check_one_way(self) -> Self:
        names = ("variants",), ("full_steps",), (key.partition(".")[2] for key in _ROUND_ROBIN)
        ways = [self.model_fields_set & set(way) for way in names]
        given = [min(way) for way in ways if way]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other; give one")
        if self.budget_minutes is not None and self.full_steps is None:
            raise ValueError("budget_minutes is for placing full steps; say how many with full_steps")
        return self


class CacheRecipe(Document):
    """What a cached step computes and what it takes from the cache."""

    keep_ratio: tuple[Ratio, Ratio] = (0.0, 0.0)
    """Per phase, the share of all tokens of all blocks that a cached step computes."""
    keep_counts: tuple[tuple[Count, ...], tuple[Count, ...]] | None = None
    """Per phase, tokens per block (or one number for all blocks), set by hand: no predictor is trained and
    ``keep_ratio`` plays no part."""
    multiple: Size = 8
    """Keep counts are multiples of this (tensor cores like 8), or all tokens."""
    reuse: Reuse = Reuse.BRANCH
    attention: Attention = Attention.ALL
    forecast_order: Annotated[int, Field(ge=0, le=2)] = 1
    skip: Skip = Skip.MODEL

    @model_validator(mode="after")
    def _check_one_way(self) -> Self:
        if self.keep_counts is not None and "keep_ratio" in self.model_fields_set:
            raise ValueError("keep_counts and keep_ratio exclude each other; give one")
        return self


class ForecastRecipe(Document):
    """Where the weights of cached steps that skip the model come from."""

    fit_samples: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Sampling runs of the model itself that the weights are fitted on; 0 takes polynomials. None: 0, or
    ``USUAL_FIT_SAMPLES`` where full steps are placed or the target is the converged run."""
    target: FitTarget = FitTarget.FULL
    """What the run is to end at: the model's own of as many steps, or of many more; towards that the solver's own
    coefficients are fitted too."""

    @model_validator(mode="after")
    def _check_enough(self) -> Self:
        if self.fit_samples and self.fit_samples < LEAST_FIT_SAMPLES:
            raise ValueError(
                f"fit_samples must be 0, which takes polynomials, or at least {LEAST_FIT_SAMPLES}, found"
                f" {self.fit_samples}; 32 are usual"
            )
        if self.target is FitTarget.CONVERGED and self.fit_samples == 0:
            raise ValueError(
                "target = converged is for what is fitted, and fit_samples = 0 fits nothing; leave one out"
            )
        return self


class PredictorRecipe(Document):
    """Training of the Cache Predictor."""

    trajectories: Annotated[int, Field(gt=0, le=100_000)] = 32
    """Sampling runs of the model itself that it is trained on."""
    iterations: Annotated[int, Field(gt=0, le=10_000_000)] = 200
    batch_size: Annotated[int, Field(gt=0, le=100_000)] = 8
    """Trajectories that one iteration looks at; at most ``trajectories``."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1e-2
    budget_weight: Annotated[float, Field(gt=0, le=1e9)] = 10.0
    """Weight of the term that drives the mean importance to the keep ratio. Too small a one lets every block be
    important, and the ranking is lost."""


class MeasureRecipe(Document):
    """Measurement of the finished plan against the model's own full run, on seeds of its own."""

    samples: Annotated[int, Field(ge=0, le=100_000)] = 32
    """0 leaves the measurement out."""


class SearchRecipe(Document):
    """What ``tc-deploy plan`` tries."""

    full_steps: tuple[Ratio, ...] = (0.08, 0.12, 0.16, 0.24, 0.32, 0.44)
    """Shares of the steps that are full, each placed and fitted; all other steps skip the model."""
    keep_ratio: tuple[Ratio, ...] = (0.25,)
    """Shares of all tokens that a cached step computes, each in a plan of its own; 0 alone: none."""
    confirmation_samples: Annotated[int, Field(gt=0, le=100_000)] = 64
    """Pictures, of other seeds, that engines make with each point of the result."""
    latency_rounds: Annotated[int, Field(gt=0, le=100_000)] = 7
    """Rounds in which each built point and the full run take turns."""
    budget_minutes: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """After so long no further baseline is built; half of it is for placing full steps. None: until all is done."""
    baselines: Literal["none", "static", "all"] = "static"
    """What runs beside: nothing but the full run, what a plan can express, or Spectrum and cache-dit in PyTorch too."""

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        for name, value in self:
            if value == ():
                raise ValueError(f"{name} must list at least one value")
            if isinstance(value, tuple) and len(value) > MAX_LISTED:
                raise ValueError(f"{name} must list at most {MAX_LISTED} values, found {len(value)}")
        return self


class QualityRecipe(Document):
    """What judges pictures beside their distance to the full run's."""

    classifier: str | None = None
    """An ONNX file (relative to the recipe) that gives ``features`` and ``logits`` of ``images``; it has the Frechet
    distance and the class accuracy taken."""


class Recipe(Document):
    """All of it."""

    model: str
    height: Size | None = None
    """Of the pictures, in pixels, as for diffusers' pipelines; None means the model's own."""
    width: Size | None = None
    num_frames: Size | None = None
    """Of a video."""
    latent_size: Annotated[tuple[Size, ...], Field(max_length=MAX_AXES)] | None = None
    """The same of the latents, (H, W) or (F, H, W), for a transformer without its pipeline."""
    text_tokens: Size | None = None
    """Tokens that every prompt is padded or cut to; None means the family's default."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    """What a model is conditioned on that takes prompts; the pipeline's own text encoders read them."""
    negative_prompt: Prompt | None = None
    """What guidance goes away from."""
    conditions: str | None = None
    """In the place of prompts: a safetensors file of their embeddings (relative to the recipe), or "random"."""
    variant: Annotated[str, Field(pattern=VARIANT)] | None = None
    """Which of several copies of the weights, as ``fp16`` of ``diffusion_pytorch_model.fp16.safetensors``."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    sampling: SamplingRecipe = SamplingRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    cache: CacheRecipe = CacheRecipe()
    forecast: ForecastRecipe = ForecastRecipe()
    predictor: PredictorRecipe = PredictorRecipe()
    measure: MeasureRecipe = MeasureRecipe()
    search: SearchRecipe = SearchRecipe()
    quality: QualityRecipe = QualityRecipe()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.height is None) != (self.width is None) or (self.num_frames and not self.height):
            raise ValueError("height and width go together, and num_frames with both; give all of them")
        if self.height is not None and self.latent_size is not None:
            raise ValueError("height and latent_size exclude each other; give one")
        if self.prompts is not None and self.conditions is not None:
            raise ValueError("prompts and conditions exclude each other; give one")
        if self.negative_prompt is not None and self.prompts is None:
            raise ValueError("negative_prompt goes with prompts; a file of conditions holds its own")
        return self

    @property
    def conditioned_on(self) -> TextsRecord | str | None:
        """Prompts, a file of embeddings, ``random``, or None where nothing was said."""
        if self.prompts is None:
            return self.conditions
        return TextsRecord(prompts=self.prompts, negative_prompt=self.negative_prompt or "")

    @model_validator(mode="after")
    def _check_placed(self) -> Self:
        if self.schedule.full_steps is not None:
            counts = self.cache.keep_counts or ()
            wrong = (
                ("cache.keep_ratio", any(self.cache.keep_ratio)),
                ("cache.keep_counts", any(any(phase) for phase in counts)),
                ("cache.skip", self.cache.skip is not Skip.MODEL),
                ("cache.forecast_order", not self.cache.forecast_order),
                ("forecast.fit_samples", self.forecast.fit_samples == 0),
            )
            for name, is_wrong in wrong:
                if is_wrong:
                    raise ValueError(
                        f"schedule.full_steps places the full steps of a run whose other steps skip the model, by"
                        f" forecasts that are fitted; leave out {name}"
                    )
        return self

    @property
    def fit_seeds(self) -> range:
        """The seeds of the samples that forecasts are fitted on; none: they are polynomials."""
        samples = self.forecast.fit_samples
        if samples is None:
            fits = self.schedule.full_steps is not None or self.forecast.target is FitTarget.CONVERGED
            samples = USUAL_FIT_SAMPLES if fits else 0
        return range(self.seed, self.seed + samples)


def read_recipe(path: Path, overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe, or make one for a model folder.

    Args:
        path: a ``.toml`` file, or a model folder, which is a recipe with defaults only.
        overrides: the command line's options as dotted keys, for example ``{"schedule.phase_start": 4}``; None values
            are passed over.

    Raises:
        UsageError: the file is missing or no TOML, a key is unknown, or a value is out of range.
    """
    values: dict[str, Any] = {"model": str(path)}
    if path.suffix == ".toml":
        values = read_toml(path)
        if isinstance(values.get("model"), str):
            values["model"] = path_beside(path, values["model"])
        if isinstance(values.get("conditions"), str) and values["conditions"] != RANDOM:
            values["conditions"] = path_beside(path, values["conditions"])
        quality = values.get("quality")
        if isinstance(quality, dict) and isinstance(quality.get("classifier"), str):
            quality["classifier"] = path_beside(path, quality["classifier"])
    for key, value in overrides.items():
        if value is not None:
            *tables, name = key.split(".")
            place = values
            for table in tables:
                place = place.setdefault(table, {})
                if not isinstance(place, dict):
                    raise UsageError(f"{path}: {table}: expected a table [{table}], found {place!r}")
            place[name] = value
            # Of two ways to say something, the command line's replaces the recipe's.
            for other in _ALTERNATIVES.get(key, ()):
                if overrides.get(other) is None:
                    place.pop(other.rpartition(".")[2], None)
    try:
        # By way of JSON a list may stand for a tuple and a word for its meaning, but no text and no true for a number.
        return Recipe.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        where, reason = first_problem(error)
        tables = where.split(".")[:-1]
        if reason == "unknown key":
            reason += f"; known here: {', '.join(_keys_of(tables))}"
        given = (key for key, value in overrides.items() if value is not None and f"{where}.".startswith(f"{key}."))
        option = next(given, None)
        which = f"{path}: {where}" if option is None else f"--{option.rpartition('.')[2].replace('_', '-')}"
        raise UsageError(f"{which}: {reason}") from None


def _keys_of(tables: list[str]) -> list[str]:
    """The keys that a table of the recipe may have."""
    kind: Any = Recipe
    for table in tables:
        kind = kind.model_fields[table].annotation
    return list(kind.model_fields)
