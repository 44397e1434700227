"""Bundles whose steps read what is made before the first of them: the same pictures, however they are driven."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zoo
from bundles import Made, edit_resealed, make_plan, relative_error, run_cli
from kept import Keep
from numpy.typing import NDArray
from tolerances import tolerance

import tc_deploy
from tc_deploy import Pipeline
from tc_deploy.backends.build import build_target
from tc_deploy.bundle import MANIFEST
from tc_deploy.consistency import read_documents
from tc_deploy.errors import BackendError, BundleError, ExportError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.inspect import inspect_path
from tc_deploy.manifest import PROLOGUE, SCHEDULE, Role, read_manifest
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.runtime import program
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.buffers import BufferKey, scheduled_row
from tc_deploy.runtime.stepper import Engines
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise
from tc_deploy.types import FloatArray
from tc_deploy.validate.validation import validate_bundle

LABELS = [3, 9, 0]
SEED = 11
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL
PROMPTED = {
    "conditions": "random",
    "latent_size": (8, 12),
    "text_tokens": 5,
    "sampling": {"num_inference_steps": 6, "guidance_scale": 3.0},
    "schedule": {"phase_start": 6, "cache_interval_early": 2, "cache_interval_late": 1},
    "cache": {"keep_counts": ((8,), (0,)), "forecast_order": 1},
}
"""F c1 F c1 F c1"""


def in_pytorch(made: Made, noise: FloatArray, conditions: dict[str, NDArray[Any]], *, full: bool) -> FloatArray:
    """The latents as the scheduler of diffusers and the model in PyTorch make them."""
    model = load_model(made.model)
    plan, tables = load_plan(made.plan)
    if conditions.keys() != {"class_labels"}:
        model = load_model(made.model, zoo.ALL["pixart"][2])
    steps = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    given = {name: torch.from_numpy(np.asarray(array)) for name, array in conditions.items()}
    run = (lambda _, inputs: model.forward(inputs)) if full else steps
    return denoise(model, sampling_from_plan(plan), torch.from_numpy(noise), given, run).numpy()


@pytest.fixture(scope="module")
def prompted(kept: Keep, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """PixArt: its modulation sees the timestep alone, and keys and values of the prompt see no timestep."""

    def make(folder: Path) -> None:
        zoo.save("pixart", folder / "model" / "transformer", num_layers=1, use_additional_conditions=False)
        diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "model" / "scheduler")
        plan = make_plan(folder / "model", folder / "plan", **PROMPTED)
        export_bundle(plan, folder / "bundle", ExportOptions(prologue=True))

    entry, folder = kept("prologue-pixart", make, file=__file__), tmp_path_factory.mktemp("pixart")
    bundle = Path(shutil.copytree(entry / "bundle", folder / "bundle"))
    build_target(bundle, options={"threads": 1})
    return Made(model=entry / "model", plan=entry / "plan", bundle=bundle)


@pytest.fixture(scope="module")
def pipeline(prologue: Made) -> Iterator[Pipeline]:
    with tc_deploy.load(prologue.bundle, batch_size=2) as pipeline:
        yield pipeline


@pytest.mark.parametrize("full", [False, True], ids=["cached", "full"])
def test_labels_make_pytorch_s_pictures(prologue: Made, pipeline: Pipeline, full: bool) -> None:
    found = pipeline(class_labels=LABELS, seed=SEED, full=full).latents
    noise, labels = pipeline.noise(SEED, len(LABELS)), {"class_labels": np.array(LABELS, np.int32)}
    assert relative_error(found, in_pytorch(prologue, noise, labels, full=full)) <= EQUAL
    assert relative_error(found, in_pytorch(prologue, noise, labels, full=not full)) > VISIBLE


@pytest.mark.parametrize("full", [False, True], ids=["cached", "full"])
def test_prompts_make_pytorch_s_pictures(prompted: Made, full: bool) -> None:
    manifest = read_manifest(prompted.bundle)
    random = np.random.default_rng(0)
    given = {
        item.name: np.ones((2, *item.shape), np.float32)
        if "mask" in item.name
        else random.standard_normal((2, *item.shape), np.float32)
        for item in manifest.conditions
    }
    absent = {f"unconditional.{name}": array[::-1] / 2 if array.ndim > 2 else array for name, array in given.items()}
    with tc_deploy.load(prompted.bundle, batch_size=2) as pipeline:
        other = {name.removeprefix("unconditional."): array.copy() for name, array in absent.items()}
        found = pipeline(conditions=given, unconditional=other, seed=SEED, full=full, decode=False).latents
        noise = pipeline.noise(SEED, 2)
    both = given | {name: array.copy() for name, array in absent.items()}
    assert relative_error(found, in_pytorch(prompted, noise, both, full=full)) <= EQUAL
    assert relative_error(found, in_pytorch(prompted, noise, both, full=not full)) > VISIBLE


def test_what_a_prompt_alone_makes_is_made_once_and_what_the_timestep_makes_for_all_steps(prompted: Made) -> None:
    graphs = read_manifest(prompted.bundle).graphs
    assert {tensor.name for tensor in graphs[PROLOGUE].inputs} == {"encoder_hidden_states"}
    assert {tensor.name for tensor in graphs[SCHEDULE].inputs} == {"timestep"}
    for variant in ("full", "cached-1"):
        read = {tensor.role for tensor in graphs[variant].inputs}
        assert {Role.PROLOGUE, Role.SCHEDULED} <= read
        assert Role.TIMESTEP not in read


def test_it_is_bit_for_bit_what_the_steps_computed_themselves(prologue: Made, mixed: Made, pipeline: Pipeline) -> None:
    """The same operators on the same numbers, in one thread."""
    with tc_deploy.load(mixed.bundle, batch_size=2) as whole:
        expected = whole(class_labels=LABELS, seed=SEED).latents
    assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, expected)


def test_a_request_reads_nothing_of_the_one_before(pipeline: Pipeline) -> None:
    expected = pipeline(class_labels=LABELS, seed=SEED).latents
    other = pipeline(class_labels=[1, 1, 1], seed=SEED).latents
    assert relative_error(other, expected) > VISIBLE
    assert np.array_equal(pipeline(class_labels=LABELS, seed=SEED).latents, expected)


def test_step_by_step_is_the_same_as_in_one_piece(pipeline: Pipeline) -> None:
    expected = pipeline(class_labels=LABELS[:2], seed=SEED).latents
    *_, last = pipeline.steps(class_labels=LABELS[:2], seed=SEED)
    assert np.array_equal(last.read_latents(), expected)


def test_a_loop_of_somebody_else_s_has_the_conditions_of_its_first_step(prologue: Made) -> None:
    """What stands in a diffusers pipeline."""
    plan, tables = load_plan(prologue.plan)
    model = load_model(prologue.model)
    stepper = Engines(read_bundle(prologue.bundle, None)).stepper(2)
    for labels in ([4, 1], [0, 7]):
        stepper.start()
        expected = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
        for step, timestep in enumerate(plan.sampling.timesteps):
            latents = np.random.default_rng(step).standard_normal((2, 4, 8, 8), dtype=np.float32)
            given = {"hidden_states": latents, "class_labels": np.array(labels, np.int32)}
            found = stepper.step(given)
            tensors = {name: torch.from_numpy(array) for name, array in given.items()}
            with torch.no_grad():
                right = expected(step, tensors | {"timestep": torch.full((2,), timestep)}).numpy()
            np.testing.assert_allclose(found, right, rtol=0, atol=EQUAL * np.abs(right).max())


def test_it_validates_and_a_step_that_reads_another_s_row_is_found(
    prologue: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = validate_bundle(prologue.bundle, "onnxruntime")
    assert record.passed
    assert SCHEDULE in {variant.name for variant in record.variants}

    def first_row(tensor: Any, step: int) -> BufferKey:
        return scheduled_row(tensor, 3 if step == 4 else step)

    monkeypatch.setattr(program, "scheduled_row", first_row)
    record = validate_bundle(prologue.bundle, "onnxruntime")
    assert not record.passed
    assert {(fault.step, fault.tensor.partition(".")[0]) for fault in record.wiring} == {(4, "scheduled")}


def test_pytorch_refuses_it_in_a_line(prologue: Made, tmp_path: Path) -> None:
    bundle = prologue.copy(tmp_path / "bundle")
    with pytest.raises(BackendError, match="has a prologue; build it with another backend, or export with"):
        build_target(bundle, "torch")
    with pytest.raises(UsageError, match="a prologue makes part of what its steps read"):
        validate_bundle(prologue.bundle, "onnxruntime", against="torch")


def test_what_has_left_the_steps_is_said(prologue: Made, mixed: Made) -> None:
    moved = inspect_path(prologue.bundle)["prologue"]
    assert inspect_path(mixed.bundle)["prologue"] is None
    module = load_model(prologue.model).module
    # Every weight of every norm1 and the head's modulation; what is small stays in the graph's file.
    names = ("norm1", "proj_out_1")
    expected = sum(
        each.numel()
        for name, each in module.named_parameters()
        if any(part in name for part in names) and each.ndim > 1
    )
    assert expected <= moved["parameters"] <= 1.05 * expected
    assert moved["weights_bytes"] == 4 * moved["parameters"]
    # Three blocks' six rows and the head's two, in fp32, for both halves of guidance, at ten steps.
    width = 64
    assert moved["bytes_per_step"] == 2 * 4 * width * (3 * 6 + 2)
    assert moved["table_bytes"] == 10 * moved["bytes_per_step"]
    assert f"{moved['parameters']:,} parameters" in run_cli("inspect", prologue.bundle).out


def drop(document: dict[str, Any], graph: str) -> None:
    del document["graphs"][graph]


def rename(document: dict[str, Any]) -> None:
    document["graphs"][SCHEDULE]["outputs"][0]["name"] = "scheduled.7"


def widen(document: dict[str, Any]) -> None:
    next(one for one in document["graphs"]["full"]["inputs"] if one["role"] == "scheduled")["shape"][1] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: drop(document, SCHEDULE), r"class_labels: expected int32 \(model_batch\), found nothing"),
        (rename, r"graphs.schedule.outputs: scheduled.0: expected float32 \(run_batch, 384\), found nothing"),
        (widen, r"graphs.full.inputs: scheduled.0: expected float32 \(model_batch, 384\), found"),
    ],
)
def test_documents_that_contradict_each_other_are_refused(
    prologue: Made, tmp_path: Path, change: Any, message: str
) -> None:
    bundle = prologue.copy(tmp_path / "bundle")
    edit_resealed(bundle, MANIFEST, change)
    with pytest.raises(BundleError, match=message):
        read_documents(bundle)


def test_graphs_of_another_bundle_have_no_prologue(prologue: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export anew to have a prologue"):
        ExportOptions(prologue=True, graphs_from=(prologue.bundle,))
    with pytest.raises(UsageError, match="or they read a prologue of its own; export anew"):
        export_bundle(prologue.plan, tmp_path / "bundle", ExportOptions(graphs_from=(prologue.bundle,)))


@pytest.mark.slow
def test_a_model_without_one_is_refused_in_a_line(tmp_path: Path) -> None:
    """U-ViT's time and label are tokens among the picture's."""
    module = zoo.uvit().build(zoo.uvit().CONFIG)
    zoo.uvit().save(tmp_path / "model" / "transformer", module)
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "model" / "scheduler")
    plan = make_plan(tmp_path / "model", tmp_path / "plan", sampling={"num_inference_steps": 4})
    with pytest.raises(ExportError, match="no product of the steps' graphs follows from timestep and conditions alone"):
        export_bundle(plan, tmp_path / "bundle", ExportOptions(prologue=True, check=False))
    assert not (tmp_path / "bundle").exists()
