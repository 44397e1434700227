"""Libraries that not every machine has: import one, or say what keeps it away and what to install.

In: a module's name. Out: the module, or one line. The line names requirements, read from this package's own metadata:
that works from a wheel, from a clone, and whatever the package is called in an index. Never: installs anything.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import re
import sys
from types import TracebackType
from typing import Any

from tc_deploy.errors import BackendError, causes, first_line

DISTRIBUTION = "tc-deploy"
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
EXTRA_BY_MODULE = {
    "accelerate": "compile",
    "diffusers": "compile",
    "onnx": "compile",
    "onnx_ir": "compile",
    "onnxscript": "compile",
    "torch": "compile",
    "torchmetrics": "compile",
    "transformers": "compile",
    "onnxruntime": "cpu",
    "cuda": "rtx",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "openvino": "openvino",
    "ml_dtypes": "openvino",
    "tokenizers": "text",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "ray": "ray",
    "jinja2": "report",
    "polygraphy": "validate",
    "cryptography": "sign",
    "cache_dit": "peers",
    "matplotlib": "examples",
    "sklearn": "examples",
}
"""The extra of tc-deploy that brings a library, by the name under which Python imports it."""

_ALONE = {"cuda": "cuda-bindings", "ml_dtypes": "ml-dtypes"}
"""Libraries that several extras bring, with the distribution that is enough."""
NVIDIA_INDEX = " --extra-index-url https://pypi.nvidia.com"
"""What pip needs beside the extra ``tensorrt``, whose wheels are not on PyPI."""

_OF_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")


_TELEMETRY = {"openvino": "openvino_telemetry"}
"""A library's optional part that reports its use over the network, from a forked child, when the library is imported:
a machine that serves pictures does neither unasked. Whoever imports the library before us is not interfered with."""
_REPORTS = {"ray": "RAY_USAGE_STATS_ENABLED"}
"""The variable by which a library is told not to; a user's own word stays."""


def requirements_of(extra: str) -> list[str]:
    """What an extra requires, as pip takes it; empty where the installed metadata does not know the extra."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except (importlib.metadata.PackageNotFoundError, OSError):  # what kept the library away may keep these away too
        return []
    found = []
    for requirement in declared:
        what, _, marker = requirement.partition(";")
        if (of := _OF_EXTRA.search(marker)) is not None and of[1] == extra:
            found.append(what.strip())
    return found


def install_command(extra: str, alone: str | None = None) -> str:
    """The command that installs what an extra brings, or one distribution of it ``alone``.

    Only a clone can lack the metadata, or have older ones; there pip reads pyproject.toml.
    """
    index = NVIDIA_INDEX if extra == "tensorrt" else ""
    if names := [name for name in requirements_of(extra) if alone is None or name.startswith(alone)]:
        return "pip install " + " ".join(f"'{name}'" for name in names) + index
    return f"pip install '.[{extra}]'{index} (in the clone)"


def imported(module: str, *, purpose: str = "") -> Any:
    """Import a library that may be missing.

    Args:
        module: its name for Python, with dots for a part of it; :data:`EXTRA_BY_MODULE` has the library.
        purpose: what it is for, as the beginning of the message.

    Raises:
        BackendError: it is not installed, or does not load; names the cause and the command.
    """
    keep_silent(module)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise BackendError(f"{purpose}{import_failure(module, error)}") from error


def keep_silent(module: str) -> None:
    """Keep a library that is about to be imported from reporting its use over the network."""
    library = module.partition(".")[0]
    if library in _REPORTS:
        os.environ.setdefault(_REPORTS[library], "0")
    telemetry = _TELEMETRY.get(library)
    if telemetry is not None:
        sys.modules.setdefault(telemetry, None)  # type: ignore[arg-type]  # None is Python's word for: not to be had


def import_failure(module: str, error: BaseException) -> str:
    """What keeps a library away, and what to install."""
    library = module.partition(".")[0]
    command = install_command(EXTRA_BY_MODULE[library], _ALONE.get(library))
    if is_missing(module, error):
        return f"{library} is not installed: {command}"
    short = any(
        isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _SHORT)
        for cause in causes(error)
    )
    cure = "give the process more memory and files (ulimit -v, -n)" if short else f"install it again: {command}"
    return f"{library} is installed but does not load: {_root_cause(error)}; {cure}"


def is_missing(module: str, error: BaseException) -> bool:
    """Whether an import failed because there is no such library, and not because of what it wants in turn."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return False
    return f"{module}.".startswith(f"{error.name}.")


def load_failure(error: BaseException) -> str | None:
    """The same for an error from anywhere in our code that an import ended in; None where it comes from elsewhere.

    Libraries import parts of themselves when they are first used, so the traceback is looked at: it ends in a module's
    own lines, below a library that ours called.
    """
    library = _importing_library(error)
    if library is None and isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
    if library not in EXTRA_BY_MODULE:
        return None
    return import_failure(library, error)


def _importing_library(error: BaseException) -> str | None:
    found = None
    for cause in causes(error):
        found = _first_library(cause.__traceback__) or found
    return found


def _first_library(traceback: TracebackType | None) -> str | None:
    """The library of an extra below our last frame in a traceback, if it was importing something there."""
    names: list[tuple[str, bool]] = []
    while traceback is not None:
        frame = traceback.tb_frame
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] == __package__:
            names.clear()
        elif "importlib" not in name:
            names.append((name.partition(".")[0], frame.f_code.co_name == "<module>"))
        traceback = traceback.tb_next
    known = (name for name, _ in names if name in EXTRA_BY_MODULE)  # safetensors imports torch, say
    return next(known, None) if any(importing for _, importing in names) else None


def _root_cause(error: BaseException) -> str:
    *_, root = causes(error, contexts=False)
    return f"{type(root).__name__}: {first_line(root)}"
