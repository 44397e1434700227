"""Paths as they are said: from here in messages, in documents relative to the document's folder, absolute when read.

Relative only where both belong to one project. In: a path as text and the folder of the document. Out: the same path,
said otherwise. Never: touches a file.
"""

from __future__ import annotations

import os
from pathlib import Path


def real_path(path: Path) -> Path:
    """An absolute path with its links followed, for ``Path.resolve``.

    Before Python 3.13 that raises a RuntimeError for links in a circle. Here they stay as they are, so that whoever
    opens the path says what is wrong.
    """
    return Path(os.path.realpath(path))


def path_from_here(path: Path) -> str:
    """A path as messages name it: below the working directory relative to it, else absolute."""
    absolute, here = real_path(path), real_path(Path.cwd())
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


def relative_path(path: str, folder: Path) -> str:
    """An absolute path as the documents in ``folder`` name it.

    Where both lie below the working directory they belong together: it is relative to the folder, so that it can be
    committed, moved with it and used from anywhere. Otherwise it stays absolute, and what is no absolute path stays.
    """
    target, here, project = real_path(Path(path)), real_path(folder), real_path(Path.cwd())
    if not Path(path).is_absolute() or not (target.is_relative_to(project) and here.is_relative_to(project)):
        return path
    relative = Path(os.path.relpath(target, here)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def absolute_path(path: str, folder: Path) -> str:
    """What :func:`relative_path` made relative, as an absolute path again; a hub's id stays as it is."""
    return Path(os.path.normpath(real_path(folder) / path)).as_posix() if path.startswith(".") else path
