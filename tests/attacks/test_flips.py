"""One byte altered, anywhere: in every kind of file of a plan, a bundle and its targets, up to where an engine opens.

Refused, or the byte means nothing: then it is in a document that no checksum covers, and the document says the same but
for what is a note (who made it, the engine's options).
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import reliability
from attacks.counts import COUNTS
from bundles import Made, build_rtx, run_cli
from prompted import Prompted

import tc_deploy
from tc_deploy.backends.onnxruntime.run import OrtDevice
from tc_deploy.backends.openvino.run import OpenVinoDevice
from tc_deploy.backends.tensorrt.backend import TensorRt
from tc_deploy.consistency import read_documents
from tc_deploy.errors import BundleError, TcDeployError
from tc_deploy.plan import load_plan
from tc_deploy.runtime import binding
from tc_deploy.signing import SIGNATURE

REPOSITORY = Path(__file__).parents[2]
FLIPS, QUICK_FLIPS = 430, 12
"""Of each kind of file."""
NOTES = {"made_by", "backend_version", "options", "precision", "gpu", "plan_sha256"}
"""Of a target, that no checksum covers: who can change them can change any checksum."""

BUNDLE = (
    *("plan.json", "tables.safetensors", "manifest.json", "runtime.safetensors", "onnx/full.onnx"),
    *("onnx/cached-1.onnx", "onnx/solver.onnx", "onnx/weights.bin"),
)
SAMPLES = (
    *("polygraphy/full.inputs.json", "polygraphy/solver.outputs.json"),
    *("polygraphy/inputs.py", "polygraphy/trajectory.safetensors"),
)
"""Of a bundle, what no engine reads."""
RTX = ("full.engine", "solver.engine", "full.json", "full.log")
PROMPTED = ("onnx/text-encoder.onnx", "onnx/decoder.onnx")


class ReachedError(Exception):
    """An engine would be opened now."""


def reached(*_: Any, **__: Any) -> NoReturn:
    raise ReachedError


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded; where a GPU would be asked for, checksums have been compared."""
    for kind in (OrtDevice, OpenVinoDevice):
        monkeypatch.setattr(kind, "load", reached)
    monkeypatch.setattr(TensorRt, "check", reached)


def is_accepted(read: Callable[[], object]) -> bool:
    """Whether what is read is accepted; an error of ours, in one line, is a refusal."""
    try:
        read()
    except ReachedError:
        return True
    except TcDeployError as error:
        refusal = str(error)
    except Exception:
        COUNTS["tracebacks"] += 1
        raise
    else:
        return True
    if not refusal.isprintable():
        raise AssertionError(f"not one printable line: {refusal!r}")
    return False


def is_reached(bundle: Path, backend: str, **arguments: Any) -> bool:
    """Whether all that is read before an engine opens is accepted."""
    return is_accepted(lambda: tc_deploy.load(bundle, backend, **arguments))


def flip(path: Path, count: int, read: Callable[[], bool], seen: Callable[[], object] = lambda: None) -> int:
    """Alter bytes of a file one at a time, half of them spread evenly, half at random.

    Args:
        path: the file; it is as it was afterwards.
        count: how many.
        read: reads it, with all that belongs to it, and says whether it is accepted.
        seen: called where it was accepted, with the byte still altered.

    Returns:
        How many were accepted.
    """
    good, chance, accepted = path.read_bytes(), random.Random(path.name), 0
    even = [len(good) * number // (count // 2) for number in range(count // 2)]
    places = even + [chance.randrange(len(good)) for _ in range(count - len(even))]
    try:
        for place in places:
            mask = chance.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([good[place] ^ mask]))
            if read():
                accepted += 1
                seen()
            with path.open("r+b") as file:
                file.seek(place)
                file.write(good[place : place + 1])
    finally:
        path.write_bytes(good)
    COUNTS["flips"] += count
    COUNTS["flips accepted"] += accepted
    return accepted


