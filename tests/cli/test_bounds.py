"""What is asked for is looked at before the work: sizes, numbers, names, and what a plan fixes."""

from __future__ import annotations

import ast
import re
import time
from pathlib import Path

import click
import pytest
from bundles import Made, run_cli

from tc_deploy import errors
from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.program import command_from_target

AT_ONCE_S = 20.0
"""On a busy machine; the work itself would take minutes, or all memory."""
BAD_USE, NO_MEMORY = errors.UsageError.exit_code, errors.OutOfMemoryError.exit_code
ONLY_IN_A_CLONE = re.compile(r"tc-deploy\[|\b(docs|examples|tests)/")
GENERATE = ("generate", "BUNDLE", "--class-label", 1, "-o", "OUT/x.png")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (NO_MEMORY, (*GENERATE, "--batch-size", 10**9)),
        (BAD_USE, (*GENERATE, "-n", 10**9)),
        (NO_MEMORY, ("generate", "BUNDLE", "--class-label", 1, "-n", 10**6, "-o", "OUT/x.npy", "--batch-size", 10**8)),
        (BAD_USE, (*GENERATE, "--seed", 2**70)),
        (BAD_USE, (*GENERATE, "--guidance-scale", "nan")),
        (BAD_USE, (*GENERATE, "--guidance-scale", "1e39")),
        (BAD_USE, (*GENERATE, "--guidance-scale", "1e30")),
        (BAD_USE, (*GENERATE, "--guidance-scale", -3)),
        (BAD_USE, (*GENERATE, "--true-cfg-scale", 1001)),
        (BAD_USE, ("calibrate", "MODEL", "-o", "OUT/p", "--guidance-scale", "1e30")),
        (BAD_USE, ("plan", "MODEL", "-o", "OUT/p", "--true-cfg-scale", "1e30")),
        (BAD_USE, (*GENERATE, "--guidance-scale", "-inf")),
        (BAD_USE, (*GENERATE, "--zoom", 65)),
        (BAD_USE, ("generate", "BUNDLE", "--class-label", 1, "-o", "")),
        (BAD_USE, ("generate", "BUNDLE", "--class-label", 1, "-o", "OUT/" + "x" * 300 + ".png")),
        (BAD_USE, ("inspect", "x" * 300)),
        (BAD_USE, ("inspect", "x/" * 5000)),
        (BAD_USE, ("export", "PLAN", "-o", "OUT/b", "--static-batch", 2**31)),
        (NO_MEMORY, ("export", "PLAN", "-o", "OUT/b", "--static-batch", 2**31 - 1)),
        (BAD_USE, ("build", "BUNDLE", "--threads", 30_000)),
        (BAD_USE, ("build", "BUNDLE", "--weights", "other")),
        (BAD_USE, ("build", "BUNDLE", "--provider", "other")),
        (NO_MEMORY, ("bench", "BUNDLE", "--batch-size", 10**9)),
        (BAD_USE, ("bench", "BUNDLE", "--rounds", 10**9)),
        (BAD_USE, ("calibrate", "MODEL", "-o", "OUT/p", "--steps", 10**9)),
        (BAD_USE, ("calibrate", "MODEL", "-o", "OUT/p", "--samples", 10**9)),
        (BAD_USE, ("calibrate", "MODEL", "-o", "OUT/p", "--fit-samples", 10**9, "--keep-ratio", 0.5, 0.5)),
        (BAD_USE, ("calibrate", "MODEL", "-o", "OUT/p", "--keep-ratio", "nan", 0.5)),
        (BAD_USE, ("calibrate", "MODEL", "-o", "OUT/p", "--seed", 2**70)),
        (BAD_USE, ("plan", "MODEL", "-o", "OUT/p", "--target-psnr", "inf")),
        (BAD_USE, ("plan", "MODEL", "-o", "OUT/p", "--max-latency-ms", "nan")),
        (BAD_USE, ("plan", "MODEL", "-o", "OUT/p", "--budget", 10**9)),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else None,
)
def test_too_much_is_refused_before_the_work(mixed: Made, tmp_path: Path, code: int, words: tuple[object, ...]) -> None:
    places = {"BUNDLE": mixed.bundle, "PLAN": mixed.plan, "MODEL": mixed.model}
    given = [places.get(str(word), str(word).replace("OUT", str(tmp_path))) for word in words]
    start_s = time.monotonic()
    answer = run_cli("-q", *given)
    assert answer.error
    assert answer.code == code, answer.err
    assert time.monotonic() - start_s < AT_ONCE_S
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_lists_no_others(mixed: Made) -> None:
    error = run_cli("build", mixed.bundle, "--weigths", "shared").error
    assert "No such option '--weigths'" in error
    assert "--compute-capability" not in error


# ------------------------------------------------------------------------------------------------- what a plan fixes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", 30), "runs 10 steps"),
        (("--num-inference-steps", 30), "--steps 30"),
        (("--height", 512), "makes latents of 4x8x8 and no pictures"),
        (("--width", 512), "--height H --width W"),
    ],
)
def test_what_a_plan_fixes_is_said(mixed: Made, tmp_path: Path, words: tuple[object, ...], says: str) -> None:
    answer = run_cli("generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / "x.npy", *words)
    assert answer.code == BAD_USE
    assert says in answer.error
    assert "tc-deploy calibrate" in answer.error
    assert list(tmp_path.iterdir()) == []


def test_what_a_plan_fixes_may_be_asked_for(pixel: Made, tmp_path: Path) -> None:
    words = ("generate", pixel.bundle, "--class-label", 1, "-o", tmp_path / "x.npy", "--steps", 9, "--width", 8)
    answer = run_cli(*words, "--height", 512)
    assert (answer.code, "makes pictures of 8x8" in answer.error) == (BAD_USE, True)
    answer = run_cli(*words, "--height", 8)
    assert answer.code == 0, answer.err


def test_another_guidance_than_the_plan_s_is_a_warning(mixed: Made, tmp_path: Path) -> None:
    words = ("generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / "x.safetensors")
    warning = "the plan was calibrated at guidance scale 2, and is not measured at 7.5"
    for given, warned in ((7.5, True), (2, False), (None, False)):
        answer = run_cli(*words, *(() if given is None else ("--guidance-scale", given)))
        assert answer.code == 0, answer.err
        assert (warning in answer.err) == warned


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_names_nothing_that_only_a_clone_has(name: str) -> None:
    command = command_from_target(COMMANDS[name].target)
    words = command.get_help(click.Context(command, info_name=name))
    assert not ONLY_IN_A_CLONE.search(words)


def messages(path: Path) -> set[str]:
    """The strings of a file that are no docstrings, which are for readers of the source."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    comments = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {str(node.value) for node in strings if id(node) not in comments}


def test_messages_name_nothing_that_only_a_clone_has() -> None:
    for path in Path(errors.__file__).parent.rglob("*.py"):
        for text in messages(path):
            assert not ONLY_IN_A_CLONE.search(text), f"{path.name}: {text}"
