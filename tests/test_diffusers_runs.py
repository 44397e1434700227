"""Whose run a call is, in real pipelines: image to image, callbacks, other schedulers, threads, sizes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
import zoo
from diffusers_pipelines import CachedTransformer, build_bundle, shifted_autoencoder
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.diffusers import EngineTransformer
from tc_deploy.diffusers.runs import KEPT
from tc_deploy.errors import UsageError
from tc_deploy.models import loading
from tc_deploy.models import sd3 as sd3_blocks

STEPS = 6
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
NEAR = 10 * EQUAL
"""FLUX's rotary angles are large, and ONNX rounds them otherwise; another run's caches make a hundred times this."""
PLAN = {
    "conditions": "random",
    "latent_size": (8, 12),
    "text_tokens": 5,
    # F c c F c c
    "sampling": {"num_inference_steps": STEPS, "guidance_scale": 3.0},
    "schedule": {"phase_start": STEPS, "cache_interval_early": 3, "cache_interval_late": 1},
}
SHIFTED = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
DYNAMIC = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = {
    "prompt_embeds": tensor(1, 1, 5, 24),
    "negative_prompt_embeds": tensor(2, 1, 5, 24),
    "pooled_prompt_embeds": tensor(3, 1, 20),
    "negative_pooled_prompt_embeds": tensor(4, 1, 20),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model in its pipelines, and its bundle."""

    bundle: Path
    model: Path
    original: nn.Module
    scheduler: Any
    size: dict[str, int]
    parts: Callable[..., Any]

    def run(self, transformer: nn.Module, kind: Any, scheduler: Any = None, **arguments: Any) -> Tensor:
        """The final latents of a pipeline of its own."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config) if scheduler is None else scheduler
        pipe = self.parts(kind, transformer, scheduler)
        pipe.set_progress_bar_config(disable=True)
        given: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            "return_dict": False,
        }
        latents: Tensor = pipe(**{**given, **self.size, **PROMPTS, **arguments})[0]
        return latents


def made(folder: Path, name: str, scheduler: Any, size: dict[str, int], parts: Callable[..., Any], **plan: Any) -> Made:
    model = folder / "model"
    layers = {"num_layers": 1, "num_single_layers": 1} if name == "flux" else {"num_layers": 1}
    zoo.save(name, model / "transformer", **layers)
    scheduler.save_pretrained(model / "scheduler")
    keep = ((8, 5), (0, 0)) if name == "flux" else ((8,), (0,))
    cache = {"attention": "all", "forecast_order": 1, "keep_counts": keep}
    bundle = build_bundle(model, folder, **{**PLAN, "cache": cache, **plan})
    original = getattr(diffusers, zoo.MODELS[name][0]).from_pretrained(model / "transformer").eval()
    return Made(bundle=bundle, model=model, original=original, scheduler=scheduler, size=size, parts=parts)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    def parts(kind: Any, transformer: Any, scheduler: Any) -> Any:
        return kind(transformer, scheduler, shifted_autoencoder(4, 2), *[None] * 6)

    return made(tmp_path_factory.mktemp("sd3"), "sd3", SHIFTED, {"height": 16, "width": 24}, parts)


@pytest.fixture(scope="module")
def engine(sd3: Made) -> EngineTransformer:
    return EngineTransformer(sd3.bundle)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------------- runs in the middle

TEXT, IMAGE = diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusion3Img2ImgPipeline
PICTURE = {"image": torch.full((1, 3, 16, 24), 0.5)}


def stop_after(step: int) -> Any:
    """As a user's button does: the pipeline skips what is left."""

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == step
        return values

    return callback


def fail_after(step: int) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise TimeoutError
        return values

    return callback


@pytest.mark.parametrize("stop", [stop_after, fail_after])
def test_image_to_image_does_not_go_on_with_a_run_that_was_stopped(
    sd3: Made, engine: EngineTransformer, stop: Any
) -> None:
    # Strength 0.6 of 6 steps begins at step 2; what was stopped has run steps 0 and 1.
    try:
        sd3.run(engine, TEXT, callback_on_step_end=stop(1))
    except TimeoutError:
        assert stop is fail_after
    with pytest.raises(UsageError, match=r"which is step 2: .* with strength below 1, .* use strength=1"):
        sd3.run(engine, IMAGE, **PICTURE, strength=0.6)
    whole = sd3.run(engine, TEXT)
    assert relative_error(whole, sd3.run(CachedTransformer(sd3.bundle, sd3.model), TEXT)) <= EQUAL


def test_image_to_image_of_strength_1_is_as_it_was(sd3: Made) -> None:
    full = EngineTransformer(sd3.bundle, full=True)
    found, expected = (sd3.run(each, IMAGE, **PICTURE, strength=1.0) for each in (full, sd3.original))
    assert relative_error(found, expected) <= EQUAL


def test_latents_that_a_callback_changes_are_taken(sd3: Made, engine: EngineTransformer) -> None:
    def blend(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 0.7 * values["latents"] + 0.3 * tensor(index, *values["latents"].shape)}

    cached = CachedTransformer(sd3.bundle, sd3.model)
    found, expected = (sd3.run(each, TEXT, callback_on_step_end=blend) for each in (engine, cached))
    assert relative_error(found, expected) <= EQUAL


