"""What engines are validated on: the plan's own prompts where it has them, and a word of it everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import zoo
from bundles import Made, recipe_of, run_cli
from safetensors.numpy import save_file

from tc_deploy.bundle import sha256_of_file
from tc_deploy.errors import ExportError, UsageError
from tc_deploy.golden import read_golden
from tc_deploy.manifest import read_manifest
from tc_deploy.plan import PromptsRecord
from tc_deploy.types import FloatArray

PROMPTS, WIDTH = 3, 96
OUTLIER = 1
"""The prompt whose embeddings are as large as T5's worst: fp16 holds them, and no sum of their products."""


def prompts(*, outlier: bool) -> dict[str, FloatArray]:
    embeddings = np.random.default_rng(0).standard_normal((PROMPTS, 1, WIDTH), np.float32)
    if outlier:
        embeddings[OUTLIER] = 6e4
    mask = np.ones((PROMPTS, 1), np.float32)
    empty = {"encoder_hidden_states": np.full((1, 1, WIDTH), 0.5, np.float32), "encoder_attention_mask": mask[:1]}
    given = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
    return given | {f"unconditional.{name}": array for name, array in empty.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt whose blocks read the embeddings themselves, as none projects them before."""
    folder = tmp_path_factory.mktemp("model")
    zoo.save("pixart-sizes", folder / "transformer", num_layers=1)
    diffusers.DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    return folder


def made_plan(model: Path, folder: Path, conditions: str | Path) -> Path:
    sampling = ("--steps", 4, "--guidance-scale", 2, "--phase-start", 4, "--cache-interval-early", 2)
    words = (*sampling, "--samples", 0, "--keep-counts", 8, 0)
    recipe = recipe_of(folder.parent, model, latent_size=[12, 8], text_tokens=1)
    answer = run_cli("calibrate", recipe, "-o", folder, *words, "--conditions", conditions)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture(scope="module")
def with_outlier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Exported in fp32, which holds the outlier, and built."""
    folder = tmp_path_factory.mktemp("outlier")
    save_file(prompts(outlier=True), folder / "prompts.safetensors")
    plan = made_plan(model, folder / "plan", folder / "prompts.safetensors")
    assert run_cli("export", plan, "-o", folder / "bundle").code == 0
    assert run_cli("build", folder / "bundle", "--threads", 1).code == 0
    return Made(model=model, plan=plan, bundle=folder / "bundle")


def test_an_outlier_that_overflows_fp16_is_seen(with_outlier: Made, tmp_path: Path) -> None:
    answer = run_cli("export", with_outlier.plan, "-o", tmp_path / "bundle", "--precision", "fp16")
    assert answer.code == ExportError.exit_code
    assert "transformer_blocks.0.attn2.to_" in answer.error
    assert "overflows fp16 in a sampling run; keep its block in fp32 with --fp32-block transformer_blocks.0" in (
        answer.error
    )
    assert not (tmp_path / "bundle").exists()


def test_random_conditions_do_not_show_it_and_say_so(with_outlier: Made, tmp_path: Path) -> None:
    words = ("--precision", "fp16", "--conditions", "random", "--no-check")
    answer = run_cli("export", with_outlier.plan, "-o", tmp_path / "bundle", *words)
    assert answer.code == 0, answer.err
    assert "sampled on random conditions, so outliers of real prompts are not seen" in answer.out
    assert read_manifest(tmp_path / "bundle").sampled_on == "random"


def test_engines_are_validated_on_the_plan_s_prompts(with_outlier: Made, tmp_path: Path) -> None:
    file = with_outlier.plan.parent / "prompts.safetensors"
    manifest = read_manifest(with_outlier.bundle)
    expected = PromptsRecord(file=str(file), sha256=sha256_of_file(file), prompts=PROMPTS)
    assert manifest.sampled_on == expected
    # One sample, so the prompt with the largest values, and the file's own unconditional half.
    _, saved = read_golden(with_outlier.bundle, manifest)
    held = prompts(outlier=True)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        assert np.array_equal(saved.conditions[name], held[name][OUTLIER : OUTLIER + 1])
        assert np.array_equal(saved.unconditional[name], held[f"unconditional.{name}"])
    words = f"1 of 3 prompts, with the largest values, of {file}, sha256 {expected.sha256[:16]}"
    shown = run_cli("validate", with_outlier.bundle, "-o", tmp_path / "validation.json")
    assert shown.code == 0, shown.out
    assert f"on {words}" in shown.out
    assert json.loads((tmp_path / "validation.json").read_text())["sampled_on"] == words
    page = tmp_path / "report.html"
    words_of_report = ("report", with_outlier.bundle, "--validation", tmp_path / "validation.json", "-o", page)
    assert run_cli(*words_of_report).code == 0
    assert f"on {words}" in page.read_text(encoding="utf-8")
    assert f"on {words}" in run_cli("inspect", with_outlier.bundle).out


def test_the_checkpoint_is_sampled_on_the_same(with_outlier: Made) -> None:
    """Against PyTorch anew, the unconditional half too is the file's."""
    assert run_cli("validate", with_outlier.bundle, "--against", "torch").code == 0


def test_prompts_that_are_gone_can_be_named_anew(model: Path, tmp_path: Path) -> None:
    file, moved = tmp_path / "prompts.safetensors", tmp_path / "moved.safetensors"
    save_file(prompts(outlier=True), file)
    plan = made_plan(model, tmp_path / "plan", file)
    file.rename(moved)
    words = ("export", plan, "-o", tmp_path / "bundle", "--precision", "fp16")
    answer = run_cli(*words, "--conditions", moved)
    assert answer.code == ExportError.exit_code
    assert "overflows fp16" in answer.error
    save_file({"encoder_hidden_states": np.zeros((1, 1, 3), np.float32)}, file)
    answer = run_cli(*words, "--conditions", file)
    assert answer.code == UsageError.exit_code
    assert str(file) in answer.error


def test_labels_are_said_to_be_labels(mixed: Made) -> None:
    assert read_manifest(mixed.bundle).sampled_on == "labels"
    assert "on class labels" in run_cli("validate", mixed.bundle).out
