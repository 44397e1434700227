"""Plans of a model that takes prompts: which prompt a sample takes, what a plan says of them, and engines on them."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import zoo
from bundles import Made, recipe_of, run_cli
from prompted import CASES
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.bundle import sha256_of_file
from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import Recipe, read_recipe
from tc_deploy.errors import ModelError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.golden import sampled_on_in_words
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model
from tc_deploy.plan import Plan, PromptsRecord, TextsRecord, load_plan
from tc_deploy.planned.model import model_of_plan, sampling_from_plan
from tc_deploy.planned.prompts import draw_batch, prompts_for, prompts_of_plan
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import FloatArray

PROMPTS, TOKENS, WIDTH = 3, 5, 24
BATCH = 2
SETTINGS: dict[str, Any] = {
    "latent_size": (8, 12),
    "text_tokens": TOKENS,
    "sampling": {"num_inference_steps": 6, "guidance_scale": 3.0},
    "schedule": {"phase_start": 3, "cache_interval_early": 3, "cache_interval_late": 2},
    "cache": {"keep_counts": ((8,), (0,))},
    "measure": {"samples": 2},
}


def made_prompts(count: int, seed: int) -> dict[str, FloatArray]:
    drawn = np.random.default_rng(seed)
    return {
        "encoder_hidden_states": drawn.standard_normal((count, TOKENS, WIDTH), np.float32),
        "encoder_attention_mask": (np.arange(TOKENS) < drawn.integers(1, TOKENS + 1, (count, 1))).astype(np.float32),
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    zoo.save("pixart", folder / "transformer")
    diffusers.DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts, one empty prompt."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.safetensors"
    unconditional = {f"unconditional.{name}": array for name, array in made_prompts(1, seed=1).items()}
    safetensors.numpy.save_file(made_prompts(PROMPTS, seed=0) | unconditional, path)
    return path


@pytest.fixture(scope="module")
def plan_folder(model_folder: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "plan"
    calibrate(settings_of(model_folder, str(file)), folder)
    return folder


def settings_of(model: Path, conditions: str | None, **changes: Any) -> Recipe:
    return Recipe.model_validate({"model": str(model), "conditions": conditions, **SETTINGS, **changes})


def sampling_of(model: DiffusionTransformer, conditions: str | None) -> Sampling:
    return Sampling(
        scheduler=None,
        steps=1,
        guidance_scale=2.0,
        set_timesteps_kwargs={},
        prompts=prompts_for(model, conditions, guided=True),
    )


# ------------------------------------------------------------------------------------------------------------- samples


def test_a_sample_takes_the_prompt_of_its_seed(file: Path) -> None:
    model, seeds = zoo.model("pixart"), [7, 0, 4, 2]
    noise, conditions = draw_batch(model, sampling_of(model, str(file)), seeds)
    stored = safetensors.numpy.load_file(file)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        for sample, seed in enumerate(seeds):
            assert np.array_equal(conditions[name][sample], stored[name][seed % PROMPTS])
            assert np.array_equal(conditions[f"unconditional.{name}"][sample], stored[f"unconditional.{name}"][0])
    for sample, seed in enumerate(seeds):
        alone = draw_batch(model, sampling_of(model, str(file)), [seed])
        assert torch.equal(noise[sample], alone[0][0])
        assert torch.equal(conditions["encoder_hidden_states"][sample], alone[1]["encoder_hidden_states"][0])


def test_random_conditions_are_of_the_seed_alone() -> None:
    model = zoo.model("pixart")
    sampling = sampling_of(model, "random")
    assert sampling.prompts is None
    both, first = (draw_batch(model, sampling, seeds)[1] for seeds in ([3, 4], [3]))
    for name, values in both.items():
        assert torch.equal(values[:1], first[name])
    assert not torch.equal(*both["encoder_hidden_states"])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_goes_away_from_the_file_s_unconditional_half(file: Path, scale: float) -> None:
    """One Euler step: the latents move along the guided output."""
    model = zoo.model("pixart")
    scheduler = diffusers.EulerDiscreteScheduler()
    sampling = Sampling(
        scheduler=scheduler,
        steps=1,
        guidance_scale=scale,
        set_timesteps_kwargs={},
        prompts=prompts_for(model, str(file), guided=True),
    )
    noise, conditions = draw_batch(model, sampling, [1, 2])
    seen: list[Any] = []
    denoise(model, sampling, noise, conditions, lambda _, inputs: seen.append(inputs) or model.forward(inputs))
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        assert torch.equal(seen[0][name], torch.cat([conditions[name], conditions[f"unconditional.{name}"]]))
    assert seen[0].keys() == {"hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"}


# ---------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_names_its_prompts(plan_folder: Path, file: Path) -> None:
    plan, _ = load_plan(plan_folder)
    assert plan.origin.conditions == PromptsRecord(file=str(file), sha256=sha256_of_file(file), prompts=PROMPTS)
    shown = run_cli("inspect", plan_folder)
    assert shown.code == 0, shown.err
    assert f"prompts   3 of {file}, sha256 {sha256_of_file(file)[:16]}" in shown.out
    assert plan.measured is not None


def test_other_prompts_give_another_measurement(plan_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    random = calibrate(settings_of(model_folder, "random"), tmp_path / "plan")
    assert random.origin.conditions == "random"
    assert load_plan(tmp_path / "plan")[0] == random
    of_file, _ = load_plan(plan_folder)
    assert random.measured is not None
    assert of_file.measured is not None
    assert random.measured.psnr_db != of_file.measured.psnr_db
    assert "random conditions" in run_cli("inspect", tmp_path / "plan").out


def test_labels_are_drawn_and_not_mentioned(tiny_dit: DiffusionTransformer) -> None:
    assert prompts_for(tiny_dit, None, guided=True) is None
    assert "conditions" not in OLD_ORIGIN
    origin = Plan.model_fields["origin"].annotation
    assert origin is not None
    assert origin.model_validate(OLD_ORIGIN).model_dump(mode="json") == OLD_ORIGIN


OLD_ORIGIN = {"method": "manual", "seed": 0, "settings": {}}


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (None, "the model is conditioned on encoder_hidden_states and encoder_attention_mask, and a plan is only as"),
        ("nothing.safetensors", "nothing.safetensors: no such file of conditions; it holds what encode_prompt of"),
    ],
)
def test_without_prompts_the_message_says_how_to_make_them(
    model_folder: Path, tmp_path: Path, conditions: str | None, message: str
) -> None:
    options = ["--conditions", conditions] if conditions else []
    for command in ("calibrate", "plan"):
        answer = run_cli(command, model_folder, "-o", tmp_path / "plan", *options)
        assert answer.code == UsageError.exit_code
        assert message in answer.error
    assert not (tmp_path / "plan").exists()


def test_prompts_of_another_length_are_refused_before_any_work(model_folder: Path, file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, model_folder, latent_size=[8, 12])
    words = ("calibrate", recipe, "-o", tmp_path / "plan", "--conditions", file)
    answer = run_cli(*words)
    assert answer.code == UsageError.exit_code
    assert "the prompt is shorter than the 120; pad it to 120 tokens, or calibrate and export for 5" in answer.error
    answer = run_cli(*words, "--text-tokens", TOKENS, "--steps", 4, "--guidance-scale", 2.0, "--samples", 0)
    assert answer.code == 0, answer.err
    plan, _ = load_plan(tmp_path / "plan")
    assert (plan.model.latent_size, plan.model.text_tokens) == ((8, 12), TOKENS)


def test_a_recipe_names_its_prompts_relative_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for stored, expected in (("prompts.safetensors", str(tmp_path / "prompts.safetensors")), ("random", "random")):
        path.write_text(f'model = "model"\nconditions = "{stored}"\n')
        assert read_recipe(path, {}).conditions == expected


# -------------------------------------------------------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def bundle(plan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    export_bundle(plan_folder, folder, ExportOptions(batch_size=BATCH))
    build_target(folder, options={"threads": 1})
    return folder


@pytest.mark.parametrize("full", [False, True])
def test_engines_make_of_prompts_what_pytorch_makes(
    bundle: Path, plan_folder: Path, model_folder: Path, full: bool
) -> None:
    given, away = made_prompts(PROMPTS, seed=5), made_prompts(1, seed=6)
    with tc_deploy.load(bundle) as pipeline:
        found = pipeline(conditions=given, unconditional=away, seed=3, full=full).latents
        noise = torch.from_numpy(pipeline.noise(3, PROMPTS))
        timed = pipeline(**pipeline.placeholders(BATCH))
    assert np.isfinite(timed.latents).all()
    plan, tables = load_plan(plan_folder)
    model = load_model(model_folder, ModelOptions.of(plan.model))
    steps = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    conditions = {name: torch.from_numpy(array) for name, array in given.items()}
    for name, array in away.items():
        conditions[f"unconditional.{name}"] = torch.from_numpy(np.repeat(array, PROMPTS, axis=0))
    run = (lambda _, inputs: model.forward(inputs)) if full else steps
    expected = denoise(model, sampling_from_plan(plan), noise, conditions, run).numpy()
    assert found.shape == (PROMPTS, 4, 8, 12)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")


def test_a_missing_unconditional_half_is_named(bundle: Path) -> None:
    with tc_deploy.load(bundle) as pipeline:
        ask = functools.partial(pipeline, conditions=made_prompts(1, seed=0))
        with pytest.raises(UsageError, match="unconditional half: encoder_hidden_states is missing"):
            ask()
        with pytest.raises(UsageError, match="takes no labels; give conditions: encoder_hidden_states"):
            pipeline(class_labels=[1])


def test_prompts_that_are_gone_are_stood_in_for(plan_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    """The graphs are compared all the same; a word says on what."""
    recipe = settings_of(model_folder, str(tmp_path / "prompts.safetensors"), measure={"samples": 0})
    safetensors.numpy.save_file(
        made_prompts(1, 0) | {f"unconditional.{name}": array for name, array in made_prompts(1, 1).items()},
        tmp_path / "prompts.safetensors",
    )
    calibrate(recipe, tmp_path / "plan")
    (tmp_path / "prompts.safetensors").unlink()
    said: list[str] = []
    manifest = export_bundle(tmp_path / "plan", tmp_path / "bundle", ExportOptions(batch_size=1), progress=said.append)
    (word,) = (line for line in said if "prompts.safetensors is gone" in line)
    assert "random conditions stand in" in word
    assert word.endswith("name a file with --conditions")
    assert manifest.sampled_on == "random"
    assert all(graph.max_abs_error is not None for graph in manifest.graphs.values())


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["calibrate", "plan"])
def test_a_gpu_that_is_not_there_is_said_before_any_work(model_folder: Path, tmp_path: Path, command: str) -> None:
    answer = run_cli(command, model_folder, "-o", tmp_path / "plan", "--conditions", "random", "--device", "cuda")
    assert answer.code == UsageError.exit_code
    assert "sees no GPU; run on --device cpu" in answer.error
    assert not list(tmp_path.iterdir())


def test_random_conditions_where_there_are_no_prompts_are_said_to_change_nothing(
    tiny_dit: DiffusionTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    assert prompts_for(tiny_dit, None, guided=True) is None
    assert not caplog.text
    assert prompts_for(tiny_dit, "random", guided=True) is None
    assert "takes no prompts: --conditions random changes nothing, labels are drawn" in caplog.text


@pytest.mark.parametrize("command", ["calibrate", "export", "generate", "plan"])
def test_a_pipe_is_not_waited_for(mixed: Made, model_folder: Path, tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "recipe.toml")
    words = {
        "calibrate": (model_folder, "-o", tmp_path / "x", "--conditions", tmp_path / "pipe", "--steps", 4),
        "export": (mixed.plan, "-o", tmp_path / "x", "--conditions", tmp_path / "pipe"),
        "generate": (mixed.bundle, "-o", tmp_path / "x.npy", "--conditions", tmp_path / "pipe"),
        "plan": (tmp_path / "recipe.toml", "-o", tmp_path / "x"),
    }[command]
    answer = run_cli(command, *words)
    assert answer.code == 2, answer.err
    assert ("recipe.toml: " if command == "plan" else "pipe: a pipe, and no file of conditions") in answer.error


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def pipeline_of_all_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A whole PixArt pipeline of tiny parts, and its folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    zoo.save("pixart", folder / "model", num_layers=1)
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(folder / "model").eval()
    pipe = CASES["pixart"].make(transformer)
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline", pipe


def calibrated(pipeline: Path, folder: Path, *words: object) -> Plan:
    sizes = ("--height", 16, "--width", 24, "--text-tokens", TOKENS, "--steps", 4, "--guidance-scale", 2)
    answer = run_cli("calibrate", pipeline, *sizes, "--skip", "blocks", "--samples", 1, *words, "-o", folder)
    assert answer.code == 0, answer.err
    return load_plan(folder)[0]


def test_a_plan_is_measured_on_the_prompts_that_the_pipeline_s_own_encoders_read(
    pipeline_of_all_parts: tuple[Path, Any], tmp_path: Path
) -> None:
    """The same plan as from a file of what diffusers' encode_prompt makes of them."""
    pipeline, pipe = pipeline_of_all_parts
    (tmp_path / "prompts.txt").write_text("\n a red bridge \n")
    given = ("--prompt", "a cat", "--prompts", tmp_path / "prompts.txt", "--negative-prompt", "a dog")
    plan = calibrated(pipeline, tmp_path / "plan", *given)
    assert plan.origin.conditions == TextsRecord(prompts=("a cat", "a red bridge"), negative_prompt="a dog")
    assert "'a cat' and 1 more, away from 'a dog'" in run_cli("inspect", tmp_path / "plan").out
    # The tiny autoencoder halves the size once.
    assert plan.model.latent_size == (8, 12)
    with torch.no_grad():
        states, mask, away, away_mask = pipe.encode_prompt(
            ["a cat", "a red bridge"], negative_prompt="a dog", max_sequence_length=TOKENS
        )
    arrays = {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask.float(),
        "unconditional.encoder_hidden_states": away[:1],
        "unconditional.encoder_attention_mask": away_mask[:1].float(),
    }
    arrays = {name: tensor.contiguous() for name, tensor in arrays.items()}
    safetensors.torch.save_file(arrays, tmp_path / "prompts.safetensors")
    other = calibrated(pipeline, tmp_path / "other", "--conditions", tmp_path / "prompts.safetensors")
    assert plan.measured is not None
    assert other.measured is not None
    assert plan.measured.psnr_db == pytest.approx(other.measured.psnr_db, abs=1e-2)


