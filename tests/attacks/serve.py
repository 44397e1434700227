"""Command lines in children of one process, with little memory: ``python serve.py EXTRA_BYTES``.

In: a line of JSON with the words of a command line. Out: a line of JSON with its exit code, what it printed, the files
that an engine was given, and how far memory grew. Python and the libraries are imported once, so that a command takes
a fraction of a second; a child may map so many bytes more than its parent.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

os.environ["OPENVINO_TELEMETRY"] = "0"

import numpy as np  # noqa: F401 - imported before the fork, as all that follows
import onnxruntime  # noqa: F401
import openvino  # noqa: F401
import PIL.Image  # noqa: F401
import safetensors.numpy  # noqa: F401
import tokenizers  # noqa: F401

from tc_deploy import cli
from tc_deploy.backends.onnxruntime.run import OrtDevice
from tc_deploy.backends.openvino.run import OpenVinoDevice
from tc_deploy.backends.tensorrt.run import TrtDevice

OPENED: list[str] = []
"""Files that were handed to an engine."""


def watch(kind: Any) -> None:
    """Write down what a device is told to load."""
    load = kind.load

    def watched(self: Any, path: Path) -> Any:
        OPENED.append(str(path))
        return load(self, path)

    kind.load = watched


def mapped_bytes() -> int:
    """What this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def answer(words: list[str], extra_bytes: int) -> dict[str, Any]:
    """Run a command line in this process."""
    most = mapped_bytes() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout, sys.stderr = out, err = io.StringIO(), io.StringIO()
    code = cli.main(words)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "opened": OPENED, "grown_mib": grown_mib}


def main() -> None:
    """Serve until the input ends."""
    for kind in (OrtDevice, OpenVinoDevice, TrtDevice):
        watch(kind)
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                found = answer(json.loads(line), int(sys.argv[1]))
            except BaseException as error:  # noqa: BLE001 - a traceback is a finding, whatever it is of
                found = {"code": -1, "out": "", "err": f"Traceback: {error!r}", "opened": OPENED, "grown_mib": 0}
            with os.fdopen(write, "w") as pipe:
                json.dump(found, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        killed = {"code": -os.WTERMSIG(status), "out": "", "err": "killed", "opened": ["?"], "grown_mib": 0}
        print(text or json.dumps(killed), flush=True)


if __name__ == "__main__":
    main()
