"""What the reliability suites counted: printed, and on request kept as JSON and as a table in docs/reliability.md.

In: a suite's name and its counts. Out: lines on the terminal; with ``RELIABILITY_RECORD=1`` in the environment (the
Makefile's targets set it) also ``docs/measurements/SUITE.json`` and the suite's section of the page. Never: touches a
page without being asked to, so that a part of a suite, run by hand, does not pass for the whole of it.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from tc_deploy.bundle import canonical_json
from tc_deploy.hardware import hardware_line

DOCS = Path(__file__).parent.parent / "docs"
RECORD = "RELIABILITY_RECORD"
SUITES = ("chaos", "attacks", "fuzz", "options", "stateful")
LIBRARIES = ("diffusers", "onnxruntime", "torch")


def record(suite: str, counts: Mapping[str, int], *, took_s: float, docs: Path = DOCS) -> None:
    """Print what a suite counted, and write it down where the environment asks for it.

    Args:
        suite: one of ``SUITES``.
        counts: how often each thing was done or seen, by a few words; those that must be 0 belong to it.
        took_s: how long the suite ran.
        docs: the folder with the page and ``measurements/``.

    Raises:
        ValueError: the suite is unknown, or the page has no section for it.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; known: {', '.join(SUITES)}")
    print(f"\n{suite}:")
    for what, count in counts.items():
        print(f"  {count:>8,}  {what}")
    if os.environ.get(RECORD) != "1":
        return
    document = {
        "suite": suite,
        "counts": dict(counts),
        "took_s": round(took_s),
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "hardware": hardware_line(),
        "versions": {"python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in LIBRARIES},
    }
    page = docs / "reliability.md"
    text = _with_section(page.read_text(encoding="utf-8"), suite, table(document))
    (docs / "measurements" / f"{suite}.json").write_text(canonical_json(document), encoding="utf-8")
    page.write_text(text, encoding="utf-8")


def table(document: Mapping[str, object]) -> str:
    """A suite's record as the page shows it."""
    counts, versions = document["counts"], document["versions"]
    assert isinstance(counts, Mapping)
    assert isinstance(versions, Mapping)
    rows = [f"| {what} | {count:,} |" for what, count in counts.items()]
    machine = f"{document['date']}, {document['hardware']}; {', '.join(f'{k} {v}' for k, v in versions.items())};"
    time = f"{int(str(document['took_s'])) / 60:.0f} minutes; [as JSON](measurements/{document['suite']}.json)."
    return "\n".join(["| what | count |", "|---|---|", *rows, "", machine, time])


def _with_section(text: str, suite: str, body: str) -> str:
    start, end = f"<!-- {suite} -->\n", f"<!-- /{suite} -->\n"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(text) is None:
        raise ValueError(f"the page has no section between {start.strip()} and {end.strip()}")
    return pattern.sub(lambda _: f"{start}{body}\n{end}", text)
