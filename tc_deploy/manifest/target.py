"""What a built target says of itself: ``engines/NAME/<backend>``, which holds what a backend made of a bundle.

In: its folder. Out: its manifest, and what is written down beside an engine that was built ahead of its use. Never:
opens an engine, or reads a file that no manifest names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from tc_deploy.bundle import MANIFEST, Document, Files, read_document, sha256_of_file
from tc_deploy.errors import BundleError
from tc_deploy.manifest.manifest import read_manifest
from tc_deploy.manifest.tensors import TensorRecord
from tc_deploy.plan import PLAN
from tc_deploy.precisions import precision_named

ENGINE_SUFFIX = ".engine"
"""Of an engine that is built ahead of its use; its :class:`EngineRecord` lies beside it, with ``.json``."""
KERNELS_SUFFIX = ".kernels"
"""Of what TensorRT-RTX compiles for an engine when it runs; it lies beside the engine, and in no manifest."""


class GpuRecord(Document):
    """The GPU that engines were built on, and for."""

    name: str
    compute_capability: str
    driver: str


class ProfileRecord(Document):
    """What an engine reads and writes under one of its optimization profiles."""

    graphs: tuple[str, ...] = Field(min_length=1)
    """The graphs that it runs then, by name: variants of equal sizes."""
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        """All of them."""
        return (*self.inputs, *self.outputs)


class EngineIdentity(Document):
    """What an engine that is built ahead of its use is made from: equal identities, interchangeable engines."""

    backend: str
    backend_version: str
    options: dict[str, Any]
    onnx_sha256: str
    weights_sha256: str
    profiles: tuple[ProfileRecord, ...] = Field(min_length=1)
    """In the engine's order."""
    axes: dict[str, tuple[PositiveInt, PositiveInt, PositiveInt]]
    """Least, best and largest size of each batch axis that is left open."""


class EngineRecord(EngineIdentity):
    """What the build of an engine found, kept beside it: without its GPU an engine cannot be looked into."""

    layers: PositiveInt
    build_s: float
    peak_memory_mib: PositiveInt
    """Largest resident memory of the process that built it."""
    warnings: tuple[str, ...]
    """What the builder warned of; its log holds the rest."""


class TargetManifest(Document):
    """What a backend made of a bundle."""

    kind: Literal["target"]
    format_version: Literal[3]
    made_by: str
    backend: str
    backend_version: str
    options: dict[str, Any]
    precision: str
    gpu: GpuRecord | None
    """None where the build used none."""
    plan_sha256: str
    manifest_sha256: str
    """Of the bundle's manifest, which names every graph and table: a target of another bundle is found out by it."""
    reads: Files
    """What of the bundle is read when the engines are loaded, by path inside it: the rest may be altered or gone."""
    files: Files
    """What lies in the target."""

    @property
    def computes_in(self) -> str:
        """The precision of matrix products, by the name that graphs have for theirs."""
        return precision_named(str(self.options.get("precision", self.precision)))

    @property
    def options_in_words(self) -> str:
        """What it was built with, asked for or not, less the precision, which is always said."""
        said = {name: value for name, value in self.options.items() if name != "precision"}
        if said.get("threads") == 0:
            said["threads"] = "all"
        words = [
            f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            for name, value in sorted(said.items())
        ]
        return ", ".join(words) or "no options"


def read_target(bundle: Path, backend: str) -> TargetManifest:
    """Read a target's manifest and check that it was built from this very bundle.

    Raises:
        BundleError: there is none, or it was built from another plan or export.
    """
    rebuild = f"tc-deploy build {bundle} --backend {backend}"
    target = read_document(TargetManifest, bundle / backend / MANIFEST, "engine", rebuild)
    if target.backend != backend:
        raise BundleError(f"{bundle / backend}: holds engines of {target.backend}; build again with: {rebuild}")
    manifest = read_manifest(bundle)
    same_plan = target.plan_sha256 == manifest.files[PLAN].sha256
    if not same_plan or target.manifest_sha256 != sha256_of_file(bundle / MANIFEST):
        what = "another export of this bundle" if same_plan else "another plan"
        raise BundleError(f"{bundle / backend}: built from {what}; build again with: {rebuild}")
    other = sorted(name for name, record in target.reads.items() if manifest.files.get(name) != record)
    if other:
        raise BundleError(
            f"{bundle / backend}: reads another {other[0]} than the bundle has; build again with: {rebuild}"
        )
    return target


def read_engine_record(engine: Path) -> EngineRecord:
    """Read what was written down about an engine when it was built.

    Raises:
        BundleError: nothing readable lies beside it.
    """
    return read_document(EngineRecord, engine.with_suffix(".json"), "engine record", "tc-deploy build")
