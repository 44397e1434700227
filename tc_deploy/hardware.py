"""The machine: processor, memory, GPUs. Numbers are printed with it, and the doctor judges by it.

Never: imports torch or an engine, or guesses: what cannot be found out is None or says why.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tc_deploy.errors import OutOfMemoryError

DRIVER_TIMEOUT_S = 20.0
"""nvidia-smi can hang on a broken driver; it answers in a few seconds on a sound one, even with many GPUs."""
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
"""What decides a CPU engine's speed, by Linux's names."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as the driver names it."""

    name: str
    driver: str
    memory_mib: int | None
    compute_capability: str


def hardware_line() -> str:
    """The machine in one line, to stand beside a measurement."""
    memory = memory_mib()
    gpus, _ = nvidia_gpus()
    parts = [f"{cpu_and_features()[0]}, {usable_cores()} cores"]
    parts += [] if memory is None else [f"{memory / 1024:.0f} GiB"]
    return ", ".join([*parts, *(gpu.name for gpu in gpus)])


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_and_features() -> tuple[str, tuple[str, ...]]:
    """The CPU's name and the features of it that matter."""
    name = platform.processor() or platform.machine()
    features: tuple[str, ...] = ()
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        name = fields.get("model name", name)
        found = set(fields.get("flags", fields.get("Features", "")).split())
        features = tuple(feature for feature in CPU_FEATURES if feature in found)
    return name, features


def memory_mib() -> int | None:
    """Memory of the machine or of its container, whichever is less; None where the system does not say."""
    sizes = []
    with contextlib.suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(sizes) // 2**20 if sizes else None


def check_fits_memory(size_bytes: int, what: str) -> None:
    """Check, before it is asked for, that memory can be had: the system would promise it, and kill the process later.

    Args:
        size_bytes: at least so much is needed.
        what: what for, as the beginning of the message.

    Raises:
        OutOfMemoryError: the machine has less.
    """
    memory = memory_mib()
    if memory is not None and size_bytes > memory * 2**20:
        raise OutOfMemoryError(
            f"{what} would take {size_bytes / 2**30:,.1f} GiB of memory, and this machine has {memory / 2**10:,.1f}"
        )


def peak_memory_mib() -> int:
    """The largest resident memory of this process so far.

    Linux counts its parent's into ``ru_maxrss``, so the figure of the process alone comes from ``/proc``.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if platform.system() == "Darwin" else 2**10)


def nvidia_gpus() -> tuple[tuple[Gpu, ...], str]:
    """The NVIDIA GPUs, and why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        driver = Path("/proc/driver/nvidia/version").exists()
        return (), "an NVIDIA driver is loaded, but nvidia-smi is not found" if driver else "no NVIDIA driver found"
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        answer = subprocess.run(  # noqa: S603 - no shell, nothing of the user's in the arguments
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=DRIVER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {DRIVER_TIMEOUT_S:.0f} s"
    except OSError as error:
        return (), f"nvidia-smi cannot be run: {error.strerror}"
    if answer.returncode != 0:
        said = " ".join((answer.stdout or answer.stderr).split())
        return (), f"nvidia-smi failed: {said or f'exit code {answer.returncode}'}"
    gpus = tuple(_gpu_from_line(line) for line in answer.stdout.splitlines() if line.count(",") >= 3)
    return gpus, "" if gpus else "the NVIDIA driver found no GPU"


def _gpu_from_line(line: str) -> Gpu:
    name, driver, memory, capability = (part.strip() for part in line.rsplit(",", 3))
    return Gpu(
        name=name,
        driver=driver,
        memory_mib=int(memory) if memory.isdecimal() else None,
        compute_capability=capability,
    )
