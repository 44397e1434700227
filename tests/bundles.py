"""Bundles that several rooms' tests share: five exports, which are kept, as every graph takes seconds.

Tests leave the folders as they are; one that damages a bundle takes a copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from kept import Keep

from tc_deploy import cli
from tc_deploy.backends.build import build_target
from tc_deploy.bundle import MANIFEST, canonical_json, file_records, sha256_of_bytes
from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import read_manifest
from tc_deploy.plan import PLAN, TABLES
from tc_deploy.types import Precision

SaveDit = Callable[..., Path]

MIXED = {
    # F c1 c1 | F c2 F c2 F c2 F: phase 1 never fills the history that its forecast would like, phase 2 does.
    "sampling": {"num_inference_steps": 10, "guidance_scale": 2.0},
    "schedule": {"phase_start": 3, "cache_interval_early": 3, "cache_interval_late": 2},
    "cache": {"keep_counts": ((0, 16, 8), (8, 0, 4)), "attention": "all", "reuse": "branch", "forecast_order": 1},
}
MULTISTEP = {
    # F c1 c1 F | F c2 F c2: the cached steps of phase 2 skip the model.
    "sampling": {"num_inference_steps": 8, "guidance_scale": 1.5},
    "schedule": {"phase_start": 4, "cache_interval_early": 3, "cache_interval_late": 2},
    "cache": {"keep_counts": ((8,), (0,)), "reuse": "branch", "forecast_order": 0, "skip": "model"},
}
HALF = {
    # F c1 F c1 F c1; each cached step skips, prunes and keeps blocks.
    "sampling": {"num_inference_steps": 6, "guidance_scale": 1.5},
    "schedule": {"phase_start": 6, "cache_interval_early": 2, "cache_interval_late": 1},
    "cache": {"keep_counts": ((0, 8, 16), (0,)), "attention": "all", "reuse": "branch", "forecast_order": 1},
}
PIXEL_BATCH = 2
ANSWERS = "answers.json"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A bundle and what it was made from."""

    model: Path
    plan: Path
    bundle: Path

    def copy(self, folder: Path) -> Path:
        """A copy of the bundle that a test may damage."""
        return Path(shutil.copytree(self.bundle, folder))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command line said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that begins with ``error:``, which is the last."""
        lines = self.err.splitlines()
        assert [line.startswith("error: ") for line in lines].count(True) == 1, self.err
        assert lines[-1].startswith("error: "), self.err
        assert "Traceback" not in self.err
        return lines[-1]


def run_cli(*words: object) -> Answer:
    """Run a command line in this process; the log is left as it was."""
    loggers = [logging.getLogger(), logging.getLogger("tc_deploy")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(word) for word in words])
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers
    return Answer(code=code, out=out.getvalue(), err=err.getvalue())


def recipe_of(folder: Path, model: Path, **keys: Any) -> Path:
    """A recipe that names a model; what has no option is said there. A dotted key is one of a table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"model": str(model.absolute()), **keys}.items()]
    (folder / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "recipe.toml"


def build_rtx(made: Made, folder: Path) -> tuple[Made, Answer]:
    """A copy of a bundle with TensorRT-RTX engines for three kinds of GPU and 1 to 4 samples, by the command line."""
    bundle = made.copy(folder / "bundle")
    words = ("--compute-capability", "8.6,8.9,12.0", "--batch-profile", 1, 2, 4)
    answer = run_cli("build", bundle, "--backend", "tensorrt-rtx", *words)
    assert answer.code == 0, answer.err
    return Made(model=made.model, plan=made.plan, bundle=bundle), answer


def relative_error(found: Any, expected: Any) -> float:
    """The largest departure of an array or a tensor, over the largest number that is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a bundle's manifest, as a user or an attacker would."""
    document = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(document)
    (bundle / MANIFEST).write_text(canonical_json(document), encoding="utf-8")


def reseal(bundle: Path) -> None:
    """Make the manifest name the files as they now are."""
    names = list(read_manifest(bundle).files)
    records = {name: record.model_dump() for name, record in file_records(bundle, names).items()}
    edit_manifest(bundle, lambda document: document.update(files=records))


def edit_resealed(bundle: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a JSON document of a bundle, and make every checksum that names it right again, as an attacker would.

    What is not a checksum of a file is left: the numbers that one document has of another's meaning.
    """
    document = json.loads((bundle / name).read_text(encoding="utf-8"))
    change(document)
    (bundle / name).write_text(canonical_json(document), encoding="utf-8")
    seal(bundle)


def seal(bundle: Path) -> None:
    """Make every checksum of a bundle and of its targets that of the file as it now is, whatever the documents say."""

    def record(path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        return {"size_bytes": len(data), "sha256": sha256_of_bytes(data)}

    def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(canonical_json(document), encoding="utf-8")

    rewrite(bundle / PLAN, lambda plan: plan.update(tables=record(bundle / TABLES)))
    present = [path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()]
    rewrite(
        bundle / MANIFEST,
        lambda manifest: manifest["files"].update(
            {name: record(bundle / name) for name in present if name in manifest["files"]}
        ),
    )
    for target in bundle.glob(f"*/{MANIFEST}"):
        rewrite(
            target,
            lambda document: document.update(
                manifest_sha256=record(bundle / MANIFEST)["sha256"],
                plan_sha256=record(bundle / PLAN)["sha256"],
                reads={name: record(bundle / name) for name in document["reads"] if (bundle / name).is_file()},
            ),
        )


def make_plan(model: Path, folder: Path, **settings: Any) -> Path:
    """Calibrate by hand: nothing is trained or measured."""
    calibrate(Recipe.model_validate({"model": str(model), "measure": {"samples": 0}, **settings}), folder)
    return folder


def save_scheduler(model: Path, scheduler: Any) -> Path:
    """Give a pipeline folder another scheduler."""
    shutil.rmtree(model / "scheduler")
    scheduler.save_pretrained(model / "scheduler")
    return model


@pytest.fixture(scope="session")
def mixed(kept: Keep, tmp_path_factory: pytest.TempPathFactory, tiny_dit_folder: Path) -> Made:
    """Guided, any batch, first-order forecast, keys and values cached; each variant skips, prunes and keeps blocks."""

    def make(folder: Path) -> None:
        export_bundle(make_plan(tiny_dit_folder, folder / "plan", **MIXED), folder / "bundle")

    return _built(copied(kept("mixed", make), tiny_dit_folder, tmp_path_factory.mktemp("mixed")))


@pytest.fixture(scope="session")
def prologue(kept: Keep, tmp_path_factory: pytest.TempPathFactory, tiny_dit_folder: Path) -> Made:
    """The same plan as ``mixed``, and its graphs with a prologue."""

    def make(folder: Path) -> None:
        plan = make_plan(tiny_dit_folder, folder / "plan", **MIXED)
        export_bundle(plan, folder / "bundle", ExportOptions(prologue=True))

    return _built(copied(kept("prologue", make), tiny_dit_folder, tmp_path_factory.mktemp("prologue")))


@pytest.fixture(scope="session")
def multistep(kept: Keep, tmp_path_factory: pytest.TempPathFactory, save_dit: SaveDit) -> Made:
    """One block, DPM-Solver++ of second order (the solver looks one step back), guided, reuse without forecast."""

    def make(folder: Path) -> None:
        model = save_scheduler(save_dit(folder / "model", num_layers=1), diffusers.DPMSolverMultistepScheduler())
        export_bundle(make_plan(model, folder / "plan", **MULTISTEP), folder / "bundle")

    entry = kept("multistep", make)
    return _built(copied(entry, entry / "model", tmp_path_factory.mktemp("multistep")))


def copied(entry: Path, model: Path, folder: Path) -> Made:
    """What is kept, with a plan and a bundle of this process's own."""
    plan, bundle = (Path(shutil.copytree(entry / name, folder / name)) for name in ("plan", "bundle"))
    return Made(model=model, plan=plan, bundle=bundle)


def _built(made: Made) -> Made:
    build_target(made.bundle, options={"threads": 1})
    return made


def _half(kept: Keep, model: Path, precision: Precision, folder: Path) -> Made:
    def make(folder: Path) -> None:
        plan = make_plan(model, folder / "plan", **HALF)
        export_bundle(plan, folder / "bundle", ExportOptions(precision=precision))

    return copied(kept(precision.value, make), model, folder)


@pytest.fixture(scope="session")
def fp16(kept: Keep, tmp_path_factory: pytest.TempPathFactory, tiny_dit_folder: Path) -> Made:
    """Guided, any batch, first-order forecast, keys and values cached, products in fp16; not built."""
    return _half(kept, tiny_dit_folder, Precision.FP16, tmp_path_factory.mktemp("fp16"))


@pytest.fixture(scope="session")
def bf16(kept: Keep, tmp_path_factory: pytest.TempPathFactory, tiny_dit_folder: Path) -> Made:
    """The same in bf16."""
    return _half(kept, tiny_dit_folder, Precision.BF16, tmp_path_factory.mktemp("bf16"))


@dataclass(frozen=True, kw_only=True)
class MadeByCommands(Made):
    """A bundle that the command line made, and what it said."""

    left: list[str]
    """What lay in the folder of plan and bundle when the commands were done."""
    calibrated: Answer
    exported: Answer
    built: Answer


def _repeat_embedders(module: Any) -> None:
    """Let the second block hold copies of the first one's embedders, as converted checkpoints do."""
    first, second = (block.norm1.emb for block in module.transformer_blocks)
    second.load_state_dict(first.state_dict())


@pytest.fixture(scope="session")
def pixel(kept: Keep, tmp_path_factory: pytest.TempPathFactory, save_dit: SaveDit) -> MadeByCommands:
    """Latents that are RGB pictures, a fixed batch, no guidance, residual reuse, second-order forecast, Euler's solver.

    F c1 F c1 F c1 F c1 F; phase 2 is empty. Euler's noise is not of size 1, and the model sees it scaled. Made by the
    command line.
    """

    def make(folder: Path) -> None:
        model = save_dit(folder / "model", edit=_repeat_embedders, num_layers=2, in_channels=3, out_channels=6)
        save_scheduler(model, diffusers.EulerDiscreteScheduler())
        schedule = ("--steps", 9, "--phase-start", 9, "--cache-interval-early", 2, "--cache-interval-late", 1)
        recipe = recipe_of(model, model, **{"cache.reuse": "residual", "cache.attention": "kept"})
        cache = ("--forecast-order", 2, "--keep-counts", "8,0", "0")
        plan, bundle = folder / "plan", folder / "bundle"
        answers = {
            "calibrated": run_cli("calibrate", recipe, "-o", plan, *schedule, *cache, "--samples", 2),
            "exported": run_cli("export", plan, "-o", bundle, "--static-batch", PIXEL_BATCH),
        }
        said = {name: dataclasses.asdict(answer) for name, answer in answers.items()}
        left = sorted(path.name for path in folder.iterdir())
        (folder / ANSWERS).write_text(json.dumps({"left": left, "said": said}), encoding="utf-8")

    entry = kept("pixel", make, by_commands=True)
    made = copied(entry, entry / "model", tmp_path_factory.mktemp("pixel"))
    words = (entry / ANSWERS).read_text(encoding="utf-8")
    for own in (made.plan, made.bundle):
        words = words.replace(str(entry / own.name), str(own))
    document = json.loads(words)
    return MadeByCommands(
        model=made.model,
        plan=made.plan,
        bundle=made.bundle,
        left=document["left"],
        **{name: Answer(**answer) for name, answer in document["said"].items()},
        built=run_cli("build", made.bundle, "--threads", 1),
    )
