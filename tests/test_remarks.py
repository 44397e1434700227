"""What calibrate says against a plan is said again wherever the plan is used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from bundles import Made, run_cli

import tc_deploy
from tc_deploy.plan import load_plan, write_plan_files
from tc_deploy.remarks import remark_on, verdict_against

VERDICT = "running fewer steps is better than this plan at equal cost; do not use it"


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory, mixed: Made) -> Made:
    """A plan that was measured to be worse than fewer steps; not exported yet. The figures are written in by hand."""
    folder = tmp_path_factory.mktemp("worse")
    answer = run_cli(
        *(
            "calibrate",
            mixed.model,
            "-o",
            folder / "plan",
            "--steps",
            6,
            "--phase-start",
            6,
            "--cache-interval-early",
            6,
            "--cache-interval-late",
            1,
        ),
        *("--keep-counts", "0", "0", "--forecast-order", 0, "--samples", 2),
    )
    assert answer.code == 0, answer.err
    plan, tables = load_plan(folder / "plan")
    assert plan.measured is not None
    measured = plan.measured.model_copy(update={"psnr_db": 10.0, "fewer_steps_psnr_db": 20.0})
    write_plan_files(plan.model_copy(update={"measured": measured}), tables, folder / "plan", folder / "plan")
    return Made(model=mixed.model, plan=folder / "plan", bundle=folder / "bundle")


def test_it_is_said_at_every_stage(worse: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, _ = load_plan(worse.plan)
    assert verdict_against(plan) == remark_on(plan) == VERDICT
    for words in (
        ("export", worse.plan, "-o", worse.bundle),
        ("build", worse.bundle, "--threads", 1),
        ("inspect", worse.plan),
        ("inspect", worse.bundle),
        ("report", worse.bundle, "-o", tmp_path / "report.html"),
    ):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            answer = run_cli(*words)
        assert answer.code == 0, answer.err
        said = answer.out + answer.err + caplog.text
        if words[0] == "report":
            said = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert ("do not use this plan" if words[0] == "report" else VERDICT) in said, words
    caplog.clear()
    moved = worse.copy(tmp_path / "moved")
    with caplog.at_level(logging.WARNING), tc_deploy.load(moved):
        assert f"{moved}: {VERDICT}" in caplog.text
    again = worse.copy(tmp_path / "again")
    answer = run_cli("generate", again, "--class-label", 1, "-o", tmp_path / "x.npy")
    assert f"{again}: {VERDICT}" in answer.err


def test_nothing_is_said_of_a_plan_that_is_no_worse(
    mixed: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert verdict_against(load_plan(mixed.plan)[0]) is None
    with caplog.at_level(logging.WARNING), tc_deploy.load(mixed.copy(tmp_path / "bundle")):
        assert "do not use it" not in caplog.text
