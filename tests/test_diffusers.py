"""Engines in the place of a diffusers pipeline's transformer, against the pipeline as it was."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from bundles import MIXED, MadeByCommands, make_plan
from diffusers_pipelines import CachedTransformer, build_bundle, tiny_autoencoder
from tolerances import tolerance
from torch import Tensor, nn

from tc_deploy.backends.build import build_target
from tc_deploy.diffusers import EngineTransformer
from tc_deploy.diffusers.transformer import _usual_call
from tc_deploy.errors import UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.models import dit

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
STEPS = 10
LABELS = [207, 3, 999]
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL
"""A difference that no rounding makes."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_dit: Callable[..., Path]) -> Path:
    """A whole DiT pipeline, saved. DiTPipeline's "no class" is 1000, whatever the model's classes."""
    folder = save_dit(tmp_path_factory.mktemp("pipelines") / "dit", num_layers=2, num_embeds_ada_norm=1000)
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    diffusers.DiTPipeline(transformer, tiny_autoencoder(4), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of that pipeline's transformer: F c1 c1 | F c2 F c2 F c2 F."""
    cache = MIXED["cache"] | {"keep_counts": ((0, 8), (8, 4))}
    return build_bundle(folder, tmp_path_factory.mktemp("engines"), **MIXED | {"cache": cache})


@pytest.fixture(scope="module")
def engine(bundle: Path) -> EngineTransformer:
    """Every test begins runs of its own on it."""
    return EngineTransformer(bundle)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> diffusers.DiTPipeline:
    """The pipeline; tests exchange its transformer."""
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def original(pipe: diffusers.DiTPipeline) -> nn.Module:
    """The pipeline's own transformer."""
    transformer: nn.Module = pipe.transformer
    return transformer


def run(pipe: diffusers.DiTPipeline, transformer: nn.Module, labels: list[int] = LABELS, **arguments: Any) -> Tensor:
    """The final latents, (B, C, H, W), which reach the autoencoder and are not handed out by DiTPipeline."""
    pipe.transformer = transformer
    decoded: list[Tensor] = []
    hook = pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    try:
        given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(1), "output_type": "pt"}
        images = pipe(class_labels=labels, **given | arguments).images
    finally:
        hook.remove()
    assert images.shape == (len(labels), 3, 8, 8)
    return decoded[0]


# ----------------------------------------------------------------------------------------------------- in a DiTPipeline


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["guided", "unguided"])
def test_with_every_step_full_the_pipeline_is_as_it_was(
    pipe: diffusers.DiTPipeline, original: nn.Module, bundle: Path, guidance_scale: float
) -> None:
    expected = run(pipe, original, guidance_scale=guidance_scale)
    found = run(pipe, EngineTransformer(bundle, full=True), guidance_scale=guidance_scale)
    assert relative_error(found, expected) <= EQUAL


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["guided", "unguided"])
def test_cached_steps_are_pytorch_s_cached_forward(
    pipe: diffusers.DiTPipeline, original: nn.Module, engine: EngineTransformer, folder: Path, guidance_scale: float
) -> None:
    plan = engine.path.parent / "plan"
    expected = run(pipe, CachedTransformer(plan, folder), guidance_scale=guidance_scale)
    found = run(pipe, engine, guidance_scale=guidance_scale)
    assert relative_error(found, expected) <= EQUAL
    assert relative_error(run(pipe, original, guidance_scale=guidance_scale), found) > VISIBLE


def test_runs_of_any_batch_take_turns(pipe: diffusers.DiTPipeline, engine: EngineTransformer) -> None:
    all_of_them = run(pipe, engine, LABELS)
    one, unguided = run(pipe, engine, LABELS[:1]), run(pipe, engine, LABELS, guidance_scale=1.0)
    assert torch.equal(run(pipe, engine, LABELS), all_of_them)
    assert torch.equal(run(pipe, engine, LABELS[:1]), one)
    assert torch.equal(run(pipe, engine, LABELS, guidance_scale=1.0), unguided)


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_after_one_that_was_left_early_begins_anew(
    pipe: diffusers.DiTPipeline, engine: EngineTransformer, after: int
) -> None:
    expected = run(pipe, engine)
    seen: list[int] = []

    def interrupt(*_: Any) -> None:
        seen.append(1)
        if len(seen) == after:
            raise KeyboardInterrupt

    hook = engine.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, engine)
    hook.remove()
    assert torch.equal(run(pipe, engine), expected)


