"""Progress on stderr: a bar where a person watches, a line per part where a log is written, nothing with ``-q``."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG = logging.getLogger("tc_deploy")
LINE_EVERY_S = 10.0
"""In a log; rarer, a reader wonders whether it still runs."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``report(what is being done, done, of how many)``; each new ``what`` starts a bar of its own.

    One of one is work that has no length to count: its bar only moves, and ends where the next one begins.
    """
    console = Console(stderr=True)
    if not console.is_terminal or not LOG.isEnabledFor(logging.INFO):
        yield _lines()
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times, console=console) as bars:
        yield _bars(bars)
        _end_uncounted(bars)


def _bars(bars: Progress) -> Callable[[str, int, int], None]:
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            _end_uncounted(bars)
            tasks[what] = bars.add_task(what, total=None if total == 1 else total)
        if total > 1 or done:
            bars.update(tasks[what], completed=done, total=total)

    return report


def _end_uncounted(bars: Progress) -> None:
    for task in bars.tasks:
        if task.total is None:
            bars.update(task.id, completed=1, total=1)


def _lines(clock: Callable[[], float] = time.monotonic) -> Callable[[str, int, int], None]:
    """A line when a part begins, and one every ``LINE_EVERY_S`` while it goes on."""
    said_s: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        now_s = clock()
        if what not in said_s:
            LOG.info("%s", what)
        elif now_s - said_s[what] >= LINE_EVERY_S:
            LOG.info("%s: %s of %s", what, done, total)
        else:
            return
        said_s[what] = now_s

    return report
