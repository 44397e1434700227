"""Build: a bundle to a target ``engines/NAME/<backend>``.

In: a checked bundle. Out: a folder with what the backend made and its manifest, written last: it names every file with
its checksum, and what the engines were made from and for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.backends.base import Progress
from tc_deploy.backends.process import check_process
from tc_deploy.bundle import MANIFEST, claimed, file_records, kept_from_writers, reading, sha256_of_file
from tc_deploy.consistency import read_documents
from tc_deploy.manifest import (
    BUNDLE_FOLDER,
    FORMAT_VERSION,
    TARGET_FOLDER,
    TargetManifest,
    read_manifest,
    write_manifest,
)
from tc_deploy.plan import PLAN
from tc_deploy.remarks import warn_of_plan


def build_target(
    bundle: Path,
    backend: str = registry.DEFAULT,
    options: Mapping[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> TargetManifest:
    """Build a bundle's graphs for one backend.

    Args:
        bundle: ``engines/NAME``.
        backend: the engine kind.
        options: its settings, by the names that its file gives them.
        progress: told what is being done, and how far it is.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        UsageError: there is no such backend, or it refuses an option.
        BackendError: the engine is not installed, refuses a graph, or computes numbers that are not finite.
        StorageError: the target cannot be written, something else is in its place, or another process is writing the
            bundle or the target.
    """
    engine = registry.backend(backend)
    check_process()
    version = engine.version()
    options = engine.settled(options or {})
    with reading(bundle, BUNDLE_FOLDER):  # which puts right what a process left that died while it replaced the bundle
        read_manifest(bundle)
    with kept_from_writers(bundle), claimed(bundle / backend, TARGET_FOLDER) as claim, claim.new_folder() as folder:
        documents = read_documents(bundle)
        manifest = documents.manifest
        warn_of_plan(documents.plan, bundle)
        gpu = engine.build(bundle, manifest, folder, options, progress)
        target = TargetManifest(
            kind="target",
            format_version=FORMAT_VERSION,
            made_by=f"tc-deploy {__version__}",
            backend=backend,
            backend_version=version,
            options=options,
            precision=manifest.precision,
            gpu=gpu,
            plan_sha256=manifest.files[PLAN].sha256,
            manifest_sha256=sha256_of_file(bundle / MANIFEST),
            reads={name: manifest.files[name] for name in engine.reads(manifest, options) if name in manifest.files},
            files=file_records(folder, sorted(path.name for path in folder.iterdir())),
        )
        write_manifest(target, folder)
    return target
