"""The picture of a validation: every cause where its errors say, gaps where there are none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from bundles import Made, run_cli
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.bundle import MANIFEST, sha256_of_file
from tc_deploy.report import charts
from tc_deploy.report.causes import cause_chart
from tc_deploy.validate.record import (
    DriftRecord,
    Metrics,
    OutputRecord,
    ValidationRecord,
    VariantRecord,
    write_validation,
)

Errors = tuple[float | None, ...]


def make_validation(algorithm: Errors, export: Errors | None = None, **changes: object) -> ValidationRecord:
    metrics = Metrics(
        max_abs=1e-5, median_abs=1e-6, max_rel=1e-3, median_rel=1e-6, to_deviation=1e-5, cosine=1.0, sqnr_db=111.25
    )
    drift = DriftRecord(
        algorithm=algorithm,
        export=export,
        engine=None,
        precision=None,
        total=export or algorithm,
        image_psnr_db=120.0,
        image_psnr_to_full_db=43.0,
        exceeded=(),
    )
    output = OutputRecord(name="sample", step=3, metrics=metrics, failures=())
    fields = {
        "kind": "validation",
        "format_version": 2,
        "made_by": "tc-deploy",
        "date": "2026-11-24",
        "hardware": "a machine",
        "bundle": "mixed",
        "manifest_sha256": "",
        "backend": "openvino",
        "backend_version": "2026.4",
        "precision": "fp32",
        "against": "recorded",
        "sampled_on": "class labels",
        "passed": True,
        "variants": (VariantRecord(name="full", steps=(0, 3), outputs=(output,)),),
        "wiring": (),
        "drift": drift,
        "blame": (),
        "repeats": (),
    }
    return ValidationRecord.model_validate(fields | changes)


def test_a_tenth_is_a_step_of_equal_height() -> None:
    chart = cause_chart(make_validation((0.0, 1e-1, 1e-2, 1e-3), (1e-6,) * 4), phase_start=2)
    assert chart is not None
    algorithm, export = chart.curves
    assert (algorithm.cause, export.cause) == ("algorithm", "export")
    heights = [float(pair.split()[1]) for pair in algorithm.path[1:].split("L")]
    # The first step, without an error, is left out.
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert len({pair.split()[1] for pair in export.path[1:].split("L")}) == 1
    assert chart.rule is not None
    assert [tick.label for tick in chart.y_ticks] == ["1e−6", "1e−5", "1e−4", "1e−3", "1e−2", "1e−1"]


def test_a_gap_breaks_the_curve() -> None:
    chart = cause_chart(make_validation((1e-2, None, 1e-2, 1e-1)), phase_start=None)
    assert chart is not None
    assert chart.curves[0].path.count("M") == 2
    assert chart.rule is None


def test_nothing_to_draw() -> None:
    assert cause_chart(None, phase_start=2) is None
    assert cause_chart(make_validation((0.0, None)), phase_start=1) is None


@given(st.lists(st.none() | st.floats(0, 1e6), min_size=1, max_size=60))
def test_any_errors_fit_in_the_plot(errors: list[float | None]) -> None:
    chart = cause_chart(make_validation(tuple(errors)), phase_start=1)
    if chart is None:
        assert not any(error is not None and error > 1e-9 for error in errors)
        return
    for curve in chart.curves:
        for pair in curve.path.removesuffix("h0").replace("M", "L")[1:].split("L"):
            x, y = map(float, pair.split())
            assert math.isfinite(x + y)
            assert charts.LEFT - 0.1 <= x <= charts.RIGHT + 0.1
            assert charts.TOP - 0.1 <= y <= charts.BOTTOM + 0.1


def test_the_page_shows_the_validation(mixed: Made, tmp_path: Path) -> None:
    file, page = tmp_path / "validation.json", tmp_path / "report.html"
    digest = sha256_of_file(mixed.bundle / MANIFEST)
    write_validation(make_validation((0.0, 1e-2), (1e-6, 1e-6), manifest_sha256=digest), file)
    assert run_cli("report", mixed.bundle, "-o", page, "--validation", file).code == 0
    html = page.read_text(encoding="utf-8")
    for text in ('id="validation"', "PASSED", "openvino 2026.4", "111.2", 'class="curve line chosen export"'):
        assert text in html
    write_validation(make_validation((0.0, 1e-2), manifest_sha256="0" * 64), file)
    answer = run_cli("report", mixed.bundle, "-o", page, "--validation", file)
    assert answer.code == 5
    assert "a validation of another export" in answer.error