def test_a_static_bundle_takes_its_own_batch(pixel: MadeByCommands, tmp_path: Path) -> None:
    """Two samples; a scheduler that scales the model's input."""
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(pixel.model / "transformer")
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(pixel.model / "scheduler")
    pipe = diffusers.DiTPipeline(transformer, tiny_autoencoder(3), scheduler)
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 9}
    expected = run(pipe, CachedTransformer(pixel.plan, pixel.model), [4, 7], **arguments)
    engine = EngineTransformer(pixel.bundle)
    assert relative_error(run(pipe, engine, [4, 7], **arguments), expected) <= EQUAL
    with pytest.raises(UsageError, match=r"for a batch of exactly 2 in the model .* found 1; export again"):
        run(pipe, engine, [4], **arguments)


def test_the_page_s_snippet_runs(folder: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## In a diffusers pipeline")[2]
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet is not None
    (tmp_path / "engines").mkdir()
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "dit").symlink_to(folder)
    settings = {**MIXED, "sampling": {"num_inference_steps": 50, "guidance_scale": 4.0}}
    settings["cache"] = MIXED["cache"] | {"keep_counts": ((0, 8), (8, 4))}
    plan = make_plan(folder, tmp_path / "plan", **settings)
    export_bundle(plan, tmp_path / "engines" / "mine", ExportOptions(check=False, graphs_from=(bundle,)))
    build_target(tmp_path / "engines" / "mine", options={"threads": 1})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    assert names["image"].size == (8, 8)


# ----------------------------------------------------------------------------------------------- as a module of its own


def call(engine: Callable[..., Any], step: int, batch: int = 1, **changes: Any) -> Any:
    """One call as DiTPipeline makes it."""
    hidden_states = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    timestep = torch.tensor(TIMESTEPS[step]).expand(batch)
    arguments = {"timestep": timestep, "class_labels": torch.arange(batch), "return_dict": False}
    return engine(changes.pop("hidden_states", hidden_states), **arguments | changes)


def run_by_hand(engine: EngineTransformer, **changes: Any) -> list[Tensor]:
    """A run's outputs, at latents that no scheduler made."""
    step_of_run = engine.new_run()
    return [call(step_of_run, step, **changes)[0] for step in range(STEPS)]


TIMESTEPS = list(range(900, -1, -100))
"""DDIM's for 10 of 1000 steps."""


def test_it_shows_what_a_pipeline_asks_its_transformer_for(
    original: nn.Module, engine: EngineTransformer, pipe: diffusers.DiTPipeline
) -> None:
    shown = {name: value for name, value in original.config.items() if not name.startswith("_")}
    assert {name: engine.config[name] for name in shown} == shown
    assert engine.config.sample_size == original.config.sample_size
    assert (engine.dtype, engine.device) == (torch.float32, torch.device("cpu"))
    assert not engine.state_dict()
    pipe.transformer = engine
    assert pipe.to("cpu").device == torch.device("cpu")


def test_settings_that_a_file_leaves_out_have_the_class_s_defaults(engine: EngineTransformer) -> None:
    record = engine._plan.model
    older = {name: value for name, value in record.config.items() if name != "upcast_attention"}
    model, _ = _usual_call(dit.FAMILY, record.model_copy(update={"config": older}), torch.tensor([900.0]))
    assert model.module.config.upcast_attention is False


def test_an_output_is_the_caller_s_own(engine: EngineTransformer) -> None:
    step_of_run = engine.new_run()
    (first,) = call(step_of_run, 0)
    kept = first.clone()
    assert first.shape == (1, 8, 8, 8)
    second = call(step_of_run, 1, return_dict=True).sample
    assert torch.equal(first, kept)
    assert relative_error(second, first) > VISIBLE


def test_halves_of_guidance_that_come_one_by_one_have_caches_of_their_own(engine: EngineTransformer) -> None:
    labels = {"cond": torch.tensor([3]), "uncond": torch.tensor([1000])}
    alone = {name: run_by_hand(engine, class_labels=labels[name]) for name in labels}
    assert relative_error(alone["cond"][-1], alone["uncond"][-1]) > VISIBLE
    step_of_run = engine.new_run()
    for step in range(STEPS):
        for name, label in labels.items():
            with engine.cache_context(name, step_index=step):
                (found,) = call(step_of_run, step, class_labels=label)
            assert torch.equal(found, alone[name][step])


def test_halves_of_guidance_are_told_by_their_conditions_too(engine: EngineTransformer) -> None:
    """As in FluxImg2ImgPipeline, which names no half."""
    labels = [torch.tensor([3]), torch.tensor([1000])]
    alone = [run_by_hand(engine, class_labels=label) for label in labels]
    step_of_run = engine.new_run()
    for step in range(STEPS):
        for label, expected in zip(labels, alone, strict=True):
            assert torch.equal(call(step_of_run, step, class_labels=label)[0], expected[step])
            # And the same question has the same answer, as where both prompts are alike.
            assert torch.equal(call(step_of_run, step, class_labels=label)[0], expected[step])


