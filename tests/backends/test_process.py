"""Engines in a process that was forked off one with engines: refused at once, where they would hang."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bundles import Made

from tc_deploy.backends.build import build_target

FORKS = """
import os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of a fork with threads
import tc_deploy
path, backend, when = sys.argv[1:]
if when == "new":
    tc_deploy.load(path, backend)
if when in ("old", "new"):
    pipeline = tc_deploy.load(path, backend)
    pipeline(class_labels=[1])
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        if when != "old":
            pipeline = tc_deploy.load(path, backend)
        pipeline(class_labels=[1])
        print("ran", flush=True)
    except tc_deploy.errors.BackendError as error:
        print(error, flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("when", ["old", "new", "child alone"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_after_a_fork(mixed: Made, tmp_path_factory: pytest.TempPathFactory, backend: str, when: str) -> None:
    pytest.importorskip(backend, reason=f"needs {backend}")
    bundle = mixed.copy(tmp_path_factory.mktemp("fork") / "bundle")
    build_target(bundle, backend, {"threads": 2})
    words = [sys.executable, "-c", "import tc_deploy.errors" + FORKS, str(bundle), backend, when]
    answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    if when == "child alone":
        assert answer.stdout == "ran\n"
    else:
        assert answer.stdout.startswith("this process was forked off process ")
        assert "spawn" in answer.stdout
