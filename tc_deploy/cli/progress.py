"""Progress on stderr: a bar where a person watches, a line per part where a log is written, nothing with ``-q``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG = logging.getLogger("tc_deploy")


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``report(what is being done, done, of how many)``; each new ``what`` starts a bar of its own."""
    console = Console(stderr=True)
    if not console.is_terminal or not LOG.isEnabledFor(logging.INFO):
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def _lines() -> Callable[[str, int, int], None]:
    seen: set[str] = set()

    def report(what: str, done: int, total: int) -> None:
        if what not in seen:
            seen.add(what)
            LOG.info("%s%s", what, f" ({done} of {total})" if done and total > 1 else "")

    return report


def log_step(what: str) -> None:
    """Say what is being done, for work that has no length to count."""
    LOG.info("%s", what)
