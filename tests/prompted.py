"""Bundles with text encoders and a decoder, and the real pipelines of tiny random parts that they were made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import transformers
import zoo
from bundles import copied, make_plan, run_cli
from diffusers_pipelines import (
    shifted_autoencoder,
    tiny_autoencoder,
    tiny_clip,
    tiny_t5,
    tiny_tokenizer,
    tiny_umt5,
    tiny_wan_autoencoder,
)
from kept import Keep
from numpy.typing import NDArray

import tc_deploy
from tc_deploy.backends.build import build_target

STEPS, TEXT, CLIP = 4, 5, 6
PROMPTS = ["a cat on a mat", "a red bridge"]
BATCH = len(PROMPTS)
# F c F c, and no phase 2.
SCHEDULE = {"phase_start": STEPS, "cache_interval_early": 2, "cache_interval_late": 1}
FLUX_SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _pixart(transformer: Any) -> Any:
    parts = (tiny_tokenizer(300), tiny_t5(24), tiny_autoencoder(4, 2), transformer)
    return diffusers.PixArtSigmaPipeline(*parts, diffusers.DPMSolverMultistepScheduler())


def _flux(transformer: Any) -> Any:
    clip = tiny_clip(transformers.CLIPTextModel, 20)
    text = (clip, tiny_tokenizer(CLIP), tiny_t5(24), tiny_tokenizer(512))
    autoencoder = tiny_autoencoder(4)
    autoencoder.register_to_config(shift_factor=0.25)
    return diffusers.FluxPipeline(FLUX_SCHEDULER, autoencoder, *text, transformer)


def _sd3(transformer: Any) -> Any:
    kind = transformers.CLIPTextModelWithProjection
    first, second = (tiny_clip(kind, 8, projection, seed) for projection, seed in ((8, 1), (12, 2)))
    clips = (first, tiny_tokenizer(CLIP), second, tiny_tokenizer(CLIP))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, shifted_autoencoder(4, 2), *clips, tiny_t5(24), tiny_tokenizer(256)
    )


def _wan(transformer: Any) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(tiny_tokenizer(512), tiny_umt5(24), tiny_wan_autoencoder(), scheduler, transformer)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family in its pipeline."""

    changes: Mapping[str, Any]
    """To the zoo's model."""
    make: Callable[[Any], Any]
    keep: tuple[int, ...]
    sampling: Mapping[str, Any]
    arguments: Mapping[str, Any]
    """Of the pipeline."""
    size: tuple[int, int]
    """That the pipeline is asked for, in pixels."""
    shape: tuple[int, ...] = ()
    """Of one picture or video; ``size`` in RGB where nothing is said."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the engines are given beside prompts and noise."""


CASES = {
    "pixart": Case(
        changes={"num_layers": 1, "use_additional_conditions": False},
        make=_pixart,
        keep=(8,),
        sampling={"num_inference_steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": "a dog", "guidance_scale": 3.0, "use_resolution_binning": False},
        size=(16, 24),
        given={"negative_prompt": "a dog"},
    ),
    "flux": Case(
        changes={"num_layers": 1, "num_single_layers": 1},
        make=_flux,
        keep=(8, 5),
        sampling={"num_inference_steps": STEPS},
        arguments={"guidance_scale": 2.0},
        size=(8, 12),
        given={"guidance_scale": 2.0},
    ),
    "sd3": Case(
        changes={"num_layers": 1},
        make=_sd3,
        keep=(8,),
        sampling={"num_inference_steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": ["a dog"] * BATCH, "guidance_scale": 3.0},
        size=(16, 24),
        given={"negative_prompt": ["a dog"] * BATCH},
        plan={"text_tokens": CLIP + TEXT},
    ),
    "wan": Case(
        changes={"num_layers": 1},
        make=_wan,
        keep=(8,),
        sampling={"num_inference_steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": ["a dog"] * BATCH, "guidance_scale": 3.0, "num_frames": 9},
        size=(32, 64),
        # The tiny autoencoder enlarges less than the real one.
        shape=(5, 8, 16, 3),
        given={"negative_prompt": "a dog"},
        plan={"latent_size": (3, 4, 8)},
    ),
}
SLOW = ("flux", "sd3", "wan")
"""Half a minute each to export."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A case on disk, and its pipeline."""

    case: Case
    pipe: Any
    plan: Path
    bundle: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture or video."""
        return self.case.shape or (*self.case.size, 3)


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES],
)
def prompted(kept: Keep, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prompted:
    entry = kept(f"prompted-{request.param}", functools.partial(_make, request.param), by_commands=True)
    pipe = diffusers.DiffusionPipeline.from_pretrained(entry / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    made = copied(entry, entry / "pipeline", tmp_path_factory.mktemp(request.param))
    build_target(made.bundle, options={"threads": 1})
    return Prompted(case=CASES[request.param], pipe=pipe, plan=made.plan, bundle=made.bundle)


def _make(name: str, folder: Path) -> None:
    case = CASES[name]
    zoo.save(name, folder / "model", **case.changes)
    transformer = getattr(diffusers, zoo.MODELS[name][0]).from_pretrained(folder / "model").eval()
    case.make(transformer).save_pretrained(folder / "pipeline")
    plan = make_plan(
        folder / "pipeline",
        folder / "plan",
        **{
            "conditions": "random",
            "latent_size": (8, 12),
            "text_tokens": TEXT,
            "sampling": case.sampling,
            "schedule": SCHEDULE,
            "cache": {"attention": "all", "forecast_order": 1, "keep_counts": (case.keep, (0,) * len(case.keep))},
            **case.plan,
        },
    )
    answer = run_cli("export", plan, "-o", folder / "bundle", "--with-decoder", "--with-text-encoder")
    assert answer.code == 0, answer.err


def images(made: Prompted, backend: str | None = None, *, full: bool, noise: NDArray[np.float32]) -> Any:
    with tc_deploy.load(made.bundle, backend, batch_size=BATCH) as pipeline:
        return pipeline(prompt=PROMPTS, **made.case.given, latents=noise, full=full)


def noise_of(made: Prompted) -> NDArray[np.float32]:
    with tc_deploy.load(made.bundle, batch_size=BATCH) as pipeline:
        return pipeline.noise(3, BATCH)
