"""Every command on a tiny model, from the checkpoint to pictures; and one line and an exit code for every mistake."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
from bundles import PIXEL_BATCH, Answer, Made, MadeByCommands, SaveDit, run_cli, save_scheduler, snapshot
from PIL import Image

import tc_deploy
from tc_deploy import errors
from tc_deploy.backends.registry import BACKENDS
from tc_deploy.bundle import MANIFEST
from tc_deploy.cli import build
from tc_deploy.manifest import ONNX_FOLDER, WEIGHTS
from tc_deploy.plan import PLAN, load_plan
from tc_deploy.remarks import remark_on
from tc_deploy.sheet import GAP, GREY

SIDE = 8
TILE = SIDE + GAP
BENCH_ROUNDS = 2
BAD_USE = errors.UsageError.exit_code
BAD_MODEL = errors.ModelError.exit_code
BAD_PLAN = errors.PlanError.exit_code
BAD_BUNDLE = errors.BundleError.exit_code
BAD_EXPORT = errors.ExportError.exit_code
BAD_PLACE = errors.StorageError.exit_code


def refused(code: int, message: str, *words: object, unchanged: Path | None = None) -> None:
    """Check that a command line is refused in one line and leaves a folder as it was."""
    before = None if unchanged is None else (snapshot(unchanged), sorted(unchanged.rglob("*")))
    answer = run_cli(*words)
    assert message in answer.error
    assert answer.code == code, answer.error
    assert answer.out == ""
    if unchanged is not None:
        assert (snapshot(unchanged), sorted(unchanged.rglob("*"))) == before


# ------------------------------------------------------------------------------------------------------------ main path


def test_a_plan_is_made(pixel: MadeByCommands) -> None:
    assert pixel.calibrated.code == 0, pixel.calibrated.err
    first, second = pixel.calibrated.out.splitlines()
    assert first.startswith(f"{pixel.plan}: 5 full + 4 cached steps, ")
    assert first.endswith(" % of the full run's FLOPs")
    cost = load_plan(pixel.plan)[0].cost_in_full_steps()
    fewer = f"{math.ceil(cost)} full steps, its cost of {cost:.1f} rounded up: "
    assert re.fullmatch(rf"measured: [\d.]+ dB to the full run in PyTorch, on 2 unseen seeds; {fewer}[\d.]+ dB", second)
    assert pixel.left == ["bundle", "model", "plan"]


def test_a_bundle_is_exported(pixel: MadeByCommands) -> None:
    assert pixel.exported.code == 0, pixel.exported.err
    *lines, last = pixel.exported.out.splitlines()
    assert last == f"{pixel.bundle}: computes in fp32, batches of {PIXEL_BATCH}, sampled on class labels"
    for line, name in zip(lines, ("full", "cached-1", "solver"), strict=True):
        path = pixel.bundle / ONNX_FOLDER / f"{name}.onnx"
        assert path.is_file()
        assert line.startswith(f"{path}: {name}, ")
        assert ("from diffusers' scheduler over a run" if name == "solver" else "from PyTorch") in line
    assert ", 1 output, " in lines[1]
    assert "are gone" not in pixel.exported.out
    assert "comparing full with PyTorch" in pixel.exported.err


def test_engines_are_built(pixel: MadeByCommands) -> None:
    assert pixel.built.code == 0, pixel.built.err
    assert pixel.built.out.startswith(f"{pixel.bundle / 'onnxruntime'}: built with onnxruntime ")
    assert pixel.built.out.endswith(", computes in fp32, provider cpu, threads 1\n")


def picture(path: Path) -> Image.Image:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
        return image


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2)])
@pytest.mark.parametrize("zoom", [1, 3])
def test_pictures_are_laid_out_on_a_sheet(
    pixel: MadeByCommands, tmp_path: Path, count: int, columns: int, rows: int, zoom: int
) -> None:
    output = tmp_path / "new" / "sheet.png"
    words = ("generate", pixel.bundle, "--class-label", 4, "-n", count, "--seed", 7, "--zoom", zoom, "-o", output)
    answer = run_cli(*words, "--sheet")
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"{output}: {count} picture{'s' * (count > 1)}, 5 full + 4 cached steps, ")
    sheet = picture(output)
    assert (sheet.format, sheet.mode, sheet.size) == (
        "PNG",
        "RGB",
        ((columns * TILE - GAP) * zoom, (rows * TILE - GAP) * zoom),
    )
    with tc_deploy.load(pixel.bundle) as pipeline:
        images = pipeline(class_labels=[4] * count, seed=7).images
    assert images is not None
    pixels = np.asarray(sheet)
    for index, image in enumerate(images):
        top, left = index // columns * TILE * zoom, index % columns * TILE * zoom
        tile = pixels[top : top + SIDE * zoom, left : left + SIDE * zoom]
        assert np.array_equal(tile, image.repeat(zoom, axis=0).repeat(zoom, axis=1))
    for empty in range(count, columns * rows):
        top, left = empty // columns * TILE * zoom, empty % columns * TILE * zoom
        assert (pixels[top:, left:] == GREY).all()
    assert [path.name for path in output.parent.iterdir()] == ["sheet.png"]


def test_each_picture_is_a_file_named_after_its_seed(pixel: MadeByCommands, tmp_path: Path) -> None:
    words = ("generate", pixel.bundle, "--class-label", 4, "--seed", 9, "-o", tmp_path / "x.png")
    answer = run_cli(*words, "-n", 2, "--json")
    assert answer.code == 0, answer.err
    files = [tmp_path / "x-09.png", tmp_path / "x-10.png"]
    facts = json.loads(answer.out)
    assert facts["files"] == [str(file) for file in files]
    assert (facts["seeds"], facts["steps_full"], facts["steps_cached"]) == ([9, 10], 5, 4)
    assert sorted(tmp_path.iterdir()) == files
    with tc_deploy.load(pixel.bundle) as pipeline:
        images = pipeline(class_labels=[4, 4], seed=9).images
    assert images is not None
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(np.asarray(picture(file)), image)
    answer = run_cli(*words)
    assert answer.out.startswith(f"{tmp_path / 'x.png'}: 1 picture, ")
    assert np.array_equal(np.asarray(picture(tmp_path / "x.png")), images[0])


def test_a_file_of_another_s_among_several_is_found_out_before_the_work(pixel: MadeByCommands, tmp_path: Path) -> None:
    (tmp_path / "x-1.png").write_bytes(b"mine")
    words = ("generate", pixel.bundle, "--class-label", 4, "-n", 2, "-o", tmp_path / "x.png")
    refused(BAD_PLACE, f"{tmp_path / 'x-1.png'}", *words, unchanged=tmp_path)
    refused(BAD_USE, "leave --sheet out", *words[:-1], tmp_path / "x.npy", "--sheet", unchanged=tmp_path)


def test_a_plan_and_its_engines_are_told_as_json(tiny_dit_folder: Path, tmp_path: Path) -> None:
    """What a program reads is what ``inspect`` says of the folder."""
    words = ("--steps", 4, "--cache-interval-early", 1, "--cache-interval-late", 1, "--samples", 0, "--json")
    made = [
        run_cli("-q", "calibrate", tiny_dit_folder, "-o", tmp_path / "plan", *words),
        run_cli("-q", "export", tmp_path / "plan", "-o", tmp_path / "bundle", "--no-check", "--json"),
        run_cli("-q", "build", tmp_path / "bundle", "--json"),
    ]
    assert [answer.code for answer in made] == [0, 0, 0], [answer.err for answer in made]
    plan, bundle, target = (json.loads(answer.out) for answer in made)
    assert plan["remark"].startswith("nothing is cached")
    shown = json.loads(run_cli("inspect", tmp_path / "bundle", "--json").out)
    assert plan == json.loads(run_cli("inspect", tmp_path / "plan", "--json").out)
    assert bundle.pop("engines_lost") == []
    assert {**bundle, "targets": {}} == {**shown, "targets": {}}
    assert (target.pop("path"), target.pop("backend")) == (str(tmp_path / "bundle" / "onnxruntime"), "onnxruntime")
    assert target == shown["targets"]["onnxruntime"]


def test_latents_are_written_as_they_are(mixed: Made, tmp_path: Path) -> None:
    output = tmp_path / "latents.npy"
    words = ("generate", mixed.bundle, "--class-label", 1, "--class-label", 2, "-n", 3, "-o", output, "--force")
    made = []
    for extra in ((), (), ("--full",), ("--guidance-scale", 4.0), ("--batch-size", 2)):
        answer = run_cli(*words, *extra)
        assert answer.code == 0, answer.err
        steps = "10 full + 0 cached" if "--full" in extra else "5 full + 5 cached"
        assert f"3 pictures, {steps} steps" in answer.out
        made.append(np.load(output, allow_pickle=False))
    with tc_deploy.load(mixed.bundle, batch_size=3) as pipeline:
        expected = pipeline(class_labels=[1, 2, 1])
    assert np.array_equal(made[0], expected.latents)
    assert np.array_equal(made[1], made[0])
    assert not np.array_equal(made[2], made[0])
    assert not np.array_equal(made[3], made[0])
    assert made[4].shape == made[0].shape == (3, 4, SIDE, SIDE)


def test_conditions_come_from_a_file_in_turn(mixed: Made, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.safetensors", tmp_path / "latents.safetensors"
    given, away = (np.array(labels, np.int32) for labels in ([4, 2], [7]))
    safetensors.numpy.save_file({"class_labels": given, "unconditional.class_labels": away}, prompts)
    answer = run_cli("generate", mixed.bundle, "--conditions", prompts, "-n", 3, "--seed", 5, "-o", output)
    assert answer.code == 0, answer.err
    with tc_deploy.load(mixed.bundle, batch_size=3) as pipeline:
        expected = pipeline(conditions={"class_labels": given[[0, 1, 0]]}, unconditional={"class_labels": away}, seed=5)
    assert np.array_equal(safetensors.numpy.load_file(output)["latents"], expected.latents)
    words = ("generate", mixed.bundle, "--conditions", prompts, "-n", 1, "-o", output)
    refused(BAD_USE, "-n 1 is less than the 2 labels or prompts given", *words, unchanged=tmp_path)
    safetensors.numpy.save_file({"class_labels": given.astype(np.int64)}, prompts)
    words = ("generate", mixed.bundle, "--conditions", prompts, "-o", output)
    refused(BAD_USE, f"{prompts}: class_labels: expected int32, found int64", *words, unchanged=tmp_path)


def test_pictures_can_be_had_as_latents_too(pixel: MadeByCommands, tmp_path: Path) -> None:
    assert run_cli("generate", pixel.bundle, "--class-label", 1, "-o", tmp_path / "x.npy").code == 0
    assert np.load(tmp_path / "x.npy").shape == (1, 3, SIDE, SIDE)


def test_a_plan_is_shown(mixed: Made) -> None:
    answer = run_cli("inspect", mixed.plan)
    assert answer.code == 0
    lines = {" ".join(line.split()) for line in answer.out.splitlines()}
    assert "schedule F c1 c1 | F c2 F c2 F c2 F" in lines
    assert "phase 1 tokens kept per block: 0 16 8 (of 16)" in lines
    assert "cache reuse branch, attention all, forecast order 1" in lines
    facts = json.loads(run_cli("inspect", mixed.plan, "--json").out)
    assert facts["kind"] == "plan"
    assert facts["keep_counts"] == {"phase 1": [0, 16, 8], "phase 2": [8, 0, 4]}
    assert (facts["steps_full"], facts["steps_cached"]) == (5, 5)
    assert facts["measured"] is None


def test_a_bundle_is_shown(mixed: Made, pixel: MadeByCommands, tmp_path: Path) -> None:
    answer = run_cli("inspect", pixel.bundle)
    assert answer.code == 0
    assert f"batch {PIXEL_BATCH}," in answer.out
    assert any(line.startswith("engines   onnxruntime ") for line in answer.out.splitlines())
    assert "measured" in answer.out
    facts = json.loads(run_cli("inspect", mixed.bundle, "--json").out)
    assert facts["kind"] == "bundle"
    assert set(facts["graphs"]) == {"full", "cached-1", "cached-2", "solver"}
    assert facts["targets"]["onnxruntime"]["usable"]
    assert (
        facts["plan"]["plan_sha256"]
        == json.loads((mixed.bundle / MANIFEST).read_text())["files"]["plan.json"]["sha256"]
    )
    assert facts["batch_size"] is None


def test_the_device_memory_of_a_bundle_is_shown(mixed: Made, pixel: MadeByCommands) -> None:
    for size in (1, 3):
        memory = json.loads(run_cli("inspect", mixed.bundle, "--batch-size", size, "--json").out)["memory"]
        assert (memory["batch_size"], memory["alignment_bytes"]) == (size, 256)
        assert set(memory["by_kind"]) == {"caches", "latents", "tables", "conditions", "outputs"}
        latents = [buffer for buffer in memory["buffers"] if buffer["name"] == "latents@1"]
        assert latents == [
            {
                "name": "latents@1",
                "kind": "latents",
                "dtype": "float32",
                "shape": [size, 4, 8, 8],
                "offset_bytes": latents[0]["offset_bytes"],
                "size_bytes": 1024 * size,
            }
        ]
        for kind, part in memory["by_kind"].items():
            sizes = [buffer["size_bytes"] for buffer in memory["buffers"] if buffer["kind"] == kind]
            assert part == {"buffers": len(sizes), "size_bytes": sum(sizes)}
        assert sum(part["size_bytes"] for part in memory["by_kind"].values()) <= memory["size_bytes"]
    out = run_cli("inspect", pixel.bundle).out
    assert f"KiB of buffers for a batch of {PIXEL_BATCH}, beside what the engines hold" in out
    assert out.count("largest: ") == 3
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("caches: ") and line.endswith(" KiB") for line in words)
    assert "a batch of exactly 2, found 3; export again" in run_cli("inspect", pixel.bundle, "--batch-size", 3).error
    assert "a plan has no buffers; leave --batch-size out" in run_cli("inspect", mixed.plan, "--batch-size", 1).error


def test_engines_that_are_stale_or_missing_are_shown_as_such(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert "built from another export" in run_cli("inspect", bundle).out
    shutil.rmtree(bundle / "onnxruntime")
    assert f"engines   none yet: tc-deploy build {bundle}" in run_cli("inspect", bundle).out


def test_engines_are_timed(pixel: MadeByCommands) -> None:
    answer = run_cli("bench", pixel.bundle, "--json", "--rounds", BENCH_ROUNDS)
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    (contender,) = facts["contenders"]
    assert facts["rounds"] == BENCH_ROUNDS
    assert (contender["batch_size"], contender["backend"]) == (PIXEL_BATCH, "onnxruntime")
    assert set(contender["runs"]) == {"plan", "full"}
    assert set(contender["variants"]) == {"full", "cached-1", "solver"}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_plan_that_caches_nothing_says_so(tiny_dit_folder: Path, tmp_path: Path, steps: int) -> None:
    plan = tmp_path / "plan"
    answer = run_cli("calibrate", tiny_dit_folder, "-o", plan, "--steps", steps, "--samples", 1)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[1] == "measured: equal to the full run in PyTorch, on 1 unseen seed"
    assert "warning: nothing is cached: all steps run in full" in answer.err
    assert "remark    nothing is cached" in run_cli("inspect", plan).out
    again = run_cli("calibrate", tiny_dit_folder, "-o", plan, "--steps", steps, "--samples", 0)
    assert f"{plan} holds a plan, which will be replaced" in " ".join(again.err.split())


@pytest.mark.parametrize(
    ("margin_db", "remark"),
    [
        (-1.0, "running fewer steps is better than this plan"),
        (-0.9, "hardly different"),
        (0.9, "hardly different"),
        (1.0, None),
    ],
)
def test_a_plan_is_remarked_on_as_it_was_measured(pixel: MadeByCommands, margin_db: float, remark: str | None) -> None:
    plan, _ = load_plan(pixel.plan)
    assert plan.measured is not None
    figures = {"psnr_db": 30.0 + margin_db, "fewer_steps_psnr_db": 30.0}
    measured = plan.model_copy(update={"measured": plan.measured.model_copy(update=figures)})
    assert remark_on(measured) is None if remark is None else str(remark_on(measured)).startswith(remark)


def test_a_calibration_that_is_stopped_says_where_its_state_is(
    tiny_dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tc_deploy.calibrate.calibration.train_predictor", stop)
    words = ("calibrate", tiny_dit_folder, "-o", tmp_path / "plan", "--steps", 4, "--keep-ratio", 0, 0.5)
    answer = run_cli(*words)
    assert answer.code == errors.Cancelled.exit_code
    (state,) = (tmp_path / ".plan.tc-deploy").glob("calibrate-*")
    assert f"interrupted; its state is in {state}: start it again to go on" in answer.error
    assert not (tmp_path / "plan").exists()


# ------------------------------------------------------------------------------------------------- mistakes: calibrate


def calibrate_words(model: Path, output: Path, *options: object) -> tuple[object, ...]:
    by_hand = ("--steps", 4, "--samples", 0, "--keep-counts", "0", "0")
    return ("calibrate", model, "-o", output, *by_hand, *options)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--keep-counts", "0,17,0", "0"),
            BAD_USE,
            "--keep-counts): phase 1, block 1: keep count must lie in 0..16, found",
        ),
        (
            ("--keep-counts", "0,-1,0", "0"),
            BAD_USE,
            "error: --keep-counts: must be greater than or equal to 0, found -1",
        ),
        (("--keep-counts", "0", "8,8"), BAD_USE, "phase 2: expected one keep count for each of the 3 blocks, found 2"),
        (("--keep-counts", "many", "0"), BAD_USE, "expected numbers with commas between them"),
        (
            ("--phase-start", 5),
            BAD_USE,
            "schedule.phase_start (--phase-start): must lie in 0..4 (sampling.num_inference_steps), found 5",
        ),
        (("--phase-start", -1), BAD_USE, "error: --phase-start: must be greater than or equal to 0, found -1"),
        (("--cache-interval-early", 0), BAD_USE, "error: --cache-interval-early: must be greater than 0, found 0"),
        (("--steps", 0), BAD_USE, "error: --num-inference-steps: must be greater than 0, found 0"),
        (("--guidance-scale", -1), BAD_USE, "error: --guidance-scale: must be greater than or equal to 0, found -1.0"),
        (("--steps", 2000), BAD_USE, "DDIMScheduler takes at most 1000 steps, as many as the model was trained with"),
        (("--forecast-order", 3), BAD_USE, "error: --forecast-order: must be less than or equal to 2, found 3"),
        (("--skip", "everything"), BAD_USE, "--skip"),
        (("--seed", -1), BAD_USE, "error: --seed: must be greater than or equal to 0, found -1"),
    ],
)
def test_options_that_no_plan_can_have(
    tiny_dit_folder: Path, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    refused(code, message, *calibrate_words(tiny_dit_folder, tmp_path / "plan", *options), unchanged=tmp_path)


def _of_another_class(model: Path) -> None:
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))


def _as_a_pickle(model: Path) -> None:
    (weights,) = (model / "transformer").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))


def _half_written(model: Path) -> None:
    (weights,) = (model / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_of_another_class, "no family for model class 'UNet2DModel', and it is no transformer of diffusers"),
        (_as_a_pickle, "a pickle can run code when it is read, so it is refused"),
        (_half_written, "not a whole safetensors file"),
        (lambda model: shutil.rmtree(model / "scheduler"), "no scheduler/scheduler_config.json"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_checkpoints_that_cannot_be_used(
    tiny_dit_folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_dit_folder, model)
    damage(model)
    refused(BAD_MODEL, message, *calibrate_words(model, tmp_path / "plan"), unchanged=tmp_path)


def test_a_scheduler_that_clips(save_dit: SaveDit, tmp_path: Path) -> None:
    model = save_scheduler(save_dit(tmp_path / "model", num_layers=1), diffusers.DDIMScheduler(clip_sample=True))
    words = calibrate_words(model, tmp_path / "plan")
    refused(BAD_EXPORT, "set clip_sample=False (found True)", *words, unchanged=tmp_path)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            'model = "m"\ncolour = "red"',
            "recipe.toml: colour: unknown key; known here: model, ",
        ),
        ('model = "m"\n[cache]\nkept = 1', "cache.kept: unknown key; known here: keep_ratio, keep_counts, multiple, "),
        ("[cache]\nkeep_ratio = [0.0, 0.5]", "recipe.toml: model: this key is required"),
        ('model = "m"\n[cache]\nkeep_ratio = [0.0, 1.5]', "cache.keep_ratio"),
        ('model = "m"\nsampling = 3', "sampling"),
        ('model = "m', "not a TOML file"),
        (None, "no such recipe"),
    ],
)
def test_recipes_that_cannot_be_used(tmp_path: Path, recipe: str | None, message: str) -> None:
    path = tmp_path / "recipe.toml"
    if recipe is not None:
        path.write_text(recipe)
    refused(BAD_USE, message, "calibrate", path, "-o", tmp_path / "plan", "--steps", 4, unchanged=tmp_path)


# ----------------------------------------------------------------------------------------- mistakes: export and build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "bf16"), "--precision is no option of onnxruntime; add --backend openvino, or leave it out"),
        (("--backend", "openvino", "--workspace-mib", 9), "add --backend tensorrt or --backend tensorrt-rtx"),
        (("--backend", "openvino", "--precision", "fp8"), "--precision"),
    ],
)
def test_an_option_of_another_engine_kind(mixed: Made, options: tuple[object, ...], message: str) -> None:
    refused(BAD_USE, message, "build", mixed.bundle, *options, unchanged=mixed.bundle)


def test_every_option_of_a_build_belongs_to_an_engine_kind() -> None:
    names = {parameter.name for parameter in build.command.params} - {"bundle", "backend", "as_json", "config"}
    assert set(build.TAKEN_BY) == names
    for name, kinds in build.TAKEN_BY.items():
        assert set(kinds) <= set(BACKENDS), name


def test_a_plan_of_another_model(mixed: Made, multistep: Made, tmp_path: Path) -> None:
    words = ("export", mixed.plan, "-o", tmp_path / "bundle", "--model", multistep.model)
    refused(BAD_PLAN, "made for another model: weights_sha256 expected", *words, unchanged=tmp_path)


def test_no_plan(mixed: Made, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", mixed.model):
        words = ("export", place, "-o", tmp_path / "bundle")
        refused(BAD_BUNDLE, f"{place} holds no plan", *words, unchanged=tmp_path)


def test_a_plan_that_was_edited(mixed: Made, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    shutil.copytree(mixed.plan, plan)
    document = json.loads((plan / PLAN).read_text())
    document["schedule"]["phase_start"] = 99
    (plan / PLAN).write_text(json.dumps(document))
    refused(BAD_PLAN, "phase_start must lie in 0..10", "export", plan, "-o", tmp_path / "bundle", unchanged=tmp_path)


def test_a_fixed_batch_of_nothing(mixed: Made, tmp_path: Path) -> None:
    words = ("export", mixed.plan, "-o", tmp_path / "bundle", "--static-batch", 0)
    refused(BAD_USE, "0 is not in the range 1<=x<=", *words, unchanged=tmp_path)


@pytest.mark.parametrize("place", ["notes.txt", "notes.txt/bundle", "holiday"])
def test_an_export_to_a_place_that_is_not_its_own(mixed: Made, tmp_path: Path, place: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").write_text("sun")
    refused(BAD_PLACE, str(tmp_path / place), "export", mixed.plan, "-o", tmp_path / place, unchanged=tmp_path)


@pytest.mark.parametrize("command", ["build", "bench", "generate", "inspect"])
@pytest.mark.parametrize("place", ["nowhere", "file", "empty"])
def test_a_folder_that_is_no_bundle(tmp_path: Path, command: str, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    rest = ("--class-label", 1, "-o", tmp_path / "x.npy") if command == "generate" else ()
    refused(BAD_BUNDLE, str(tmp_path / place), command, tmp_path / place, *rest, unchanged=tmp_path)


@pytest.mark.parametrize("command", ["build", "bench", "generate", "inspect"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (f"{ONNX_FOLDER}/{WEIGHTS}", "the file is truncated or altered"),
        (f"{ONNX_FOLDER}/full.onnx", "the file is truncated or altered"),
        (MANIFEST, "not a bundle of this version"),
    ],
)
def test_a_bundle_that_was_cut_short(mixed: Made, tmp_path: Path, command: str, file: str, message: str) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    (bundle / file).write_bytes((bundle / file).read_bytes()[:-100])
    rest = ("--class-label", 1, "-o", tmp_path / "x.npy") if command == "generate" else ()
    refused(BAD_BUNDLE, message, command, bundle, *rest, unchanged=tmp_path)


@pytest.mark.parametrize("command", ["build", "bench", "generate"])
def test_an_engine_kind_that_nobody_knows(mixed: Made, tmp_path: Path, command: str) -> None:
    rest = ("--class-label", 1, "-o", tmp_path / "x.npy") if command == "generate" else ()
    words = (command, mixed.bundle, "--backend", "abacus", *rest)
    refused(BAD_USE, "unknown backend 'abacus'; known: onnxruntime", *words, unchanged=mixed.bundle)


# -------------------------------------------------------------------------------------------------- mistakes: generate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class-label", 10), "class label must lie in 0..9, found 10"),
        (("--class-label", -1), "class label must lie in 0..9, found -1"),
        (("--class-label", "cat"), "--class-label"),
        ((), "--class-label"),
        (
            ("--class-label", 1, "--conditions", "prompts.safetensors"),
            "takes --class-label or --conditions FILE; give one of them",
        ),
        (("--conditions", "prompts.safetensors"), "prompts.safetensors: no such file of conditions"),
        (("--class-label", 1, "-n", 0), "0 is not in the range 1<=x<="),
        (("--class-label", 1, "-n", -3), "-3 is not in the range 1<=x<="),
        (("--class-label", 1, "--batch-size", 0), "0 is not in the range 1<=x<="),
        (("--class-label", 1, "--batch-size", -2), "-2 is not in the range 1<=x<="),
        (("--class-label", 1, "--seed", -1), "-1 is not in the range 0<=x<="),
        (("--class-label", 1, "--guidance-scale", "nan"), "--guidance-scale': expected a number, found nan"),
        (("--class-label", 1, "--zoom", 0), "--zoom"),
    ],
)
def test_requests_that_cannot_be_met(mixed: Made, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    refused(BAD_USE, message, "generate", mixed.bundle, "-o", tmp_path / "x.npy", *options, unchanged=tmp_path)


def test_guidance_or_another_batch_where_the_bundle_has_none(pixel: MadeByCommands, tmp_path: Path) -> None:
    words = ("generate", pixel.bundle, "--class-label", 1, "-o", tmp_path / "x.png")
    refused(BAD_USE, "exported without guidance", *words, "--guidance-scale", 2, unchanged=tmp_path)
    refused(BAD_USE, "for a batch of exactly 2, found 3", *words, "--batch-size", 3, unchanged=tmp_path)


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.npz", "png"])
def test_an_output_of_an_unknown_kind(mixed: Made, tmp_path: Path, name: str) -> None:
    words = ("generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / name)
    refused(BAD_USE, "must end in .png (pictures), .safetensors or .npy (latents)", *words, unchanged=tmp_path)


def test_a_picture_of_latents_that_are_none(mixed: Made, tmp_path: Path) -> None:
    words = ("generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / "x.png")
    refused(BAD_USE, f"write them with -o {tmp_path / 'x.safetensors'}", *words, unchanged=tmp_path)


@pytest.mark.parametrize("name", ["notes.txt/x.npy", "folder.npy"])
def test_an_output_that_cannot_be_written_is_found_out_before_the_work(mixed: Made, tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.npy").mkdir()
    words = ("generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / name)
    refused(BAD_PLACE, f"{tmp_path / name} cannot be written", *words, unchanged=tmp_path)
    assert "pictures from" not in run_cli(*words).err


def test_a_bundle_without_its_manifest_is_no_plan(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    (bundle / MANIFEST).unlink()
    for command, *rest in (("generate", "--class-label", 1, "-o", tmp_path / "x.npy"), ("inspect",), ("build",)):
        message = f"{bundle}: a half-written or damaged bundle"
        refused(BAD_BUNDLE, message, command, bundle, *rest, unchanged=tmp_path)


def test_engines_of_another_export(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    for command, *rest in (("generate", "--class-label", 1, "-o", tmp_path / "x.npy"), ("bench",)):
        refused(BAD_BUNDLE, "built from another export", command, bundle, *rest, unchanged=tmp_path)


def test_no_engines(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    shutil.rmtree(bundle / "onnxruntime")
    for command, *rest in (("generate", "--class-label", 1, "-o", tmp_path / "x.npy"), ("bench",)):
        refused(BAD_BUNDLE, f"build one with: tc-deploy build {bundle}", command, bundle, *rest, unchanged=tmp_path)


def test_an_error_is_the_only_line_when_quiet(mixed: Made, tmp_path: Path) -> None:
    answer: Answer = run_cli("-q", "generate", mixed.bundle, "--class-label", 10, "-o", tmp_path / "x.npy")
    assert answer.err.splitlines() == [answer.error]


def test_nothing_is_said_when_quiet(mixed: Made, tmp_path: Path) -> None:
    arguments: tuple[Any, ...] = ("generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / "x.safetensors")
    assert run_cli("-q", *arguments).err == ""
    assert "denoising" in run_cli(*arguments).err
