"""What attempts are made of: ways to damage a bundle, to make its checksums right again, and to try a command on it.

In: a built bundle. Out: what a command said of a damaged copy. The sealing works on raw JSON, as an attacker would who
has this tool's source and no key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
EXTRA_BYTES = 2**30
"""That a command may map beside what it has: less than a tenth of what the documents here ask for."""
PATIENCE_S = 120
MANIFEST, PLAN, TABLES, RUNTIME_TABLES, WEIGHTS = (
    *("manifest.json", "plan.json", "tables.safetensors", "runtime.safetensors"),
    "onnx/weights.bin",
)
TARGET = "onnxruntime"
SAME = "the same picture"

Damage = Callable[[Path], object]
"""Changes a bundle."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command line said in its child."""

    code: int
    out: str
    err: str
    opened: list[str]
    """Files that an engine was given."""
    grown_mib: float


class Server:
    """Runs command lines in children of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("serve.py")), str(EXTRA_BYTES)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._log = (folder / "serve.log").open("w")
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=environment,
        )

    def run(self, *words: object) -> Answer:
        """Run a command line."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([str(word) for word in words]) + "\n")
        stdin.flush()
        ready, _, _ = select.select([stdout], [], [], PATIENCE_S)
        assert ready, f"no answer within {PATIENCE_S} s: {words}"
        return Answer(**json.loads(stdout.readline()))

    def close(self) -> None:
        """End it, with a child that may hang."""
        for child in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                os.kill(int(child), 9)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._log.close()


def read_json(path: Path) -> Any:
    """A document."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, document: Any) -> None:
    """A document as this tool writes it, but for what it would refuse to write."""
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")


def edit(name: str, change: Callable[[Any], object], *, sealed: bool = True) -> Damage:
    """Change a document of a bundle; then all checksums are made right again."""

    def damage(bundle: Path) -> None:
        document = read_json(bundle / name)
        change(document)
        write_json(bundle / name, document)
        if sealed:
            seal(bundle)

    return damage


def text(name: str, change: Callable[[str], str]) -> Damage:
    """Change a document's text, to something that no JSON writer makes; checksums of it are made right again."""

    def damage(bundle: Path) -> None:
        path = bundle / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        if name == PLAN:
            manifest = read_json(bundle / MANIFEST)
            manifest["files"][PLAN] = record_of(path)
            write_json(bundle / MANIFEST, manifest)
        if name in (PLAN, MANIFEST):
            stamp(bundle)

    return damage


def data(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change a file's bytes; then all checksums are made right again."""

    def damage(bundle: Path) -> None:
        (bundle / name).write_bytes(change((bundle / name).read_bytes()))
        seal(bundle)

    return damage


def seal(bundle: Path) -> None:
    """Make every checksum right again: those of files, of the plan, of what was measured, of the target."""
    if (bundle / PLAN).is_file() and isinstance(plan := read_json(bundle / PLAN), dict):
        if (bundle / TABLES).is_file() and "tables" in plan:
            plan["tables"] = record_of(bundle / TABLES)
        if isinstance(plan.get("measured"), dict):
            plan["measured"]["plan_sha256"] = content_sha256(plan)
        write_json(bundle / PLAN, plan)
    manifest = read_json(bundle / MANIFEST)
    for name in manifest["files"]:
        with contextlib.suppress(OSError, ValueError):
            manifest["files"][name] = record_of(bundle / name)
    with contextlib.suppress(KeyError, TypeError):
        manifest["plan_sha256"] = content_sha256(plan)
    write_json(bundle / MANIFEST, manifest)
    stamp(bundle)


def stamp(bundle: Path) -> None:
    """Make the targets believe that they were built from the bundle as it now is."""
    files: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # the attempt may be that it is no document
        files = read_json(bundle / MANIFEST).get("files", {})
    for path in bundle.glob(f"*/{MANIFEST}"):
        document = read_json(path)
        document["manifest_sha256"] = sha256(bundle / MANIFEST)
        document["reads"] = {name: files[name] for name in document["reads"] if name in files}
        document["plan_sha256"] = sha256(bundle / PLAN)
        write_json(path, document)


def content_sha256(plan: Any) -> str:
    """What a plan says of itself where it was measured: all but the measurement and where its sources were found."""
    plan = json.loads(json.dumps(plan))
    plan.pop("measured", None)
    plan["model"].pop("source", None)
    if isinstance(plan["origin"].get("conditions"), dict):
        plan["origin"]["conditions"].pop("file", None)
    canonical = json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """A file as a manifest names it."""
    return {"size_bytes": path.stat().st_size, "sha256": sha256(path)}


def safetensors_of(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header, and any length of it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length % 2**64) + encoded + body


def header_of(file: bytes) -> tuple[Any, bytes]:
    """A safetensors file's header, and what follows it."""
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def with_header(name: str, change: Callable[[Any], object], length: int | None = None) -> Damage:
    """Change a safetensors file's header; then all checksums are made right again."""

    def changed(file: bytes) -> bytes:
        header, body = header_of(file)
        replaced = change(header)
        return safetensors_of(header if replaced is None else replaced, body, length)

    return data(name, changed)


def with_array(name: str, key: str, change: Callable[[Any], Any]) -> Damage:
    """Change an array of a safetensors file; then all checksums are made right again."""
    import numpy as np
    import safetensors.numpy

    def changed(file: bytes) -> bytes:
        arrays = safetensors.numpy.load(file)
        arrays[key] = np.ascontiguousarray(change(arrays[key].copy()))
        return safetensors.numpy.save(arrays)

    return data(name, changed)
