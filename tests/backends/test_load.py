"""What loading a target reads: what it names, whose checksums are compared, and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends.gpu_stand_in import StandInCudaRuntime
from backends.tensorrt_stand_in import NAME, stand_in
from bundles import Made, edit_manifest

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.build import build_target
from tc_deploy.bundle import MANIFEST
from tc_deploy.errors import BundleError
from tc_deploy.manifest import ONNX_FOLDER, POLYGRAPHY, WEIGHTS, read_manifest, read_target

DOCUMENTS = {MANIFEST, "plan.json", "tables.safetensors", "runtime.safetensors"}
_OPENED: list[str] = []
_WATCHING: list[bool] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _WATCHING and isinstance(arguments[0], str | bytes):
        _OPENED.append(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that this process opens meanwhile; an audit hook cannot be taken away again, so it is told to sleep."""
    if not hasattr(sys, "_tc_deploy_notes_opens"):
        sys.addaudithook(_note)
        sys._tc_deploy_notes_opens = True  # type: ignore[attr-defined]
    _OPENED.clear()
    _WATCHING.append(True)
    yield _OPENED
    _WATCHING.clear()


def inside(bundle: Path, opened: list[str]) -> set[str]:
    """Those in a bundle, but for locks."""
    paths = {Path(path).resolve() for path in opened}
    names = {path.relative_to(bundle.resolve()).as_posix() for path in paths if path.is_relative_to(bundle.resolve())}
    return {name for name in names if ".tc-deploy" not in name and (bundle / name).is_file()}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_of_a_bundle_the_documents_and_what_the_target_names_are_opened(
    mixed: Made, tmp_path: Path, backend: str, opened: list[str]
) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    build_target(bundle, backend)
    reads = read_target(bundle, backend).reads
    graphs = {graph.file for graph in read_manifest(bundle).graphs.values()}
    assert reads.keys() == graphs | {f"{ONNX_FOLDER}/{WEIGHTS}"}
    shutil.rmtree(bundle / POLYGRAPHY)
    opened.clear()
    tc_deploy.load(bundle, backend).close()
    assert inside(bundle, opened) == DOCUMENTS | {f"{backend}/{MANIFEST}"} | reads.keys()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", [f"{ONNX_FOLDER}/{WEIGHTS}", f"{ONNX_FOLDER}/solver.onnx"])
def test_what_a_target_names_must_be_as_it_was(mixed: Made, tmp_path: Path, backend: str, name: str) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    build_target(bundle, backend)
    damage(bundle / name)
    with pytest.raises(BundleError, match=f"{name}: expected SHA-256 .* the file was altered"):
        tc_deploy.load(bundle, backend)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        tc_deploy.load(bundle, backend)


def test_an_engine_needs_no_graph_and_no_weights(
    built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    bundle = built.copy(tmp_path / "bundle")
    # The engines that stand in for it compute with another copy of the graphs.
    stand_in(built.bundle, StandInCudaRuntime(), monkeypatch)
    target = read_target(bundle, NAME)
    assert target.reads == {}
    opened.clear()
    tc_deploy.load(bundle, NAME).close()
    found = inside(bundle, opened)
    assert not {name for name in found if name.startswith((ONNX_FOLDER, POLYGRAPHY))}
    assert DOCUMENTS | {f"{NAME}/full.engine", f"{NAME}/{MANIFEST}"} <= found
    damage(bundle / ONNX_FOLDER / WEIGHTS)
    tc_deploy.load(bundle, NAME).close()
    shutil.rmtree(bundle / ONNX_FOLDER)
    tc_deploy.load(bundle, NAME).close()


def test_an_engine_without_weights_names_where_they_are(built: Made) -> None:
    engine, manifest = registry.backend("tensorrt"), read_manifest(built.bundle)
    own = set(engine.reads(manifest, {}))
    assert not {name for name in own if not name.startswith("tensorrt/")}
    more = set(engine.reads(manifest, {"strip_weights": True})) - own
    assert more == {*manifest.graphs_by_file(), f"{ONNX_FOLDER}/{WEIGHTS}"}


def test_what_an_engine_reads_must_have_a_checksum_that_is_the_bundle_s(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    build_target(bundle)
    before = (bundle / "onnxruntime" / MANIFEST).read_text()
    edit_manifest(bundle / "onnxruntime", lambda target: target["reads"].pop("onnx/solver.onnx"))
    with pytest.raises(BundleError, match=r"no checksum for onnx/solver\.onnx, so it is not read; build again"):
        tc_deploy.load(bundle)
    document = json.loads(before)
    document["reads"]["onnx/solver.onnx"]["sha256"] = "0" * 64
    (bundle / "onnxruntime" / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"reads another onnx/solver\.onnx than the bundle has; build again with: "):
        tc_deploy.load(bundle)
