"""Runs that stop, start in the middle and take turns on one EngineTransformer: the right value or a refusal.

Random sequences of pipelines' runs and loops without a pipeline. Whatever is served is compared with the untouched
transformer, or with PyTorch's cached forward, in the same loop alone; whatever begins in the middle must be refused;
and an ordinary run that nobody disturbs must not be. ``make stateful`` takes many sequences and records their counts.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import hypothesis
import pytest
import reliability
import torch
from diffusers_pipelines import CachedTransformer, build_bundle
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule, run_state_machine_as_test
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.diffusers import EngineTransformer
from tc_deploy.errors import UsageError

STEPS = 4
NONE = 10
"""The label that stands for none."""
SEQUENCES = int(os.environ.get("TC_DEPLOY_SEQUENCES", "40"))
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
PLAN = {
    # F c1 F c2: a run that goes on with another's caches shows it from the second step on.
    "sampling": {"num_inference_steps": STEPS, "guidance_scale": 2.0},
    "schedule": {"phase_start": 2, "cache_interval_early": 2, "cache_interval_late": 2},
    "cache": {"keep_counts": ((4,), (0,)), "attention": "all", "forecast_order": 1},
}
PLANNED = diffusers.DDIMScheduler(clip_sample=False)
OTHERS = {"timestep_spacing": "leading", "steps_offset": 0}
SCHEDULERS = {
    "planned": lambda: diffusers.DDIMScheduler.from_config(PLANNED.config),
    "ddpm": lambda: diffusers.DDPMScheduler.from_config(PLANNED.config),
    "euler": lambda: diffusers.EulerDiscreteScheduler.from_config(PLANNED.config, **OTHERS),
    "lms": lambda: diffusers.LMSDiscreteScheduler.from_config(PLANNED.config, **OTHERS),
    "other betas": lambda: diffusers.DDIMScheduler.from_config(PLANNED.config, beta_end=0.03),
}
"""All with the plan's timesteps."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What somebody asks for."""

    by: str = "pipeline"
    """Or "loop", which is nobody's, or "named", which has its run in hand."""
    seed: int = 0
    labels: tuple[int, ...] = (3,)
    scale: float = 2.0
    halves: str = "batched"
    """Or each in its cache_context, or "apart": in turn without a word."""
    entry: int = 0
    """The first step, more than 0 in image to image."""
    guided: tuple[int, int] = (0, STEPS)
    """The steps with guidance."""
    meddles: int | None = None
    """After which step the latents are changed, as a callback does."""
    scheduler: str = "planned"

    @property
    def begins_in_the_middle(self) -> bool:
        """Whether it, or a half of it, has no first step."""
        return self.entry > 0 or 0 < self.guided[0] < self.guided[1]

    @property
    def is_ordinary(self) -> bool:
        """Whether it must be served."""
        constant = self.guided[0] == 0 and (self.halves != "batched" or self.guided[1] in (0, STEPS))
        meddled = self.by == "loop" and self.meddles is not None and self.meddles < STEPS - 1
        return not self.begins_in_the_middle and constant and not meddled and self.scheduler == "planned"


