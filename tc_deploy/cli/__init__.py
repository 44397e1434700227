"""The command line's door: ``main``, and what it says where nothing else can be imported.

In: the words after ``tc-deploy``. Out: an exit code (``errors.py`` draws them). Never: imports anything before ``main``
watches over it, so that Ctrl-C, and a process that gets no memory or no file to be imported from, ends in one line from
the first moment on.
"""

import os  # which Python has imported when it starts

PROGRAM = "tc-deploy"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name, for a caller that goes on afterwards; None takes them from
            ``sys.argv`` and ends the process.

    Returns:
        The exit code.
    """
    try:
        if arguments is None:
            from tc_deploy.cli.process import run_as_process

            run_as_process()
        from tc_deploy.cli.program import run

        return run(arguments)
    except KeyboardInterrupt:  # before anything watches for it
        return 130
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends in one line and an exit code
        return _last_words(error)


def _last_words(error: Exception) -> int:
    """Show an error that not even the program's own words for it could be imported for; this imports nothing.

    Returns:
        Its exit code, as ``errors.py`` draws them.
    """
    words = ascii(f"{type(error).__name__}: {error}".removesuffix(": "))[1:-1]
    # Python says SystemError where it gets no memory for a MemoryError; "map segment" says it of a library.
    if isinstance(error, MemoryError | SystemError) or "map segment" in words:
        code, hint = 10, "; give it more memory (see: ulimit -v)"
    elif isinstance(error, OSError):
        code, hint = 8, "; see: ulimit -n"
    else:
        code, hint = 70, ""
    try:  # not contextlib's suppress, which would have to be imported
        os.write(2, f"error: {PROGRAM} cannot be started: {words}{hint}\n".encode())
    except OSError:
        return code  # nobody hears it
    return code