def test_a_prompt_that_a_callback_changes_is_refused(sd3: Made, engine: EngineTransformer) -> None:
    def change(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"] + (index == 1)}

    asked = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(UsageError, match="encoder_hidden_states: not of this run from its first step on"):
        sd3.run(engine, TEXT, **asked)


def test_two_calls_a_step_without_a_word_are_told_apart(tmp_path: Path) -> None:
    def parts(kind: Any, transformer: Any, scheduler: Any) -> Any:
        return kind(scheduler, shifted_autoencoder(4, 1), *[None] * 4, transformer)

    flux = made(tmp_path, "flux", DYNAMIC, {"height": 8, "width": 12}, parts, sampling={"num_inference_steps": STEPS})
    given = {"image": torch.full((1, 3, 8, 12), 0.5), "strength": 1.0, "true_cfg_scale": 1.5}
    full = EngineTransformer(flux.bundle, full=True)
    kind = diffusers.FluxImg2ImgPipeline
    assert relative_error(flux.run(full, kind, **given), flux.run(flux.original, kind, **given)) <= NEAR
    alike = {"negative_prompt_embeds": PROMPTS["prompt_embeds"]} | {
        "negative_pooled_prompt_embeds": PROMPTS["pooled_prompt_embeds"]
    }
    found, expected = (flux.run(each, kind, **given, **alike) for each in (full, flux.original))
    assert relative_error(found, expected) <= NEAR
    cached, engine = CachedTransformer(flux.bundle, flux.model), EngineTransformer(flux.bundle)
    # With equal prompts guidance changes nothing, so one half alone is the run.
    alone = flux.run(cached, kind, **given | {"true_cfg_scale": 1.0})
    assert relative_error(flux.run(engine, kind, **given, **alike), alone) <= NEAR
    with pytest.raises(UsageError, match="with strength below 1"):
        flux.run(engine, kind, **given | {"strength": 0.5})


# ---------------------------------------------------------------------------------------------------- other schedulers


def test_another_shift_is_named(sd3: Made, engine: EngineTransformer) -> None:
    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5)
    with pytest.raises(UsageError, match=r"FlowMatchEulerDiscreteScheduler with shift=3.0, .* found shift=2.5; give"):
        sd3.run(engine, TEXT, scheduler=other)


def test_sigmas_of_one_s_own_are_named(sd3: Made, engine: EngineTransformer) -> None:
    sigmas = {"sigmas": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]}
    with pytest.raises(UsageError, match=r"leave out sigmas, timesteps .*sampling.set_timesteps_kwargs"):
        sd3.run(engine, TEXT, **sigmas)


def test_other_steps_are_named(sd3: Made, engine: EngineTransformer) -> None:
    with pytest.raises(UsageError, match=r"expected 6 timesteps, found 9: .* call the pipeline with num_inference_"):
        sd3.run(engine, TEXT, num_inference_steps=9)


# ------------------------------------------------------------------------------------------------ sharing, and memory


def test_two_pipelines_in_two_threads_are_each_right(sd3: Made, engine: EngineTransformer) -> None:
    seeds = (5, 6)
    expected = [sd3.run(engine, TEXT, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    found: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(seeds))

    def in_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(30)
        return values

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        found[seed] = sd3.run(engine, TEXT, generator=generator, callback_on_step_end=in_step)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [torch.equal(found[seed], each) for seed, each in zip(seeds, expected, strict=True)] == [True, True]


def test_buffers_of_many_sizes_are_freed(sd3: Made) -> None:
    engine = EngineTransformer(sd3.bundle)
    steppers = []
    make = engine._engines.stepper

    def made_here(*arguments: Any, **options: Any) -> Any:
        stepper = make(*arguments, **options)
        steppers.append(weakref.ref(stepper))
        return stepper

    engine._engines.stepper = made_here  # type: ignore[method-assign]
    for batch in range(1, 3 * KEPT):
        prompts = {name: value.expand(batch, *value.shape[1:]) for name, value in PROMPTS.items()}
        sd3.run(engine, TEXT, **prompts)
    for _ in range(3):
        sd3.run(engine, TEXT, **prompts)
    gc.collect()
    assert len(steppers) == 3 * KEPT - 1
    assert sum(stepper() is not None for stepper in steppers) == KEPT


def test_a_run_that_was_stopped_leaves_its_buffers_to_the_next(sd3: Made) -> None:
    engine = EngineTransformer(sd3.bundle)
    for _ in range(3):
        sd3.run(engine, TEXT, callback_on_step_end=stop_after(2))
    assert len(engine._runs._kept) <= 3


# -------------------------------------------------------------------------------------------- what diffusers does to it


def test_it_can_be_offloaded(sd3: Made) -> None:
    """As enable_model_cpu_offload does with every part of a pipeline."""
    engine, hook = accelerate.cpu_offload_with_hook(EngineTransformer(sd3.bundle), "cpu")
    found = sd3.run(engine, TEXT)
    hook.offload()
    assert relative_error(found, sd3.run(CachedTransformer(sd3.bundle, sd3.model), TEXT)) <= EQUAL


def test_a_registered_family_is_known(sd3: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FAMILIES", {})
    with pytest.raises(UsageError, match="no family for model class 'SD3Transformer2DModel' here; install"):
        EngineTransformer(sd3.bundle)
    monkeypatch.setattr(loading, "_REGISTERED", {"SD3Transformer2DModel": sd3_blocks.FAMILY})
    assert EngineTransformer(sd3.bundle).config.joint_attention_dim == 24
