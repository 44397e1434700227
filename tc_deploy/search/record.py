"""What a search found, as a document: ``search.json`` beside ``samples.safetensors``.

Read by ``tc-deploy plan`` (to choose again without searching again) and by ``tc-deploy report``.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tc_deploy.bundle import Document, FileRecord, read_document
from tc_deploy.plan import SEARCH, AnySchedule, CacheRecord, ModelRecord, Plan
from tc_deploy.quality.record import Quality

FORMAT_VERSION: Final = 4
FULL_POINT = "full"
"""Name of the point that is the model's own run; every quality is a comparison with it."""

LatencySource: TypeAlias = Literal["measured", "flops"]
Runtime: TypeAlias = Literal["engines", "pytorch"]


class Kind(StrEnum):
    """What a point is an example of."""

    FULL = "full run"
    TOKEN_CACHE = "tc-deploy"  # noqa: S105 - not a password
    """A point of the search's space."""
    FEWER_STEPS = "fewer steps"
    BETTER_SOLVER = "better solver"
    SKIP_REUSE = "skip, reuse"
    SKIP_FORECAST = "skip, forecast"
    RANDOM_TOKENS = "random tokens"
    UNIFORM_BLOCKS = "uniform blocks"
    CACHE_DIT = "cache-dit"
    SPECTRUM = "Spectrum"


class SettingsRecord(Document):
    """What makes a point, so that its plan can be written again; None where it is no plan (a peer in PyTorch)."""

    scheduler_class: str
    schedule: AnySchedule
    cache: CacheRecord

    @classmethod
    def of(cls, plan: Plan) -> SettingsRecord:
        """A plan's."""
        return cls(scheduler_class=plan.sampling.scheduler_class, schedule=plan.schedule, cache=plan.cache)

    def token_phases(self) -> tuple[int, ...]:
        """The phases whose cached steps compute tokens."""
        return self.cache.token_phases(self.schedule.schedule())


class PointRecord(Document):
    """One way to make pictures, run on seeds that the search did not see."""

    name: str
    """Unique and readable: ``K=(4, 2), phase start 25, order 2``."""
    kind: Kind
    runtime: Runtime
    """What made its pictures, and in what it was timed. PyTorch's latency ratio is to PyTorch's own full run: shown
    beside the engines', and never held against them."""
    settings: SettingsRecord | None
    plan_sha256: str | None = None
    """Of the plan that was measured (:func:`tc_deploy.plan.content_sha256`); None where it is no plan, or the search of
    a time when that was not written down."""
    steps_full: NonNegativeInt
    steps_cached: NonNegativeInt
    cost_in_full_steps: NonNegativeFloat
    """FLOPs over those of one full step."""
    latency_ms: PositiveFloat | None
    """Of one whole sampling run: the full run's median times ``latency_ratio``, so that both order points alike; None
    where the latency was not measured."""
    latency_ratio: PositiveFloat
    """To the full run of the same runtime, median over rounds in which both ran; of FLOPs where the latency was not
    measured."""
    latency_iqr: NonNegativeFloat
    """Interquartile range of that ratio over the rounds."""
    quality: Quality
    converged_psnr_db: float | None
    """PSNR to a full run of four times the steps: what a better solver is right to be judged by."""
    drift: tuple[float, ...] | None
    """Per step, relative L2 of the latents to the full run's; None where the steps are others."""
    on_front: bool
    """No other point on the engines is both faster and closer to the full run; never of one in PyTorch."""

    @property
    def psnr_db(self) -> float:
        """To the full run."""
        return self.quality.psnr_db


class SearchRecord(Document):
    """A search."""

    kind: Literal["search"]
    format_version: Literal[4]
    made_by: str
    date: str
    model: ModelRecord
    hardware: str
    latency_source: LatencySource
    backend: str
    backend_version: str
    batch_size: PositiveInt
    """Pictures per run in every latency."""
    seed: NonNegativeInt
    confirmation_seeds: NonNegativeInt
    settings: dict[str, Any]
    """The recipe's search table."""
    points: tuple[PointRecord, ...]
    """The full run first, then by latency."""
    remarks: tuple[str, ...]
    """What the figures say, in words."""
    samples: FileRecord


def read_search(folder: Path) -> SearchRecord:
    """Read a search.

    Raises:
        BundleError: there is none, or it is not of this version.
    """
    return read_document(SearchRecord, folder / SEARCH, "search", f"tc-deploy plan RECIPE -o {folder}")