def test_an_export_reads_the_plan_s_prompts_again(pipeline_of_all_parts: tuple[Path, Any], tmp_path: Path) -> None:
    pipeline, _ = pipeline_of_all_parts
    plan = calibrated(pipeline, tmp_path / "plan", "--prompt", "a cat", "--prompt", "a red bridge")
    said: list[str] = []
    prompts = prompts_of_plan(model_of_plan(plan, "plan"), plan, progress=said.append)
    assert prompts is not None
    assert prompts.conditions.count == 2
    assert sampled_on_in_words(prompts.record, 1) == "1 of 2 prompts, with the largest values, of the plan"
    moved = Path(shutil.copytree(pipeline, tmp_path / "moved"))
    shutil.rmtree(moved / "text_encoder")
    model = model_of_plan(plan, "plan", moved)
    assert prompts_of_plan(model, plan, progress=said.append) is None
    assert "text_encoder/config.json is missing" in said[-1]
    assert said[-1].endswith("random conditions stand in for the plan's prompts, and their outliers are not seen")
    assert prompts_of_plan(model, plan, pipeline_path=pipeline, progress=said.append) is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "a cat", "--conditions", "random"), "prompts and conditions exclude each other; give one"),
        (("--negative-prompt", "a dog"), "negative_prompt goes with prompts"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompt"),
        (("--prompt", "a cat", "--height", 16), "height and width go together"),
    ],
)
def test_prompts_that_nothing_can_be_made_of(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    answer = run_cli("calibrate", model_folder, "-o", "plan", *words)
    assert answer.code == UsageError.exit_code
    assert message in answer.error
    assert not Path("plan").exists()


def test_a_model_of_labels_takes_no_prompts(tiny_dit_folder: Path, tmp_path: Path) -> None:
    answer = run_cli("calibrate", tiny_dit_folder, "--prompt", "a cat", "-o", tmp_path / "plan")
    assert answer.code == UsageError.exit_code
    assert "takes class labels, which are drawn, and no prompts" in answer.error


def test_a_transformer_without_its_pipeline_cannot_read_prompts(model_folder: Path, tmp_path: Path) -> None:
    words = ("--height", 64, "--width", 64)
    answer = run_cli("calibrate", model_folder, "--prompt", "a cat", "-o", tmp_path / "plan")
    assert answer.code == ModelError.exit_code
    assert "name the diffusers pipeline folder that holds it in the place of the model" in answer.error
    answer = run_cli("calibrate", model_folder, "--prompt", "a cat", *words, "-o", tmp_path / "plan")
    assert "name the whole pipeline's folder, or say latent_size in a recipe" in answer.error
