"""Engines in the pipelines of every family, real objects of tiny random parts, against the pipelines as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from bundles import copied
from diffusers_pipelines import CachedTransformer, build_bundle, tiny_autoencoder, tiny_wan_autoencoder
from kept import Keep
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.backends.build import build_target
from tc_deploy.diffusers import EngineTransformer
from tc_deploy.errors import UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import read_engine_record, read_manifest

STEPS = 6
BATCH = 2
TEXT_TOKENS = 5
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL
"""A difference that no rounding makes."""
PLAN = {
    "conditions": "random",
    "latent_size": (8, 12),
    "text_tokens": TEXT_TOKENS,
    # F c c F c c, and no phase 2: two graphs are enough to see a family's calls.
    "sampling": {"num_inference_steps": STEPS, "guidance_scale": 3.0},
    "schedule": {"phase_start": STEPS, "cache_interval_early": 3, "cache_interval_late": 1},
    "cache": {"attention": "all", "forecast_order": 1},
}


def _tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _masked(width: int) -> dict[str, Any]:
    """Prompt embeddings whose ends are padding; masks are integers, as tokenizers give them."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    return {
        **_prompts(width),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask.flip(0),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def _prompts(width: int) -> dict[str, Any]:
    shape = (BATCH, TEXT_TOKENS, width)
    return {"prompt_embeds": _tensor(1, *shape), "negative_prompt_embeds": _tensor(2, *shape)}


def _pooled(width: int) -> dict[str, Any]:
    shape = (BATCH, width)
    return {"pooled_prompt_embeds": _tensor(3, *shape), "negative_pooled_prompt_embeds": _tensor(4, *shape)}


def _pixart(kind: Any, levels: int) -> Callable[[nn.Module, Any], Any]:
    return lambda transformer, scheduler: kind(None, None, tiny_autoencoder(4, levels), transformer, scheduler)


def _sd3(transformer: nn.Module, scheduler: Any) -> Any:
    encoders = [None] * 6
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, tiny_autoencoder(4, 2), *encoders)


def _flux(transformer: nn.Module, scheduler: Any) -> Any:
    encoders = [None] * 4
    return diffusers.FluxPipeline(scheduler, tiny_autoencoder(4), *encoders, transformer)


def _bare(kind: Any) -> Callable[[nn.Module, Any], Any]:
    """A pipeline without text encoders and autoencoder."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return lambda transformer, scheduler: kind(**parts, transformer=transformer, scheduler=scheduler)


def _hunyuan_dit(transformer: nn.Module, scheduler: Any) -> Any:
    return diffusers.HunyuanDiTPipeline(None, None, None, transformer, scheduler, None, None, False, None, None)


def _sana(transformer: nn.Module, scheduler: Any) -> Any:
    return diffusers.SanaPipeline(None, None, None, transformer, scheduler)


def _wan(transformer: nn.Module, scheduler: Any) -> Any:
    return diffusers.WanPipeline(None, None, tiny_wan_autoencoder(), scheduler, transformer)


def _wan_ti2v(transformer: nn.Module, scheduler: Any) -> Any:
    return diffusers.WanPipeline(None, None, tiny_wan_autoencoder(), scheduler, transformer, expand_timesteps=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family in one of its pipelines; every model has 24 tokens."""

    model: str
    """Of the zoo."""
    keep: tuple[int, ...]
    scheduler: Any
    pipeline: Callable[[nn.Module, Any], Any]
    """Given transformer and scheduler."""
    size: Mapping[str, int]
    """Of the picture, in pixels."""
    arguments: Mapping[str, Any]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the model's configuration."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    static: bool = False
    """Whether the model's forward fixes the batch, so that the engines are for guided runs of it."""
    slow: bool = False
    listed: bool = False
    """Whether the pipeline takes embeddings as lists."""
    text: str = "encoder_hidden_states"
    """The condition that holds them."""
    shape: str = "hidden_states: expected"
    """What is said of a picture of another shape and as many tokens."""


FLUX_SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

