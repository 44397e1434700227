"""From a prompt to a picture: bundles with text encoders and a decoder, against the pipelines they were made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
import zoo
from bundles import make_plan, run_cli
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers_pipelines import tiny_autoencoder, tiny_clip, tiny_t5, tiny_tokenizer
from numpy.typing import NDArray
from PIL import Image
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.errors import UsageError
from tc_deploy.manifest import DECODER, TEXT_ENCODER, read_manifest
from tc_deploy.runtime.request import checked_request
from tc_deploy.validate.stage import validate_bundle

STEPS, TEXT = 4, 5
PROMPTS = ["a cat on a mat", "a red bridge"]
BATCH = len(PROMPTS)
# F c F c, and no phase 2.
SCHEDULE = {"boundary": STEPS, "k1": 2, "k2": 1}
FLUX_SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _pixart(transformer: Any) -> Any:
    parts = (tiny_tokenizer(300), tiny_t5(24), tiny_autoencoder(4, 2), transformer)
    return diffusers.PixArtSigmaPipeline(*parts, diffusers.DPMSolverMultistepScheduler())


def _flux(transformer: Any) -> Any:
    clip = tiny_clip(transformers.CLIPTextModel, 20)
    text = (clip, tiny_tokenizer(6), tiny_t5(24), tiny_tokenizer(512))
    autoencoder = tiny_autoencoder(4)
    autoencoder.register_to_config(shift_factor=0.25)
    return diffusers.FluxPipeline(FLUX_SCHEDULER, autoencoder, *text, transformer)


def _flux_sampling() -> dict[str, Any]:
    """As FluxPipeline sets its scheduler up: a shift that depends on the tokens."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(24, *(FLUX_SCHEDULER.config[name] for name in names))
    return {"steps": STEPS, "set_timesteps_kwargs": {"mu": shift, "sigmas": np.linspace(1, 1 / STEPS, STEPS).tolist()}}


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
    """Of the picture, in pixels."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the engines are given beside prompts and noise."""