class Sampler(diffusers.DiffusionPipeline):
    """A pipeline that does what pipelines do, in steps that somebody takes: its call is a generator of latents."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, transformer: Any, run: Run) -> Iterator[Tensor]:
        yield from denoised(transformer, self.scheduler, run)


def denoised(transformer: Any, scheduler: Any, run: Run) -> Iterator[Tensor]:
    """The latents after each step."""
    generator = torch.Generator().manual_seed(run.seed)
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(len(run.labels), 4, 8, 8, generator=generator)
    latents = noise * scheduler.init_noise_sigma
    if run.entry:
        latents = scheduler.add_noise(0.5 * noise.flip(0, -1), noise, scheduler.timesteps[run.entry : run.entry + 1])
    answer = transformer.new_run() if run.by == "named" else transformer
    context = getattr(transformer, "cache_context", lambda name: contextlib.nullcontext())
    if run.halves != "contexts" and isinstance(transformer, EngineTransformer):
        context = lambda name: contextlib.nullcontext()  # noqa: E731 - the same call without what it says
    for step, timestep in enumerate(scheduler.timesteps):
        if step < run.entry:
            continue
        asked = scheduler.scale_model_input(latents, timestep)
        labels, none = torch.tensor(run.labels), torch.full((len(run.labels),), NONE)
        is_guided = run.guided[0] <= step < run.guided[1]

        def predicted(name: str, asked: Tensor, labels: Tensor, timestep: Tensor = timestep) -> Tensor:
            times = timestep.expand(len(asked))
            with context(name):
                sample: Tensor = answer(asked, timestep=times, class_labels=labels, return_dict=False)[0]
            return sample[:, :4]

        if not is_guided:
            guided = predicted("cond", asked, labels)
        elif run.halves == "batched":
            cond, uncond = predicted("both", torch.cat([asked] * 2), torch.cat([labels, none])).chunk(2)
            guided = uncond + run.scale * (cond - uncond)
        else:
            cond, uncond = predicted("cond", asked, labels), predicted("uncond", asked, none)
            guided = uncond + run.scale * (cond - uncond)
        latents = scheduler.step(guided, timestep, latents, **noise_of(scheduler, generator)).prev_sample
        if run.meddles == step:
            latents = latents + 0.3 * torch.randn(latents.shape, generator=generator)
        yield latents


def noise_of(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"generator": generator} if isinstance(scheduler, diffusers.DDPMScheduler) else {}


def started(transformer: Any, run: Run, sampler: Sampler) -> Iterator[Tensor]:
    if run.by == "pipeline":
        return sampler(transformer, run)
    return denoised(transformer, SCHEDULERS[run.scheduler](), run)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One model on disk, built, and in PyTorch."""

    bundle: Path
    original: nn.Module
    cached: CachedTransformer

    @functools.cache  # noqa: B019 - it lives as long as the module's tests
    def expected(self, run: Run, *, full: bool) -> Tensor:
        """What PyTorch makes of a run."""
        transformer: Any = self.original
        if not full:
            self.cached.runs.clear()
            transformer = self.cached
        alone = replace(run, by="loop", scheduler=run.scheduler)
        with torch.no_grad():
            return list(denoised(transformer, SCHEDULERS[run.scheduler](), alone))[-1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, save_dit: Callable[..., Path]) -> Parts:
    folder = tmp_path_factory.mktemp("state")
    model = save_dit(folder / "model", num_layers=1, num_embeds_ada_norm=NONE)
    PLANNED.save_pretrained(model / "scheduler")
    bundle = build_bundle(model, folder / "engines", **PLAN)
    original = diffusers.DiTTransformer2DModel.from_pretrained(model / "transformer").eval()
    return Parts(bundle=bundle, original=original, cached=CachedTransformer(bundle.parent / "plan", model))


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(eq=False)
class Live:
    """A run that somebody is in the middle of."""

    run: Run
    full: bool
    steps: Iterator[Tensor]
    sampler: Sampler
    is_disturbed: bool = False
    done: int = 0


RUNS = st.builds(
    Run,
    by=st.sampled_from(["pipeline", "pipeline", "loop", "named"]),
    seed=st.integers(0, 1),
    labels=st.sampled_from([(3,), (5,), (3, 5)]),
    scale=st.sampled_from([0.0, 2.0, 5.0]),
    halves=st.sampled_from(["batched", "contexts", "apart"]),
    entry=st.sampled_from([0, 0, 0, 0, 1, 2, 3]),
    guided=st.sampled_from([(0, STEPS), (0, STEPS), (0, STEPS), (0, 0), (0, 2), (1, STEPS), (1, 3)]),
    meddles=st.sampled_from([None, None, None, 0, 2]),
    scheduler=st.sampled_from(["planned"] * 12 + ["ddpm", "euler", "lms", "other betas"]),
)


ENDS = st.sampled_from([KeyboardInterrupt, TimeoutError, GeneratorExit, None])