CASES = {
    "pixart-sigma": Case(
        model="pixart",
        changes={"num_layers": 1, "use_additional_conditions": False},
        keep=(8,),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        pipeline=_pixart(diffusers.PixArtSigmaPipeline, 2),
        size={"height": 16, "width": 24},
        arguments=_masked(24),
    ),
    "pixart-alpha": Case(
        # The 1024 models, which are told the picture's size.
        model="pixart-sizes",
        changes={"num_layers": 1, "sample_size": 128, "use_additional_conditions": None},
        keep=(8,),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        pipeline=_pixart(diffusers.PixArtAlphaPipeline, 4),
        size={"height": 64, "width": 96},
        arguments=_masked(96),
        slow=True,
    ),
    "sd3": Case(
        model="sd3",
        keep=(8, 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        pipeline=_sd3,
        size={"height": 16, "width": 24},
        arguments={**_prompts(24), **_pooled(20)},
    ),
    "flux": Case(
        # Guidance is embedded; "guided" is by a negative prompt, in a call of its own.
        model="flux",
        changes={"num_layers": 1, "num_single_layers": 1},
        keep=(8, 5),
        scheduler=FLUX_SCHEDULER,
        pipeline=_flux,
        size={"height": 8, "width": 12},
        arguments={**_prompts(24), **_pooled(20), "true_cfg_scale": 2.0},
        plan={"sampling": {"num_inference_steps": STEPS}},
        unguided={"true_cfg_scale": 1.0},
        shape="img_ids: engines cannot honour it",
    ),
    "sana": Case(
        # Taken as one piece.
        model="sana",
        changes={"num_layers": 1},
        keep=(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        pipeline=_sana,
        # SanaPipeline divides by 32 where it has no autoencoder.
        size={"height": 256, "width": 384},
        arguments=_masked(24),
    ),
    "qwen-image": Case(
        model="qwen-image",
        changes={"num_layers": 1},
        keep=(8,),
        scheduler=FLUX_SCHEDULER,
        pipeline=_bare(diffusers.QwenImagePipeline),
        size={"height": 64, "width": 96},
        # A mask for the prompts; every token of the negative ones counts, so the pipeline leaves theirs out.
        arguments={
            **_prompts(24),
            "prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
            "negative_prompt_embeds_mask": torch.ones(2, 5, dtype=torch.int64),
            "true_cfg_scale": 2.0,
            "guidance_scale": None,
        },
        plan={"sampling": {"num_inference_steps": STEPS}},
        unguided={"true_cfg_scale": 1.0},
        shape="img_shapes: engines cannot honour it",
    ),
    "z-image": Case(
        model="z-image",
        changes={"n_layers": 1},
        keep=(8, 8),
        scheduler=FLUX_SCHEDULER,
        pipeline=_bare(diffusers.ZImagePipeline),
        size={"height": 64, "width": 128},
        arguments={
            "prompt_embeds": list(_tensor(1, BATCH, 32, 24)),
            "negative_prompt_embeds": list(_tensor(2, BATCH, 32, 24)),
        },
        plan={"latent_size": (8, 16), "text_tokens": 32},
        unguided={"guidance_scale": 0.0},
        static=True,
        listed=True,
        text="cap_feats",
    ),
    "flux2": Case(
        model="flux2",
        changes={"num_layers": 1, "num_single_layers": 1},
        keep=(8, 5),
        scheduler=FLUX_SCHEDULER,
        pipeline=_bare(diffusers.Flux2Pipeline),
        size={"height": 64, "width": 96},
        arguments={"prompt_embeds": _prompts(24)["prompt_embeds"]},
        plan={"sampling": {"num_inference_steps": STEPS}},
        unguided={},
        slow=True,
        shape="img_ids: engines cannot honour it",
    ),
    "chroma": Case(
        model="chroma",
        keep=(8, 5),
        scheduler=FLUX_SCHEDULER,
        pipeline=_bare(diffusers.ChromaPipeline),
        size={"height": 64, "width": 96},
        arguments={
            **_prompts(24),
            "prompt_attention_mask": torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
            "negative_prompt_attention_mask": torch.ones(2, 5),
        },
        # Each half of guidance has a call of its own.
        plan={"sampling": {"num_inference_steps": STEPS}},
        static=True,
        slow=True,
        shape="img_ids: engines cannot honour it",
    ),
    "cogview4": Case(
        model="cogview4",
        changes={"num_layers": 1},
        keep=(8,),
        scheduler=FLUX_SCHEDULER,
        pipeline=_bare(diffusers.CogView4Pipeline),
        size={"height": 64, "width": 96},
        arguments=_prompts(24),
        slow=True,
    ),
    "hunyuan-dit": Case(
        model="hunyuan-dit",
        keep=(8, 0, 5, 0),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        pipeline=_hunyuan_dit,
        size={"height": 64, "width": 96, "use_resolution_binning": False},
        arguments={
            **_prompts(24),
            "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
            "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
            "prompt_embeds_2": _tensor(5, BATCH, 3, 32),
            "negative_prompt_embeds_2": _tensor(6, BATCH, 3, 32),
            "prompt_attention_mask_2": torch.tensor([[1, 1, 0], [1, 0, 0]]),
            "negative_prompt_attention_mask_2": torch.ones(2, 3, dtype=torch.int64),
        },
        plan={"text_tokens": None},
        slow=True,
    ),
    "cogvideox": Case(
        model="cogvideox",
        changes={"num_layers": 1},
        keep=(8,),
        scheduler=diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0, timestep_spacing="trailing"),
        pipeline=_bare(diffusers.CogVideoXPipeline),
        size={"height": 32, "width": 64, "num_frames": 9},
        arguments=_prompts(24),
        plan={"latent_size": (3, 4, 8)},
        slow=True,
    ),
    "ltx-video": Case(
        model="ltx-video",
        changes={"num_layers": 1},
        keep=(8,),
        scheduler=FLUX_SCHEDULER,
        pipeline=_bare(diffusers.LTXPipeline),
        size={"height": 64, "width": 128, "num_frames": 17},
        arguments={
            **_prompts(24),
            "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
            "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
        },
        plan={"latent_size": (3, 2, 4)},
        slow=True,
        shape="height: engines cannot honour it",
    ),
    "wan": Case(
        model="wan",
        changes={"num_layers": 1},
        keep=(8,),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        pipeline=_wan,
        size={"height": 32, "width": 64, "num_frames": 9},
        arguments=_prompts(24),
        plan={"latent_size": (3, 4, 8)},
    ),
}
CASES["wan, a timestep per token"] = replace(CASES["wan"], pipeline=_wan_ti2v, slow=True)


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
        latents: Tensor = self.pipe(**{**arguments, **self.case.size, **self.case.arguments, **changes})[0]
        return latents


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if CASES[name].slow else ()) for name in CASES]
)
def made(kept: Keep, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One bundle per family."""
    case: Case = CASES[request.param]

    def make(folder: Path) -> None:
        zoo.save(case.model, folder / "model" / "transformer", **case.changes)
        case.scheduler.save_pretrained(folder / "model" / "scheduler")
        cache = {**PLAN["cache"], "keep_counts": (case.keep, (0,) * len(case.keep))}
        settings = {**PLAN, "cache": cache, **case.plan}
        build_bundle(folder / "model", folder, BATCH if case.static else None, **settings)

    # All sources count, since engines are built.
    entry = kept(f"in-pipeline-{request.param}", make, by_commands=True, file=__file__)
    own = copied(entry, entry / "model", tmp_path_factory.mktemp(request.param))
    kind = getattr(diffusers, zoo.ALL[case.model][0])
    original = kind.from_pretrained(own.model / "transformer").eval()
    pipe = case.pipeline(original, case.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return Made(case=case, model=own.model, bundle=own.bundle, pipe=pipe, original=original)


@pytest.fixture(scope="module")
def engine(made: Made) -> EngineTransformer:
    return EngineTransformer(made.bundle)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_engines_are_pytorch_in_the_pipeline(made: Made, engine: EngineTransformer, guided: bool) -> None:
    changes = {} if guided else made.case.unguided
    if not guided and made.case.model == "z-image":
        with pytest.raises(UsageError, match="batch"):
            made.run(engine, **changes)
        return
    original = made.run(made.original, **changes)
    assert relative_error(made.run(EngineTransformer(made.bundle, full=True), **changes), original) <= EQUAL
    cached = made.run(engine, **changes)
    assert relative_error(cached, made.run(CachedTransformer(made.bundle, made.model), **changes)) <= EQUAL
    assert relative_error(cached, original) > VISIBLE
    assert torch.equal(made.run(engine, **changes), cached)


def test_openvino_is_pytorch_in_the_pipeline(made: Made, tmp_path: Path) -> None:
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    build_target(bundle, "openvino", {"threads": 1, "precision": "f32"})
    cached = made.run(EngineTransformer(bundle, "openvino"))
    equal = tolerance("openvino", "fp32", "trajectory_max_rel")
    assert relative_error(cached, made.run(CachedTransformer(made.bundle, made.model))) <= equal


def test_tensorrt_rtx_builds_every_graph(made: Made, tmp_path: Path) -> None:
    """Real engines; running them needs a GPU."""
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    target = build_target(bundle, "tensorrt-rtx", {} if made.case.static else {"batch_profile": (1, BATCH, BATCH)})
    graphs = read_manifest(bundle).graphs
    assert {"full", "cached-1", "solver"} <= {*graphs}
    for name in graphs:
        assert f"{name}.engine" in target.files
        assert read_engine_record(bundle / "tensorrt-rtx" / f"{name}.engine").warnings == ()


@pytest.mark.slow
def test_one_graph_of_all_variants_is_the_separate_ones(made: Made, engine: EngineTransformer, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    if not made.case.keep:
        with pytest.raises(UsageError, match="nothing to make one graph of"):
            export_bundle(made.bundle, bundle, ExportOptions(one_graph=True))
        return
    # A bundle holds its plan.
    export_bundle(made.bundle, bundle, ExportOptions(one_graph=True))
    build_target(bundle, options={"threads": 1})
    one_graph = EngineTransformer(bundle)
    assert relative_error(made.run(one_graph), made.run(engine)) <= EQUAL
    build_target(bundle, "tensorrt-rtx", {"batch_profile": (1, BATCH, BATCH)})
    record = read_engine_record(bundle / "tensorrt-rtx" / "steps.engine")
    assert [profile.graphs for profile in record.profiles] == [("cached-1",), ("full",)]
    assert record.warnings == ()


def test_other_steps_are_refused(made: Made, engine: EngineTransformer) -> None:
    with pytest.raises(UsageError, match=rf"the plan is for {STEPS} steps of {type(made.case.scheduler).__name__}"):
        made.run(engine, num_inference_steps=STEPS + 1)


def test_another_size_is_refused(made: Made, engine: EngineTransformer) -> None:
    with pytest.raises(UsageError, match=r"hidden_states: expected \(B, .* --height H --width W -o calibration/NAME"):
        made.run(engine, height=2 * made.case.size["height"])


def test_a_prompt_of_another_length_is_refused(made: Made, engine: EngineTransformer) -> None:
    if made.case.listed:
        shorter: dict[str, Any] = {name: [row[:-1] for row in rows] for name, rows in made.case.arguments.items()}
    else:
        tensors = {name: value for name, value in made.case.arguments.items() if isinstance(value, Tensor)}
        shorter = {name: value[:, :-1] for name, value in tensors.items() if "pooled" not in name}
    with pytest.raises(UsageError, match=rf"{made.case.text}: expected \(B, \d+, .* --text-tokens N"):
        made.run(engine, **shorter)


def test_another_shape_of_as_many_tokens_is_refused(made: Made, engine: EngineTransformer) -> None:
    """FLUX's latents come packed, so their shape is not the picture's; the positions are."""
    with pytest.raises(UsageError, match=made.case.shape):
        made.run(engine, height=made.case.size["width"], width=made.case.size["height"])


def test_the_configuration_is_the_model_s(made: Made, engine: EngineTransformer) -> None:
    shown = {name: value for name, value in made.original.config.items() if not name.startswith("_")}
    assert {name: engine.config[name] for name in shown} == shown


@pytest.mark.parametrize("made", ["sd3"], indirect=True)
def test_skipped_layers_are_refused(made: Made, engine: EngineTransformer) -> None:
    with pytest.raises(UsageError, match="skip_layers: engines cannot honour it"):
        made.run(engine, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


@pytest.mark.parametrize("made", ["qwen-image"], indirect=True)
def test_several_images_a_prompt_are_pytorch_s(made: Made, engine: EngineTransformer) -> None:
    """Prompts of unequal length, each with its mask, and a negative prompt."""
    asked = {"num_images_per_prompt": 2}
    original = made.run(made.original, **asked)
    assert len(original) == 2 * BATCH
    assert relative_error(made.run(EngineTransformer(made.bundle, full=True), **asked), original) <= EQUAL
    cached = made.run(CachedTransformer(made.bundle, made.model), **asked)
    assert relative_error(made.run(engine, **asked), cached) <= EQUAL
