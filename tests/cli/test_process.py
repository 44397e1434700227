"""The command line as a process: its streams, the signals that end it, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundles import Made, edit_resealed

from tc_deploy import errors
from tc_deploy.backends.build import build_target
from tc_deploy.plan import PLAN

PROGRAM = (sys.executable, "-m", "tc_deploy")
FULL = Path("/dev/full")


def shell(redirection: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line with streams as a shell opens and closes them."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *PROGRAM, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        errors="replace",
        env=os.environ | environment,
    )


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("words", [("--version",), ("inspect", "PLAN")])
@pytest.mark.parametrize(("redirection", "why"), [(">&-", "is closed"), (f">{FULL}", "No space left on device")])
def test_output_that_is_lost_is_an_error(mixed: Made, words: tuple[str, ...], redirection: str, why: str) -> None:
    if not FULL.exists():
        pytest.skip("needs /dev/full")
    answer = shell(redirection, *(str(mixed.plan) if word == "PLAN" else word for word in words))
    assert answer.returncode == errors.StorageError.exit_code
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: standard output ")
    assert why in line


@pytest.mark.parametrize("redirection", [f"2>{FULL}", "<&- 2>&-"])
def test_the_exit_code_does_without_the_other_streams(tmp_path: Path, redirection: str) -> None:
    assert shell(redirection, "--version").returncode == 0
    assert shell(redirection, "inspect", tmp_path).returncode == errors.BundleError.exit_code


def test_a_closed_stream_s_number_goes_to_no_file(mixed: Made, tmp_path: Path) -> None:
    output = tmp_path / "latents.npy"
    words = ("generate", mixed.bundle, "--class-label", 1, "-o", output)
    assert shell("2>&- <&-", *words).returncode == 0
    assert output.read_bytes().startswith(b"\x93NUMPY")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_an_encoding_that_lacks_a_character(mixed: Made, tmp_path: Path, environment: dict[str, str]) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    edit_resealed(bundle, PLAN, lambda plan: plan["model"].update(source="../\N{CAT FACE}"))
    answer = shell("", "inspect", bundle, **environment)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "PyTorch" in answer.stdout


# -------------------------------------------------------------------------------------------------------------- limits

LIMITED = """
import resource, sys
from tc_deploy.cli import main
limit, more = getattr(resource, sys.argv.pop(1)), int(sys.argv.pop(1))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if limit == resource.RLIMIT_AS else 3
resource.setrlimit(limit, (taken + more, taken + more))
sys.exit(main())
"""
"""The command line's door is there, and from then on the process may take so much more."""


def limited(limit: str, more: int, *words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", LIMITED, limit, str(more), *map(str, words)]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("kib", [0, 64, 256, 512, 1000, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 20000])
def test_a_process_that_gets_no_memory_ends_in_one_line(mixed: Made, kib: int) -> None:
    """Wherever it runs out: at the first import, in the words for that, or in a library that cannot be mapped."""
    answer = limited("RLIMIT_AS", kib * 1024, "inspect", mixed.plan)
    assert answer.returncode == errors.OutOfMemoryError.exit_code, answer.stderr
    assert "Traceback" not in answer.stderr
    assert [line for line in answer.stderr.splitlines() if line.startswith("error: ")] == answer.stderr.splitlines()[
        -1:
    ]


@pytest.mark.parametrize("descriptors", [0, 1, 2, 3])
def test_a_process_that_gets_no_files_ends_in_one_line(mixed: Made, descriptors: int) -> None:
    answer = limited("RLIMIT_NOFILE", descriptors, "inspect", mixed.plan)
    if answer.returncode == 0:
        assert descriptors > 0
        return
    assert answer.returncode in (errors.StorageError.exit_code, errors.BundleError.exit_code)
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Too many open files" in line


def test_what_cannot_be_imported_is_one_line_of_an_internal_error(tmp_path: Path) -> None:
    """A half-removed installation, say."""
    (tmp_path / "click.py").write_text("raise ImportError('half of it')\n", encoding="utf-8")
    answer = shell("", "--version", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert answer.returncode == errors.INTERNAL_EXIT_CODE
    assert answer.stderr == "error: tc-deploy cannot be started: ImportError: half of it\n"


def test_what_a_library_does_at_the_end_is_not_told() -> None:
    """PyTorch counts its compilations there, with a traceback where no file can be opened any more."""
    program = (
        "import atexit, sys; from tc_deploy import cli; atexit.register(lambda: print('done', flush=True));"
        " atexit.register(lambda: 1 / 0); sys.argv = ['tc-deploy', 'inspect', 'no/such']; cli.main()"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == errors.BundleError.exit_code
    assert answer.stdout == "done\n"
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: ")


# ------------------------------------------------------------------------------------------------------------- signals

SLEEPS = """
import sys, time, types, click
from tc_deploy import cli
from tc_deploy.cli.commands import COMMANDS, CommandEntry
def body():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)
module = types.ModuleType("replaced")
module.command = click.command()(body)
sys.modules["replaced"] = module
COMMANDS["doctor"] = CommandEntry("replaced:command", "")
sys.argv = ["tc-deploy", "doctor"]
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")],
)
def test_a_signal_ends_a_command_in_order(number: signal.Signals, word: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        process.send_signal(number)  # a second one, while it tidies up, changes nothing
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "tidied up\n", f"error: {word}\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    program = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SLEEPS.replace('sleep(60)', 'sleep(1)')}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_signal_waits_for_the_end_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import time\nprint('begun', flush=True)\nfor _ in range(9): time.sleep(0.1)\nprint('whole', flush=True)\n",
        encoding="utf-8",
    )
    program = SLEEPS.replace('print("begun", flush=True)', "import slow_to_import")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "whole\ntidied up\n", "error: interrupted\n")


def interrupted_after(delay_s: float, *words: object) -> tuple[int, str, str]:
    with subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def check_interrupted(code: int, out: str, err: str) -> None:
    """Check that it ended in one line, or had ended before."""
    if code == 0:
        assert "PASSED" in out
        return
    assert code == 130, err
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err


@pytest.mark.slow
def test_validate_is_interrupted_at_any_moment(mixed: Made, tmp_path: Path) -> None:
    """Engines that are freed in whatever order their objects are found crash; most did so after the verdict."""
    pytest.importorskip("openvino", reason="needs OpenVINO")
    bundle = mixed.copy(tmp_path / "bundle")
    build_target(bundle, "openvino", {"threads": 1})
    words = ("validate", bundle, "--backend", "openvino")
    start_s = time.monotonic()
    subprocess.run([*PROGRAM, *map(str, words)], check=True, capture_output=True)
    whole_s = time.monotonic() - start_s
    for number in range(40):
        check_interrupted(*interrupted_after(0.2 + whole_s * number / 40, *words))