def write_keys(folder: Path) -> tuple[Path, Path]:
    """A new signing key, private and public."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    start_s = time.monotonic()
    yield
    COUNTS["took_s"] += time.monotonic() - start_s
    if COUNTS["flips"] < 10_000:
        return
    counts = {
        "bytes altered, one at a time": COUNTS["flips"],
        "of these in notes or spaces of a document without a checksum, so accepted": COUNTS["flips accepted"],
        "attempts through generate": COUNTS["attempts"],
        "of these refused before an engine was given a file": COUNTS["refused"],
        "of these harmless, with the same picture": COUNTS["harmless"],
        "attempts through inspect, build and report": COUNTS["other"],
        "tracebacks": COUNTS["tracebacks"],
        "other pictures": COUNTS["other pictures"],
    }
    reliability.record("attacks", counts, took_s=COUNTS["took_s"])


@pytest.fixture(scope="module")
def bundle(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed.copy(tmp_path_factory.mktemp("flips") / "bundle")


@pytest.fixture(scope="module")
def rtx(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_rtx(mixed, tmp_path_factory.mktemp("flips-rtx"))[0].bundle


@pytest.mark.parametrize("name", BUNDLE)
def test_a_few_bytes_of_a_bundle(bundle: Path, name: str) -> None:
    assert is_reached(bundle, "onnxruntime")
    assert flip(bundle / name, QUICK_FLIPS, lambda: is_reached(bundle, "onnxruntime")) == 0


@pytest.mark.attacks
@pytest.mark.parametrize("name", BUNDLE)
def test_bytes_of_a_bundle(bundle: Path, name: str) -> None:
    assert flip(bundle / name, FLIPS, lambda: is_reached(bundle, "onnxruntime")) == 0


@pytest.mark.parametrize("count", [QUICK_FLIPS, pytest.param(FLIPS, marks=pytest.mark.attacks)])
@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_of_samples(bundle: Path, name: str, count: int) -> None:
    """Who reads a whole bundle, as inspect and validate do, refuses them; loading a target opens none of them."""

    def read() -> bool:
        return is_accepted(lambda: binding.read_bundle(bundle, "onnxruntime", whole=True))

    def loaded_or_whole() -> bool:
        assert is_reached(bundle, "onnxruntime")
        return read()

    assert read()
    assert flip(bundle / name, count, loaded_or_whole) == 0


@pytest.mark.parametrize("name", SAMPLES)
def test_an_altered_sample_is_refused_by_the_commands_that_read_it(mixed: Made, tmp_path: Path, name: str) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    private, public = write_keys(tmp_path)
    answer = run_cli("sign", bundle, "--key", private)
    assert answer.code == 0, answer.err
    commands = (("inspect", bundle), ("verify", bundle, "--key", public), ("validate", bundle))
    assert [run_cli(*words).code for words in commands[:2]] == [0, 0]
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    for words in commands:
        answer = run_cli(*words)
        assert answer.code == BundleError.exit_code, answer.err
        assert f"{bundle / name}: expected SHA-256" in answer.error


@pytest.fixture
def documents_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only a target is altered, the bundle's own documents are read once."""
    monkeypatch.setattr(binding, "read_documents", functools.cache(read_documents))


@pytest.mark.attacks
@pytest.mark.usefixtures("documents_once")
@pytest.mark.parametrize("name", RTX)
def test_bytes_of_an_engine_that_was_built_ahead(rtx: Path, name: str) -> None:
    path = rtx / "tensorrt-rtx" / name
    assert is_reached(rtx, "tensorrt-rtx")
    assert flip(path, FLIPS, lambda: is_reached(rtx, "tensorrt-rtx")) == 0


@pytest.mark.attacks
@pytest.mark.parametrize("prompted", ["pixart"], indirect=True)
def test_bytes_of_tokenizers_and_of_graphs_around_the_model(prompted: Prompted, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(prompted.bundle, tmp_path / "bundle"))
    assert is_reached(bundle, "onnxruntime")
    tokenizer = next((bundle / "tokenizers").iterdir())
    for name in (tokenizer.relative_to(bundle), *PROMPTED):
        assert flip(bundle / name, FLIPS, lambda: is_reached(bundle, "onnxruntime")) == 0


@pytest.mark.attacks
@pytest.mark.usefixtures("documents_once")
def test_bytes_of_a_target_s_manifest(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the root of what was built, so that a note in it may change; the picture does not."""
    path = bundle / "onnxruntime" / "manifest.json"
    good = path.read_bytes()
    before = json.loads(good)
    options: dict[str, bytes] = {}

    def seen() -> None:
        after = json.loads(path.read_text())
        assert {key for key in before if after[key] != before[key]} <= NOTES
        options[json.dumps(after["options"])] = path.read_bytes()

    flip(path, FLIPS, lambda: is_reached(bundle, "onnxruntime"), seen)
    monkeypatch.undo()
    images = []
    for document in (good, *options.values()):
        path.write_bytes(document)
        with tc_deploy.load(bundle, "onnxruntime") as pipeline:
            images.append(pipeline(class_labels=[1]).latents)
    path.write_bytes(good)
    for picture in images:
        COUNTS["other pictures"] += not np.array_equal(picture, images[0])
    assert COUNTS["other pictures"] == 0


@pytest.mark.attacks
@pytest.mark.usefixtures("documents_once")
def test_bytes_of_a_signature(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    private, public = write_keys(tmp_path)
    answer = run_cli("sign", bundle, "--key", private)
    assert answer.code == 0, answer.err
    path = bundle / SIGNATURE
    before = json.loads(path.read_text())

    def seen() -> None:
        after = json.loads(path.read_text())
        assert {key for key in before if after[key] != before[key]} <= {"made_by"}

    def read() -> bool:
        return is_reached(bundle, "onnxruntime", require_signature=public)

    assert read()
    flip(path, FLIPS, read, seen)
    assert flip(bundle / "onnxruntime" / "manifest.json", FLIPS, read) == 0


@pytest.mark.parametrize("count", [QUICK_FLIPS, pytest.param(FLIPS, marks=pytest.mark.attacks)])
def test_bytes_of_a_plan(tmp_path: Path, count: int) -> None:
    """A plan that was measured vouches for all that it does; what was measured, and where, are notes."""
    plan = Path(shutil.copytree(REPOSITORY / "calibration" / "digits", tmp_path / "plan"))
    path = plan / "plan.json"

    def read() -> bool:
        return is_accepted(lambda: load_plan(plan))

    def meaning() -> Any:
        document = json.loads(path.read_text())
        document["model"].pop("source")
        return document | {"measured": None}

    before = meaning()

    def seen() -> None:
        assert meaning() == before

    assert read()
    flip(path, count, read, seen)
    assert flip(plan / "tables.safetensors", count, read) == 0
