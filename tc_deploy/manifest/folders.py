"""The folders that bundles and targets are: what this tool wrote there, as their manifests tell.

In: a folder. Out: the names of what is ours in it. Never: reads a file but the documents, or removes one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tc_deploy.bundle import (
    MANIFEST,
    Earlier,
    FolderKind,
    NotOursError,
    canonical_json,
    file_names,
    known_document,
)
from tc_deploy.manifest.manifest import POLYGRAPHY, SIGNATURE, Manifest
from tc_deploy.manifest.target import ENGINE_SUFFIX, KERNELS_SUFFIX, TargetManifest

_FILES = frozenset({"kind", "format_version", "made_by", "files"})
_KEYS = _FILES | {"precision", "batch_size", "latent_shape", "pixels", "conditions", "solver", "graphs"}
_OPTIONAL = frozenset({"fp32_blocks", "decoder", "text"})
_EARLIER = {
    1: Earlier(required=_KEYS, optional=_OPTIONAL),
    2: Earlier(required=_KEYS | {"plan_sha256"}, optional=_OPTIONAL | {"sampled_on"}),
}
_TARGET_KEYS = _FILES | {
    *("backend", "backend_version", "options", "precision", "gpu", "plan_sha256", "manifest_sha256")
}
_EARLIER_TARGETS = {version: Earlier(required=_TARGET_KEYS) for version in (1, 2)}
_SIGNATURES = {1: Earlier(required=frozenset({"kind", "format_version", "made_by", "signs", "signature"}))}


def _target_names(folder: Path) -> Iterator[str]:
    """The files of a target.

    Raises:
        NotOursError: it is none.
    """
    names = file_names(known_document(folder / MANIFEST, "target", TargetManifest, _EARLIER_TARGETS)["files"])
    yield from names
    yield from (name.removesuffix(ENGINE_SUFFIX) + KERNELS_SUFFIX for name in names if name.endswith(ENGINE_SUFFIX))
    yield MANIFEST


def _bundle_names(folder: Path) -> Iterator[str]:
    """The files of a bundle and of the targets in it; Python leaves a compiled script where polygraphy ran one.

    Raises:
        NotOursError: it is none.
    """
    names = file_names(known_document(folder / MANIFEST, "bundle", Manifest, _EARLIER)["files"])
    for target in sorted(folder.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(NotOursError):
            if not target.parent.is_symlink():
                yield from (f"{target.parent.name}/{name}" for name in _target_names(target.parent))
    with contextlib.suppress(NotOursError):
        known_document(folder / SIGNATURE, "signature", None, _SIGNATURES)
        yield SIGNATURE
    yield from names
    yield from (f"{POLYGRAPHY}/__pycache__/{path.name}" for path in (folder / POLYGRAPHY).glob("__pycache__/*.pyc"))
    yield MANIFEST


TARGET_FOLDER: Final = FolderKind(name="a target", marker=MANIFEST, names=_target_names, is_inner=True)
BUNDLE_FOLDER: Final = FolderKind(name="a bundle", marker=MANIFEST, names=_bundle_names, inner=TARGET_FOLDER)


def write_manifest(manifest: Manifest | TargetManifest, folder: Path) -> None:
    """Write a manifest into a folder that is being made; call it last."""
    (folder / MANIFEST).write_text(canonical_json(manifest.model_dump(mode="json")), encoding="utf-8")
