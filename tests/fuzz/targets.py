"""What is fuzzed: functions of bytes from outside, which may end in nothing but a result or a :class:`TcDeployError`.

In: a folder of good documents, which :func:`seed_folder` made of a bundle. Out: by name, a function of bytes and the
documents to begin with. Each writes its bytes in the place of one file and reads the folder as the product does, up to
where an engine would be opened. Never: opens an engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tc_deploy.backends import registry
from tc_deploy.backends.tensorrt.options import checked_options
from tc_deploy.bundle import MANIFEST, FileRecord, canonical_json, sha256_of_bytes
from tc_deploy.calibrate.recipe import read_recipe
from tc_deploy.conditions import UNCONDITIONAL, checked_conditions, read_conditions
from tc_deploy.errors import TcDeployError
from tc_deploy.manifest import (
    RUNTIME_TABLES,
    ConditionRecord,
    Manifest,
    TextRecord,
    TokenizerRecord,
    read_engine_record,
    read_manifest,
    read_target,
)
from tc_deploy.plan import PLAN, TABLES, load_plan
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.layout import checked_batch_size, pipeline_layout, pipeline_programs
from tc_deploy.runtime.request import checked_request
from tc_deploy.tokenization import Tokenizers
from tc_deploy.types import Cleaning

BACKEND = "onnxruntime"
TOKENS = 4
PROMPT = ConditionRecord(name="encoder_hidden_states", dtype="float32", shape=(3, 2), classes=None)
MASK = ConditionRecord(name="encoder_attention_mask", dtype="float32", shape=(3,), classes=None)
TEXT = TextRecord(
    cleaning=Cleaning.LOWER,
    tokenizers=(TokenizerRecord(file="tokenizers/t.json", ids="ids", mask="mask", tokens=TOKENS),),
    defaults={},
    components=(),
)
RECIPE = """model = "m"
conditions = "random"
latent_size = [8, 8]
text_tokens = 5
seed = 7

[sampling]
num_inference_steps = 20
guidance_scale = 2.5
set_timesteps_kwargs = {mu = 1.15}

[schedule]
phase_start = 8
cache_interval_early = 4
cache_interval_late = 2

[cache]
keep_ratio = [0.0, 0.25]
multiple = 16
reuse = "residual"
attention = "kept"
forecast_order = 2
skip = "model"

[predictor]
trajectories = 4
iterations = 30
batch_size = 2
learning_rate = 0.01
budget_weight = 10.0

[measure]
samples = 4

[search]
full_steps = [0.25, 0.5]
keep_ratio = [0.0, 0.5]
baselines = "none"

[quality]
classifier = "c.onnx"
"""
ARGUMENTS: Mapping[str, Any] = {
    "class_labels": [1, 2],
    "count": None,
    "true_cfg_scale": None,
    "conditions": None,
    "unconditional": None,
    "prompt": None,
    "negative_prompt": None,
    "seed": 3,
    "guidance_scale": 2.0,
    "latents": None,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parser."""

    kind: str
    """Of its documents, as ``mutations.py`` knows them."""
    seeds: tuple[bytes, ...]
    """Good ones."""
    read: Callable[[bytes], object]
    """Raises :class:`TcDeployError`; anything else that it raises is a finding."""

    def run(self, data: bytes) -> bool:
        """Whether a document was accepted.

        Raises:
            Exception: a finding: what is raised is no error of ours, or its text is not one line that can be printed.
        """
        try:
            self.read(data)
        except TcDeployError as error:
            text = str(error)
            if not text or not text.isprintable():
                raise AssertionError(f"not one printable line: {text!r}") from error
            return False
        return True


def seed_folder(bundle: Path, tokenizer: str, folder: Path) -> Path:
    """Gather good documents: a built bundle, a tokenizer, an engine record, conditions."""
    shutil.copytree(bundle, folder / "bundle")
    shutil.rmtree(folder / "bundle" / "polygraphy", ignore_errors=True)
    manifest = json.loads((folder / "bundle" / MANIFEST).read_text())
    manifest["files"] = {name: item for name, item in manifest["files"].items() if not name.startswith("polygraphy/")}
    (folder / "bundle" / MANIFEST).write_text(canonical_json(manifest))
    target = folder / "bundle" / BACKEND / MANIFEST
    document = json.loads(target.read_text())
    document["manifest_sha256"] = sha256_of_bytes((folder / "bundle" / MANIFEST).read_bytes())
    target.write_text(canonical_json(document))
    (folder / "tokenizer.json").write_text(tokenizer)
    profile = {"graphs": ["full"], "inputs": manifest["graphs"]["full"]["inputs"], "outputs": []}
    record = {
        "backend": "tensorrt-rtx",
        "backend_version": "1.7.1.116",
        "options": {"compute_capability": ["8.6"], "batch_profile": [1, 2, 4], "use_cuda_graph": True},
        "onnx_sha256": "0" * 64,
        "weights_sha256": "1" * 64,
        "profiles": [profile],
        "axes": {"batch": [1, 2, 4]},
        "layers": 3,
        "build_s": 1.5,
        "peak_memory_mib": 600,
        "warnings": ["a"],
    }
    (folder / "engine.json").write_text(canonical_json(record))
    return folder


