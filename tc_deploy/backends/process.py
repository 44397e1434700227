"""Engines stay in the process that opened them: their threads are not copied by a fork, and who waits for one hangs.

Never: touches an engine.
"""

from __future__ import annotations

import os

from tc_deploy.errors import BackendError


class _Process:
    """What is known of this process."""

    def __init__(self) -> None:
        self.has_engines = False
        self.forked_off: int | None = None
        """The process with engines of which this one is a copy."""
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        if self.has_engines and self.forked_off is None:
            self.forked_off = os.getppid()


_PROCESS = _Process()


def check_process() -> None:
    """Check that engines can be opened and run here, and remember that they are.

    Raises:
        BackendError: this process was forked off one that had opened engines.
    """
    if _PROCESS.forked_off is not None:
        raise BackendError(
            f"this process was forked off process {_PROCESS.forked_off}, which had loaded engines, and their threads"
            " did not come along: a run would hang; load only in the child, or start it by multiprocessing's spawn or"
            " forkserver"
        )
    _PROCESS.has_engines = True
