"""Bad values for every option and argument of every command, generated from click's own declarations.

Each must end in a known exit code and one line, leave nothing behind, and never be a defect. A part runs by default;
``make matrix`` runs all of it.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
import pytest
from bundles import Made, make_plan, run_cli
from reliability import record

from tc_deploy import errors
from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.program import command_from_target

LIMIT_S = 300
"""Far above what a bad value may take, for those that turn out to be good on a busy machine."""
KNOWN = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
"""Exit codes that a bad value may end in; 0 where it turns out to be a good one."""

# What must be right for the others to be looked at. A search takes minutes, so its source is not there.
WORDS: dict[str, list[str]] = {
    "calibrate": ["MODEL", "-o", "OUT/plan", "--steps", "2", "--samples", "0", "--keep-counts", "0", "0"],
    "deploy": ["OUT/no-model", "-o", "OUT/bundle", "--plan", "OUT/plan"],
    "plan": ["OUT/no-model", "-o", "OUT/plan"],
    "export": ["BRIEF", "-o", "OUT/bundle", "--no-check"],
    "build": ["BUNDLE"],
    "validate": ["OUT/no-bundle"],
    "generate": ["BUNDLE", "--class-label", "1", "-o", "OUT/x.npy"],
    "inspect": ["BUNDLE"],
    "report": ["BUNDLE", "-o", "OUT/x.html"],
    "sign": ["BUNDLE", "--key", "OUT/no-key"],
    "verify": ["BUNDLE", "--key", "OUT/no-key"],
    "doctor": [],
    "bench": ["OUT/no-bundle"],
    "serve": ["OUT/no-bundle"],
    "export-triton": ["BUNDLE", "-o", "OUT/repository"],
}

TEXTS = ["", "caf\udce9", "a\0b", "x" * 300, "\x1b[31m", "%s{}", "--", "-1"]
PATHS = ["", "caf\udce9", "a\0b", "x" * 300, "OUT/no/such", "FILE", "FILE/x", "FOLDER", "/dev/null", "/", "LOOP"]
WHOLE = ["", "x", "1.5", "nan", "-1", "0", "1e9", str(2**31), str(2**63), str(2**70), "9" * 5000, "٣", "caf\udce9"]
NUMBERS = ["", "x", "nan", "inf", "-inf", "1e39", "-1e39", "1e400", "-1", "caf\udce9"]


def bad_values(kind: click.ParamType) -> list[str]:
    """Values that a type refuses, or that what comes after it should look at."""
    if isinstance(kind, click.Path):
        return PATHS
    if isinstance(kind, click.types.IntParamType | click.IntRange):
        return WHOLE
    if isinstance(kind, click.types.FloatParamType | click.FloatRange):
        return NUMBERS
    return TEXTS


def cases(name: str) -> Iterator[tuple[str, list[str]]]:
    """Command lines of one command that are wrong in one place, each with a few words for what is wrong."""
    command = command_from_target(COMMANDS[name].target)
    base = WORDS[name]
    place = 0
    yield "nothing", []
    yield "one word too many", [*base, "too-many"]
    yield "an unknown option", [*base, "--no-such-option"]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            for value in bad_values(parameter.type):
                yield f"{parameter.name} {value[:20]!a}", [*base[:place], value, *base[place + 1 :]]
            place += 1
            continue
        option = parameter.opts[-1]
        if getattr(parameter, "is_flag", False):
            yield f"{option}=1", [*base, f"{option}=1"]
            continue
        yield f"{option} without a value", [*base, option]
        kinds = parameter.type.types if isinstance(parameter.type, click.Tuple) else [parameter.type]
        for value in bad_values(kinds[0]):
            given = [f"{option}={value}"] if len(kinds) == 1 else [option, *[value] * len(kinds)]
            yield f"{option} {value[:20]!a}", [*base, *given]


ALL = [(name, what, words) for name in COMMANDS for what, words in cases(name)]
SOME = ALL[::31]


class Overtime(BaseException):
    """A case took longer than it may."""


def _overtime(number: int, frame: FrameType | None) -> None:
    raise Overtime


def contents(folder: Path) -> dict[str, int]:
    """Every path below a folder, with the time it was written."""
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory, save_dit: Callable[..., Path]) -> Path:
    """A plan of one block and full steps alone: a value that turns out to be good exports one small graph."""
    folder = tmp_path_factory.mktemp("brief")
    settings = {
        "sampling": {"num_inference_steps": 2},
        "schedule": {"variants": "F F"},
        "cache": {"keep_counts": ((0,), (0,))},
    }
    return make_plan(save_dit(folder / "model", num_layers=1), folder / "plan", **settings)


def outcome(made: Made, brief: Path, folder: Path, name: str, words: list[str]) -> tuple[int, list[str]]:
    """Run a case in a folder of its own.

    Returns:
        Its exit code, and what is wrong with how it ended.
    """
    out = folder / "out"
    for path in (out, folder / "folder"):
        path.mkdir()
    (folder / "file").write_text("somebody's", encoding="utf-8")
    (folder / "loop").symlink_to(folder / "loop")
    places = {"MODEL": made.model, "BRIEF": brief, "BUNDLE": made.bundle, "OUT": out}
    places |= {"FILE": folder / "file", "FOLDER": folder / "folder", "LOOP": folder / "loop"}
    given = []
    for word in words:
        head, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        first, slash, rest = value.partition("/")
        given.append(f"{head}{equals}{places.get(first, first)}{slash}{rest}")
    before = contents(folder), contents(made.bundle), contents(made.plan), contents(made.model)
    earlier = signal.signal(signal.SIGALRM, _overtime)
    signal.alarm(LIMIT_S)
    try:
        answer = run_cli("-q", name, *given)
    except Overtime:
        return -1, [f"took more than {LIMIT_S} s"]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    after = contents(folder), contents(made.bundle), contents(made.plan), contents(made.model)
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    wrong = []
    if answer.code not in KNOWN:
        wrong.append(f"exit code {answer.code}")
    if "Traceback" in answer.err + answer.out:
        wrong.append("a traceback")
    if answer.code and len(lines) != 1 and not answer.err.startswith("Usage: "):
        wrong.append(f"{len(lines)} error lines")
    if answer.code and before != after:
        wrong.append("something was left behind")
    return answer.code, wrong and [*wrong, answer.err[-300:]]


@pytest.mark.parametrize(("name", "what", "words"), SOME, ids=[f"{name} {what}" for name, what, _ in SOME])
def test_a_bad_value_is_one_line(
    mixed: Made, brief: Path, tmp_path: Path, name: str, what: str, words: list[str]
) -> None:
    copy = Made(model=mixed.model, plan=mixed.plan, bundle=mixed.copy(tmp_path / "bundle"))
    (tmp_path / "case").mkdir()
    assert outcome(copy, brief, tmp_path / "case", name, words)[1] == []


@pytest.mark.matrix
def test_every_bad_value_is_one_line(mixed: Made, brief: Path, tmp_path: Path) -> None:
    start_s = time.monotonic()
    codes: Counter[str] = Counter()
    wrong: dict[str, Any] = {}
    copy = Made(model=mixed.model, plan=mixed.plan, bundle=mixed.copy(tmp_path / "bundle"))
    for number, (name, what, words) in enumerate(ALL):
        folder = tmp_path / str(number)
        folder.mkdir()
        code, problems = outcome(copy, brief, folder, name, words)
        codes["accepted" if code == 0 else "refused"] += 1
        if problems:
            wrong[f"{name}: {what}"] = problems
            print(f"{name}: {what}: {problems}", flush=True)
    tracebacks = sum("a traceback" in problems for problems in wrong.values())
    defects = sum(f"exit code {errors.INTERNAL_EXIT_CODE}" in problems for problems in wrong.values())
    counts = {"cases": len(ALL), **codes, "tracebacks": tracebacks, "internal errors": defects}
    record("options", {**counts, "otherwise wrong": len(wrong) - defects}, took_s=time.monotonic() - start_s)
    assert wrong == {}
