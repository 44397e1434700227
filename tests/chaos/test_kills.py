"""Commands are killed and started again: the same bytes in the end, never a folder that loads and is wrong.

At *every* write point, as Python's audit events tell of them, and at random moments, which also lie within a library's
own writes and within long computations.
"""

from __future__ import annotations

import random
import signal
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from chaos.commands import Commands, Ended, Tree, differences, part, tree
from chaos.stages import STAGES, Inputs, Reference

pytestmark = pytest.mark.chaos

SLOW = {"plan": 10, "export over": 14}
"""Stages of seconds with hundreds of write points, and of how many of them this suite is content in its default."""
AT_EVERY_POINT = [name for name in STAGES if name != "plan"]
READER = {"cal": ("inspect", "cal"), "bundle": ("inspect", "bundle")}

References = Callable[[str], Reference]


class Judge:
    """Looks at what a stopped command left, lets it run again, and keeps what is wrong.

    Args:
        reference: the stage as nothing stopped it.
        commands: what runs it.
        arena: where.
        tally: what was seen.
    """

    def __init__(self, reference: Reference, commands: Commands, arena: Path, tally: Counter[str]) -> None:
        self.reference, self.commands, self.arena, self.tally = reference, commands, arena, tally
        self.faults: list[str] = []

    def _fault(self, where: str, what: str) -> None:
        if what:
            self.tally["faults"] += 1
            self.faults.append(f"{where}: {what}")

    def stopped(self, ended: Ended, where: str) -> None:
        """What a command leaves that was stopped."""
        stage, now = self.reference.stage, tree(self.arena)
        self._fault(where, ended.problem)
        state = self.reference.state_of(now)
        interrupted = ended.code in (130, 143)
        self.tally["kills"] += ended.code is not None and ended.code < 0
        self.tally["interrupts (Ctrl-C and SIGTERM)"] += interrupted
        if interrupted:
            # Python raises KeyboardInterrupt between any two instructions: also between a call of the system and the
            # line that notes it, and in the midst of tidying up, which it ends. To hold signals back there would make
            # a full or slow disk deaf to Ctrl-C. So what is left must be ours by its name, or an empty folder that was
            # made for the output, and gone after the next run, which `again` looks at.
            left = self.reference.left_behind(now)
            self.tally["interrupts that left what the next run sweeps"] += bool(left)
            foreign = [name for name in left if ".tc-deploy" not in name and not _is_empty_folder(now, name)]
            self._fault(where, f"an interrupt left {foreign[:4]}" if foreign else "")
            if state not in ("new", "old", "none"):
                self._fault(where, "an interrupt left a part of the output")
            if stage.replaces and state == "none":
                self._fault(where, "an interrupt took the old output away")
        if state == "none" and stage.replaces:
            self.tally["old output set aside until the next run"] += 1
        if state == "other":
            self.tally["half-written outputs"] += 1
            self._fault(where, self._read())

    def _read(self) -> str:
        """What a reader says of an output that is neither the old nor the new one."""
        words = READER.get(self.reference.stage.output)
        if words is None:
            return "half-written, and nothing would notice"
        ended = self.commands.run(self.arena, *words)
        return ended.problem or ("half-written, and it loads" if ended.code == 0 else "")

    def again(self, where: str) -> None:
        """What the same command makes when it runs again, to its end."""
        ended = self.commands.run(self.arena, *self.reference.stage.words)
        self.tally["reruns"] += 1
        self._fault(where, ended.problem)
        if ended.code != 0:
            self._fault(where, f"the rerun ended with {ended.code}: {ended.err.strip()[-300:]}")
        difference = differences(tree(self.arena), self.reference.after)
        self._fault(where, f"after the rerun: {difference}" if difference else "")
        self.tally["reruns with the same bytes and nothing beside them"] += not difference

    def verdict(self) -> None:
        """Fail with what was found."""
        assert not self.faults, f"{len(self.faults)} faults:\n" + "\n".join(self.faults)


def _is_empty_folder(now: Tree, name: str) -> bool:
    return stat.S_ISDIR(now[name][0]) and all(".tc-deploy" in path for path in part(now, name) if path != name)


@pytest.fixture
def judge_of(references: References, commands: Commands, arena: Path, tally: Counter[str]) -> Callable[[str], Judge]:
    tally.update({"kills": 0, "faults": 0})
    return lambda name: Judge(references(name), commands, arena, tally)


def chosen_points(name: str, points: Sequence[str], kills: int) -> list[int]:
    """All write points from 1; of a slow stage those that are not within its new folder, spread, unless many kills
    are asked for."""
    every = list(range(1, len(points) + 1))
    if name not in SLOW or kills >= 1000:
        return every
    outside = [number for number in every if ".tc-deploy-new/" not in points[number - 1]]
    step = max(1, len(outside) / SLOW[name])
    return sorted({outside[int(index * step)] for index in range(int(len(outside) / step))} | {outside[-1]})


