"""What each family's pipeline decides about sampling, against the untouched pipeline object of diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from bundles import make_plan
from diffusers_pipelines import tiny_autoencoder, tiny_wan_autoencoder
from torch import Tensor

from tc_deploy.calibrate.asked import sampling_from_recipe
from tc_deploy.calibrate.measure import with_steps
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.conditions import UNCONDITIONAL
from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model
from tc_deploy.models.solver import read_solver
from tc_deploy.tokencache.sampler import Sampling, denoise

# diffusers turns tensors into arrays in the way of numpy 1, which numpy 2 still takes but deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

BATCH, TEXT, STEPS = 2, 5, (4, 7)
EQUAL = 1e-5
"""Relative: batches are cut and added up in another order, in fp32."""
LABELS = [3, 8]

FlowEuler = diffusers.FlowMatchEulerDiscreteScheduler
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DYNAMIC = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}

PLAIN: Mapping[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
}
SCALED = {**PLAIN, "euler": diffusers.EulerDiscreteScheduler}
STATIC: Mapping[str, Callable[[], Any]] = {
    "flow-euler": lambda: FlowEuler(shift=3.0),
    "flow-dpm": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    "flow-unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
}
SIZED: Mapping[str, Callable[[], Any]] = {
    "flow-euler, dynamic": lambda: FlowEuler(**DYNAMIC),
    # As in FLUX.1-dev's folder, and other numbers than the pipelines' defaults.
    "flow-euler, dynamic by its own numbers": lambda: FlowEuler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.3, max_shift=1.7, shift=3.0
    ),
    "flow-dpm, dynamic": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, **DYNAMIC),
    "flow-unipc, dynamic": lambda: diffusers.UniPCMultistepScheduler(**FLOW, **DYNAMIC),
    # What users get who swap: settings that the class does not take stay in its configuration.
    "dpm from flow-euler": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
        FlowEuler(**DYNAMIC, base_image_seq_len=16, max_image_seq_len=64, max_shift=1.7).config, **FLOW
    ),
}


def _tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family in its pipeline."""

    model: str
    """Of the zoo."""
    pipeline: Callable[[Any, Any], Any]
    """Given transformer and scheduler."""
    schedulers: Mapping[str, Callable[[], Any]]
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of the latents."""
    asked: Callable[[tuple[int, ...]], dict[str, Any]]
    """Arguments of the pipeline for latents of that size."""
    changes: Mapping[str, Any] = field(default_factory=lambda: {"num_layers": 1})
    """To the model's configuration."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """By the model's condition, the pipeline's argument."""
    guided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    """Arguments of pipeline and recipe alike."""
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    always: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline."""
    noise: Callable[[Tensor, tuple[int, ...]], Tensor] = lambda noise, size: noise
    """The noise as the pipeline wants it, for latents of that size."""
    given: Callable[[Tensor], Any] = lambda value: value
    """Embeddings as the pipeline wants them."""
    text: int = TEXT
    """Tokens of a prompt; None where the configuration says it."""


def _pixels(scale: int) -> Callable[[tuple[int, ...]], dict[str, Any]]:
    return lambda size: {"height": scale * size[0], "width": scale * size[1]}


def _pixart(kind: Any, levels: int) -> Callable[[Any, Any], Any]:
    return lambda transformer, scheduler: kind(None, None, tiny_autoencoder(4, levels), transformer, scheduler)


EMBEDDINGS = {"encoder_hidden_states": "prompt_embeds"}
MASKED = {**EMBEDDINGS, "encoder_attention_mask": "prompt_attention_mask"}
POOLED = {**EMBEDDINGS, "pooled_projections": "pooled_prompt_embeds"}
UNBINNED = {"use_resolution_binning": False, "negative_prompt": None}


def _flux(transformer: Any, scheduler: Any) -> Any:
    return diffusers.FluxPipeline(scheduler, tiny_autoencoder(4), None, None, None, None, transformer)


def _in_order(kind: Any, *names: str) -> Callable[[Any, Any], Any]:
    """A pipeline without text encoders and autoencoder."""
    return lambda transformer, scheduler: kind(
        **{**dict.fromkeys(names), "transformer": transformer, "scheduler": scheduler}
    )


def _longcat_image(transformer: Any, scheduler: Any) -> Any:
    pipe = _in_order(diffusers.LongCatImagePipeline, "vae", "text_encoder", "tokenizer", "text_processor")(
        transformer, scheduler
    )
    pipe._encode_prompt = torch.stack
    return pipe


def _klein(transformer: Any, scheduler: Any) -> Any:
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return diffusers.Flux2KleinPipeline(scheduler, autoencoder, None, None, transformer)


EULER = {name: make for name, make in SIZED.items() if name.startswith("flow-euler")}
"""Those that take sigmas beside their own."""

CASES = {
    "qwen-image": Case(
        model="qwen-image",
        pipeline=_in_order(diffusers.QwenImagePipeline, "vae", "text_encoder", "tokenizer"),
        schedulers=EULER,
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        arguments={**EMBEDDINGS, "encoder_hidden_states_mask": "prompt_embeds_mask"},
        guided={"true_cfg_scale": 3.0},
        unguided={"true_cfg_scale": 1.0},
    ),
    "flux2": Case(
        model="flux2",
        changes={"num_layers": 1, "num_single_layers": 1},
        pipeline=_in_order(diffusers.Flux2Pipeline, "vae", "text_encoder", "tokenizer"),
        schedulers=EULER,
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        arguments=EMBEDDINGS,
        guided={"guidance_scale": 2.5},
        unguided={"guidance_scale": 4.0},
        noise=lambda noise, size: noise.transpose(1, 2).reshape(len(noise), -1, size[0] // 2, size[1] // 2),
    ),
    "flux2-klein": Case(
        model="flux2",
        changes={"num_layers": 1, "num_single_layers": 1, "guidance_embeds": False},
        pipeline=_klein,
        schedulers={"flow-euler, dynamic": SIZED["flow-euler, dynamic"]},
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        arguments=EMBEDDINGS,
        noise=lambda noise, size: noise.transpose(1, 2).reshape(len(noise), -1, size[0] // 2, size[1] // 2),
    ),
    "z-image": Case(
        model="z-image",
        changes={"n_layers": 1},
        pipeline=_in_order(diffusers.ZImagePipeline, "vae", "text_encoder", "tokenizer"),
        schedulers={"flow-euler": STATIC["flow-euler"], "flow-euler, dynamic": SIZED["flow-euler, dynamic"]},
        sizes=((8, 16), (16, 16)),
        asked=_pixels(8),
        arguments={"cap_feats": "prompt_embeds"},
        given=list,
        unguided={"guidance_scale": 0.0},
        text=32,
    ),
    "chroma": Case(
        model="chroma",
        changes={},
        pipeline=_in_order(diffusers.ChromaPipeline, "vae", "text_encoder", "tokenizer"),
        schedulers=EULER,
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        arguments={**EMBEDDINGS, "attention_mask": "prompt_attention_mask"},
    ),
    "longcat-image": Case(
        model="longcat-image",
        changes={},
        pipeline=_longcat_image,
        schedulers={"flow-euler, dynamic": SIZED["flow-euler, dynamic"]},
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        # It takes no embeddings without a text, so they pass for texts.
        arguments={"encoder_hidden_states": "prompt"},
        given=list,
        always={"enable_prompt_rewrite": False},
    ),
    "aura-flow": Case(
        model="aura-flow",
        changes={},
        pipeline=_in_order(diffusers.AuraFlowPipeline, "vae", "text_encoder", "tokenizer"),
        schedulers={"flow-euler": STATIC["flow-euler"]},
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        arguments=EMBEDDINGS,
        always={"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)},
    ),
    "cogview4": Case(
        model="cogview4",
        pipeline=_in_order(diffusers.CogView4Pipeline, "vae", "text_encoder", "tokenizer"),
        schedulers={"flow-euler, dynamic": SIZED["flow-euler, dynamic"]},
        sizes=((8, 12), (16, 12)),
        asked=_pixels(8),
        arguments=EMBEDDINGS,
    ),
    "hunyuan-dit": Case(
        model="hunyuan-dit",
        changes={},
        pipeline=lambda transformer, scheduler: diffusers.HunyuanDiTPipeline(
            *(None, None, None, transformer, scheduler, None, None, False, None, None)
        ),
        schedulers={name: SCALED[name] for name in ("ddim", "euler")},
        sizes=((8, 12), (12, 8)),
        asked=lambda size: {**_pixels(8)(size), "use_resolution_binning": False},
        arguments={
            "encoder_hidden_states": "prompt_embeds",
            "text_embedding_mask": "prompt_attention_mask",
            "encoder_hidden_states_t5": "prompt_embeds_2",
            "text_embedding_mask_t5": "prompt_attention_mask_2",
        },
        text=0,
    ),
    "cogvideox": Case(
        model="cogvideox",
        pipeline=_in_order(diffusers.CogVideoXPipeline, "vae", "text_encoder", "tokenizer"),
        schedulers={"ddim": lambda: diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0, timestep_spacing="trailing")},
        sizes=((3, 4, 8), (2, 8, 4)),
        asked=lambda size: {"num_frames": 4 * size[0] - 3, "height": 8 * size[1], "width": 8 * size[2]},
        arguments=EMBEDDINGS,
    ),
    "ltx-video": Case(
        model="ltx-video",
        pipeline=_in_order(diffusers.LTXPipeline, "vae", "text_encoder", "tokenizer"),
        schedulers={"flow-euler, dynamic": SIZED["flow-euler, dynamic"]},
        sizes=((3, 2, 4), (2, 4, 2)),
        asked=lambda size: {"num_frames": 8 * size[0] - 7, "height": 32 * size[1], "width": 32 * size[2]},
        arguments=MASKED,
    ),
    "dit": Case(
        model="dit",
        changes={"num_layers": 1, "num_embeds_ada_norm": 1000},
        pipeline=lambda transformer, scheduler: diffusers.DiTPipeline(transformer, tiny_autoencoder(4), scheduler),
        schedulers=PLAIN,
        sizes=((8, 8), (12, 12)),
        asked=lambda size: {},
    ),
    "pixart-alpha": Case(
        # The 1024 models, which are told the picture's size.
        model="pixart-sizes",
        changes={"num_layers": 1, "sample_size": 128, "use_additional_conditions": None},
        pipeline=_pixart(diffusers.PixArtAlphaPipeline, 4),
        schedulers=SCALED,
        sizes=((8, 12), (12, 8)),
        asked=lambda size: {**_pixels(8)(size), **UNBINNED},
        arguments=MASKED,
    ),
    "pixart-sigma": Case(
        model="pixart",
        changes={"num_layers": 1, "use_additional_conditions": False},
        pipeline=_pixart(diffusers.PixArtSigmaPipeline, 4),
        schedulers=SCALED,
        sizes=((8, 12), (12, 8)),
        asked=lambda size: {**_pixels(8)(size), **UNBINNED},
        arguments=MASKED,
    ),
    "sd3": Case(
        model="sd3",
        pipeline=lambda transformer, scheduler: diffusers.StableDiffusion3Pipeline(
            transformer, scheduler, tiny_autoencoder(4, 2), *[None] * 6
        ),
        schedulers={**STATIC, "flow-euler, dynamic": SIZED["flow-euler, dynamic"]},
        sizes=((8, 12), (16, 12)),
        asked=_pixels(2),
        arguments=POOLED,
    ),
    "flux-dev": Case(
        model="flux",
        changes={"num_layers": 1, "num_single_layers": 1},
        pipeline=_flux,
        schedulers={**SIZED, "flow-euler": STATIC["flow-euler"]},
        sizes=((8, 12), (16, 12)),
        asked=_pixels(1),
        arguments=POOLED,
        guided={"guidance_scale": 2.5, "true_cfg_scale": 2.0},
        unguided={"guidance_scale": 2.5},
    ),
    "flux-schnell": Case(
        model="flux-schnell",
        changes={},
        pipeline=_flux,
        # Its own folder's, and those that users give it.
        schedulers={"flow-euler": lambda: FlowEuler(shift=1.0), **SIZED},
        sizes=((8, 8), (16, 12)),
        asked=_pixels(1),
        arguments=POOLED,
        guided={"true_cfg_scale": 2.0},
        unguided={"guidance_scale": 0.0},
    ),
    "wan": Case(
        model="wan",
        pipeline=lambda transformer, scheduler: diffusers.WanPipeline(
            None, None, tiny_wan_autoencoder(), scheduler, transformer
        ),
        schedulers=STATIC,
        sizes=((3, 4, 8), (2, 8, 4)),
        asked=lambda size: {"num_frames": 4 * size[0] - 3, "height": 8 * size[1], "width": 8 * size[2]},
        arguments=EMBEDDINGS,
    ),
    # Wan 2.2 TI2V-5B's: it names a timestep for every token.
    "wan, a timestep per token": Case(
        model="wan",
        pipeline=lambda transformer, scheduler: diffusers.WanPipeline(
            None, None, tiny_wan_autoencoder(), scheduler, transformer, expand_timesteps=True
        ),
        schedulers={"flow-unipc": STATIC["flow-unipc"]},
        sizes=((3, 4, 8), (2, 8, 4)),
        asked=lambda size: {"num_frames": 4 * size[0] - 3, "height": 8 * size[1], "width": 8 * size[2]},
        arguments=EMBEDDINGS,
    ),
}
RUNS = [(case, name) for case in CASES for name in CASES[case].schedulers]


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A case as the package sees it, and the pipeline that its folder was saved from."""

    case: Case
    pipe: Any
    folder: Path
    size: tuple[int, ...]

    def model(self) -> DiffusionTransformer:
        return load_model(
            self.folder, ModelOptions(latent_size=self.size, text_tokens=(self.words and self.case.text) or None)
        )

    @property
    def words(self) -> bool:
        return bool(self.case.arguments)

    def sampling(self, model: DiffusionTransformer, steps: int, **sampling: Any) -> Sampling:
        conditions = {"conditions": "random"} if self.words else {}
        recipe = {"model": str(self.folder), "sampling": {"num_inference_steps": steps, **sampling}, **conditions}
        return sampling_from_recipe(Recipe.model_validate(recipe), model)


