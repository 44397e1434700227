"""Writes docs/gpu.md from what ``run.sh`` measured; nothing in that page is written by hand.

python tests/gpu/page.py results     # takes results/*.json into docs/measurements/gpu/, and writes the page
python tests/gpu/page.py             # writes the page from what is there
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
MEASURED, PAGE = ROOT / "docs" / "measurements" / "gpu", ROOT / "docs" / "gpu.md"
PARTS = {
    "runtime": "The device runtime",
    "large": "Full and cached steps of a large DiT, bf16",
    "calibrate": "Calibration",
    "train": "Training of the second demo model",
    "engines": "Engines",
}
"""By the name of a part's file, the title of its section."""
HEAD = """# On a GPU

This page is written by `tests/gpu/page.py` from the files that `tests/gpu/run.sh` leaves. Do not edit it.

With the project installed on a machine with an NVIDIA GPU:

    make gpu                                  # tests; those that lack something skip, and say what
    tests/gpu/run.sh results                  # measures, for 8 minutes at most, and writes results/PART.json
    python tests/gpu/page.py results          # takes them into docs/measurements/gpu, and writes this page

On a bare machine without a network, with a Python 3.12 and PyTorch of its own:

    make gpu-kit                              # where there is a network: packs .gpu-kit; copy the project with it
                                              # EMOJI=node_modules/emoji-datasource-google packs what `train` learns
    PYTHON=python3 tests/gpu/run.sh results --kit .gpu-kit --minutes 8

Run it again with the same folder for what is missing. `tests/gpu/machine.txt` lists what the bare machine must bring.
"""
NOT_RUN = "Not run on a GPU."


def page_of(documents: Mapping[str, Any]) -> str:
    """The page.

    Args:
        documents: by part, what its file holds.
    """
    lines = [HEAD]
    for part, title in PARTS.items():
        lines += [f"## {title}", ""]
        document = documents.get(part)
        results = document["results"] if document else {}
        found = {name: result["found"] for name, result in results.items() if "found" in result}
        if not found:
            lines += [NOT_RUN, ""]
            continue
        lines += [machine(document), "", *SECTIONS[part](found), ""]
        refused = [(name, result["refused"]) for name, result in results.items() if "refused" in result]
        lines += [*table(("not had", "reason"), refused), ""] if refused else []
    return "\n".join(lines).rstrip() + "\n"


def machine(document: Any) -> str:
    """Where and when a part ran."""
    gpus = document["gpu"]
    names = ", ".join(f"{gpu['name']}, driver {gpu['driver']}" for gpu in gpus) if isinstance(gpus, list) else gpus
    versions = ", ".join(f"{name} {found}" for name, found in sorted(document["versions"].items()) if found)
    return f"{names}; {versions}; {document['date']}."


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"


def runtime_section(found: Mapping[str, Any]) -> Iterator[str]:
    """What held, by its key; times and sizes in the file."""
    for name, values in found.items():
        facts = {**values, **values.get("equal_to_launched", {}), **values.get("errors_to_cpu", {})}
        kept = {key: value for key, value in facts.items() if isinstance(value, bool | int | float)}
        yield f"**{name}**: " + ", ".join(f"{words(key)} {number(value)}" for key, value in kept.items()) + "."
        yield ""


def large_section(found: Mapping[str, Any]) -> Iterator[str]:
    """Times to a full step's, beside FLOPs to a full step's."""
    rows = []
    for name, values in found.items():
        for way in ("graph", "launched"):
            if way not in values:
                continue
            made = values[way]
            for kind, ratio in made["time_to_full"].items():
                rows.append(
                    (
                        name,
                        way,
                        kind,
                        f"{made['latency'][kind]['p50_ms']:.2f}",
                        f"{ratio['median']:.3f} ± {ratio['iqr']:.3f}",
                        f"{made['efficiency'][kind]:.2f}",
                    )
                )
    yield from table(("size", "run as", "step", "ms", "time to full (median ± IQR)", "FLOPs to full over that"), rows)
    for name, values in found.items():
        if "latency" not in values and "graph" not in values:
            yield ""
            yield f"**{name}**: `{json.dumps(values)}`"


def plain_section(found: Mapping[str, Any]) -> Iterator[str]:
    """As it stands in the file."""
    for name, values in found.items():
        yield f"**{name}**: `{json.dumps(values)}`"
        yield ""


def engines_section(found: Mapping[str, Any]) -> Iterator[str]:
    """Numbers against the CPU's engine, and memory."""
    rows = []
    for name, values in found.items():
        errors = values["errors_to_cpu"]
        memory = values.get("device_memory_bytes")
        rows.append(
            (
                name,
                values["version"],
                *(f"{errors[kind]['max_relative_error']:.1e}" for kind in ("full", "cached")),
                "" if memory is None else f"{memory / 2**20:.0f}",
            )
        )
    yield from table(("on", "version", "largest error, full run", "with the plan", "MiB on the GPU"), rows)


SECTIONS = {
    "runtime": runtime_section,
    "large": large_section,
    "calibrate": plain_section,
    "train": plain_section,
    "engines": engines_section,
}


def words(key: str) -> str:
    """A key as prose."""
    return key.replace("_", " ")


def number(value: float) -> str:
    """A value for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def measured() -> dict[str, Any]:
    """What is committed, by part."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(MEASURED.glob("*.json"))}


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
def main(results: Path | None) -> None:
    """Write the page, with what RESULTS holds if it is given."""
    if results is not None:
        MEASURED.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            if (results / f"{part}.json").is_file():
                shutil.copyfile(results / f"{part}.json", MEASURED / f"{part}.json")
    PAGE.write_text(page_of(measured()), encoding="utf-8")
    click.echo(str(PAGE))


if __name__ == "__main__":
    main()
