"""By what single files of ours are told from others': the words in them that say who wrote them.

In: a file. Out: whether this tool wrote it. Never: reads a file of any size.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Final

from tc_deploy.bundle.documents import LARGEST_DOCUMENT_BYTES
from tc_deploy.bundle.kinds import MADE_BY
from tc_deploy.bundle.outputs import FileKind

SOFTWARE: Final = ("Software", "tc-deploy")
"""The text that a PNG file of ours holds, by the keyword that the format has for it."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_MARK = b"tEXt" + SOFTWARE[0].encode() + b"\0" + SOFTWARE[1].encode()
_HEAD_BYTES = 2048
_JSON_START = struct.calcsize("<Q")


def is_our_png(path: Path) -> bool:
    """Whether a file is a PNG with our mark, which stands before its pixels."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return head.startswith(_PNG) and _PNG_MARK in head


def is_our_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file whose metadata say that this tool made it."""
    with path.open("rb") as file:
        start = file.read(_JSON_START)
        if len(start) < _JSON_START:
            return False
        (size_bytes,) = struct.unpack("<Q", start)
        if size_bytes > LARGEST_DOCUMENT_BYTES:
            return False
        try:
            header = json.loads(file.read(size_bytes))
        except (ValueError, RecursionError):
            return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and str(metadata.get("made_by")).startswith(MADE_BY)


def is_our_json(path: Path) -> bool:
    """Whether a file is a JSON document whose ``made_by`` names this tool."""
    if path.stat().st_size > LARGEST_DOCUMENT_BYTES:
        return False
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("made_by")).startswith(MADE_BY)


SHEET_FILE: Final = FileKind(name="a picture", is_ours=is_our_png)
JSON_FILE: Final = FileKind(name="a JSON document", is_ours=is_our_json)
ARRAYS_FILE: Final = FileKind(name="a safetensors file", is_ours=is_our_safetensors)
NUMPY_FILE: Final = FileKind(name="an .npy file", is_ours=None)
