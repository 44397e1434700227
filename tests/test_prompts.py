"""From a prompt to a picture: bundles with text encoders and a decoder, against the pipelines they were made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from bundles import SaveDit, make_plan, run_cli
from diffusers_pipelines import tiny_autoencoder
from PIL import Image
from prompted import BATCH, PROMPTS, SCHEDULE, STEPS, TEXT, Prompted, images, noise_of
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.errors import UsageError
from tc_deploy.manifest import DECODER, TEXT_ENCODER, read_manifest
from tc_deploy.runtime.request import checked_request
from tc_deploy.sheet import GAP
from tc_deploy.validate.validation import validate_bundle


def test_prompts_become_the_pipeline_s_pictures(prompted: Prompted) -> None:
    noise = noise_of(prompted)
    height, width = prompted.case.size
    made_by_it = prompted.pipe(
        prompt=PROMPTS,
        **prompted.case.arguments,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        max_sequence_length=TEXT,
        latents=torch.from_numpy(noise),
        output_type="np",
        return_dict=False,
    )[0]
    full = images(prompted, full=True, noise=noise)
    assert (full.images.dtype, full.images.shape) == (np.uint8, (BATCH, *prompted.shape))
    assert (full.steps_full, full.steps_cached) == (STEPS, 0)
    # Rounding to bytes moves a value by half a step, and one between two bytes to either.
    assert np.abs(full.images / 255 - made_by_it).max() <= 1.5 / 255
    cached = images(prompted, full=False, noise=noise)
    assert (cached.steps_full, cached.steps_cached) == (2, 2)
    assert np.abs(cached.latents - full.latents).max() > 100 * tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_prompts_alone_are_told_apart(prompted: Prompted) -> None:
    noise = np.repeat(noise_of(prompted)[:1], BATCH, axis=0)
    first, second = images(prompted, full=False, noise=noise).latents
    assert np.abs(first - second).max() > tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_openvino_makes_the_same(prompted: Prompted) -> None:
    noise = noise_of(prompted)
    build_target(prompted.bundle, "openvino", {"threads": 1, "precision": "f32"})
    expected, found = (images(prompted, name, full=False, noise=noise) for name in ("onnxruntime", "openvino"))
    error = np.abs(found.latents - expected.latents).max() / np.abs(expected.latents).max()
    assert error <= tolerance("openvino", "fp32", "trajectory_max_rel")
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


def test_tensorrt_rtx_builds_every_graph(prompted: Prompted, tmp_path: Path) -> None:
    """Real engines; running them needs a GPU."""
    bundle = shutil.copytree(prompted.bundle, tmp_path / "bundle")
    target = build_target(bundle, "tensorrt-rtx", {"batch_profile": (1, BATCH, BATCH)})
    assert {f"{name}.engine" for name in read_manifest(bundle).graphs} <= {*target.files}
    assert {DECODER, TEXT_ENCODER} <= {*read_manifest(bundle).graphs}


def test_validation_covers_decoder_and_text_encoder(prompted: Prompted) -> None:
    record = validate_bundle(prompted.bundle, "onnxruntime")
    assert {DECODER, TEXT_ENCODER} <= {variant.name for variant in record.variants if variant.passed}
    assert record.passed


def test_no_torch_is_needed(prompted: Prompted) -> None:
    program = """
import json, sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None
import tc_deploy
with tc_deploy.load(sys.argv[1], "onnxruntime") as pipeline:
    result = pipeline(prompt="a cat", seed=1)
print(json.dumps([list(result.images.shape), result.steps_cached]))
"""
    words = [sys.executable, "-c", program, str(prompted.bundle)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [[1, *prompted.shape], 2]


def test_the_command_line_takes_prompts(prompted: Prompted, tmp_path: Path) -> None:
    words = ("generate", prompted.bundle, "--backend", "onnxruntime", "--prompt", "a cat", "--prompt", "a red dog")
    answer = run_cli(*words, "--sheet", "-o", tmp_path / "out.png")
    assert answer.code == 0, answer.err
    assert "2 pictures, 2 full + 2 cached steps" in answer.out
    *frames, height, width, _ = prompted.shape
    with Image.open(tmp_path / "out.png") as sheet:
        # Two pictures stand side by side; of video each has a row of frames.
        columns, rows = (frames[0], 2) if frames else (2, 1)
        assert sheet.size == (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    shown = run_cli("inspect", prompted.bundle).out
    assert DECODER in shown
    assert TEXT_ENCODER in shown
    manifest = read_manifest(prompted.bundle)
    assert manifest.decoder is not None
    assert manifest.text is not None
    for part in (manifest.decoder, *manifest.text.components):
        assert f"part      {part.name}, {part.model_class}, sha256 {part.weights_sha256[:16]}" in shown
    for item in manifest.text.tokenizers:
        assert f"prompts   {item.file}, padded or cut to {item.tokens} tokens" in shown


def test_what_does_not_go_with_prompts_is_refused(prompted: Prompted) -> None:
    with tc_deploy.load(prompted.bundle, "onnxruntime") as pipeline:
        for given, message in (
            ({"prompt": 3}, "prompt must be a text or a list of texts"),
            ({"prompt": []}, "no text in prompt"),
            ({"prompt": [3]}, "prompt must hold text"),
            ({"prompt": ["a cat"], "class_labels": [1]}, "one of them"),
            ({"prompt": ["a cat"], "conditions": {"encoder_hidden_states": np.zeros(1)}}, "not for a request to give"),
        ):
            with pytest.raises(UsageError, match=message):
                pipeline(**given)


def test_labels_become_the_pipeline_s_pictures(save_dit: SaveDit, tmp_path: Path) -> None:
    # DiTPipeline's "no class" is 1000, whatever the model's classes.
    folder = save_dit(tmp_path / "pipeline", num_layers=1, num_embeds_ada_norm=1000)
    autoencoder = tiny_autoencoder(4, 2)
    autoencoder.save_pretrained(folder / "vae")
    plan = make_plan(
        folder,
        tmp_path / "plan",
        sampling={"num_inference_steps": STEPS, "guidance_scale": 2.0},
        schedule=SCHEDULE,
        cache={"keep_counts": ((0,), (0,))},
    )
    assert run_cli("export", plan, "-o", tmp_path / "bundle", "--with-decoder").code == 0
    build_target(tmp_path / "bundle", options={"threads": 1})
    with tc_deploy.load(tmp_path / "bundle") as pipeline:
        noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
        result = pipeline(class_labels=[3, 1], latents=noise.numpy(), full=True)
        assert pipeline(class_labels=[3], seed=5, decode=False).images is None
        with pytest.raises(UsageError, match="this bundle takes class labels, no prompts"):
            pipeline(prompt=["a cat"])
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    pipe = diffusers.DiTPipeline(transformer.eval(), autoencoder, scheduler)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "np"}
    # It draws its noise itself.
    expected = pipe([3, 1], generator=torch.Generator().manual_seed(1), **settings).images
    assert np.abs(result.images / 255 - expected).max() <= 1.5 / 255


def test_a_bundle_without_a_text_encoder_says_how_to_have_one(prompted: Prompted) -> None:
    manifest = read_manifest(prompted.bundle).model_copy(update={"text": None})
    nothing = dict.fromkeys(("class_labels", "negative_prompt", "conditions", "unconditional", "latents"))
    nothing |= dict.fromkeys(("count", "guidance_scale", "true_cfg_scale"))
    with pytest.raises(UsageError, match=r"no text encoder.*--with-text-encoder"):
        checked_request(manifest, prompt=PROMPTS, **nothing, seed=0)
