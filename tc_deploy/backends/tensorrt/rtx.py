"""What loading has in TensorRT-RTX and not in TensorRT: a verdict on an engine beforehand, and a cache of kernels.

A TensorRT-RTX engine is finished on the GPU that it runs on: kernels are compiled when its context is made and when it
first runs. They are kept beside the engine, ``NAME.kernels``, so that the next process need not compile them again.
That file is no part of the target: it is made where the engine runs, and a folder that cannot be written has none. It
begins with a checksum over itself and its engine; one that does not fit is left unread. TensorRT-RTX itself compares
version, GPU and driver. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from pathlib import Path
from typing import Any

from tc_deploy.bundle import sha256_of_file, write_bytes
from tc_deploy.errors import BackendError, StorageError
from tc_deploy.manifest import KERNELS_SUFFIX

_DIGEST_BYTES = hashlib.sha256().digest_size


class RtxExtras:
    """The two, over the Python module ``tensorrt_rtx``."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def check(self, path: Path, runtime: Any, plan: bytes) -> None:
        """Ask the runtime what it thinks of an engine, by its header alone.

        Raises:
            BackendError: it would not run here; says why.
        """
        verdict, reasons = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if verdict != self._module.EngineValidity.INVALID:
            return
        members = self._module.EngineInvalidityDiagnostics.__members__.items()
        found = [name.lower().replace("_", " ") for name, member in members if int(reasons) & int(member)]
        raise BackendError(
            f"{path}: tensorrt-rtx says that the engine cannot run here: {', '.join(found) or 'it gives no reason'};"
            f" build again with: tc-deploy build {path.parent.parent} --backend tensorrt-rtx"
        )

    def context(self, path: Path, engine: Any, *, captured: bool) -> Any:
        """An execution context that begins with the kernels of earlier processes, and leaves its own behind.

        Args:
            path: of the engine.
            engine: as deserialised.
            captured: its runs will be: kernels for their shapes are compiled at once, for one that came later, in the
                place of a general one, would not be in a graph that is captured already.

        Returns:
            The context, without scratch memory; None where there is no memory for it.
        """
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if captured:
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
        kernels = config.create_runtime_cache()
        file, salt = path.with_suffix(KERNELS_SUFFIX), sha256_of_file(path).encode()
        known = _sealed(file, salt)
        if known is not None:
            kernels.deserialize(known)  # False where they are of another machine: then it begins anew
        config.set_runtime_cache(kernels)
        context = engine.create_execution_context(config)
        if context is not None:
            # At the end, when all that ran has been compiled; the engine stays until then.
            weakref.finalize(context, _keep, file, salt, kernels, known, engine)
        return context


def _digest(salt: bytes, kernels: bytes) -> bytes:
    return hashlib.sha256(salt + kernels).digest()


def _sealed(file: Path, salt: bytes) -> bytes | None:
    """What :func:`_keep` wrote there, for that engine; None where it did not."""
    with contextlib.suppress(OSError):
        data = file.read_bytes()
        if data[:_DIGEST_BYTES] == _digest(salt, data[_DIGEST_BYTES:]):
            return data[_DIGEST_BYTES:]
    return None


def _keep(file: Path, salt: bytes, kernels: Any, known: bytes | None, engine: Any) -> None:  # noqa: ARG001 - held
    data = bytes(kernels.serialize())
    # The folder may be gone, replaced by another build, or not ours to write.
    if data != known and file.parent.is_dir():
        with contextlib.suppress(StorageError):
            write_bytes(file, _digest(salt, data) + data)
