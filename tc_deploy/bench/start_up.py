"""What a fresh process costs that imports tc-deploy, loads a bundle and runs: time to the first step, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tc_deploy.errors import BackendError

_PROGRAM = """
import json, sys, time
start_s = time.perf_counter()
import tc_deploy
pipeline = tc_deploy.load(sys.argv[1], sys.argv[2], batch_size=int(sys.argv[3]))
loaded_s = time.perf_counter()
steps = iter(pipeline.steps(**pipeline.placeholders(pipeline.batch_size)))
next(steps).read_latents()
done_s = time.perf_counter()
for step in steps:
    pass
# Not getrusage: its peak is inherited from the process that started this one.
with open("/proc/self/status") as file:
    status = dict(line.split(":", 1) for line in file)
print(json.dumps({
    "load_s": loaded_s - start_s,
    "first_step_s": done_s - start_s,
    "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
    "peak_mib": int(status["VmHWM"].split()[0]) / 1024,
    "torch_imported": "torch" in sys.modules,
}))
"""


def start_up(path: Path, backend: str, batch_size: int) -> dict[str, Any]:
    """Start a process that loads a bundle and makes one run.

    Returns:
        ``load_s`` and ``first_step_s`` since its first line, ``resident_mib`` after the run, ``peak_mib``, and whether
        torch was imported.

    Raises:
        BackendError: the process failed.
    """
    command = [sys.executable, "-c", _PROGRAM, str(path), backend, str(batch_size)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise BackendError(f"{path}: a fresh process cannot run it: {said[-1]}")
    found: dict[str, Any] = json.loads(answer.stdout)
    return found