class Turns(RuleBasedStateMachine):
    """Several users of one pipeline's engines."""

    parts: ClassVar[Parts]
    engines: ClassVar[dict[bool, EngineTransformer]]
    counts: ClassVar[collections.Counter[str]]
    live = Bundle("live")

    @initialize()
    def meet(self) -> None:
        self.counts["sequences"] += 1
        self.samplers: dict[tuple[int, str], Sampler] = {}
        self.all: list[Live] = []

    @rule(target=live, run=RUNS, full=st.booleans(), pipe=st.integers(0, 1))
    def begin(self, run: Run, full: bool, pipe: int) -> Live:
        sampler = self.samplers.setdefault((pipe, run.scheduler), Sampler(SCHEDULERS[run.scheduler]()))
        return self._begun(run, full, sampler)

    def _begun(self, run: Run, full: bool, sampler: Sampler) -> Live:
        self.counts["runs begun"] += 1
        live = Live(run, full, started(self.engines[full], run, sampler), sampler)
        self.all.append(live)
        return live

    @rule(live=consumes(live), after=st.integers(1, STEPS - 1), end=ENDS, changes=st.sampled_from([{}, {"scale": 3.0}]))
    def begin_where_another_stopped(self, live: Live, after: int, end: Any, changes: dict[str, Any]) -> None:
        """Image to image by the same user and with the same prompt, at the very step that comes next."""
        self.go_on(live, max(after - live.done, 0))
        self.stop(live, end)
        entry = min(max(live.run.entry + live.done, 1), STEPS - 1)
        intruder = replace(live.run, seed=1 - live.run.seed, entry=entry, **changes)
        self.go_on(self._begun(intruder, live.full, live.sampler), STEPS)

    @rule(run=RUNS, full=st.booleans(), after=st.integers(1, STEPS - 1), end=ENDS)
    def stop_one_and_begin_where_it_stopped(self, run: Run, full: bool, after: int, end: Any) -> None:
        """The same, of a run that would have been served."""
        plain = replace(run, entry=0, guided=(0, STEPS), meddles=None, scheduler="planned")
        live = self.begin(plain, full, 0)
        self.go_on(live, after)
        self.stop(live, end)
        self.go_on(self._begun(replace(plain, seed=1 - run.seed, entry=after), full, live.sampler), STEPS)

    @rule(live=live, steps=st.integers(1, STEPS))
    def go_on(self, live: Live, steps: int) -> None:
        for other in self.all:
            # Somebody else's steps: a pipeline may then be refused, and must not be wrong.
            other.is_disturbed |= other is not live
        for _ in range(steps):
            try:
                with torch.no_grad():
                    latents = next(live.steps)
            except StopIteration:
                return
            except UsageError as error:
                self.refused(live, str(error))
                return
            live.done += 1
            if live.run.entry + live.done == STEPS:
                self.finished(live, latents)

    def refused(self, live: Live, message: str) -> None:
        self.counts["runs refused"] += 1
        assert "\n" not in message
        assert live.is_disturbed or not live.run.is_ordinary, (live.run, message)

    def finished(self, live: Live, latents: Tensor) -> None:
        self.counts["runs served to the end"] += 1
        assert not live.run.begins_in_the_middle, live.run
        error = relative_error(latents, self.parts.expected(live.run, full=live.full))
        self.counts["wrong values"] += error > EQUAL
        assert error <= EQUAL, (live.run, error)

    @rule(live=consumes(live), end=ENDS)
    def stop(self, live: Live, end: type[BaseException] | None) -> None:
        """By what the run raises, by closing it, or by leaving it where it is."""
        self.counts["runs stopped"] += 1
        if end is not None:
            with contextlib.suppress(end, StopIteration):
                live.steps.throw(end())  # type: ignore[attr-defined]

    @rule(full=st.booleans(), by=st.sampled_from(["pipeline", "loop", "named"]))
    def an_ordinary_run_is_right_at_any_time(self, full: bool, by: str) -> None:
        live = self.begin(Run(by=by, seed=1), full, 1)
        self.go_on(live, STEPS)
        assert live.done == STEPS


def test_every_call_is_right_or_refused(parts: Parts) -> None:
    class Trial(Turns):
        engines: ClassVar = {full: EngineTransformer(parts.bundle, full=full) for full in (False, True)}
        counts: ClassVar[collections.Counter[str]] = collections.Counter()

    Trial.parts = parts
    settings = hypothesis.settings(
        max_examples=SEQUENCES,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    begin_s = time.perf_counter()
    run_state_machine_as_test(Trial, settings=settings)
    reliability.record("stateful", Trial.counts, took_s=time.perf_counter() - begin_s)
    assert min(Trial.counts[what] for what in ("runs refused", "runs stopped", "runs served to the end")) > 0
