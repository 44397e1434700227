"""The plan: what calibration decided, as a folder of reviewable JSON and one file of tables.

In: a folder ``calibration/NAME`` with ``plan.json`` and ``tables.safetensors``. Out: a checked :class:`Plan` and its
tables. The JSON is canonical: the same calibration gives the same bytes. Never: imports torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
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
    PLAN_DOCUMENT,
    Document,
    Earlier,
    FileRecord,
    FolderKind,
    NotOursError,
    absolute_path,
    canonical_json,
    check_files,
    file_names,
    known_document,
    new_folder,
    read_document,
    reading,
    relative_path,
    sha256_of_bytes,
)
from tc_deploy.errors import BundleError, PlanError
from tc_deploy.figures import contradiction_of_cost, contradiction_of_model
from tc_deploy.schedule import PHASES, Schedule, schedule_from_line, tprr
from tc_deploy.tables import FORECAST_WEIGHTS, StepTables, check_tables, tables_bytes, token_index_name
from tc_deploy.tensors import read_tensors
from tc_deploy.types import Attention, FloatArray, GuidanceRule, IntArray, Reuse, Skip

FORMAT_VERSION: Final = 3
PLAN: Final = PLAN_DOCUMENT
TABLES = "tables.safetensors"
VARIANT: Final = r"^[A-Za-z0-9_-]+$"
"""What the name of a copy of the weights looks like: it becomes a part of file names."""
SEARCH = "search.json"
"""What a search found, beside the plan that it chose."""
SAMPLES = "samples.safetensors"
"""Final latents of a few pictures per point of a search, ``(n, *latent shape)`` float32 under the point's name."""
POINTS = "points"
"""The plan of every point of a search, each in a folder of its own."""
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


