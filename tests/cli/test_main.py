"""The command line as a whole: fast, quiet about what it does not need, and one line for every error."""

import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from tc_deploy import __version__, cli, errors
from tc_deploy.cli.commands import COMMANDS, CommandEntry
from tc_deploy.cli.failure import failure_of

ROOT = Path(__file__).parents[2]
CONSOLE_SCRIPT = Path(sys.executable).parent / "tc-deploy"
HELP_LIMIT_S = 0.5
"""Of a processor's time, which other work does not lengthen: completion and curiosity are answered at once."""
ENGINES = {"diffusers", "onnx", "onnxruntime", "torch", "transformers"}
HEAVY = ENGINES | {"numpy", "pydantic", "rich"}

Body = Callable[[], object]


def run(*words: str, program: tuple[str, ...] = ("-m", "tc_deploy")) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, check=False, cwd=ROOT)


def imported_by(*words: str) -> set[str]:
    """The modules that a successful command line has imported."""
    program = (
        "import sys; from tc_deploy.cli import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    )
    answer = run(*words, program=("-c", program))
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.splitlines()[-1].split())


@pytest.fixture
def logging_restored() -> Iterator[None]:
    loggers = [logging.getLogger(), logging.getLogger("tc_deploy")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def doctor_does(monkeypatch: pytest.MonkeyPatch, logging_restored: None) -> Callable[[Body], None]:
    """Put another body under the name ``doctor``."""

    def replace(body: Body) -> None:
        module = types.ModuleType("replaced")
        module.__dict__["command"] = click.command()(body)
        monkeypatch.setitem(sys.modules, "replaced", module)
        monkeypatch.setitem(COMMANDS, "doctor", CommandEntry("replaced:command", ""))

    return replace


def raising(error: BaseException) -> Body:
    def body() -> None:
        raise error

    return body


# --------------------------------------------------------------------------------------------------------------- help


def test_help_is_instant() -> None:
    times = []
    for _ in range(3):
        start = os.times()
        answer = run("--help")
        end = os.times()
        times.append(end.children_user + end.children_system - start.children_user - start.children_system)
        assert answer.returncode == 0
    assert min(times) < HELP_LIMIT_S


def test_help_lists_every_command_in_order() -> None:
    lines = run("--help").stdout.splitlines()
    first = lines.index("Commands:") + 1
    assert [line.split()[0] for line in lines[first : first + len(COMMANDS)]] == list(COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("--help") & HEAVY == set()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_s_help_needs_no_engine_and_no_torch(name: str) -> None:
    assert imported_by(name, "--help") & ENGINES == set()


@pytest.mark.parametrize("program", [("-m", "tc_deploy"), ("cli.py",), (str(CONSOLE_SCRIPT),)])
def test_every_door_leads_to_the_same_place(program: tuple[str, ...]) -> None:
    answer = run("--version", program=program)
    assert (answer.returncode, answer.stdout) == (0, f"tc-deploy {__version__}\n")


def test_no_command_shows_the_help() -> None:
    answer = run()
    assert answer.returncode == errors.UsageError.exit_code
    assert answer.stderr.startswith("Usage: tc-deploy")


# ------------------------------------------------------------------------------------------------------------- errors


def error_classes(base: type[errors.TcDeployError] = errors.TcDeployError) -> list[type[errors.TcDeployError]]:
    """The tree; a room's own error that Python's protocols ask for is one of these and keeps its exit code."""
    found = [base, *(kind for direct in base.__subclasses__() for kind in error_classes(direct))]
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_the_exit_codes_are_those_that_the_tree_draws() -> None:
    assert {kind.__name__: kind.exit_code for kind in error_classes()} == {
        "TcDeployError": 1,
        "UsageError": 2,
        "ModelError": 3,
        "PlanError": 4,
        "BundleError": 5,
        "ExportError": 6,
        "BackendError": 7,
        "StorageError": 8,
        "NotFiniteError": 9,
        "OutOfMemoryError": 10,
        "Cancelled": 130,
    }
    for kind in error_classes():
        assert f"{kind.__name__} " in str(errors.__doc__)
        assert str(kind.exit_code) in str(errors.__doc__)


@pytest.mark.parametrize("kind", error_classes())
def test_an_error_is_one_line_and_an_exit_code(
    kind: type[errors.TcDeployError], doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_does(raising(kind("x is wrong:\n  expected 1, found 2")))
    assert cli.main(["doctor"]) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.err == "error: x is wrong: expected 1, found 2\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["docto"], "error: No such command 'docto'"),
        (["--colour"], "error: No such option"),
        (["doctor", "--colour"], r"--colour.* (see: tc-deploy doctor --help)"),
        (["-v", "-q", "doctor"], "error: -v and -q exclude each other"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    answer = run(*words)
    assert answer.returncode == errors.UsageError.exit_code
    assert answer.stdout == ""
    assert all(part in answer.stderr for part in message.split(".*"))
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(("library", "names"), [("torch", "'torch>="), ("onnxruntime", "pip install 'onnxruntime>=")])
def test_a_missing_library_names_what_to_install(
    library: str, names: str, doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_does(raising(ModuleNotFoundError(f"No module named {library!r}", name=library)))
    assert cli.main(["doctor"]) == errors.BackendError.exit_code
    said = capsys.readouterr().err
    assert f"{library} is not installed: pip install " in said
    assert names in said


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'tc_deploy.typo'", name="tc_deploy.typo"),
        ZeroDivisionError(),
        RecursionError("maximum recursion depth exceeded"),
        SystemExit(1),
        EOFError("Ran out of input"),
        FileNotFoundError(2, "No such file or directory", "x"),
        ValueError("two\nlines"),
    ],
)
def test_our_own_bug_is_one_line_and_a_traceback_on_request(
    error: BaseException, doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_does(raising(error))
    assert cli.main(["doctor"]) == errors.INTERNAL_EXIT_CODE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: internal error: {type(error).__name__}")
    assert line.endswith("; please report it with the output of tc-deploy -v and the same words")
    assert cli.main(["-v", "doctor"]) == errors.INTERNAL_EXIT_CODE
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), errors.OutOfMemoryError.exit_code, "memory does not suffice"),
        (RuntimeError("std::bad_alloc"), errors.OutOfMemoryError.exit_code, "memory does not suffice: std::bad_alloc"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            errors.OutOfMemoryError.exit_code,
            "memory does not suffice",
        ),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            errors.OutOfMemoryError.exit_code,
            "memory does not suffice: libtorch_cpu.so",
        ),
        (OSError(28, "No space left on device", "/tmp/x"), errors.StorageError.exit_code, "/tmp/x: No space left"),
        (OSError(24, "Too many open files"), errors.StorageError.exit_code, "error: Too many open files"),
        (
            RuntimeError("unable to open <x>: Too many open files (24)"),
            errors.StorageError.exit_code,
            "unable to open <x>",
        ),
    ],
)
def test_what_the_machine_lacks_is_no_defect(
    error: Exception, code: int, words: str, doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_does(raising(error))
    assert cli.main(["doctor"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_message_does_nothing_to_a_terminal(
    doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_does(raising(errors.BundleError("a\x1b]0;b\x07\u202ec")))
    assert cli.main(["doctor"]) == errors.BundleError.exit_code
    assert capsys.readouterr().err == "error: a\\x1b]0;b\\x07\\u202ec\n"


@pytest.mark.parametrize("word", ["caf\udce9", "a\0b"])
def test_an_argument_that_is_no_text_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", word]) == errors.UsageError.exit_code
    assert ascii(word) in capsys.readouterr().err


def test_an_interruption_is_no_traceback(
    doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_does(raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: interrupted\n"


def test_what_a_library_makes_of_an_interruption_is_still_one(
    doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("a callback failed") from error

    doctor_does(body)
    assert cli.main(["doctor"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: interrupted\n"


def test_causes_that_form_a_circle_come_to_an_end(
    doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = MemoryError("first"), RuntimeError("second")
    first.__context__, second.__cause__ = second, first
    assert [str(cause) for cause in errors.causes(second)] == ["second", "first"]
    doctor_does(raising(first))
    assert cli.main(["doctor"]) == errors.OutOfMemoryError.exit_code
    assert "first" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback() -> None:
    for words in (["--help"], ["doctor"]):
        program = [sys.executable, "-m", "tc_deploy", *words]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == errors.READER_LEFT_EXIT_CODE == 128 + signal.SIGPIPE


def test_a_command_s_exit_code_is_the_program_s(doctor_does: Callable[[Body], None]) -> None:
    doctor_does(lambda: click.get_current_context().exit(5))
    assert cli.main(["doctor"]) == 5
    doctor_does(lambda: "a result")
    assert cli.main(["doctor"]) == 0


# ---------------------------------------------------------------------------------------------------------------- log


def log_everything() -> None:
    for name in ("tc_deploy.some.room", "some.library"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "%s %s", name, logging.getLevelName(level))
    raise errors.PlanError("at last")


@pytest.mark.parametrize("options", [[], ["-v"]])
def test_a_traceback_that_a_library_logs_is_a_detail(
    options: list[str], doctor_does: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        try:
            raise ValueError("of a library")
        except ValueError:
            logging.getLogger("some.library").exception("something failed")

    doctor_does(body)
    assert cli.main([*options, "doctor"]) == 0
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (options == ["-v"])
    assert "something failed" in said
    assert said.endswith("ValueError: of a library\n")


@pytest.mark.parametrize(
    ("options", "ours", "others"),
    [
        (["-q"], {"ERROR"}, {"ERROR"}),
        ([], {"INFO", "WARNING", "ERROR"}, {"WARNING", "ERROR"}),
        (["-v"], {"DEBUG", "INFO", "WARNING", "ERROR"}, {"INFO", "WARNING", "ERROR"}),
        (["-v", "-v"], {"DEBUG", "INFO", "WARNING", "ERROR"}, {"DEBUG", "INFO", "WARNING", "ERROR"}),
        (["-vvv"], {"DEBUG", "INFO", "WARNING", "ERROR"}, {"DEBUG", "INFO", "WARNING", "ERROR"}),
    ],
)
def test_how_much_is_said(
    options: list[str],
    ours: set[str],
    others: set[str],
    doctor_does: Callable[[Body], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    doctor_does(log_everything)
    for _ in range(2):
        assert cli.main([*options, "doctor"]) == errors.PlanError.exit_code
        captured = capsys.readouterr()
        assert captured.out == ""
        for name, levels in (("tc_deploy.some.room", ours), ("some.library", others)):
            said = [line.split(name)[1].strip() for line in captured.err.splitlines() if name in line]
            assert {word for word in said if word.isupper()} == levels
            assert captured.err.count(f"{name} ERROR") == 1
        assert captured.err.splitlines()[-1] == "error: at last"
        assert ("Traceback" in captured.err) == (len(options) == 2 or options == ["-vvv"])


@pytest.mark.parametrize(("short", "code"), [(OSError(24, "Too many open files"), 8), (MemoryError(), 10)])
def test_an_explanation_that_finds_nothing_left_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, short: Exception, code: int
) -> None:
    def fail(error: BaseException) -> str:
        raise short

    monkeypatch.setattr("tc_deploy.libraries.load_failure", fail)
    failure = failure_of(RuntimeError("the cause"))
    assert failure.exit_code == code
    assert failure.message.startswith("the cause; and to explain it: ")
