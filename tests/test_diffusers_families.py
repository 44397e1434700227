"""Engines in the pipelines of every family, real objects of tiny random parts, against the pipelines as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from diffusers_pipelines import CachedTransformer, build_bundle, tiny_autoencoder
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.diffusers import EngineTransformer
from tc_deploy.errors import UsageError

STEPS = 6
BATCH = 2
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL
"""A difference that no rounding makes."""
PLAN = {
    # F c c F c c, and no phase 2: two graphs are enough to see a family's calls.
    "sampling": {"steps": STEPS, "guidance_scale": 3.0},
    "schedule": {"boundary": STEPS, "k1": 3, "k2": 1},
    "cache": {"attention": "all", "forecast_order": 1},
}


def _tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _masked(seed: int, tokens: int, width: int) -> dict[str, Tensor]:
    """Prompt embeddings whose last thirds are padding; masks are integers, as tokenizers give them."""
    mask = (torch.arange(tokens) < tokens * 2 // 3).long().expand(BATCH, -1)
    return {
        "prompt_embeds": _tensor(seed, BATCH, tokens, width),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": _tensor(seed + 1, BATCH, tokens, width),
        "negative_prompt_attention_mask": mask.roll(1, 0),
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family in one of its pipelines."""

    model: str
    """Of the zoo."""
    changes: Mapping[str, Any]
    keep: tuple[int, ...]
    scheduler: Any
    pipeline: Callable[[nn.Module, Any], Any]
    """Given transformer and scheduler."""
    arguments: Mapping[str, Any]
    plan: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})


def _pixart(kind: Any, levels: int) -> Callable[[nn.Module, Any], Any]:
    return lambda transformer, scheduler: kind(None, None, tiny_autoencoder(4, levels), transformer, scheduler)


CASES = {
    "pixart-sigma": Case(
        model="pixart",
        changes={"num_layers": 1, "use_additional_conditions": False},
        keep=(8,),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        pipeline=_pixart(diffusers.PixArtSigmaPipeline, 1),
        arguments={**_masked(1, 300, 24), "negative_prompt": None, "use_resolution_binning": False},
    ),
    "pixart-alpha": Case(
        # The 1024 models, which are told the picture's size.
        model="pixart-sizes",
        changes={"num_layers": 1, "sample_size": 128, "patch_size": 32, "use_additional_conditions": None},
        keep=(8,),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        pipeline=_pixart(diffusers.PixArtAlphaPipeline, 4),
        arguments={**_masked(1, 120, 96), "negative_prompt": None, "use_resolution_binning": False},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A case on disk, and its pipeline."""

    case: Case
    model: Path
    bundle: Path
    pipe: Any
    original: nn.Module

    def run(self, transformer: nn.Module, **changes: Any) -> Tensor:
        """The final latents."""
        self.pipe.transformer = transformer
        arguments: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "guidance_scale": 4.0,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            "return_dict": False,
        }
        latents: Tensor = self.pipe(**{**arguments, **self.case.arguments, **changes})[0]
        return latents


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One bundle per family."""
    case: Case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    zoo.save(case.model, folder / "model" / "transformer", **case.changes)
    case.scheduler.save_pretrained(folder / "model" / "scheduler")
    cache = {**PLAN["cache"], "keep_counts": (case.keep, (0,) * len(case.keep))}
    bundle = build_bundle(folder / "model", folder, **{**PLAN, "cache": cache, **case.plan})
    kind = getattr(diffusers, zoo.MODELS[case.model][0])
    original = kind.from_pretrained(folder / "model" / "transformer").eval()
    pipe = case.pipeline(original, case.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return Made(case=case, model=folder / "model", bundle=bundle, pipe=pipe, original=original)


@pytest.fixture(scope="module")
def engine(made: Made) -> EngineTransformer:
    return EngineTransformer(made.bundle)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_engines_are_pytorch_in_the_pipeline(made: Made, engine: EngineTransformer, guided: bool) -> None:
    changes = {} if guided else made.case.unguided
    original = made.run(made.original, **changes)
    assert relative_error(made.run(EngineTransformer(made.bundle, full=True), **changes), original) <= EQUAL
    cached = made.run(engine, **changes)
    assert relative_error(cached, made.run(CachedTransformer(made.bundle, made.model), **changes)) <= EQUAL
    assert relative_error(cached, original) > VISIBLE
    assert torch.equal(made.run(engine, **changes), cached)


def test_other_steps_are_refused(made: Made, engine: EngineTransformer) -> None:
    with pytest.raises(UsageError, match=rf"the plan is for {STEPS} steps of {type(made.case.scheduler).__name__}"):
        made.run(engine, num_inference_steps=STEPS + 1)


def test_another_size_is_refused(made: Made, engine: EngineTransformer) -> None:
    height = 2 * 8 * made.original.config.sample_size
    with pytest.raises(UsageError, match=r"(hidden_states: expected \(B, .*made for that size|added_cond_kwargs)"):
        made.run(engine, height=height, width=height)


def test_a_prompt_of_another_length_is_refused(made: Made, engine: EngineTransformer) -> None:
    shorter = {
        name: value[:, :-1]
        for name, value in made.case.arguments.items()
        if isinstance(value, Tensor) and "pooled" not in name
    }
    with pytest.raises(UsageError, match=r"encoder_hidden_states: expected \(B, .*found \("):
        made.run(engine, **shorter)


def test_the_configuration_is_the_model_s(made: Made, engine: EngineTransformer) -> None:
    shown = {name: value for name, value in made.original.config.items() if not name.startswith("_")}
    assert {name: engine.config[name] for name in shown} == shown