@pytest.mark.parametrize("name", AT_EVERY_POINT)
def test_killed_at_every_write_point(
    name: str, judge_of: Callable[[str], Judge], inputs: Inputs, commands: Commands, arena: Path, kills: int
) -> None:
    judge = judge_of(name)
    points = judge.reference.ended.points
    for number in chosen_points(name, points, kills):
        inputs.lay(STAGES[name], arena)
        where = f"{name}, killed before write point {number}, {points[number - 1]}"
        ended = commands.run(arena, *STAGES[name].words, stop_at=number)
        assert ended.code == -signal.SIGKILL, f"{where}: {ended}"
        judge.stopped(ended, where)
        judge.again(where)
        judge.tally["write points killed at"] += 1
    judge.verdict()


def test_a_search_that_is_killed_again_and_again(
    judge_of: Callable[[str], Judge], inputs: Inputs, commands: Commands, arena: Path, kills: int
) -> None:
    """It goes on from what it kept, so that each start comes a little further; the last is not stopped."""
    judge, draw = judge_of("plan"), random.Random(13)
    inputs.lay(STAGES["plan"], arena)
    for start in range(max(20, kills // 10)):
        # What is kept is kept every few write points; too small a step would never get further.
        ended = commands.run(arena, *STAGES["plan"].words, stop_at=draw.randint(1, 30 + start))
        if ended.code == 0:
            inputs.lay(STAGES["plan"], arena)
            continue
        judge.stopped(ended, f"plan, start {start}, killed before {ended.points[-1]}")
        judge.tally["write points killed at"] += 1
    judge.again("plan, after all kills")
    judge.verdict()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plan again", ("inspect", "cal")),
        ("plan again", ("report", "cal", "-o", "page.html")),
        ("plan again", ("plan", "cal")),
        ("export over", ("inspect", "bundle")),
        ("export over", ("report", "bundle", "-o", "page.html")),
        ("export over", ("generate", "bundle", "--class-label", 1, "-o", "x.safetensors")),
        ("export over", ("build", "bundle", "--threads", 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_whoever_comes_next_finds_the_old_output(
    name: str,
    words: tuple[object, ...],
    judge_of: Callable[[str], Judge],
    inputs: Inputs,
    commands: Commands,
    arena: Path,
) -> None:
    """Killed between the two renames by which a folder takes another's place: a reader puts the old one back."""
    judge = judge_of(name)
    points = judge.reference.ended.points
    renames = [number for number, point in enumerate(points, 1) if point.startswith("os.rename")]
    for number in renames[-2:]:
        inputs.lay(STAGES[name], arena)
        assert commands.run(arena, *STAGES[name].words, stop_at=number).code == -signal.SIGKILL
        judge.tally["kills"] += 1
        ended = commands.run(arena, *words)
        assert (ended.problem, ended.code) == ("", 0), f"{points[number - 1]}: {ended}"
        for made in ("page.html", "x.safetensors"):
            (arena / made).unlink(missing_ok=True)
        if words[0] != "build":
            assert judge.reference.state_of(tree(arena)) == "old"
        judge.again(f"{name}, killed before {points[number - 1]}, then {words[0]}")
    judge.verdict()


@pytest.mark.parametrize("name", [name for name in STAGES if name != "plan"])
def test_interrupted_at_write_points(
    name: str, judge_of: Callable[[str], Judge], inputs: Inputs, commands: Commands, arena: Path, kills: int
) -> None:
    """Ctrl-C: the old output or the new one, and nothing beside it but the state that was promised."""
    judge, draw = judge_of(name), random.Random(name)
    points = judge.reference.ended.points
    for number in sorted(draw.sample(range(1, len(points) + 1), min(len(points), max(4, kills // 75)))):
        inputs.lay(STAGES[name], arena)
        where = f"{name}, interrupted at write point {number}, {points[number - 1]}"
        judge.stopped(commands.run(arena, *STAGES[name].words, stop_at=number, by=signal.SIGINT), where)
        judge.again(where)
    judge.verdict()


def test_killed_at_random_moments(
    judge_of: Callable[[str], Judge], inputs: Inputs, commands: Commands, arena: Path, kills: int
) -> None:
    """As many as are still missing, and 60 at least; one in ten by SIGTERM."""
    draw, done, judges = random.Random(kills), 0, {}
    weights = {name: 1 if name.startswith("export") else 3 for name in AT_EVERY_POINT}
    tally = judge_of("report").tally
    while done < 60 or tally["kills"] < kills:
        name = draw.choices(list(weights), list(weights.values()))[0]
        judge = judges.setdefault(name, judge_of(name))
        after_s = draw.uniform(0.02, 1.0) * judge.reference.ended.took_s
        inputs.lay(STAGES[name], arena)
        by = signal.SIGTERM if draw.random() < 0.1 else signal.SIGKILL
        ended = commands.run(arena, *STAGES[name].words, after_s=after_s, by=by)
        where = f"{name}, {by.name} after {after_s:.3f} s"
        judge.stopped(ended, where)
        judge.again(where)
        done += 1
        tally["stopped at random moments"] += 1
    faults = [fault for judge in judges.values() for fault in judge.faults]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)
