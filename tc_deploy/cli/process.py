"""What a process owes the system: streams that are open, signals that end it in order, an end without a crash.

In: the process's own words, streams and signals. Out: its exit code. Never: returns.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

GRACE_S = 3.0
"""Signals this soon after the first are taken for the same one: ``timeout`` sends two, a person presses again while
temporary folders are being removed."""
_RETRY_S = 0.05
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def run_as_process() -> NoReturn:
    """Run the command line with the words and streams of this process, and end it."""
    signals = _Signals()
    try:
        code = _run(stdout_was_open=_open_streams())
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    _end(signals.exit_code(code))


def _run(*, stdout_was_open: bool) -> int:
    from tc_deploy.cli.failure import show_failure
    from tc_deploy.cli.program import run
    from tc_deploy.errors import StorageError

    if not stdout_was_open:
        return show_failure(StorageError("standard output is closed; send it to /dev/null if nobody is to read it"))
    return run(sys.argv[1:])


class _Signals:
    """Turns the signals that ask a process to end into KeyboardInterrupt, so that whatever is half done is undone.

    One that comes while a module is being imported waits for the end of that: extension modules crash when they are
    interrupted, and nothing is half done that cannot wait.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._received_at_s = 0.0
        self._process = os.getpid()
        for number in _WORDS:
            # One that is ignored, as nohup and a shell's background jobs do, stays so.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A library's process, forked off this one, which ends it as it would any other.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now_s = time.monotonic()
        if self._received is not None and now_s - self._received_at_s < GRACE_S:
            return
        if _is_importing(frame):
            # To the main thread, whatever it waits for.
            retry = threading.Timer(_RETRY_S, signal.pthread_kill, [threading.main_thread().ident, number])
            retry.daemon = True
            retry.start()
            return
        self._received, self._received_at_s = number, now_s
        raise KeyboardInterrupt(_WORDS[signal.Signals(number)])

    def exit_code(self, code: int) -> int:
        """The exit code of a run that may have been ended by a signal; no further signal is heard."""
        for number in _WORDS:
            signal.signal(number, signal.SIG_IGN)
        return 128 + self._received if self._received is not None and code == 128 + signal.SIGINT else code


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def _open_streams() -> bool:
    """Open what the caller has closed, and write so that nothing that happens to a stream is a traceback.

    Returns:
        Whether standard output was open.
    """
    was_open = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest free number, this one; otherwise an output file would, and be printed into.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _opened(_Output, 1, sys.stdout)
    sys.stderr = _opened(_Diagnostics, 2, sys.stderr)
    return was_open


def _opened(kind: type[io.TextIOWrapper], number: int, earlier: Any) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    encoding = getattr(earlier, "encoding", None) or "utf-8"
    at_once = raw.isatty() or kind is _Diagnostics
    # A character that the terminal's encoding lacks is shown by its number.
    return kind(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=at_once)


class _Output(io.TextIOWrapper):
    """Standard output: whoever waits for results must hear that they are lost."""

    def write(self, text: str) -> int:
        with _losses():
            return super().write(text)

    def flush(self) -> None:
        with _losses():
            super().flush()


@contextlib.contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        from tc_deploy.cli.failure import ReaderLeft

        raise ReaderLeft from error
    except OSError as error:
        from tc_deploy.errors import StorageError

        raise StorageError(f"standard output cannot be written: {error.strerror}") from error


class _Diagnostics(io.TextIOWrapper):
    """Standard error: what cannot be said there cannot be said at all, and the exit code says the rest."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _end(code: int) -> NoReturn:
    """End the process without the interpreter's own tidying up.

    That would free engines and their threads in whatever order their objects are found, in which OpenVINO's crash, and
    by then a signal kills instead of interrupting. What was registered to be done at the end is done, and what fails of
    that is not told: it is a library's own business, such as PyTorch's statistics, and all has been said.
    """
    sys.unraisablehook = lambda unraisable: None
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
