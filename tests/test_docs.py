"""The documents: nothing is left to be filled in, no link is dead, and every command is one that there is."""

import ast
import importlib.util
import itertools
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from tc_deploy.bundle import Document
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.cli.commands import COMMANDS
from tc_deploy.cli.program import command_from_target, group

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
GUIDES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "cli.md")]
"""The changelog names what was, and cli.md is written from the commands themselves."""
README_LINES, README_WIDTH = 130, 155
CODE = re.compile(r"^(?:```(\w*)\n(.*?)^```|((?: {4,}\S[^\n]*\n)+))", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What a link to a heading may name, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > README_WIDTH] == []


# ------------------------------------------------------------------------------------------------------------ commands


def lines_of(page: Path) -> Iterator[tuple[str, bool]]:
    """Each line of code on a page, and whether it stands alone, as what somebody copies does."""
    text = page.read_text(encoding="utf-8")
    for match in CODE.finditer(text):
        if match[1] != "python":
            yield from ((line.strip(), True) for line in (match[2] or match[3]).splitlines())
    for match in INLINE.finditer(CODE.sub("", text)):
        yield " ".join(match[1].split()), False


def commands(program: str) -> list[Any]:
    """The lines with which a program is called, for parametrize."""
    found = {(line, alone): page for page in GUIDES for line, alone in lines_of(page) if line.startswith(f"{program} ")}
    return [pytest.param(line, alone, id=f"{name_of(page)}: {line[:80]}") for (line, alone), page in found.items()]


def words_of(line: str) -> list[str]:
    """The words after the program's name; ``…`` stands for words that the reader puts there."""
    return [word for word in shlex.split(line, comments=True)[1:] if word != "…"]


@pytest.mark.parametrize(("line", "alone"), commands("tc-deploy"))
def test_a_command_is_one_that_the_command_line_takes(line: str, alone: bool) -> None:
    before = list(itertools.takewhile(lambda word: word.startswith("-"), words_of(line)))
    assert set(before) <= {name for parameter in group.params for name in parameter.opts}
    name, *words = words_of(line)[len(before) :] or ["COMMAND"]
    if name == "COMMAND":
        return
    command = command_from_target(COMMANDS[name].target)
    try:
        command.make_context(name, list(words))
    except click.exceptions.Exit:
        assert "--help" in words
    except click.MissingParameter:
        # In a sentence only what it is about is said.
        assert not alone


@pytest.mark.parametrize(("line", "alone"), commands("python"))
def test_a_script_is_there_and_has_the_options(line: str, alone: bool) -> None:
    script, *words = words_of(line)
    if script.startswith("-"):
        return
    source = (ROOT / script).read_text(encoding="utf-8")
    for word in words:
        assert not word.startswith("--") or re.search(rf'["/]{word}["/]', source), word


@pytest.mark.parametrize(("line", "alone"), commands("make"))
def test_a_make_target_is_there(line: str, alone: bool) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert words_of(line)[0].partition("=")[0] in {*targets, "PYTHON"}


@pytest.mark.parametrize(("line", "alone"), commands("pip"))
def test_an_extra_is_one_of_the_package(line: str, alone: bool) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for names in re.findall(r"\.\[([\w,]+)\]", line):
        assert set(names.split(",")) <= set(extras)


def test_what_the_release_and_the_image_run_is_there() -> None:
    release = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    used = re.findall(r"run: make ([\w-]+)", release)
    assert used
    assert set(used) <= set(targets)
    image = (ROOT / "docs" / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    entry = re.findall(r'^(?:ENTRYPOINT|CMD) \["([\w-]+)"\]$', image, re.MULTILINE)
    assert (entry[0] in project["scripts"], entry[1] in COMMANDS) == (True, True)


def test_commands_are_found() -> None:
    """So that the tests above are not empty for want of matches."""
    assert len(commands("tc-deploy")) > 50
    assert min(len(commands(program)) for program in ("python", "make", "pip")) > 5


@pytest.mark.slow
def test_the_readme_s_way_from_a_folder_to_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line as it stands there, in an empty folder, and the output that is shown below them."""
    section = README.read_text(encoding="utf-8").partition("## Text to image\n")[2].partition("\n## ")[0]
    to_picture, _, from_server = section.partition("\nOr serve them")
    lines = re.findall(r"^ {4}((?:python|tc-deploy) .+)$", to_picture, re.MULTILINE)
    assert [line.split()[1] for line in lines][-2:] == ["deploy", "generate"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    said = []
    for line in [*lines, "tc-deploy inspect calibration/pixart"]:
        answer = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
        assert "warning" not in answer.stderr
        said += answer.stdout.splitlines()
    shown = re.findall(r"^ {4}((?:calibration/|measured|cat\.png).+)$", section, re.MULTILINE)
    schedule = re.findall(r"^ {4}(F .+)$", section, re.MULTILINE)
    assert len(shown) == 3
    # Seconds and decibels are the machine's.
    measured = re.compile(r"\d+\.\d+ (?:dB|s)")
    assert {measured.sub("#", line) for line in shown} <= {measured.sub("#", line) for line in said}
    assert "PASSED" in said
    assert [line.removeprefix("schedule").strip() for line in said if line.startswith("schedule")] == schedule
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (128, 128)
    check_server(from_server, tmp_path, environment)
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    assert names["images"].shape == (2, 128, 128, 3)
    with Image.open(tmp_path / "cat.png") as picture:
        assert np.abs(np.asarray(picture, int) - names["images"][0]).max() <= 1


def check_server(section: str, folder: Path, environment: dict[str, str]) -> None:
    """The three lines that start a server and make a picture with curl and with OpenAI's client; on a free port."""
    block = re.search(r"((?:^ {4}.+\n){3})", section, re.MULTILINE)
    assert block is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = block[1].replace("localhost:8000", f"localhost:{port}").replace(" &\n", f" --port {port} &\n")
    assert script.count(str(port)) == 2
    shell = ["bash", "-euo", "pipefail", "-c", f"trap 'kill $!; wait $!' EXIT\n{script}"]
    answer = subprocess.run(
        shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    pictures = []
    for name in ("curl.png", "openai.png"):
        with Image.open(folder / name) as picture:
            pictures.append(np.asarray(picture, int))
    # Each has a seed of its own.
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 2
    assert np.abs(pictures[0] - pictures[1]).max() > 0


def test_the_page_of_the_command_line_is_as_the_commands_are() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "tests" / "cli" / "page.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    written = writer.PAGE.read_text(encoding="utf-8")
    assert written == writer.page(), "docs/cli.md is stale; write it anew with: make docs"


# ------------------------------------------------------------------------------------------------------------ messages


def text_of(node: ast.AST) -> str:
    """A string of the source, with … for what is put in when it is used."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    return "…"


def test_every_message_of_the_troubleshooting_page_is_in_the_source() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(messages) > 20
    source = {
        text_of(node)
        for path in (ROOT / "tc_deploy").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }
    assert [message for message in messages if not any(message.rstrip(" …") in text for text in source)] == []


# ------------------------------------------------------------------------------------------------------------- recipes


def test_every_key_of_a_recipe_stands_in_the_table_with_its_default() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`(.+?)`|none|required) \|", text, re.MULTILINE)
    expected: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if field.is_required() or not isinstance(field.default, Document):
            expected[name] = None if field.is_required() else field.default
        else:
            expected |= {f"{name}.{key}": value for key, value in field.default.model_dump(mode="json").items()}
    assert {key: tomllib.loads(f"x = {value}")["x"] if value else None for key, value in rows} == expected
