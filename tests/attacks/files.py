"""Files that are not what they seem: cut, swapped, linked, no files at all, and graphs that name other files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from attacks.harness import (
    MANIFEST,
    PLAN,
    RUNTIME_TABLES,
    TABLES,
    TARGET,
    WEIGHTS,
    Damage,
    data,
    edit,
    read_json,
    record_of,
    seal,
    stamp,
    write_json,
)

GRAPH = "onnx/full.onnx"
BUILT = f"{TARGET}/{MANIFEST}"
HELD = (MANIFEST, PLAN, TABLES, RUNTIME_TABLES, GRAPH, "onnx/solver.onnx", WEIGHTS, BUILT)
"""One of every kind that a bundle without prompts holds."""


def to(name: str, change: Callable[[Path], object]) -> Damage:
    """Do something to a file; no checksum is mended."""
    return lambda bundle: change(bundle / name)


def cut(part: float) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, int(path.stat().st_size * part))


def extend(more: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes() + more)


def replaced(make: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """Put something in a file's place; ``make`` is given the place and where the file is now, outside the bundle."""

    def change(path: Path) -> None:
        outside = next(folder for folder in path.parents if folder.name == "bundle").with_name("outside")
        shutil.move(path, outside)
        make(path, outside)

    return change


def sparse(path: Path, _: Path) -> None:
    """10 GB of nothing, which take no room."""
    path.touch()
    os.truncate(path, 10**10)


def loop(path: Path, _: Path) -> None:
    path.symlink_to(path.name)


def loop_of_two(path: Path, _: Path) -> None:
    path.with_name("b").symlink_to(path.name)
    path.symlink_to("b")


def linked(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def hard_linked(path: Path, outside: Path) -> None:
    path.hardlink_to(outside)


def link_inside(path: Path, outside: Path) -> None:
    """A link to a file of the bundle itself, of the same bytes."""
    shutil.move(outside, path.with_name("moved"))
    path.symlink_to("moved")


PLACES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "gone": ("left out", lambda path, outside: None),
    "folder": ("a folder in the place of", lambda path, outside: path.mkdir()),
    "fifo": ("a FIFO in the place of", lambda path, outside: os.mkfifo(path)),
    "null": ("a link to /dev/null in the place of", lambda path, outside: path.symlink_to("/dev/null")),
    "zero": ("a link to /dev/zero in the place of", lambda path, outside: path.symlink_to("/dev/zero")),
    "loop": ("a link to itself in the place of", loop),
    "loop-of-two": ("links in a circle in the place of", loop_of_two),
    "dangling": ("a link to nothing in the place of", lambda path, outside: path.symlink_to("nothing")),
    "sparse": ("10 GB of zeros in the place of", sparse),
}
"""Put in the place of every kind of file."""

LINKS: dict[str, tuple[str, Damage]] = {
    **{
        f"link-{name.replace('/', '-')}": (f"a link out of the folder for {name}", to(name, replaced(linked)))
        for name in (TABLES, RUNTIME_TABLES, GRAPH, WEIGHTS)
    },
    "link-inside": ("a link to the same bytes inside the folder", to(GRAPH, replaced(link_inside))),
    "hard-link": ("a second name for a graph, outside", to(GRAPH, replaced(hard_linked))),
    "link-folder": ("a link for the folder onnx/", to("onnx", replaced(linked))),
}


def swap(one: str, other: str) -> Damage:
    """Two files of a bundle in each other's place."""

    def damage(bundle: Path) -> None:
        first, second = (bundle / one).read_bytes(), (bundle / other).read_bytes()
        (bundle / one).write_bytes(second)
        (bundle / other).write_bytes(first)

    return damage


def sealed(damage: Damage) -> Damage:
    """And then checksums are made right again."""
    return lambda bundle: (damage(bundle), seal(bundle))


