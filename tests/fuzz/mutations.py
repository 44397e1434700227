"""Documents that are nearly right: a JSON value, a TOML literal or a safetensors header changed in one to four places.

In: the bytes of a good document and a source of chance. Out: bytes that get past the first bracket of a parser, where
bytes at random would not. Never: looks at what the parser does with them.
"""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 255, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(10**30)),
    *(0.5, -0.0, 1e-45, 1e39, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "0",
        "1",
        "..",
        "../x",
        "/etc/passwd",
        "a" * 300,
        "\x1b[2J",
        "\ud800",
        "\u202e",
        "float32",
        "bfloat16",
        "object",
    ),
    *([], {}, [[]], [0], [1, 2, 3], {"": 0}, [1e39], ["x"], [[1, 2], [3]], [-1, -1]),
)
LITERALS = (
    *(
        "-1",
        "0",
        "1e400",
        "nan",
        "-inf",
        "99999999999999999999",
        '""',
        '"x"',
        '"\\u0000"',
        '"../x"',
        "true",
        "[]",
        "{}",
    ),
    *("[1, 2]", "[[1], [2]]", "[-1, 2]", "1979-05-27", "0x7f", "'''a\nb'''", "{a = {b = [1]}}", "[0.0, nan]"),
)
_LITERAL = re.compile(rb"\"[^\"\n]*\"|-?\d+(?:\.\d+)?|\btrue\b|\bfalse\b|\[[^\[\]\n]*\]")


def mutated_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON document with some of its values changed."""
    document = json.loads(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        document = _changed(document, chance)
    return json.dumps(document).encode()


def mutated_toml(data: bytes, chance: random.Random) -> bytes:
    """A TOML document with some of its literals replaced, or lines left out or there twice."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        found = list(_LITERAL.finditer(data))
        if found and chance.random() < 0.8:
            place = chance.choice(found)
            data = data[: place.start()] + chance.choice(LITERALS).encode() + data[place.end() :]
        else:
            lines = data.split(b"\n")
            line = chance.randrange(len(lines))
            lines[line : line + 1] = [lines[line]] * chance.choice((0, 2))
            data = b"\n".join(lines)
    return data


def mutated_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, another length of it, or other numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], bytearray(data[8 + length :])
    where = chance.random()
    if where < 0.6:
        header = mutated_json(header, chance)
    elif where < 0.8 and body:
        start = chance.randrange(len(body)) // 4 * 4
        body[start : start + 4] = struct.pack("<f", chance.choice((float("nan"), float("inf"), -1.0, 1e38, 0.0)))
    else:
        return struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 10**10, 2**63, 2**64 - 1))) + data[8:]
    return struct.pack("<Q", len(header)) + header + bytes(body)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": mutated_json,
    "toml": mutated_toml,
    "safetensors": mutated_safetensors,
}


def mutated(kind: str, data: bytes, chance: random.Random) -> bytes:
    """A document changed as its kind allows, or one of its bytes where it is none any more."""
    try:
        return MUTATIONS[kind](data, chance)
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError, struct.error):
        place = chance.randrange(len(data) or 1)
        return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]


def _changed(document: Any, chance: random.Random) -> Any:
    """A copy of a document in which one value is another."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places:
        return chance.choice(VALUES)
    holder, key = chance.choice(places)
    old = holder[key]
    match chance.randrange(8):
        case 0:
            del holder[key]
        case 1:
            other, name = chance.choice(places)
            holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name])
        case 2 if isinstance(old, (int, float)):
            holder[key] = chance.choice((old + 1, old - 1, -old, old * 2, str(old), float(old) + 0.5))
        case 2 if isinstance(old, list):
            holder[key] = chance.choice((old * 2, old[:-1], old[::-1], [old]))
        case 3 if isinstance(holder, dict):
            holder[chance.choice(("", "kind", "x", "../x", str(key) + "_"))] = holder.pop(key)
        case _:
            holder[key] = chance.choice(VALUES)
    return document


def _places(value: Any) -> Any:
    """Every place in a document that holds a value, as what it is in and its key or index."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)
