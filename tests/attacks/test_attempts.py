"""Bundles that lie: each attempt of the README through the command line, in a child with little memory.

A refusal is one line and an exit code, before an engine was given a file. What means the same makes the same picture.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.numpy
from attacks import documents, files
from attacks.counts import COUNTS
from attacks.harness import Answer, Damage, Server
from bundles import Made

README = Path(__file__).with_name("README.md")
ATTEMPTS: dict[str, tuple[str, Damage]] = {**documents.VALUES, **files.FILES}
QUICK = documents.QUICK | files.QUICK
SAME = "the same picture"
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<what>.*?) \| (?P<outcome>.*?) \|$", re.MULTILINE)
OUTCOMES = {found["name"]: found["outcome"] for found in ROW.finditer(README.read_text(encoding="utf-8"))}
LARGEST_MIB = 300
"""That a refusal's memory may grow by; the documents ask for gigabytes."""
COMMANDS = ("inspect", "build", "report")
"""Other commands that read a bundle; the attempts go to them in turn."""


def params() -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.attacks]) for name in ATTEMPTS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    start_s = time.monotonic()
    yield
    COUNTS["took_s"] += time.monotonic() - start_s


def generate(server: Server, bundle: Path, output: Path) -> Answer:
    return server.run("generate", bundle, "--class-label", 1, "--seed", 3, "-o", output)


@pytest.fixture(scope="module")
def good(server: Server, mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The picture of the bundle as it was exported; an engine is given its graphs, so that the watch is seen to see."""
    output = tmp_path_factory.mktemp("good") / "o.safetensors"
    answer = generate(server, mixed.bundle, output)
    assert answer.code == 0, answer.err
    assert len(answer.opened) == 4
    return safetensors.numpy.load_file(output)["latents"].tobytes()


def check_refusal(answer: Answer) -> None:
    assert answer.code in (2, 4, 5, 7), answer.err
    assert answer.opened == [], "an engine was given a file"
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert "Traceback" not in answer.err
    assert answer.grown_mib < LARGEST_MIB


@pytest.mark.parametrize("name", params())
def test_an_attempt_is_refused_or_means_nothing(
    server: Server, mixed: Made, good: bytes, tmp_path: Path, name: str
) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    ATTEMPTS[name][1](bundle)
    output = tmp_path / "o.safetensors"
    answer = generate(server, bundle, output)
    COUNTS["attempts"] += 1
    COUNTS["tracebacks"] += "Traceback" in answer.err
    if answer.code == 0:
        COUNTS["other pictures"] += safetensors.numpy.load_file(output)["latents"].tobytes() != good
    if OUTCOMES[name] == SAME:
        assert answer.code == 0, answer.err
        assert safetensors.numpy.load_file(output)["latents"].tobytes() == good
        COUNTS["harmless"] += 1
        return
    check_refusal(answer)
    assert not output.exists()
    assert OUTCOMES[name] == f"refused, exit code {answer.code}"
    COUNTS["refused"] += 1


@pytest.mark.attacks
@pytest.mark.parametrize(
    ("name", "command"), [(name, COMMANDS[number % len(COMMANDS)]) for number, name in enumerate(ATTEMPTS)]
)
def test_other_commands_end_in_one_line_too(
    server: Server, mixed: Made, tmp_path: Path, name: str, command: str
) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    ATTEMPTS[name][1](bundle)
    more = {"report": ("-o", tmp_path / "page.html")}.get(command, ())
    answer = server.run(command, bundle, *more)
    COUNTS["other"] += 1
    COUNTS["tracebacks"] += "Traceback" in answer.err
    assert answer.code in (0, 2, 4, 5, 7, 8), answer.err
    assert "Traceback" not in answer.err
    if answer.code:
        assert [line.startswith("error: ") for line in answer.err.splitlines()].count(True) == 1, answer.err
        assert answer.opened == [], "an engine was given a file"


def test_the_readme_lists_every_attempt() -> None:
    listed = {found["name"]: found["what"] for found in ROW.finditer(README.read_text(encoding="utf-8"))}
    assert listed == {name: what for name, (what, _) in ATTEMPTS.items()}