SWAPS: dict[str, tuple[str, Damage]] = {
    "swap-graphs": ("two graphs swapped", swap(GRAPH, "onnx/cached-1.onnx")),
    "swap-tables": ("the plan's and the solver's tables swapped", swap(TABLES, RUNTIME_TABLES)),
    "swap-manifests": ("the bundle's and the engine's manifest swapped", swap(MANIFEST, BUILT)),
    "swap-plan": ("plan and manifest swapped", swap(PLAN, MANIFEST)),
    "swap-graph-weights": ("a graph and the weights swapped", swap(GRAPH, WEIGHTS)),
    "sealed-swap-graphs": (
        "two graphs swapped, checksums right",
        sealed(swap(GRAPH, "onnx/cached-1.onnx")),
    ),
    "sealed-swap-tables": (
        "the tables swapped, checksums right",
        sealed(swap(TABLES, RUNTIME_TABLES)),
    ),
    "sealed-swap-weights": (
        "a graph and the weights swapped, checksums right",
        sealed(swap(GRAPH, WEIGHTS)),
    ),
    "sealed-weights-cut": ("weights cut short, checksums right", data(WEIGHTS, lambda file: file[:-4096])),
    "sealed-weights-empty": ("no weights, checksums right", data(WEIGHTS, lambda file: b"")),
    "sealed-graph-cut": ("a graph cut short, checksums right", data(GRAPH, lambda file: file[: len(file) // 2])),
    "sealed-graph-empty": ("an empty graph, checksums right", data(GRAPH, lambda file: b"")),
    "sealed-graph-text": ("text for a graph, checksums right", data(GRAPH, lambda file: b"hello " * 1000)),
    "sealed-graph-zeros": ("zeros for a graph, checksums right", data(GRAPH, lambda file: bytes(len(file)))),
    "sealed-graph-twice": ("a graph twice in its file, checksums right", data(GRAPH, lambda file: file + file)),
}


def external(change: Callable[[dict[str, str], Path], object]) -> Damage:
    """Change where a graph's first external tensor says that its data lies; checksums are made right again."""

    def damage(bundle: Path) -> None:
        model = onnx.load(str(bundle / GRAPH), load_external_data=False)
        tensor = next(item for item in model.graph.initializer if item.external_data)
        entries = {item.key: item.value for item in tensor.external_data}
        change(entries, bundle)
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        (bundle / GRAPH).write_bytes(model.SerializeToString())
        seal(bundle)

    return damage


def in_graph(change: Callable[[Any, Path], object]) -> Damage:
    """Change a graph; checksums are made right again."""

    def damage(bundle: Path) -> None:
        model = onnx.load(str(bundle / GRAPH), load_external_data=False)
        change(model, bundle)
        (bundle / GRAPH).write_bytes(model.SerializeToString())
        seal(bundle)

    return damage


def at(location: str) -> Damage:
    return external(lambda entries, bundle: entries.update(location=location))


def linked_weights(entries: dict[str, str], bundle: Path) -> None:
    (bundle / "onnx" / "link.bin").symlink_to("/etc/passwd")
    entries["location"] = "link.bin"


def second_location(model: Any, bundle: Path) -> None:
    tensor = next(item for item in model.graph.initializer if item.external_data)
    tensor.external_data.add(key="location", value="/etc/passwd")


def in_constant(model: Any, bundle: Path) -> None:
    """A tensor that hides in an operator's attribute."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    node = model.graph.node.add(op_type="Constant", output=["hidden"])
    node.attribute.add(name="value", type=4).t.CopyFrom(tensor)


def in_subgraph(model: Any, bundle: Path) -> None:
    """A tensor that hides in the branch of an If."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    node = model.graph.node.add(op_type="If", input=["c"], output=["o"])
    node.attribute.add(name="then_branch", type=5).g.initializer.append(tensor)


def in_function(model: Any, bundle: Path) -> None:
    """A tensor that hides in a function's operator."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    function = model.functions.add(name="f", domain="d")
    function.node.add(op_type="Constant", output=["o"]).attribute.add(name="value", type=4).t.CopyFrom(tensor)


def foreign_operator(model: Any, bundle: Path) -> None:
    model.graph.node[0].domain = "com.evil"


def engine_context(model: Any, bundle: Path) -> None:
    """ONNX Runtime's operator that loads a compiled engine from a file."""
    node = model.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["o"])
    node.attribute.add(name="ep_cache_context", type=3).s = b"/etc/passwd"


def nested(file: bytes) -> bytes:
    """Graphs in attributes of operators in graphs, 90 deep, behind what is there: readers take the two for one."""
    message = b""
    for _ in range(90):
        for field in (6, 5, 1):  # Attribute.g, Node.attribute, Graph.node
            message = bytes([field << 3 | 2]) + varint(len(message)) + message
    return file + bytes([7 << 3 | 2]) + varint(len(message)) + message


def varint(number: int) -> bytes:
    """A number as a protocol buffer writes it."""
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def graph_elsewhere(name: str) -> Damage:
    """Let the manifest look for a graph in another place, with the right checksum."""

    def change(bundle: Path) -> None:
        place = Path(name) if name.startswith("/") else bundle / name
        if not place.exists():
            shutil.copyfile(bundle / GRAPH, place)
        document = read_json(bundle / MANIFEST)
        document["graphs"]["full"]["file"] = name
        document["files"].pop(GRAPH)
        document["files"][name] = record_of(place)
        write_json(bundle / MANIFEST, document)
        stamp(bundle)

    return change


def _big(entries: dict[str, str], **changes: str) -> None:
    entries.update(changes)


PATHS: dict[str, tuple[str, Damage]] = {
    "external-parent": ("weights at ../plan.json", at("../plan.json")),
    "external-far": ("weights at ../../../../../../etc/passwd", at("../../../../../../etc/passwd")),
    "external-absolute": ("weights at /etc/passwd", at("/etc/passwd")),
    "external-device": ("weights at /dev/zero", at("/dev/zero")),
    "external-other": ("weights in another graph's file", at("solver.onnx")),
    "external-dot": ("weights at ./weights.bin", at("./weights.bin")),
    "external-empty": ("weights without a name", at("")),
    "external-zero-byte": ("weights at weights.bin\\0/etc/passwd", at("weights.bin\0/etc/passwd")),
    "external-backslash": ("weights at ..\\\\weights.bin", at("..\\weights.bin")),
    "external-link": ("weights behind a link", external(linked_weights)),
    "external-negative": ("weights at offset -1", external(lambda entries, bundle: _big(entries, offset="-1"))),
    "external-offset": ("weights at offset 10^10", external(lambda entries, bundle: _big(entries, offset=str(10**10)))),
    "external-length": ("10 GB of weights", external(lambda entries, bundle: _big(entries, length=str(10**10)))),
    "external-words": ("an offset in words", external(lambda entries, bundle: _big(entries, offset="many"))),
    "external-wraps": ("an offset of 2^64", external(lambda entries, bundle: _big(entries, offset=str(2**64)))),
    "external-underscore": (
        "an offset that readers differ in",
        external(lambda entries, bundle: _big(entries, offset="0_0")),
    ),
    "external-twice": ("two places for a tensor", in_graph(second_location)),
    "external-constant": ("another file in an operator's attribute", in_graph(in_constant)),
    "external-subgraph": ("another file in a branch", in_graph(in_subgraph)),
    "external-function": ("another file in a function", in_graph(in_function)),
    "operator-foreign": ("an operator that is not ONNX's", in_graph(foreign_operator)),
    "operator-engine": ("an operator that loads an engine", in_graph(engine_context)),
    "graph-nested": ("graphs in graphs, 90 deep", data(GRAPH, nested)),
    "path-parent": ("a graph at ../full.onnx", graph_elsewhere("../full.onnx")),
    "path-absolute": ("a graph at /tmp/…", lambda bundle: graph_elsewhere(str(bundle.parent / "full.onnx"))(bundle)),
    "path-dots": ("a graph at onnx/../onnx/full.onnx", graph_elsewhere("onnx/../onnx/full.onnx")),
    "path-elsewhere": ("a graph beside the manifest", graph_elsewhere("full.onnx")),
    "path-more": (
        "a checksum for /etc/passwd",
        edit(MANIFEST, lambda found: found["files"].update({"/etc/passwd": record_of(Path("/etc/passwd"))})),
    ),
    "path-long": (
        "a file name of 5,000 characters",
        edit(MANIFEST, lambda found: found["files"].update({"a" * 5000: {"size_bytes": 1, "sha256": "0" * 64}})),
    ),
    "path-zero-byte": (
        "a file name with a zero byte",
        edit(MANIFEST, lambda found: found["files"].update({"a\0b": {"size_bytes": 1, "sha256": "0" * 64}})),
    ),
    "path-empty": (
        "a file without a name",
        edit(MANIFEST, lambda found: found["files"].update({"": {"size_bytes": 1, "sha256": "0" * 64}})),
    ),
}

QUICK = frozenset({"external-absolute", "external-subgraph", "path-parent", "link-weights", "hard-link", "swap-graphs"})
"""They run by default."""

FILES: dict[str, tuple[str, Damage]] = {
    **{
        f"{place}-{name.replace('/', '-')}": (f"{what} {name}", to(name, replaced(make)))
        for name in HELD
        for place, (what, make) in PLACES.items()
    },
    **{f"cut-{name.replace('/', '-')}": (f"half of {name}", to(name, cut(0.5))) for name in HELD},
    **{
        f"extended-{name.replace('/', '-')}": (f"something behind {name}", to(name, extend(b"\nmore"))) for name in HELD
    },
    **LINKS,
    **SWAPS,
    **PATHS,
}
