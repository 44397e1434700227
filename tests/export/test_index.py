"""model_index.json decides what a pipeline has: what it names is there, what it denies is done without."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
import zoo
from bundles import recipe_of, run_cli
from diffusers_pipelines import tiny_autoencoder, tiny_clip, tiny_t5, tiny_tokenizer

from tc_deploy.errors import ModelError, PlanError, UsageError
from tc_deploy.export.parts import PipelineParts
from tc_deploy.manifest import read_manifest
from tc_deploy.models import sd3
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.encoders import text_plan
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise

CLIP, TEXT = 6, 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion 3 with all its parts, as diffusers saves it."""
    kind = transformers.CLIPTextModelWithProjection
    first, second = (tiny_clip(kind, 8, projection, seed) for projection, seed in ((8, 1), (12, 2)))
    folder = tmp_path_factory.mktemp("sd3")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(zoo.save("sd3", folder / "model"))
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        tiny_autoencoder(4),
        *(first, tiny_tokenizer(CLIP), second, tiny_tokenizer(CLIP), tiny_t5(24), tiny_tokenizer(256)),
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def edit_index(folder: Path, **entries: Any) -> None:
    """None takes an entry out."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


def encoders_of(folder: Path) -> list[str]:
    geometry = sd3.FAMILY.geometry(zoo.model("sd3").module, ModelOptions(latent_size=(8, 12), text_tokens=CLIP + TEXT))
    return [part.encoder for part in text_plan(PipelineFolder(folder, "text encoders"), sd3.FAMILY, geometry).parts]


def refusal_of(call: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


NULL = [None, None]
ALL = ["text_encoder", "text_encoder_2", "text_encoder_3"]


def test_a_part_that_is_denied_is_done_without(folder: Path) -> None:
    assert encoders_of(folder) == ALL
    edit_index(folder, text_encoder_3=NULL, tokenizer_3=NULL)
    # Whether or not its folder is still there, as in the pipeline itself.
    assert encoders_of(folder) == ALL[:2]
    shutil.rmtree(folder / "text_encoder_3")
    assert encoders_of(folder) == ALL[:2]


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_3"])
def test_a_part_that_is_named_and_missing_is_an_error(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    message = refusal_of(lambda: encoders_of(folder))
    assert f"model_index.json names {part}, and {part}/" in message
    assert "is missing" in message


def test_the_command_says_so_before_any_work(folder: Path, tmp_path: Path) -> None:
    words = ("--steps", 2, "--samples", 0, "--keep-counts", 0, 0, "--conditions", "random")
    recipe = recipe_of(tmp_path, folder, latent_size=[8, 12], text_tokens=CLIP + TEXT)
    assert run_cli("calibrate", recipe, "-o", tmp_path / "plan", *words).code == 0
    shutil.rmtree(folder / "text_encoder_3")
    answer = run_cli("export", tmp_path / "plan", "-o", tmp_path / "bundle", "--with-text-encoder")
    assert answer.code == ModelError.exit_code
    assert "model_index.json names text_encoder_3, and text_encoder_3/config.json is missing" in answer.error
    assert not (tmp_path / "bundle").exists()


def test_without_an_index_nobody_knows_what_is_optional(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    assert encoders_of(folder) == ALL
    shutil.rmtree(folder / "text_encoder_3")
    message = refusal_of(lambda: encoders_of(folder))
    assert "text_encoder_3/ is missing, and there is no model_index.json" in message
    assert '"text_encoder_3": [null, null]' in message


def test_an_index_that_is_silent_about_it(folder: Path) -> None:
    edit_index(folder, text_encoder_3=None)
    shutil.rmtree(folder / "text_encoder_3")
    assert "model_index.json does not name it" in refusal_of(lambda: encoders_of(folder))


def test_a_part_that_is_needed_and_denied(folder: Path) -> None:
    edit_index(folder, text_encoder_2=NULL)
    assert "says that the pipeline has no text_encoder_2" in refusal_of(lambda: encoders_of(folder))
    edit_index(folder, text_encoder_2=["transformers", "CLIPTextModelWithProjection"], tokenizer_3=NULL)
    assert "says that the pipeline has no tokenizer_3" in refusal_of(lambda: encoders_of(folder))


def test_a_part_that_the_family_does_not_know(folder: Path) -> None:
    edit_index(folder, text_encoder_4=["transformers", "LlamaForCausalLM"])
    assert "names text_encoder_4, which this family's prompts" in refusal_of(lambda: encoders_of(folder))
    # A pipeline for IP adapters names parts that no prompt goes through.
    edit_index(folder, text_encoder_4=None, image_encoder=["transformers", "SiglipVisionModel"])
    assert encoders_of(folder) == ALL


def decoder_of(folder: Path) -> PipelineParts:
    model = zoo.model("sd3")
    return PipelineParts(folder, model.family, model.geometry, decoder=True, text_encoder=False)


def test_the_autoencoder_is_what_the_index_names(folder: Path) -> None:
    decoder_of(folder)
    edit_index(folder, vae=["diffusers", "AutoencoderTiny"])
    message = refusal_of(lambda: decoder_of(folder))
    assert "names AutoencoderTiny as vae, vae/config.json is of AutoencoderKL" in message
    edit_index(folder, vae=NULL)
    assert "says that the pipeline has no vae" in refusal_of(lambda: decoder_of(folder))
    edit_index(folder, vae=["diffusers", "AutoencoderKL"])
    shutil.rmtree(folder / "vae")
    assert "names vae, and vae/config.json is missing" in refusal_of(lambda: decoder_of(folder))


def test_the_transformer_is_what_the_index_names(folder: Path) -> None:
    edit_index(folder, transformer=None, unet=["diffusers", "UNet2DConditionModel"])
    assert "names a unet and no transformer" in refusal_of(lambda: load_model(folder))
    edit_index(folder, unet=None, transformer=["diffusers", "SD3Transformer2DModel"])
    shutil.rmtree(folder / "transformer")
    assert "names transformer, and transformer/config.json is missing" in refusal_of(lambda: load_model(folder))


# -------------------------------------------------------------------------------------------------- pictures or latents
@pytest.fixture
def three_channels(save_dit: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose latents have as many channels as a picture, as those of an autoencoder of factor 4 do."""
    return save_dit(tmp_path / "f4", num_layers=1, in_channels=3, out_channels=6)


