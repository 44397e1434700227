"""Two commands on one output: what stands there is one's whole result, and the other says so in one line."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from chaos.commands import Commands, Tree, differences, part, tree
from chaos.stages import BY_HAND, STAGES, Inputs, Stage

pytestmark = pytest.mark.chaos

CALIBRATE = ("calibrate", "recipe.toml", "-o", "cal")
BY_HAND_TOO = ("calibrate", "model", "--steps", 6, *BY_HAND, "-o", "cal")
EXPORT = ("export", "cal", "-o", "bundle")
HALF = ("export", "cal", "-o", "bundle", "--static-batch", 2)
BUILD = ("build", "bundle", "--threads", 1)
BUILD_TOO = ("build", "bundle", "--threads", 2)
IMAGE = ("generate", "bundle", "--class-label", 1, "-o", "x.safetensors")
IMAGE_TOO = ("generate", "bundle", "--class-label", 2, "-o", "x.safetensors")
INSPECT = ("inspect", "bundle")
REPORT = ("report", "cal", "-o", "page.html")
AGAIN = ("plan", "cal", "--target-psnr", 20)

MODEL = {"model": "model", "recipe.toml": "recipe.toml"}
BUNDLE = {"model": "model", "cal": "plan", "bundle": "built"}
PAIRS = {
    "calibrate twice": (CALIBRATE, CALIBRATE, MODEL),
    "two calibrates": (CALIBRATE, BY_HAND_TOO, MODEL),
    "two calibrates over a plan": (CALIBRATE, BY_HAND_TOO, {**MODEL, "cal": "plan"}),
    "calibrate and choose again": (BY_HAND_TOO, AGAIN, {**MODEL, "cal": "search"}),
    "calibrate and report": (BY_HAND_TOO, REPORT, {**MODEL, "cal": "search"}),
    "two exports": (EXPORT, HALF, {"model": "model", "cal": "plan"}),
    "export and build": (EXPORT, BUILD, BUNDLE),
    "export and generate": (EXPORT, IMAGE, BUNDLE),
    "export and inspect": (EXPORT, INSPECT, BUNDLE),
    "calibrate and export": (BY_HAND_TOO, EXPORT, {"model": "model", "cal": "plan"}),
    "two builds": (BUILD, BUILD_TOO, {"bundle": "exported"}),
    "build and generate": (BUILD, IMAGE, {"bundle": "built"}),
    "two generates": (IMAGE, IMAGE_TOO, {"bundle": "built"}),
    "choose again twice": (AGAIN, ("plan", "cal", "--target-psnr", 0), {"cal": "search"}),
}
ROUNDS = 5
SLOW_ROUNDS = 3
"""In the first two rounds both start at once, in the others one starts at any moment of the other's run."""


@pytest.mark.parametrize("name", PAIRS)
def test_two_at_once(name: str, inputs: Inputs, commands: Commands, arena: Path, tally: Counter[str]) -> None:
    first, second, found = PAIRS[name]
    draw, faults = random.Random(name), []
    # In whichever order they come: each alone, and each after the other.
    allowed: list[Tree] = []
    took_s: list[float] = []
    for order in ((first, second), (second, first)):
        inputs.lay(Stage(name="", words=(), output="", found=found), arena)
        for words in order:
            ended = commands.run(arena, *words)
            allowed.append(tree(arena))
            if words == order[0]:
                assert ended.code == 0, ended.err
                took_s.append(ended.took_s)
    for turn in range(SLOW_ROUNDS if EXPORT in (first, second) else ROUNDS):
        inputs.lay(Stage(name="", words=(), output="", found=found), arena)
        early, late, early_s = (first, second, took_s[0]) if draw.random() < 0.5 else (second, first, took_s[1])
        start = commands.start(arena, *early)
        time.sleep(draw.random() * 0.05 if turn < 2 else draw.random() * early_s)
        other = commands.start(arena, *late)
        endings = [commands.wait(start), commands.wait(other)]
        where = f"{name}, round {turn}"
        faults += [f"{where}: {' '.join(map(str, end.words))}: {end.problem}" for end in endings if end.problem]
        if all(end.code != 0 for end in endings):
            faults.append(f"{where}: neither got through: {[end.err.strip()[-200:] for end in endings]}")
        now = tree(arena)
        distances = [differences(now, tree_) for tree_ in allowed]
        if all(distances):
            faults.append(f"{where}: no order of the two gives this: {min(distances, key=len)}")
        tally["pairs of commands on one output"] += 1
        tally["of them refused with one line"] += sum(end.code != 0 for end in endings) > 0
    tally["faults"] += len(faults)
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


@pytest.mark.parametrize("name", ["calibrate", "export", "build", "plan again"])
def test_the_lock_of_a_dead_process_is_no_lock(
    name: str, inputs: Inputs, commands: Commands, arena: Path, tally: Counter[str]
) -> None:
    """Killed just after it took the lock, by which time the file is there; another command then takes the output."""
    stage = STAGES[name]
    inputs.lay(stage, arena)
    whole = commands.run(arena, *stage.words)
    expected = tree(arena)
    locks = [number for number, point in enumerate(whole.points, 1) if "lock" in point and point.startswith("fcntl")]
    assert locks
    for number in locks:
        inputs.lay(stage, arena)
        assert commands.run(arena, *stage.words, stop_at=number + 1).code in (-9, 0)
        ended = commands.run(arena, *stage.words)
        assert (ended.problem, ended.code) == ("", 0)
        assert differences(tree(arena), expected) == ""
        tally["locks of dead processes"] += 1


def test_a_search_s_state_outlives_a_calibration(
    inputs: Inputs, commands: Commands, arena: Path, tally: Counter[str]
) -> None:
    """A stopped search's state lies beside the plan; a calibration that ends there is not to take it away."""
    stage = STAGES["plan"]
    inputs.lay(stage, arena)
    assert commands.run(arena, *stage.words, stop_at=40).code == -9
    before = {
        path: entry for path, entry in tree(arena).items() if path.startswith(".cal.tc-deploy/plan-") and entry[1]
    }
    assert before
    ended = commands.run(arena, *CALIBRATE)
    assert (ended.problem, ended.code) == ("", 0)
    now = tree(arena)
    assert {path: entry for path, entry in now.items() if path in before} == before
    assert part(now, "cal")
    tally["states of another command that stayed"] += 1
