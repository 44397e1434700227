"""One server, one set of inputs and one tally for the whole suite."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos.commands import Commands
from chaos.stages import STAGES, Inputs, Reference, reference
from reliability import record


@pytest.fixture(scope="session")
def kills() -> int:
    """How many kills the suite makes at least."""
    return int(os.environ.get("CHAOS_KILLS", "300"))


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """What was done and seen; it is shown, and kept where that was asked for, when the last test has ended."""
    counts: Counter[str] = Counter()
    start_s = time.monotonic()
    yield counts
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        record("chaos", counts, took_s=time.monotonic() - start_s)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The process whose children run the commands."""
    with Commands(tmp_path_factory.mktemp("notes")) as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Inputs:
    """What the stages find."""
    return Inputs(tmp_path_factory.mktemp("inputs"), commands)


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all stages run in, one after the other: a path may stand in what they write."""
    return tmp_path_factory.mktemp("arena")


@pytest.fixture(scope="session")
def references(inputs: Inputs, arena: Path, commands: Commands) -> Callable[[str], Reference]:
    """Runs a stage to its end, once."""
    known: dict[str, Reference] = {}

    def of(name: str) -> Reference:
        if name not in known:
            known[name] = reference(STAGES[name], inputs, arena, commands)
        return known[name]

    return of
