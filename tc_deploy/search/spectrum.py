"""Spectrum (arXiv 2603.01623) in PyTorch: the output of skipped steps forecast by Chebyshev polynomials.

Its weights depend on step indices alone, but combine every full step so far, where a plan's combine the last three: so
it runs here. What is forecast is the model's output, as plans forecast it; the paper takes the last block's.

In: a model, its sampler, noise. Out: per setting the latents, and how long a run takes over PyTorch's own full run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.schedule import FULL as FULL_STEP
from tc_deploy.schedule import Schedule
from tc_deploy.search.in_pytorch import FULL, PeerRun, batches_of, kept_tensors, key_of, ratios_to_full, sample
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling, denoise

DEGREE = 4
RIDGE = 0.1
LOCAL_SHARE = 0.5
"""Of a forecast, what the straight line through the last two full steps has; its defaults, as are the two above."""
FIRST_INTERVAL = 2.0


@dataclass(frozen=True, kw_only=True)
class SpectrumSetting:
    """Where full steps stand: at the start, and then at intervals that grow."""

    warmup: int
    """So many steps at the start are full."""
    growth: float
    """By which the interval grows with every full step after them."""

    @property
    def name(self) -> str:
        """``Spectrum, warm-up 5, growth 0.75``."""
        return f"Spectrum, warm-up {self.warmup}, growth {self.growth:g}"

    def schedule(self, steps: int) -> Schedule:
        """Which steps are full."""
        variants, interval, since = [], FIRST_INTERVAL, 0
        for step in range(steps):
            full = step < self.warmup
            if not full and since + 1 >= int(interval):
                full, interval = True, interval + self.growth
            since = 0 if full else since + 1
            variants.append(FULL_STEP if full else 1)
        return Schedule(variants=tuple(variants))


SETTINGS = (
    SpectrumSetting(warmup=5, growth=0.0),
    SpectrumSetting(warmup=5, growth=0.25),
    SpectrumSetting(warmup=5, growth=0.75),
    SpectrumSetting(warmup=3, growth=0.75),
    SpectrumSetting(warmup=3, growth=3.0),
    SpectrumSetting(warmup=2, growth=6.0),
)
"""The published one is the third; the others cost more and less."""


def spectrum_weights(schedule: Schedule) -> NDArray[np.float64]:
    """How each step combines the outputs of the full steps, (T, full steps), oldest first; a full one's row is unused.

    A ridge regression of all outputs so far on Chebyshev polynomials of the step, evaluated at the present step, and
    the straight line through the last two, half each.
    """
    full = [step for step, variant in enumerate(schedule.variants) if variant == FULL_STEP]
    places = 2 * np.arange(schedule.steps) / max(schedule.steps - 1, 1) - 1
    basis = np.polynomial.chebyshev.chebvander(places, DEGREE)
    weights = np.zeros((schedule.steps, len(full)))
    line = schedule.polynomial_weights(1)
    for step in range(schedule.steps):
        known = [node for node in full if node <= step]
        nodes = basis[known]
        gram = nodes.T @ nodes + RIDGE * np.eye(DEGREE + 1)
        weights[step, : len(known)] = (1 - LOCAL_SHARE) * basis[step] @ np.linalg.solve(gram, nodes.T)
        for age, weight in enumerate(line[step][: len(known)]):
            weights[step, len(known) - 1 - age] += LOCAL_SHARE * weight
    return weights


def spectrum_runs(
    model: DiffusionTransformer,
    sampling: Sampling,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    batch_size: int,
    rounds: int,
    kept: Path,
    settings: Sequence[SpectrumSetting] = SETTINGS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PeerRun, ...]:
    """Sample, and time runs in turn with PyTorch's full run.

    Args:
        model: the model.
        sampling: scheduler, steps, guidance.
        noise: (n, C, H, W) standard normal.
        conditions: by name, (n, ...).
        batch_size: pictures per run.
        rounds: timed runs of each; 0 times nothing.
        kept: a folder for what was found, of this model, sampler, noise and conditions alone: nothing runs twice.
        settings: which.
        progress: told how many sampling runs are done, and of how many.

    Returns:
        One per setting that skips a step.
    """
    schedules = {setting: setting.schedule(sampling.steps) for setting in settings}
    schedules = {setting: schedule for setting, schedule in schedules.items() if schedule.full_steps < sampling.steps}
    batches = list(batches_of(noise, conditions, batch_size))
    untimed = len(schedules) * len(batches)
    total = untimed + rounds * (1 + len(schedules))
    latents: dict[SpectrumSetting, Tensor] = {}
    requests: dict[str, Callable[[], object]] = {FULL: partial(sample, model, sampling, *batches[0])}
    for setting, schedule in schedules.items():
        run = partial(_sampled, model, sampling, schedule, spectrum_weights(schedule))

        def make(run: Callable[..., Tensor] = run) -> dict[str, Tensor]:
            made = []
            for batch in batches:
                made.append(run(*batch))
                progress(len(latents) * len(batches) + len(made), total)
            return {"latents": torch.cat(made)[: len(noise)].contiguous()}

        path = kept / f"{_key([setting], len(noise), batch_size)}.safetensors"
        latents[setting] = kept_tensors(path, make)["latents"]
        requests[setting.name] = partial(run, *batches[0])
    path = kept / f"{_key([*schedules], batch_size, rounds)}.json"
    told = lambda done, _: progress(untimed + done, total)  # noqa: E731
    ratios = ratios_to_full(requests, rounds, path, told) if rounds and schedules else {}
    found = []
    for setting, schedule in schedules.items():
        ratio = ratios.get(setting.name, {})
        found.append(
            PeerRun(
                name=setting.name,
                kind=Kind.SPECTRUM,
                latents=latents[setting],
                latency_ratio=ratio.get("median"),
                latency_iqr=ratio.get("iqr"),
                cost_in_full_steps=schedule.full_steps,
                steps_full=schedule.full_steps,
                steps_cached=schedule.steps - schedule.full_steps,
            )
        )
    return tuple(found)


def _sampled(
    model: DiffusionTransformer,
    sampling: Sampling,
    schedule: Schedule,
    weights: NDArray[np.float64],
    noise: Tensor,
    conditions: Mapping[str, Tensor],
) -> Tensor:
    outputs = list[Tensor]()

    def output(step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        if schedule.variants[step] == FULL_STEP:
            outputs.append(model.forward(inputs))
            return outputs[-1]
        return torch.stack([float(weight) * known for weight, known in zip(weights[step], outputs, strict=False)]).sum(
            0
        )

    return denoise(model, sampling, noise, conditions, output)


def _key(settings: Sequence[SpectrumSetting], *numbers: int) -> str:
    """What a kept result depends on, beside what its folder stands for."""
    return key_of(
        ["Spectrum", DEGREE, RIDGE, LOCAL_SHARE, FIRST_INTERVAL, *numbers, *map(dataclasses.asdict, settings)]
    )