def _made(case: Case, scheduler: Any, size: tuple[int, ...], folder: Path) -> Ours:
    changes = {**case.changes, "sample_size": size[0]} if case.model == "dit" else case.changes
    transformer = getattr(diffusers, zoo.ALL[case.model][0]).from_pretrained(
        zoo.save(case.model, folder / "transformer", **changes)
    )
    pipe = case.pipeline(transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    # The whole would write what no test reads, hundreds of times.
    pipe.save_config(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return Ours(case=case, pipe=pipe, folder=folder, size=size)


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Ours:
    name, scheduler, size = request.param
    case = CASES[name]
    return _made(case, case.schedulers[scheduler](), case.sizes[size], tmp_path)


def _conditions(
    ours: Ours, model: DiffusionTransformer, guidance: Mapping[str, Any] = {}
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Conditions as the package takes them, and the same as the pipeline's arguments."""
    if not ours.words:
        return {"class_labels": torch.tensor(LABELS, dtype=torch.int32)}, {"class_labels": LABELS}
    ours_, theirs = {}, {}
    for number, condition in enumerate(model.geometry.conditions):
        for prefix, half, seed in (("", "", 2 * number), ("negative_", UNCONDITIONAL, 2 * number + 1)):
            argument = ours.case.arguments.get(condition.name)
            if argument is None:
                told = guidance.get("guidance_scale", ours.case.guided["guidance_scale"])
                ours_[half + condition.name] = torch.full((BATCH,), told)
                continue
            value = _tensor(seed, BATCH, *condition.shape)
            if "mask" in condition.name:
                lengths = torch.tensor([[condition.shape[0] - 1], [2]]).roll(len(prefix), 0)
                value = (torch.arange(condition.shape[0]) < lengths).float()
            ours_[half + condition.name], theirs[prefix + argument] = value, ours.case.given(value)
    return ours_, theirs


def _pipelines_run(
    ours: Ours, steps: int, noise: Tensor, given: Mapping[str, Any], guidance: Mapping[str, Any]
) -> Tensor:
    asked = {"num_inference_steps": steps, **given, **guidance, **ours.case.asked(ours.size), **ours.case.always}
    if ours.words:
        taken = inspect.signature(ours.pipe.__call__).parameters
        asked = {name: value for name, value in asked.items() if name in taken or not name.startswith("negative_")}
        noise = ours.case.noise(noise, ours.size)
        return ours.pipe(**asked, latents=noise, output_type="latent", return_dict=False)[0]
    # DiTPipeline takes no noise and gives no latents: it draws the one, and its decoder sees the other.
    seen: list[Tensor] = []
    decode = ours.pipe.vae.decode
    ours.pipe.vae.decode = lambda latents: (seen.append(latents), decode(latents))[1]
    try:
        ours.pipe(**asked, generator=torch.Generator().manual_seed(0), output_type="pt")
    finally:
        ours.pipe.vae.decode = decode
    return seen[0] * ours.pipe.vae.config.scaling_factor


@pytest.mark.parametrize(
    "made",
    [(case, name, size) for case, name in RUNS for size in (0, 1)],
    indirect=True,
    ids=lambda value: "-".join(map(str, value)),
)
def test_timesteps_are_the_pipeline_s(made: Ours) -> None:
    model = made.model()
    _, theirs = _conditions(made, model)
    for steps in STEPS:
        noise = _tensor(9, BATCH, *model.geometry.latent_shape)
        _pipelines_run(made, steps, noise, theirs, made.case.unguided)
        sampling = made.sampling(model, steps)
        table = read_solver(sampling.scheduler, steps, sampling.set_timesteps_kwargs)
        assert table.timesteps.tolist() == made.pipe.scheduler.timesteps.float().tolist()


def _latents_are_equal(made: Ours, steps: int, guidance: Mapping[str, Any]) -> None:
    model = made.model()
    sampling = made.sampling(model, steps, **guidance)
    noise = torch.randn((BATCH, *model.geometry.latent_shape), generator=torch.Generator().manual_seed(0))
    given, theirs = _conditions(made, model, guidance)
    expected = _pipelines_run(made, steps, noise, theirs, guidance)
    found = denoise(model, sampling, noise, given, lambda _, inputs: model.forward(inputs))
    assert (found - expected).abs().max() <= EQUAL * expected.abs().max()


FIRST = [(case, next(iter(CASES[case].schedulers)), 0) for case in CASES if case != "flux2-klein"]
"""FLUX.2 klein's pipeline gives its latents as its autoencoder takes them."""


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("made", FIRST, indirect=True, ids=lambda value: value[0])
def test_latents_are_the_pipeline_s(made: Ours, guided: bool) -> None:
    _latents_are_equal(made, STEPS[0], made.case.guided if guided else made.case.unguided)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "made",
    [(case, name, size) for case, name in RUNS for size in (0, 1) if case != "flux2-klein"],
    indirect=True,
    ids=lambda value: "-".join(map(str, value)),
)
def test_latents_of_every_scheduler_size_and_step_count_are_the_pipeline_s(
    made: Ours, steps: int, guided: bool
) -> None:
    _latents_are_equal(made, steps, made.case.guided if guided else made.case.unguided)


REFUSED = {
    # FluxPipeline hands its scheduler sigmas and mu; these take none, and FluxPipeline raises ValueError or TypeError.
    ("flux-dev", "ddim"): "DDIMScheduler has no sigmas, which FluxPipeline needs of its scheduler",
    ("flux-dev", "euler"): "EulerDiscreteScheduler has no mu, which FluxPipeline needs of its scheduler",
    ("flux-dev", "dpm"): "DPMSolverMultistepScheduler has no sigmas, which FluxPipeline needs of its scheduler",
    # WanPipeline reads both.
    ("wan", "ddim"): "DDIMScheduler has no set_begin_index, which WanPipeline needs of its scheduler",
}


@pytest.mark.parametrize(("case", "scheduler"), REFUSED)
def test_a_scheduler_that_the_pipeline_cannot_use_is_refused(case: str, scheduler: str, tmp_path: Path) -> None:
    made = _made(CASES[case], SCALED[scheduler](), CASES[case].sizes[0], tmp_path)
    model = made.model()
    _, theirs = _conditions(made, model)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        _pipelines_run(made, STEPS[0], _tensor(0, BATCH, *model.geometry.latent_shape), theirs, {})
    with pytest.raises(ModelError, match=REFUSED[case, scheduler]) as raised:
        made.sampling(model, STEPS[0])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", ["dit", "sd3"])
def test_a_scheduler_with_which_the_pipeline_makes_noise_is_refused(case: str, tmp_path: Path) -> None:
    """Neither pipeline starts from noise as large as Euler's first sigma."""
    _made(CASES[case], diffusers.EulerDiscreteScheduler(), CASES[case].sizes[0], tmp_path / "model")
    random = {"conditions": "random", "text_tokens": TEXT} if CASES[case].arguments else {}
    with pytest.raises(ModelError, match="Pipeline does not scale noise and latents as EulerDiscreteScheduler wants"):
        make_plan(tmp_path / "model", tmp_path / "plan", latent_size=CASES[case].sizes[0], **random)


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxKontextPipeline", "SomebodysPipeline"])
def test_a_folder_of_another_pipeline_is_refused(name: str, tmp_path: Path) -> None:
    made = _made(CASES["flux-dev"], FlowEuler(), (8, 12), tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
    with pytest.raises(
        ModelError, match=rf"model_index.json names a {name}, which samples otherwise than FluxPipeline"
    ):
        made.model()


def test_without_an_index_the_family_s_pipeline_is_assumed(tmp_path: Path) -> None:
    made = _made(CASES["flux-schnell"], FlowEuler(shift=1.0), (8, 8), tmp_path)
    (tmp_path / "model_index.json").unlink()
    model = made.model()
    _, theirs = _conditions(made, model)
    _pipelines_run(made, 4, _tensor(0, BATCH, *model.geometry.latent_shape), theirs, {})
    assert made.pipe.scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    sampling = made.sampling(model, 4)
    assert sampling.fresh_scheduler().timesteps.tolist() == [1000, 750, 500, 250]


def test_a_recipe_s_own_arguments_stand_above_the_pipeline_s(tmp_path: Path) -> None:
    made = _made(CASES["flux-dev"], SIZED["flow-euler, dynamic"](), (8, 12), tmp_path)
    model = made.model()
    own = [1.0, 0.6, 0.3, 0.1]
    sampling = made.sampling(model, 4, set_timesteps_kwargs={"sigmas": own})
    _, theirs = _conditions(made, model)
    _pipelines_run(made, 4, _tensor(0, BATCH, *model.geometry.latent_shape), {**theirs, "sigmas": own}, {})
    assert sampling.fresh_scheduler().timesteps.tolist() == made.pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [2, 8])
def test_another_step_count_has_the_pipeline_s_grid_too(tmp_path: Path, steps: int) -> None:
    made = _made(CASES["flux-dev"], SIZED["flow-euler, dynamic"](), (8, 12), tmp_path)
    model = made.model()
    _, theirs = _conditions(made, model)
    _pipelines_run(made, steps, _tensor(0, BATCH, *model.geometry.latent_shape), theirs, {})
    found = with_steps(model, made.sampling(model, 4), steps).fresh_scheduler()
    assert found.timesteps.tolist() == made.pipe.scheduler.timesteps.tolist()


# ------------------------------------------------------------------------------------------------------------- guidance
def _sampling(case: str, folder: Path, **sampling: Any) -> Sampling:
    made = _made(CASES[case], next(iter(CASES[case].schedulers.values()))(), CASES[case].sizes[0], folder)
    return made.sampling(made.model(), 4, **sampling)


@pytest.mark.parametrize("case", ["dit", "pixart-sigma", "sd3", "wan"])
def test_guidance_of_one_and_less_is_none(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for scale in (0.0, 0.5, 1.0):
        caplog.clear()
        sampling = _sampling(case, tmp_path / str(scale), guidance_scale=scale)
        assert (sampling.guidance_scale, sampling.embedded_guidance) == (None, None)
        assert [record.message for record in caplog.records].count(
            f"a guidance scale of {scale:g} is none, as in diffusers: one model call per sample"
        ) == 1
    assert _sampling(case, tmp_path / "more", guidance_scale=1.5).guidance_scale == 1.5


def test_flux_s_guidance_scale_is_the_distilled_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dev = _sampling("flux-dev", tmp_path / "dev", guidance_scale=1.0, true_cfg_scale=2.0)
    assert (dev.guidance_scale, dev.embedded_guidance) == (2.0, 1.0)
    assert _sampling("flux-dev", tmp_path / "one", true_cfg_scale=1.0).guidance_scale is None
    schnell = _sampling("flux-schnell", tmp_path / "schnell", guidance_scale=3.5)
    assert (schnell.guidance_scale, schnell.embedded_guidance) == (None, None)
    assert "guidance_scale 3.5 is ignored: no guidance was distilled into" in caplog.text


def test_true_cfg_scale_is_flux_s_name_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="true_cfg_scale: the pipeline of a SD3Transformer2DModel has none"):
        _sampling("sd3", tmp_path, true_cfg_scale=2.0)