class Plan(Document):
    """The plan document."""

    kind: Literal["plan"]
    format_version: Literal[3]
    model: ModelRecord
    sampling: SamplingRecord
    schedule: AnySchedule
    cache: CacheRecord
    cost: CostRecord
    origin: OriginRecord
    measured: MeasuredRecord | None
    tables: FileRecord
    forecast: ForecastRecord | None = None
    """None: cached steps forecast by polynomials."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the fit out where there is none, so that such a plan has the bytes that it always had."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "forecast" or value is not None}

    def run_schedule(self) -> Schedule:
        """The schedule, checked.

        Raises:
            PlanError: a number is outside its range, or a list makes no schedule.
        """
        return self.schedule.schedule()

    def step_tables(self, tables: Mapping[str, FloatArray | IntArray]) -> StepTables:
        """Its tables, checked before, as whatever runs its steps takes them; without a fit the weights are polynomials.

        Raises:
            PlanError: as for :meth:`run_schedule`.
        """
        schedule, names = self.run_schedule(), {phase: token_index_name(phase) for phase in self.phases_used()}
        weights = tables.get(FORECAST_WEIGHTS)
        return StepTables(
            forecast_weights=(
                schedule.polynomial_weights(self.cache.forecast_order)
                if weights is None
                else weights.astype(np.float32)
            ),
            token_index={phase: tables[name].astype(np.int32) for phase, name in names.items() if name in tables},
        )

    def phases_used(self) -> tuple[int, ...]:
        """The phases that have a cached step, so the cached variants that exist."""
        return tuple(phase for phase in PHASES if self.run_schedule().cached_steps(phase))

    def keep_counts(self, phase: int) -> tuple[int, ...]:
        """Tokens that each block keeps in a cached step of ``phase`` (1 or 2)."""
        return self.cache.keep_counts[phase - 1]

    def cost_in_full_steps(self) -> float:
        """What one sampling run costs, in full steps, by FLOPs."""
        return self.cost.in_full_steps(self.run_schedule())

    def cost_ratio(self) -> float:
        """What one sampling run costs against the run with every step full, by FLOPs; 1 means nothing is saved."""
        return self.cost_in_full_steps() / self.schedule.steps


def check_plan(plan: Plan, tables: Mapping[str, FloatArray | IntArray], where: str) -> None:
    """Check all that the JSON schema cannot say.

    Raises:
        PlanError: keep counts, timesteps or tables do not fit the model and the schedule, figures contradict each
            other, or what was measured or fitted is of another plan.
    """
    schedule = plan.run_schedule()
    if len(plan.sampling.timesteps) != schedule.steps:
        raise PlanError(f"{where}: {len(plan.sampling.timesteps)} timesteps for {schedule.steps} steps")
    for phase in PHASES:
        check_keep_counts(plan.keep_counts(phase), plan.model.blocks, plan.model.tokens, f"{where}: phase {phase}")
    model, cost = plan.model, plan.cost
    wrong = contradiction_of_model(model.config, model.latent_size, model.tokens, model.width) or contradiction_of_cost(
        cost.full_flops, cost.cached_flops, plan.cache.keep_counts, model.tokens
    )
    if wrong is not None:
        raise PlanError(f"{where}: {wrong}; calibrate again")
    _check_forecast(plan, tables, where)
    check_tables(tables, schedule, plan.cache.keep_counts, plan.cache.forecast_order, plan.model.tokens, where)
    if plan.measured is not None and plan.measured.plan_sha256 != content_sha256(plan):
        raise PlanError(
            f"{where}: what it says under measured is of another plan, so {PLAN} was edited since; calibrate again, or"
            ' set "measured" to null'
        )


def _check_forecast(plan: Plan, tables: Mapping[str, FloatArray | IntArray], where: str) -> None:
    fit = plan.forecast
    if (fit is None) != (FORECAST_WEIGHTS not in tables):
        said, found = ("nothing", "a table") if fit is None else ("a fit", "no table")
        raise PlanError(f"{where}: it says {said} under forecast, and has {found} {FORECAST_WEIGHTS}; calibrate again")
    if fit is None:
        return
    if fit.fitted_for != fitted_for_sha256(plan.model, plan.sampling, plan.schedule, plan.cache):
        raise PlanError(
            f"{where}: its forecast weights were fitted for another model, sampler, schedule or cache than {PLAN} has,"
            " which was edited since; calibrate again"
        )
    seeds = () if plan.measured is None else plan.measured.seeds
    if any(fit.first_seed <= seed < fit.first_seed + fit.samples for seed in seeds):
        raise PlanError(f"{where}: it was measured on seeds that its forecast weights were fitted on; calibrate again")


def check_keep_counts(keep_counts: tuple[int, ...], blocks: int, tokens: int, where: str) -> None:
    """Check one phase's keep counts.

    Raises:
        PlanError: not one count per block, or a count outside 0..N.
    """
    if len(keep_counts) != blocks:
        raise PlanError(f"{where}: expected one keep count for each of the {blocks} blocks, found {len(keep_counts)}")
    for block, keep in enumerate(keep_counts):
        if not 0 <= keep <= tokens:
            raise PlanError(f"{where}, block {block}: keep count must lie in 0..{tokens}, found {keep}")


def plan_sha256(plan: Plan) -> str:
    """The plan's identity: SHA-256 of its canonical bytes (which name the tables' SHA-256)."""
    return sha256_of_bytes(plan_bytes(plan))


def content_sha256(plan: Plan) -> str:
    """What a plan does, as one number: SHA-256 of all but what was measured of it and where its sources were found."""
    content = plan.model_dump(mode="json", exclude={"measured": True, "model": {"source"}})
    if isinstance(content["origin"].get("conditions"), dict):
        content["origin"]["conditions"].pop("file", None)
    return sha256_of_bytes(canonical_json(content).encode("utf-8"))


def fitted_for_sha256(model: ModelRecord, sampling: SamplingRecord, schedule: AnySchedule, cache: CacheRecord) -> str:
    """What fitted forecast weights are for, as one number: another model, sampler or schedule has others."""
    parts = {
        "weights": model.weights_sha256,
        "sampling": sampling.model_dump(mode="json"),
        "schedule": schedule.model_dump(mode="json"),
        "cache": cache.model_dump(mode="json"),
    }
    return sha256_of_bytes(canonical_json(parts).encode("utf-8"))


def plan_bytes(plan: Plan) -> bytes:
    """The canonical bytes of ``plan.json``."""
    return canonical_json(plan.model_dump(mode="json")).encode("utf-8")


def save_plan(plan: Plan, tables: Mapping[str, FloatArray | IntArray], folder: Path) -> None:
    """Write a plan folder, all or nothing.

    Raises:
        PlanError: the plan is inconsistent.
        StorageError: the place cannot be written.
    """
    check_plan(plan, tables, str(folder))
    with new_folder(folder, PLAN_FOLDER) as temporary:
        write_plan_files(plan, tables, temporary, folder)


def write_plan_files(
    plan: Plan, tables: Mapping[str, FloatArray | IntArray], folder: Path, place: Path | None = None
) -> None:
    """Write the two files of a plan into a folder that is being made; the JSON last.

    Args:
        plan: the plan.
        tables: its tables.
        folder: where they are written.
        place: where the folder will lie; None: where it is.
    """
    (folder / TABLES).write_bytes(tables_bytes(tables))
    (folder / PLAN).write_bytes(plan_bytes(_with_paths(plan, lambda path: relative_path(path, place or folder))))


def _with_paths(plan: Plan, said: Callable[[str], str]) -> Plan:
    """A plan whose paths are said otherwise."""
    model = plan.model.model_copy(update={"source": said(plan.model.source)})
    origin, prompts = plan.origin, plan.origin.conditions
    if isinstance(prompts, PromptsRecord):
        prompts = prompts.model_copy(update={"file": said(prompts.file)})
        origin = origin.model_copy(update={"conditions": prompts})
    return plan.model_copy(update={"model": model, "origin": origin})


def load_plan(folder: Path) -> tuple[Plan, dict[str, FloatArray | IntArray]]:
    """Read and check a plan folder. Paths that its file has relative to it are absolute in what is returned.

    Returns:
        The plan and its tables by name.

    Raises:
        BundleError: a file is missing, truncated or altered.
        PlanError: the plan is inconsistent.
    """
    plan, tables = load_plan_as_written(folder)
    return _with_paths(plan, lambda path: absolute_path(path, folder)), tables


def load_plan_as_written(folder: Path) -> tuple[Plan, dict[str, FloatArray | IntArray]]:
    """The same with paths as the file has them, to show or to identify the plan by.

    Raises:
        BundleError: as for :func:`load_plan`.
        PlanError: likewise.
    """
    with reading(folder, PLAN_FOLDER):
        plan = read_document(Plan, folder / PLAN, "plan", f"tc-deploy calibrate MODEL -o {folder}")
        check_files(folder, {TABLES: plan.tables})
        try:
            tables = read_tensors(folder / TABLES)
        except ValueError as error:
            raise PlanError(f"{folder / TABLES}: {error}; calibrate again") from None
    check_plan(plan, tables, str(folder))
    return plan, tables


_KEYS = frozenset({"format_version", "model", "sampling", "schedule", "cache", "cost", "origin", "measured", "tables"})
_EARLIER = {
    1: Earlier(required=_KEYS),
    2: Earlier(required=_KEYS | {"kind"}, optional=frozenset({"forecast"})),
}
_SEARCHES = {
    version: Earlier(
        required=frozenset(
            {"kind", "format_version", "made_by", "date", "model", "hardware", "latency_source", "backend"}
            | {"backend_version", "batch_size", "seed", "screening_seeds", "confirmation_seeds", "settings", "variants"}
            | {"screened", "points", "remarks", "samples"}
        )
    )
    for version in (1, 2, 3)
}
"""The record's class is in a room above; here it is known by its keys."""


