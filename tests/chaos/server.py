"""A process that has imported everything once and forks a child for each command: a kill costs no start of PyTorch.

In: one JSON request a line. Out: one JSON answer a line. The children run the command line as it is; what watches them
is an audit hook, so production code knows nothing of it. Never: runs a model or an engine itself, for their threads
would not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

IMPORTED_ONCE = (
    *("tc_deploy.cli.program", "tc_deploy.cli.failure"),
    *(f"tc_deploy.cli.{name}" for name in ("build", "calibrate", "export", "generate", "inspect", "plan", "report")),
    *(
        "tc_deploy.calibrate.calibration",
        "tc_deploy.export.bundle_export",
        "tc_deploy.search.plan_search",
        "tc_deploy.report.page",
    ),
    *("tc_deploy.backends.build", "tc_deploy.runtime.pipeline", "tc_deploy.backends.onnxruntime.run"),
    *("torch.export", "torch._dynamo", "torch._export.utils", "torch.onnx._internal.exporter._core"),
    *("diffusers", "diffusers.models.transformers.dit_transformer_2d", "diffusers.schedulers", "safetensors.torch"),
    *("jinja2", "onnxscript", "polygraphy.json", "PIL.PngImagePlugin", "rich.progress"),
    *("torchmetrics.functional.image", "torch.utils.flop_counter"),
)
WRITERS = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1}
"""Python's audit events of calls that change a folder, with the number of paths that come first."""
LOCKERS = {"fcntl.flock", "fcntl.lockf"}
LIMITS = {"as": resource.RLIMIT_AS, "nofile": resource.RLIMIT_NOFILE, "fsize": resource.RLIMIT_FSIZE}


def _path(value: Any, folder: int) -> str:
    """A path as an audit event names it: text, bytes, a descriptor, or a name in an open folder."""
    if isinstance(value, int):
        value, folder = f"/proc/self/fd/{value}", -1
    text = os.fsdecode(value)
    if folder >= 0:
        text = f"/proc/self/fd/{folder}/{text}"
    path = Path(text)  # its last part is not followed: that is what changes
    return f"{os.path.realpath(path.parent)}/{path.name}"


def write_points(below: str, reached: Callable[[str, str], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that tells of every call, before it happens, by which something below a folder changes."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if flags & writing and path is not None else []
            folder = -1
        elif event in WRITERS:
            count = WRITERS[event]
            paths = list(arguments[:count])
            rest = [value for value in arguments[count:] if isinstance(value, int)]
            folder = rest[-1] if event != "os.truncate" and rest else -1
        elif event in LOCKERS:
            paths, folder = [arguments[0] if isinstance(arguments[0], int) else arguments[0].fileno()], -1
        else:
            return
        for path in paths:
            name = str(Path(f"/proc/self/fd/{path}").readlink()) if isinstance(path, int) else _path(path, folder)
            if name.startswith(below):
                reached(event, name[len(below) :])
                return

    return hook


def _become(request: dict[str, Any]) -> None:
    """Be the process that a shell would have started."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        descriptor = os.open(name, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ["TMPDIR"] = tempfile.tempdir = request["temporary"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    log = os.open(request["events"], os.O_WRONLY)
    seen = 0

    def reached(event: str, name: str) -> None:
        nonlocal seen
        seen += 1
        os.write(log, f"{event} {name}\n".encode(errors="replace"))
        if seen == request["stop_at"]:
            os.kill(os.getpid(), request["signal"])

    taken = {
        "as": int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"),
        "nofile": max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()),
    }
    for name, value in request["limits"].items():
        resource.setrlimit(LIMITS[name], (taken.get(name, 0) + value, resource.getrlimit(LIMITS[name])[1]))
    sys.addaudithook(write_points(os.path.realpath(request["folder"]) + "/", reached))


def _end(code: int) -> NoReturn:
    """End as Python does, but for the destruction of every module, which takes a forked child seconds."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> int:
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    from tc_deploy.cli import main as command_line

    # A child's collector would write to, and so copy, every page of what was imported.
    gc.collect()
    gc.freeze()
    threads = len(list(Path("/proc/self/task").iterdir()))
    answer: dict[str, Any] = {"ready": threads}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return 0
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                _become(request)
                _end(command_line(request["words"]))
            answer = {"pid": pid}
        else:
            answer = _waited(request["pid"], request["timeout_s"])


def _waited(pid: int, timeout_s: float) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"code": os.waitstatus_to_exitcode(status)}
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"code": None}


if __name__ == "__main__":
    sys.exit(main())
