"""The page itself: what the other files found, put into the template, written at once.

In: a folder. Out: one HTML file that needs nothing else: style, pictures and charts are inside, no script is. Whatever
comes from a document is escaped by the template engine. Never: computes a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tc_deploy.bundle import FileKind, check_output, write_output
from tc_deploy.plan import places_read
from tc_deploy.report import causes, charts, images, provenance, tokens, words
from tc_deploy.report.source import Source, source_from_folder
from tc_deploy.search.record import Kind, PointRecord

MISSING = "–"
_GENERATOR = b'<meta name="generator" content="tc-deploy">'
_HEAD_BYTES = 2048
"""Where the generator is named."""


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _GENERATOR in file.read(_HEAD_BYTES)


PAGE = FileKind(name="a report", is_ours=_is_page)


def write_report(folder: Path, output: Path, validation: Path | None = None, *, force: bool = False) -> int:
    """Draw a plan folder or a bundle as one HTML page.

    Args:
        folder: the folder.
        output: the page.
        validation: what a validation of that bundle wrote.
        force: replace a file that is no report.

    Returns:
        The page's size in bytes.

    Raises:
        BundleError: the folder is neither, or a file in it is missing, truncated, altered or of another model.
        PlanError: the plan is inconsistent.
        StorageError: the output cannot be written, is read for the page, or is somebody's file.
    """
    reads = [*places_read(folder), *([] if validation is None else [validation])]
    check_output(output, PAGE, reads=reads, force=force)
    page = page_from_source(source_from_folder(folder, validation)).encode("utf-8")
    write_output(output, page)
    return len(page)


def page_from_source(source: Source) -> str:
    """The page's HTML; the same folder gives the same page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tc_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "slug": _slug, "pictures": words.pictures}
    points = () if source.search is None else source.search.points
    return environment.get_template("report.html").render(
        source=source,
        plan=source.plan,
        search=source.search,
        schedule=source.plan.run_schedule(),
        verdict=words.verdict_from_source(source),
        phases=words.phase_words(source.plan),
        pareto=charts.pareto_chart(source),
        drift=charts.drift_chart(source),
        validation=source.validation,
        causes=causes.cause_chart(source.validation, source.plan.run_schedule().phase_start),
        remarks=() if source.validation is None else source.validation.remarks(),
        geometry=charts,
        cells=tokens.schedule_cells(source.plan),
        heat=tokens.heat_columns(source.plan),
        heat_size=tokens,
        grids=tokens.token_grids(source.plan, source.tables),
        sheet=images.sample_sheet(source),
        needs_decoder=images.needs_decoder(source),
        foreign={point.kind for point in source.in_pytorch},
        points=sorted(points, key=lambda point: point.latency_ratio),
        beaten=_beaten(source),
        known=_known(points),
        keeps_tokens=bool(source.plan.cache.token_phases(source.plan.run_schedule())),
        facts=provenance.facts_from_source(source),
    )


def _beaten(source: Source) -> set[str]:
    """The points that need not be read: another on these engines is as fast and closer. What is compared stays."""
    compared = (source.chosen, source.best_baseline)
    points = () if source.search is None else source.search.points
    return {
        point.name
        for point in points
        if point.runtime == "engines" and not point.on_front and point.kind is not Kind.FULL and point not in compared
    }


def _known(points: Sequence[PointRecord]) -> set[str]:
    """The figures that at least one point has; a column without any is left out."""
    figures = {"latency_ms": [point.latency_ms for point in points]}
    for name in ("frechet_distance", "class_accuracy"):
        figures[name] = [getattr(point.quality, name) for point in points]
    return {name for name, values in figures.items() if any(value is not None for value in values)}


def _slug(kind: Kind) -> str:
    """A kind's name in the style sheet and as a shape."""
    return kind.name.lower().replace("_", "-")


def _percent(share: float | None) -> str:
    return MISSING if share is None else words.percent(share)


def _number(value: float | None, decimals: int = 1) -> str:
    return MISSING if value is None else f"{value:.{decimals}f}".replace("-", "−")
