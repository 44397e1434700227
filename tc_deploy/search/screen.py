"""What a candidate costs in quality, by sampling with it in PyTorch on the screening seeds.

The full run's pictures are made once; every judgement is kept in the work folder as it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tc_deploy.bundle import canonical_json, sha256_of_bytes, write_state
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.quality.metrics import LARGEST_PSNR_DB, image_psnr_db
from tc_deploy.search.cost import CostModel
from tc_deploy.search.space import Candidate, Judged
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.tokencache.sampler import OWN_REMEDY, Sampling, TokenCachedSteps, denoise, finite_steps
from tc_deploy.tokencache.selection import phase_keep_counts, token_index_from_importance
from tc_deploy.types import FloatArray

FIRST_SEED = 600_000
"""Above the seeds of training, below those of measurement."""
NOT_FINITE_DB = -LARGEST_PSNR_DB
"""Below whatever is finite."""


class Screen:
    """Judges candidates.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        importance: (T, L, N) scores that choose blocks and tokens.
        multiple: keep counts are multiples of it.
        samples: pictures per judgement.
        costs: predicts latency; None takes FLOPs.
        folder: where judgements are kept.
        on_judged: told how many were judged.

    Raises:
        NotFiniteError: the model's own run gives values that are not finite.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        sampling: Sampling,
        importance: FloatArray,
        multiple: int,
        samples: int,
        costs: CostModel | None,
        folder: Path,
        on_judged: Callable[[int], None],
    ) -> None:
        self.model, self.sampling, self.importance, self.multiple = model, sampling, importance, multiple
        self.costs, self.folder, self.on_judged = costs, folder, on_judged
        self.noise, self.conditions = draw_batch(model, sampling, range(FIRST_SEED, FIRST_SEED + samples))
        check = finite_steps(f"{model.source}: the model's own run", sampling.steps, OWN_REMEDY)
        self.reference = denoise(
            model, sampling, self.noise, self.conditions, lambda _, inputs: model.forward(inputs), check
        )
        self.judged = 0

    def __call__(self, candidate: Candidate) -> Judged:
        """Sample with a candidate, unless that was done before."""
        schedule, cache = candidate.schedule(self.sampling.steps), self.cache(candidate)
        if self.costs is None:
            ratio = count_flops(self.model, cache).in_full_steps(schedule) / schedule.steps
        else:
            ratio = self.costs.latency_ratio(schedule, cache)
        psnr_db = self._psnr_db(candidate, cache)
        self.judged += 1
        self.on_judged(self.judged)
        return Judged(candidate=candidate, latency_ratio=ratio, psnr_db=psnr_db)

    def cache(self, candidate: Candidate) -> CacheRecord:
        """A candidate's cache settings: the budget of each phase spent over blocks by importance."""
        counts = phase_keep_counts(
            self.importance, candidate.keep_ratio, self.multiple, candidate.schedule(self.sampling.steps)
        )
        return CacheRecord(
            reuse=candidate.reuse,
            attention=candidate.attention,
            forecast_order=candidate.forecast_order,
            keep_counts=counts,
            skip=candidate.skip,
        )

    def tables(self, candidate: Candidate) -> StepTables:
        """The tokens and the weights of each cached step."""
        cache, schedule = self.cache(candidate), candidate.schedule(self.sampling.steps)
        index = token_index_from_importance(self.importance, cache.keep_counts, schedule)
        return StepTables.polynomial(schedule, cache.forecast_order, index)

    def _psnr_db(self, candidate: Candidate, cache: CacheRecord) -> float:
        schedule = candidate.schedule(self.sampling.steps)
        identity = canonical_json({"variants": schedule.variants, "cache": cache.model_dump(mode="json")})
        path = self.folder / f"{sha256_of_bytes(identity.encode())[:16]}.json"
        try:
            return float(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
        steps = TokenCachedSteps(self.model, cache, schedule, self.tables(candidate))
        found = denoise(self.model, self.sampling, self.noise, self.conditions, steps)
        pixels = self.model.geometry.pixels
        psnr_db = image_psnr_db(found, self.reference, pixels=pixels) if found.isfinite().all() else NOT_FINITE_DB
        write_state(path, json.dumps(psnr_db).encode())
        return psnr_db