def test_rows_of_a_batch_are_independent(engine: EngineTransformer) -> None:
    def second_row(companion: float) -> list[Tensor]:
        outputs = []
        step_of_run = engine.new_run()
        for step in range(STEPS):
            states = torch.full((2, 4, 8, 8), companion)
            states[1] = 0.1 * step
            outputs.append(call(step_of_run, step, 2, hidden_states=states)[0][1])
        return outputs

    for one, other in zip(second_row(0.0), second_row(5.0), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("steps", [5, 9, 11, 25])
def test_another_step_count_is_refused(pipe: diffusers.DiTPipeline, engine: EngineTransformer, steps: int) -> None:
    with pytest.raises(UsageError) as refused:
        run(pipe, engine, num_inference_steps=steps)
    message = str(refused.value)
    assert message.startswith("timestep: expected ")
    assert "the plan is for 10 steps of DDIMScheduler" in message
    assert f"tc-deploy calibrate {engine._plan.model.source} --steps N" in message
    assert "\n" not in message


OTHER_SCHEDULERS = {
    "DPMSolverMultistepScheduler": {},
    # These have the plan's own timesteps.
    "DDPMScheduler": {},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading", "steps_offset": 0},
    "LMSDiscreteScheduler": {"timestep_spacing": "leading", "steps_offset": 0},
    "DDIMScheduler": {"beta_end": 0.03},
}


@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_another_scheduler_is_refused(
    pipe: diffusers.DiTPipeline, engine: EngineTransformer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = getattr(diffusers, name).from_config(pipe.scheduler.config, **OTHER_SCHEDULERS[name])
    monkeypatch.setattr(pipe, "scheduler", other)
    message = rf"expected DDIMScheduler\(clip_sample=False\), which the plan is for, found {name}; give"
    if name == "DDIMScheduler":
        message = r"expected DDIMScheduler with beta_end=0\.02, as the plan is for .* found beta_end=0\.03; give"
    with pytest.raises(UsageError, match=message) as refused:
        run(pipe, engine)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("step", [1, 3, 9])
def test_a_run_that_does_not_begin_at_the_beginning_is_refused(bundle: Path, step: int) -> None:
    with pytest.raises(UsageError, match=rf"expected 900 at step 0, found {TIMESTEPS[step]}"):
        call(EngineTransformer(bundle), step)


def test_a_step_out_of_order_is_refused_and_the_run_goes_on(engine: EngineTransformer) -> None:
    expected = run_by_hand(engine)
    step_of_run = engine.new_run()
    call(step_of_run, 0)
    for step in (2, 9):
        with pytest.raises(UsageError, match=r"expected 800 at step 1, found .*, which is step .* come in order"):
            call(step_of_run, step)
    for step in range(1, STEPS):
        assert torch.equal(call(step_of_run, step)[0], expected[step])
    with pytest.raises(UsageError, match="expected 900 at step 0, found 800"):
        call(step_of_run, 1)


def test_a_batch_that_changes_in_a_run_is_refused(engine: EngineTransformer) -> None:
    call(engine, 0, 2)
    with pytest.raises(UsageError, match="expected a batch of 2, which this run began with, found 1 at step 1"):
        call(engine, 1, 1)


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_states": torch.zeros(1, 4, 8, 16)}, r"hidden_states: expected \(B, 4, 8, 8\), found \(1, 4, 8, 16\)"),
    ({"hidden_states": torch.zeros(1, 3, 8, 8)}, r"hidden_states: expected \(B, 4, 8, 8\)"),
    ({"hidden_states": torch.zeros(4, 8, 8)}, r"hidden_states: expected \(B, 4, 8, 8\)"),
    ({"hidden_states": torch.zeros(1, 4, 8, 8, dtype=torch.float16)}, "found torch.float16; load the pipeline with"),
    ({"hidden_states": torch.zeros(1, 4, 8, 8, dtype=torch.float64)}, "expected torch.float32, found torch.float64"),
    ({"hidden_states": torch.zeros(0, 4, 8, 8), "class_labels": torch.zeros(0).long()}, "for a batch of at least 1"),
    ({"hidden_states": torch.full((1, 4, 8, 8), torch.nan)}, "hidden_states: expected finite values, found NaN"),
    ({"hidden_states": torch.full((1, 4, 8, 8), -torch.inf)}, "hidden_states: expected finite values"),
    ({"hidden_states": None}, r"hidden_states: expected a tensor \(B, 4, 8, 8\), found nothing"),
    ({"class_labels": torch.tensor([1001])}, r"class_labels: expected labels in 0..1000 .* found 1001"),
    ({"class_labels": torch.tensor([-1])}, "class_labels: expected labels in 0..1000 .* found -1"),
    ({"class_labels": torch.tensor([2**40])}, "class_labels: expected labels in 0..1000"),
    ({"class_labels": torch.tensor([1.0], dtype=torch.float64)}, "class_labels: expected torch.int32"),
    ({"class_labels": torch.tensor([1, 2])}, "class_labels: expected a batch of 1, as hidden_states has, found 2"),
    ({"class_labels": [1]}, r"class_labels: expected a tensor \(B\), found list"),
    ({"class_labels": None}, r"class_labels: expected a tensor \(B\), found nothing"),
    ({"timestep": torch.tensor([900, 800])}, "timestep: expected one number for the whole batch, found Tensor"),
    ({"timestep": torch.full((1, 16), 900)}, "timestep: expected one number for the whole batch, found Tensor"),
    ({"timestep": torch.tensor([])}, "timestep: expected one number for the whole batch, found Tensor"),
    ({"timestep": None}, "timestep: expected one number for the whole batch, found nothing"),
    ({"timestep": torch.tensor([float("nan")])}, "timestep: expected"),
    ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs: engines cannot honour it"),
    ({"controlnet_cond": torch.zeros(1)}, "DiTTransformer2DModel is called otherwise: .*'controlnet_cond'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS)
def test_a_call_that_the_engines_cannot_honour_is_refused(
    engine: EngineTransformer, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        call(engine, 0, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("nothing", [None, {}, {"gligen": None}])
def test_an_argument_that_asks_for_nothing_is_taken(engine: EngineTransformer, nothing: Any) -> None:
    assert torch.equal(call(engine, 0, cross_attention_kwargs=nothing)[0], call(engine, 0)[0])


def test_timesteps_come_in_any_form(engine: EngineTransformer) -> None:
    expected = call(engine, 0)[0]
    for timestep in (900, 900.0, torch.tensor(900), torch.tensor([900.0]), np.int64(900)):
        assert torch.equal(call(engine, 0, timestep=timestep)[0], expected)


def test_a_pipeline_of_another_class_is_refused(engine: EngineTransformer) -> None:
    autoencoder, prompt = tiny_autoencoder(4), torch.zeros(1, 5, 16)
    pixart = diffusers.PixArtSigmaPipeline(None, None, autoencoder, engine, diffusers.DDIMScheduler())
    mask = torch.ones(1, 5)
    embeds = {"prompt_embeds": prompt, "prompt_attention_mask": mask, "negative_prompt": None}
    empty = {"negative_prompt_embeds": prompt, "negative_prompt_attention_mask": mask}
    with pytest.raises(UsageError, match=r"called otherwise: .*; is the bundle in a pipeline of another model class\?"):
        pixart(**embeds, **empty, height=8, width=8, num_inference_steps=STEPS, use_resolution_binning=False)
    with pytest.raises(UsageError, match="a DiTTransformer2DModel has no setting 'joint_attention_dim'"):
        _ = engine.config.joint_attention_dim


def test_adapters_are_refused(engine: EngineTransformer) -> None:
    assert not hasattr(engine, "load_lora_adapter")
    with pytest.raises(UsageError, match=r"no 'load_lora_adapter': engines are fixed .* merge LoRA"):
        engine.load_lora_adapter({})


def test_a_bundle_that_a_process_left_half_replaced_is_put_right(bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / ".half.tc-deploy" / "old"
    shutil.copytree(bundle, old)
    owner = {"kind": "holder", "format_version": 1, "made_by": "tc-deploy 0"}
    (old.parent / "owner.json").write_text(json.dumps(owner))
    assert EngineTransformer(tmp_path / "half").path == tmp_path / "half"
    assert not old.exists()


@pytest.mark.parametrize("way", [copy.deepcopy, ForkingPickler.dumps], ids=["deepcopy", "pickle"])
def test_engines_are_not_copied(engine: EngineTransformer, way: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError) as raised:
        way({"transformer": engine})
    message = str(raised.value)
    assert "\n" not in message
    assert "can be neither copied nor pickled" in message
    assert f"EngineTransformer('{engine.path}', 'onnxruntime')" in message


def test_a_pipeline_that_is_saved_says_that_the_engines_are_not(
    folder: Path, engine: EngineTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.transformer = engine
    pipe.save_pretrained(tmp_path / "saved")
    (said,) = [record.getMessage() for record in caplog.records if "transformer" in record.getMessage()]
    assert "\n" not in said
    assert f"EngineTransformer('{engine.path}', 'onnxruntime'), whose weights stay in that bundle" in said
    assert "cannot be saved" in said
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["transformer"] == [None, None]
    assert not (tmp_path / "saved" / "transformer").exists()