def targets(folder: Path, work: Path) -> dict[str, Target]:
    """The targets.

    Args:
        folder: as :func:`seed_folder` made it.
        work: an empty folder that they write into.
    """
    bundle = Path(shutil.copytree(folder / "bundle", work / "bundle"))
    plan = work / "plan"
    plan.mkdir()
    for name in (PLAN, TABLES):
        shutil.copyfile(bundle / name, plan / name)
    manifest = read_manifest(bundle)
    good = {name: (bundle / name).read_bytes() for name in (MANIFEST, PLAN, TABLES, RUNTIME_TABLES)}
    target = (bundle / BACKEND / MANIFEST).read_bytes()

    def in_bundle(name: str, read: Callable[[], object]) -> Callable[[bytes], object]:
        return _in_place(bundle / name, read)

    def read_runtime_tables(data: bytes) -> object:
        with _restored(bundle / MANIFEST, good[MANIFEST]), _restored(bundle / RUNTIME_TABLES, good[RUNTIME_TABLES]):
            (bundle / RUNTIME_TABLES).write_bytes(data)
            document = json.loads(good[MANIFEST])
            document["files"][RUNTIME_TABLES] = _record(data)
            (bundle / MANIFEST).write_text(canonical_json(document))
            return read_bundle(bundle, BACKEND)

    def read_tables(data: bytes) -> object:
        (plan / TABLES).write_bytes(data)
        document = json.loads(good[PLAN]) | {"tables": _record(data), "measured": None}
        (plan / PLAN).write_text(canonical_json(document))
        return load_plan(plan)

    def read_plan(data: bytes) -> object:
        (plan / TABLES).write_bytes(good[TABLES])
        (plan / PLAN).write_bytes(data)
        return load_plan(plan)

    def read_engine(data: bytes) -> object:
        (work / "e.json").write_bytes(data)
        record = read_engine_record(work / "e.engine")
        return checked_options("tensorrt-rtx", record.options, ahead_of_time=True)

    def read_built() -> object:
        found = read_target(bundle, BACKEND)
        engine = registry.backend(BACKEND)
        engine.check(bundle, found)
        return engine.open(found.options)

    return {
        "plan": Target(kind="json", seeds=(good[PLAN],), read=read_plan),
        "manifest": Target(
            kind="json", seeds=(good[MANIFEST],), read=in_bundle(MANIFEST, lambda: _read_documents(bundle))
        ),
        "built": Target(kind="json", seeds=(target,), read=in_bundle(f"{BACKEND}/{MANIFEST}", read_built)),
        "engine": Target(kind="json", seeds=((folder / "engine.json").read_bytes(),), read=read_engine),
        "recipe": Target(kind="toml", seeds=(RECIPE.encode(),), read=_recipe(work)),
        "arguments": Target(
            kind="json", seeds=(json.dumps(ARGUMENTS).encode(),), read=lambda data: _request(manifest, data)
        ),
        "conditions": Target(kind="safetensors", seeds=(_conditions(),), read=_read_conditions(work)),
        "tokenizer": Target(kind="json", seeds=((folder / "tokenizer.json").read_bytes(),), read=_read_tokenizer(work)),
        "tables": Target(kind="safetensors", seeds=(good[TABLES],), read=read_tables),
        "runtime-tables": Target(kind="safetensors", seeds=(good[RUNTIME_TABLES],), read=read_runtime_tables),
    }


NAMES = (
    *("plan", "manifest", "built", "engine", "recipe", "arguments", "conditions", "tokenizer", "tables"),
    "runtime-tables",
)


class _restored:  # noqa: N801 - used as a statement
    """A file that has its bytes again afterwards."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data = path, data

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._data)


def _in_place(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    good = path.read_bytes()

    def replaced(data: bytes) -> object:
        with _restored(path, good):
            path.write_bytes(data)
            return read()

    return replaced


def _record(data: bytes) -> dict[str, Any]:
    return FileRecord(size_bytes=len(data), sha256=sha256_of_bytes(data)).model_dump()


def _read_documents(bundle: Path) -> object:
    """All that a pipeline does before it opens an engine."""
    found = read_bundle(bundle, BACKEND)
    programs = pipeline_programs(found.manifest, found.plan)
    return pipeline_layout(found.manifest, programs, checked_batch_size(found.manifest, None))


def _recipe(work: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        (work / "r.toml").write_bytes(data)
        return read_recipe(work / "r.toml", {"schedule.cache_interval_early": 3})

    return read


def _request(manifest: Manifest, data: bytes) -> object:
    """A request whose arguments are the values of a JSON document; lists of numbers come as arrays, too."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    arguments = {name: given.get(name, default) for name, default in ARGUMENTS.items()}
    if isinstance(arguments["latents"], (list, int, float)):
        arguments["latents"] = _array(arguments["latents"])
    return checked_request(manifest, **arguments)


def _array(value: Any) -> Any:
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        return value


def _conditions() -> bytes:
    numbers = np.random.default_rng(0)
    arrays = {item.name: numbers.standard_normal((2, *item.shape), np.float32) for item in (PROMPT, MASK)}
    return safetensors.numpy.save(arrays | {UNCONDITIONAL + name: array[:1] for name, array in arrays.items()})


def _read_conditions(work: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        (work / "c.safetensors").write_bytes(data)
        given, unconditional = read_conditions(work / "c.safetensors")
        return checked_conditions((PROMPT, MASK), given, unconditional, guided=True)

    return read


def _read_tokenizer(work: Path) -> Callable[[bytes], object]:
    (work / "tokenizers").mkdir()

    def read(data: bytes) -> object:
        (work / "tokenizers" / "t.json").write_bytes(data)
        arrays = Tokenizers(work, TEXT).arrays(["a cat on a mat, in the sun", ""], warn=False)
        assert {name: array.shape for name, array in arrays.items()} == {"ids": (2, TOKENS), "mask": (2, TOKENS)}
        return arrays

    return read
