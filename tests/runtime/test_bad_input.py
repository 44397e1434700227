"""What the runtime refuses: damaged folders before an engine sees them, bad requests before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Made, MadeByCommands, edit_manifest, reseal, snapshot

import tc_deploy
from tc_deploy import Pipeline
from tc_deploy.bundle import MANIFEST
from tc_deploy.errors import BundleError, PlanError, TcDeployError, UsageError
from tc_deploy.manifest import ONNX_FOLDER, RUNTIME_TABLES, WEIGHTS
from tc_deploy.plan import PLAN, TABLES

WEIGHTS_FILE = f"{ONNX_FOLDER}/{WEIGHTS}"
FULL_GRAPH = f"{ONNX_FOLDER}/full.onnx"


@pytest.fixture
def bundle(mixed: Made, tmp_path: Path) -> Path:
    """A built bundle that a test may damage."""
    return mixed.copy(tmp_path / "bundle")


def refusal(path: Path, **arguments: Any) -> TcDeployError:
    """The error with which a folder is refused; the folder stays as it was."""
    before = snapshot(path)
    with pytest.raises(TcDeployError) as raised:
        tc_deploy.load(path, **arguments)
    assert snapshot(path) == before
    assert "\n" not in str(raised.value)
    return raised.value


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename_a_graph_s_file(bundle: Path, name: str) -> None:
    """Let the manifest look for the full graph elsewhere, with the right checksum."""

    def change(document: dict[str, Any]) -> None:
        document["graphs"]["full"]["file"] = name
        document["files"][name] = document["files"].pop(FULL_GRAPH)

    edit_manifest(bundle, change)
    stamp_target(bundle)


def stamp_target(bundle: Path) -> None:
    """Make the target believe that it was built from the bundle as it now is."""
    from tc_deploy.bundle import sha256_of_file

    document = json.loads((bundle / "onnxruntime" / MANIFEST).read_text())
    document["manifest_sha256"] = sha256_of_file(bundle / MANIFEST)
    document["reads"] = json.loads((bundle / MANIFEST).read_text())["files"]
    (bundle / "onnxruntime" / MANIFEST).write_text(json.dumps(document))


# ------------------------------------------------------------------------------------------------------ damaged folders


@pytest.mark.parametrize("place", ["nowhere", "file", "empty"])
def test_a_folder_that_is_no_bundle_names_the_command_that_makes_one(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    error = refusal(tmp_path / place)
    assert isinstance(error, BundleError)
    assert f"{tmp_path / place} holds no bundle" in str(error)
    assert "tc-deploy export" in str(error)


def test_a_plan_folder_is_no_bundle(mixed: Made) -> None:
    assert isinstance(refusal(mixed.plan), BundleError)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, FULL_GRAPH, f"{ONNX_FOLDER}/solver.onnx", RUNTIME_TABLES, PLAN, TABLES])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing|holds no plan"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the file is truncated or altered"),
        (lambda path: path.write_bytes(b""), "the file is truncated or altered"),
        (flip_a_byte, "the file was altered"),
    ],
    ids=["missing", "truncated", "emptied", "altered"],
)
def test_a_damaged_file_is_named(bundle: Path, name: str, damage: Callable[[Path], object], message: str) -> None:
    damage(bundle / name)
    error = refusal(bundle)
    assert isinstance(error, BundleError)
    assert name in str(error)
    assert any(part in str(error) for part in message.split("|"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("graphs"), "graphs: this key is required"),
        (lambda document: document.update(colour="red"), "colour: unknown key"),
        (lambda document: document.update(format_version=2), "a bundle of format 2, and this tc-deploy reads format 3"),
        (lambda document: document.update(kind="target"), "kind"),
        (lambda document: document.update(batch_size=0), "batch_size"),
        (lambda document: document["files"].pop(WEIGHTS_FILE), "no checksum for onnx/weights.bin"),
        (lambda document: document["files"].pop(FULL_GRAPH), "no checksum for onnx/full.onnx"),
    ],
)
def test_a_manifest_that_is_not_of_this_version_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(bundle, change)
    error = refusal(bundle)
    assert isinstance(error, BundleError)
    assert message in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_manifest_that_is_no_document_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    assert isinstance(refusal(bundle), BundleError)


@pytest.mark.parametrize("how", ["../", "absolute", "onnx/../../", "link"])
def test_a_file_outside_the_folder_is_refused(bundle: Path, how: str) -> None:
    outside = bundle.parent / "full.onnx"
    shutil.copy(bundle / FULL_GRAPH, outside)
    if how == "link":
        (bundle / ONNX_FOLDER / "linked.onnx").symlink_to(outside)
    name = {"absolute": str(outside), "link": f"{ONNX_FOLDER}/linked.onnx"}.get(how, f"{how}full.onnx")
    rename_a_graph_s_file(bundle, name)
    error = refusal(bundle)
    assert isinstance(error, BundleError)
    assert ("lies outside the folder" if how == "link" else f"{name[:80]!r} names no file inside the folder") in str(
        error
    )


def test_a_bundle_without_engines_names_the_command_that_builds_them(bundle: Path) -> None:
    shutil.rmtree(bundle / "onnxruntime")
    for arguments in ({}, {"backend": "onnxruntime"}):
        error = refusal(bundle, **arguments)
        assert isinstance(error, BundleError)
        assert f"tc-deploy build {bundle}" in str(error)


def test_engines_of_another_export_are_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(made_by="another day"))
    error = refusal(bundle)
    assert isinstance(error, BundleError)
    assert "built from another export of this bundle; build again with: tc-deploy build" in str(error)


@pytest.mark.parametrize("text", ["{}", '{"kind": "target"}', "no JSON"])
def test_an_engine_s_manifest_that_is_malformed_is_refused(bundle: Path, text: str) -> None:
    (bundle / "onnxruntime" / MANIFEST).write_text(text)
    assert isinstance(refusal(bundle), BundleError)


def test_an_engine_kind_that_nobody_knows_is_refused(bundle: Path) -> None:
    for backend in ("abacus", "", "../bundle/onnxruntime"):
        error = refusal(bundle, backend=backend)
        assert isinstance(error, UsageError)
        assert "known: onnxruntime" in str(error)


def test_a_folder_of_an_engine_kind_that_nobody_knows_is_passed_over(bundle: Path) -> None:
    shutil.copytree(bundle / "onnxruntime", bundle / "abacus")
    with tc_deploy.load(bundle) as pipeline:
        assert pipeline.backend == "onnxruntime"


def test_a_plan_that_contradicts_its_tables_is_refused(bundle: Path) -> None:
    document = json.loads((bundle / PLAN).read_text())
    document["cache"]["keep_counts"][0] = [16, 16, 8]
    document["cache"]["keep_counts"][1] = [8, 8, 4]
    (bundle / PLAN).write_text(json.dumps(document))
    reseal(bundle)
    stamp_target(bundle)
    assert isinstance(refusal(bundle), PlanError)


# --------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(bundle: Path, batch_size: int) -> None:
    error = refusal(bundle, batch_size=batch_size)
    assert isinstance(error, UsageError)
    assert f"batch size must be at least 1, found {batch_size}" in str(error)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_other_than_the_exported_one_is_refused(pixel: MadeByCommands, batch_size: int) -> None:
    error = refusal(pixel.bundle, batch_size=batch_size)
    assert isinstance(error, UsageError)
    assert f"for a batch of exactly 2, found {batch_size}; export again" in str(error)


@pytest.fixture(scope="module")
def guided(mixed: Made) -> Pipeline:
    """A pipeline with a batch of 2."""
    return tc_deploy.load(mixed.bundle, batch_size=2)


@pytest.fixture(scope="module")
def unguided(pixel: MadeByCommands) -> Pipeline:
    """A pipeline without guidance, with a batch of 2."""
    return tc_deploy.load(pixel.bundle)


def noise(count: int, *shape: int) -> np.ndarray:
    return np.zeros((count, *(shape or (4, 8, 8))), np.float32)


BAD_REQUESTS = [
    ({"class_labels": []}, "no class label given"),
    ({"class_labels": [10]}, r"class label must lie in 0..9, found 10"),
    ({"class_labels": [-1]}, r"class label must lie in 0..9, found -1"),
    ({"class_labels": [2**40]}, r"class label must lie in 0..9"),
    ({"class_labels": [0, 1, 2, 3, 10]}, r"class label must lie in 0..9, found 10"),
    ({}, "give class_labels, prompt or conditions, one of them"),
    ({"class_labels": [1], "conditions": {"class_labels": np.int32([1])}}, "give class_labels, prompt or conditions"),
    ({"class_labels": [1], "prompt": ["a cat"]}, "give class_labels, prompt or conditions"),
    ({"prompt": ["a cat"]}, "this bundle takes class labels, no prompts"),
    ({"class_labels": [1], "negative_prompt": "a dog"}, "negative_prompt goes with prompt"),
    ({"class_labels": [1], "unconditional": {"class_labels": np.int32([1])}}, "leave out unconditional"),
    ({"conditions": {}}, r"class_labels is missing; this model takes class_labels \(n,\) int32"),
    ({"conditions": {"class_labels": np.int64([1])}}, "class_labels: expected int32, found int64"),
    ({"conditions": {"class_labels": np.int32([10])}}, r"class_labels must lie in 0..9, found 10"),
    ({"conditions": {"class_labels": np.int32([1, 2])}, "latents": noise(1)}, "latents: expected shape"),
    ({"class_labels": [1], "seed": -1}, r"seed must lie in 0..\d+, found -1"),
    ({"class_labels": [1], "seed": 2**64}, "seed must lie in"),
    ({"class_labels": [1], "guidance_scale": float("nan")}, "guidance scale must be a number from 0 to 1000"),
    ({"class_labels": [1], "guidance_scale": float("-inf")}, "guidance scale must be a number from 0 to 1000"),
    ({"class_labels": [1], "guidance_scale": -0.5}, "guidance scale must be a number from 0 to 1000"),
    ({"class_labels": [1], "guidance_scale": "2"}, "guidance scale must be a number from 0 to 1000"),
    ({"class_labels": 3}, "class_labels must be a list, found 3; for one picture give a list of one"),
    ({"class_labels": [1.5]}, "class label must be a whole number, found 1.5"),
    ({"class_labels": ["3"]}, "class label must be a whole number, found '3'"),
    ({"class_labels": [None]}, "class label must be a whole number, found None"),
    ({"class_labels": [1], "seed": "a"}, "seed must be a whole number, found 'a'"),
    ({"class_labels": [1], "latents": np.zeros((1, 4, 8, 8), int)}, "latents: expected floating point numbers"),
    ({"class_labels": [1], "latents": noise(2)}, r"latents: expected shape \(1, 4, 8, 8\), found \(2, 4, 8, 8\)"),
    ({"class_labels": [1, 2], "latents": noise(1)}, "latents: expected shape"),
    # The batches before the last would fit.
    ({"class_labels": [1, 2, 3], "latents": noise(4)}, "latents: expected shape"),
    ({"class_labels": [1, 2], "latents": noise(4)}, "latents: expected shape"),
    ({"class_labels": [1], "latents": noise(1, 3, 8, 8)}, "latents: expected shape"),
    ({"class_labels": [1], "latents": noise(1, 4, 8, 4)}, "latents: expected shape"),
    ({"class_labels": [1], "latents": noise(4, 8, 8)[0]}, "latents: expected shape"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_REQUESTS)
def test_a_bad_request_is_refused_before_anything_runs(
    guided: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    ran: list[int] = []
    with pytest.raises(UsageError, match=message):
        guided(**arguments, on_step=lambda first, step: ran.append(step.index), should_cancel=lambda: bool(ran))
    assert ran == []


@pytest.mark.parametrize(("arguments", "message"), BAD_REQUESTS)
def test_bad_steps_are_refused_when_they_are_asked_for(
    guided: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        guided.steps(**arguments)


def test_more_steps_at_a_time_than_a_batch_holds_are_refused(guided: Pipeline) -> None:
    with pytest.raises(UsageError, match="at most 2 pictures at a time, the batch size, found 3"):
        guided.steps(class_labels=[1, 2, 3])


def test_guidance_for_a_bundle_without_it_is_refused(unguided: Pipeline) -> None:
    for use in (unguided, unguided.steps):
        with pytest.raises(UsageError, match="exported without guidance"):
            use(class_labels=[1], guidance_scale=2.0)
        with pytest.raises(UsageError, match="exported without guidance"):
            use(conditions={"class_labels": np.int32([1])}, unconditional={"class_labels": np.int32([1])})


def test_a_batch_size_that_is_no_number(mixed: Made) -> None:
    with pytest.raises(UsageError, match="batch size must be a whole number, found '4'"):
        tc_deploy.load(mixed.bundle, batch_size="4")  # type: ignore[arg-type]


def test_a_step_is_shown_by_its_number(guided: Pipeline) -> None:
    step = next(iter(guided.steps(class_labels=[1])))
    assert repr(step) == "Step(index=0, total=10, full=True)"


def test_labels_may_be_numpy_s(guided: Pipeline) -> None:
    found = guided(class_labels=np.array([1, 2]), seed=np.int64(5)).latents
    assert np.array_equal(found, guided(class_labels=[1, 2], seed=5).latents)