def _written_names(folder: Path) -> Iterator[str]:
    """The files of a plan folder, of a search's the points' too.

    Raises:
        NotOursError: it is none.
    """
    found = known_document(folder / PLAN, "plan", Plan, _EARLIER)
    file_names({TABLES: found["tables"]})
    points = [path.name for path in sorted((folder / POINTS).glob("*")) if _is_plan(path)]
    for point in points:
        yield from (f"{POINTS}/{point}/{TABLES}", f"{POINTS}/{point}/{PLAN}")
    if (folder / SEARCH).exists():
        try:
            known_document(folder / SEARCH, "search", None, _SEARCHES)
        except NotOursError as error:
            raise NotOursError(f"beside it {SEARCH} is no search of tc-deploy: {error}") from None
        yield from (SAMPLES, SEARCH)
    elif points:
        yield SAMPLES
    yield from (TABLES, PLAN)


def _is_plan(folder: Path) -> bool:
    try:
        known_document(folder / PLAN, "plan", Plan, _EARLIER)
    except NotOursError:
        return False
    return not folder.is_symlink()


PLAN_FOLDER: Final = FolderKind(name="a plan", marker=PLAN, names=_written_names)


def places_read(folder: Path) -> list[Path]:
    """A plan folder or a bundle, with the checkpoint and the prompts that it was made from, as far as they are there.

    What a command reads that is given the folder, and so what no output of that command may lie in.
    """
    with contextlib.suppress(BundleError, PlanError):
        plan = read_document(Plan, folder / PLAN, "plan", "tc-deploy calibrate")
        prompts = plan.origin.conditions
        said = [plan.model.source, *([prompts.file] if isinstance(prompts, PromptsRecord) else [])]
        sources = [absolute_path(path, folder) for path in said]
        return [folder, *(Path(source) for source in sources if Path(source).exists())]
    return [folder]