CASES = {
    "pixart": Case(
        changes={"num_layers": 1, "use_additional_conditions": False},
        make=_pixart,
        keep=(8,),
        sampling={"steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": "a dog", "guidance_scale": 3.0, "use_resolution_binning": False},
        size=(16, 24),
        given={"negative_prompts": "a dog"},
    ),
    "flux": Case(
        changes={"num_layers": 1, "num_single_layers": 1},
        make=_flux,
        keep=(8, 5),
        sampling=_flux_sampling(),
        arguments={"guidance_scale": 2.0},
        size=(8, 12),
        given={"conditions": {"guidance": np.full(BATCH, 2.0, np.float32)}},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A case on disk, and its pipeline."""

    case: Case
    pipe: Any
    bundle: Path


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    zoo.save(request.param, folder / "model", **case.changes)
    transformer = getattr(diffusers, zoo.MODELS[request.param][0]).from_pretrained(folder / "model").eval()
    pipe = case.make(transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    plan = make_plan(
        folder / "pipeline",
        folder / "plan",
        conditions="random",
        latent_size=(8, 12),
        text_tokens=TEXT,
        sampling=case.sampling,
        schedule=SCHEDULE,
        cache={"attention": "all", "forecast_order": 1, "keep_counts": (case.keep, (0,) * len(case.keep))},
    )
    answer = run_cli("export", plan, "-o", folder / "bundle", "--with-decoder", "--with-text-encoder")
    assert answer.code == 0, answer.err
    build_target(folder / "bundle", options={"threads": 1})
    return Made(case=case, pipe=pipe, bundle=folder / "bundle")


def pictures(made: Made, backend: str | None = None, *, full: bool, noise: NDArray[np.float32]) -> Any:
    with tc_deploy.load(made.bundle, backend, batch_size=BATCH) as pipeline:
        return pipeline(prompts=PROMPTS, **made.case.given, latents=noise, full=full)


def noise_of(made: Made) -> NDArray[np.float32]:
    with tc_deploy.load(made.bundle, batch_size=BATCH) as pipeline:
        return pipeline.noise(3, BATCH)


def test_prompts_become_the_pipeline_s_pictures(made: Made) -> None:
    noise = noise_of(made)
    height, width = made.case.size
    expected = made.pipe(
        prompt=PROMPTS,
        **made.case.arguments,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        max_sequence_length=TEXT,
        latents=torch.from_numpy(noise),
        output_type="np",
    ).images
    full = pictures(made, full=True, noise=noise)
    assert (full.images.dtype, full.images.shape) == (np.uint8, (BATCH, height, width, 3))
    assert (full.steps_full, full.steps_cached) == (STEPS, 0)
    # Rounding to bytes moves a value by half a step, and one between two bytes to either.
    assert np.abs(full.images / 255 - expected).max() <= 1.5 / 255
    cached = pictures(made, full=False, noise=noise)
    assert (cached.steps_full, cached.steps_cached) == (2, 2)
    assert np.abs(cached.latents - full.latents).max() > 100 * tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_prompts_alone_are_told_apart(made: Made) -> None:
    noise = np.repeat(noise_of(made)[:1], BATCH, axis=0)
    first, second = pictures(made, full=False, noise=noise).latents
    assert np.abs(first - second).max() > tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_openvino_makes_the_same(made: Made) -> None:
    noise = noise_of(made)
    build_target(made.bundle, "openvino", {"threads": 1, "precision": "f32"})
    expected, found = (pictures(made, name, full=False, noise=noise) for name in ("onnxruntime", "openvino"))
    error = np.abs(found.latents - expected.latents).max() / np.abs(expected.latents).max()
    assert error <= tolerance("openvino", "fp32", "trajectory_max_rel")
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


def test_tensorrt_rtx_builds_every_graph(made: Made, tmp_path: Path) -> None:
    """Real engines; running them needs a GPU."""
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    target = build_target(bundle, "tensorrt-rtx", {"batch_profile": (1, BATCH, BATCH)})
    assert {f"{name}.engine" for name in read_manifest(bundle).graphs} <= {*target.files}
    assert {DECODER, TEXT_ENCODER} <= {*read_manifest(bundle).graphs}


def test_validation_covers_decoder_and_text_encoder(made: Made) -> None:
    record = validate_bundle(made.bundle, "onnxruntime")
    assert {DECODER, TEXT_ENCODER} <= {variant.name for variant in record.variants if variant.passed}
    assert record.passed


def test_no_torch_is_needed(made: Made) -> None:
    program = """
import json, sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None
import tc_deploy
with tc_deploy.load(sys.argv[1], "onnxruntime") as pipeline:
    result = pipeline(prompts=["a cat"], seed=1)
print(json.dumps([list(result.images.shape), result.steps_cached]))
"""
    words = [sys.executable, "-c", program, str(made.bundle)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [[1, *made.case.size, 3], 2]


def test_the_command_line_takes_prompts(made: Made, tmp_path: Path) -> None:
    words = ("generate", made.bundle, "--backend", "onnxruntime", "--prompt", "a cat", "--prompt", "a red dog")
    answer = run_cli(*words, "-o", tmp_path / "out.png")
    assert answer.code == 0, answer.err
    assert "2 pictures, 2 full + 2 cached steps" in answer.out
    height, width = made.case.size
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.height >= height
        assert sheet.width >= 2 * width
    shown = run_cli("inspect", made.bundle).out
    assert DECODER in shown
    assert TEXT_ENCODER in shown


def test_what_does_not_go_with_prompts_is_refused(made: Made) -> None:
    with tc_deploy.load(made.bundle, "onnxruntime") as pipeline:
        for given, message in (
            ({"prompts": "a cat"}, "prompts must be a list"),
            ({"prompts": []}, "no text in prompts"),
            ({"prompts": [3]}, "prompts must hold text"),
            ({"prompts": ["a cat"], "class_labels": [1]}, "one of them"),
            ({"prompts": ["a cat"], "conditions": {"encoder_hidden_states": np.zeros(1)}}, "not for a request to give"),
        ):
            with pytest.raises(UsageError, match=message):
                pipeline(**given)


def test_labels_become_pictures(tiny_dit_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dit_folder, tmp_path / "pipeline")
    autoencoder = tiny_autoencoder(4, 2)
    autoencoder.save_pretrained(folder / "vae")
    plan = make_plan(
        folder,
        tmp_path / "plan",
        sampling={"steps": STEPS, "guidance_scale": 2.0},
        schedule=SCHEDULE,
        cache={"keep_counts": ((0,) * 3, (0,) * 3)},
    )
    assert run_cli("export", plan, "-o", tmp_path / "bundle", "--with-decoder").code == 0
    build_target(tmp_path / "bundle", options={"threads": 1})
    with tc_deploy.load(tmp_path / "bundle") as pipeline:
        result = pipeline(class_labels=[3, 1], seed=5)
        assert pipeline(class_labels=[3], seed=5, decode=False).images is None
        with pytest.raises(UsageError, match="this bundle takes class labels, no prompts"):
            pipeline(prompts=["a cat"])
    with torch.no_grad():
        scaled = torch.from_numpy(result.latents) / autoencoder.config.scaling_factor
        expected = autoencoder.decode(scaled, return_dict=False)[0].clip(-1, 1).numpy() / 2 + 0.5
    assert np.abs(result.images / 255 - expected.transpose(0, 2, 3, 1)).max() <= 1.5 / 255


def test_a_bundle_without_a_text_encoder_says_how_to_have_one(made: Made) -> None:
    manifest = read_manifest(made.bundle).model_copy(update={"text": None})
    nothing = dict.fromkeys(("class_labels", "negative_prompts", "conditions", "unconditional", "latents"))
    with pytest.raises(UsageError, match=r"no text encoder.*--with-text-encoder"):
        checked_request(manifest, prompts=PROMPTS, **nothing, seed=0, guidance_scale=None)