def test_without_an_autoencoder_three_channels_are_a_picture(three_channels: Path) -> None:
    assert load_model(three_channels).geometry.pixels
    assert load_model(three_channels / "transformer").geometry.pixels


@pytest.mark.parametrize("how", ["folder", "index"])
def test_with_an_autoencoder_they_are_latents(three_channels: Path, tmp_path: Path, how: str) -> None:
    if how == "folder":
        tiny_autoencoder(3).save_pretrained(three_channels / "vae")
    else:
        # As of a hub's model, of which the autoencoder is not fetched.
        index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
        index["vae"] = ["diffusers", "AutoencoderKL"]
        (three_channels / "model_index.json").write_text(json.dumps(index))
    for path in (three_channels, three_channels / "transformer"):
        assert not load_model(path).geometry.pixels
    # So they are measured, exported and shown as latents, wherever the transformer is taken from later.
    plan, bundle = tmp_path / "plan", tmp_path / "bundle"
    words = ("--steps", 4, "--samples", 1, "--keep-counts", 0, 0)
    assert run_cli("calibrate", three_channels, "-o", plan, *words).code == 0
    measured = load_plan(plan)[0].measured
    assert measured is not None
    assert measured.psnr_db == latents_psnr_db(plan)
    alone = Path(shutil.copytree(three_channels / "transformer", tmp_path / "alone"))
    answer = run_cli("export", plan, "-o", bundle, "--model", alone, "--no-check")
    assert answer.code == 0, answer.err
    assert not read_manifest(bundle).pixels
    assert run_cli("build", bundle, "--threads", 1).code == 0
    refused = run_cli("generate", bundle, "--class-label", 1, "-o", tmp_path / "x.png")
    assert refused.code == UsageError.exit_code
    assert "decoder" in refused.error
    assert "latents" in run_cli("inspect", bundle).out


def latents_psnr_db(plan: Path) -> float:
    """The plan's samples against its full run's, as latents: the peak is their range."""
    from tc_deploy.planned.model import model_of_plan, sampling_from_plan

    loaded, tables = load_plan(plan)
    assert loaded.measured is not None
    model, sampling = model_of_plan(loaded, str(plan)), sampling_from_plan(loaded)
    (seed,) = loaded.measured.seeds
    noise, conditions = draw_batch(model, sampling, [seed])
    steps = TokenCachedSteps(model, loaded.cache, loaded.run_schedule(), loaded.step_tables(tables))
    full = denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs))
    error = (denoise(model, sampling, noise, conditions, steps) - full).double().square().mean()
    return round(20 * math.log10(float(full.max() - full.min())) - 10 * math.log10(float(error)), 2)


def test_a_plan_of_pictures_is_not_exported_as_latents(three_channels: Path, tmp_path: Path) -> None:
    words = ("--steps", 4, "--samples", 0, "--keep-counts", 0, 0)
    assert run_cli("calibrate", three_channels, "-o", tmp_path / "plan", *words).code == 0
    tiny_autoencoder(3).save_pretrained(three_channels / "vae")
    answer = run_cli("export", tmp_path / "plan", "-o", tmp_path / "bundle")
    assert answer.code == PlanError.exit_code
    assert "autoencoder expected False, found True" in answer.error
