"""Real bundles measured side by side; and what cannot be measured."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundles import MULTISTEP, PIXEL_BATCH, Made, MadeByCommands, run_cli, snapshot

from tc_deploy import errors
from tc_deploy.bench.clock import Clock, step_by_step
from tc_deploy.bench.measure import bench_bundles, bundle_and_backend
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.schedule import FULL, tprr

ROUNDS = 2
BATCHES = (1, 3)
RUNS = ("plan", "full")


@pytest.fixture(scope="module")
def facts(mixed: Made, multistep: Made) -> dict[str, Any]:
    """Two bundles of other plans, solvers and depths, with two batch sizes."""
    against = [f"{multistep.bundle}:onnxruntime"]
    found = bench_bundles(mixed.bundle, None, against, batch_sizes=(*BATCHES, BATCHES[0]), rounds=ROUNDS)
    return json.loads(json.dumps(found))  # as a program reads it


def test_every_bundle_runs_with_every_batch_size(facts: dict[str, Any], mixed: Made, multistep: Made) -> None:
    assert facts["rounds"] == ROUNDS
    assert all(facts[key] for key in ("hardware", "made_by", "date"))
    found = [(contender["bundle"], contender["batch_size"]) for contender in facts["contenders"]]
    assert found == [(str(made.bundle), batch) for batch in BATCHES for made in (mixed, multistep)]
    assert all(contender["backend"] == "onnxruntime" for contender in facts["contenders"])
    assert all(contender["backend_version"] for contender in facts["contenders"])
    assert all(contender["options"] == {"provider": "cpu", "threads": 1} for contender in facts["contenders"])


def test_figures_agree_with_each_other(facts: dict[str, Any]) -> None:
    for number, contender in enumerate(facts["contenders"]):
        assert tuple(contender["runs"]) == RUNS
        for run in contender["runs"].values():
            assert 0 < run["p50_ms"] <= run["p90_ms"] <= run["p99_ms"]
            assert run["iqr_ms"] >= 0
            assert run["images_per_s"] == pytest.approx(1e3 * contender["batch_size"] / run["p50_ms"], rel=1e-3)
            assert run["ratio_to_first"]["median"] > 0
            if number % 2 == 0:
                assert run["ratio_to_first"] == {"median": 1, "iqr": 0}
        assert contender["runs"]["full"]["ratio_to_full"] == {"median": 1, "iqr": 0}
        assert contender["runs"]["plan"]["ratio_to_full"]["median"] > 0
        assert 0 < contender["host_share"]["median"] < 1
        start = contender["start_up"]
        assert 0 < start["load_s"] < start["first_step_s"]
        assert 10 < start["resident_mib"] <= start["peak_mib"]
        assert start["torch_imported"] is False


def test_graphs_are_timed_as_often_as_the_schedule_says(facts: dict[str, Any]) -> None:
    calls = {"full": 5, "cached-1": 2, "cached-2": 3, "solver": 10}
    assert {name: row["calls"] for name, row in facts["contenders"][0]["variants"].items()} == calls
    variants = tprr(steps=8, **MULTISTEP["schedule"]).variants
    calls = {"full": variants.count(FULL), "cached-1": variants.count(1), "cached-2": variants.count(2), "solver": 8}
    assert {name: row["calls"] for name, row in facts["contenders"][1]["variants"].items()} == calls


def test_the_clock_sees_every_call_while_it_is_on_and_changes_nothing(mixed: Made) -> None:
    clock = Clock()
    plain, watched = Pipeline(mixed.bundle), Pipeline(mixed.bundle, watch=clock.watch)
    made = []
    for graphs, calls in ((True, {"full": 5, "cached-1": 2, "cached-2": 3, "solver": 10}), (False, {})):
        on_step = step_by_step if graphs else None
        request = functools.partial(watched, class_labels=[3], seed=5, on_step=on_step)
        run = clock.timed(lambda request=request: made.append(request()), graphs=graphs)
        assert {name: len(times) for name, times in run.calls_ms.items()} == calls
        assert sum(map(sum, run.calls_ms.values())) <= run.wall_ms
    expected = plain(class_labels=[3], seed=5).latents
    for result in made:
        assert (result.latents == expected).all()


def test_the_command_prints_what_can_be_pasted(pixel: MadeByCommands) -> None:
    answer = run_cli("bench", pixel.bundle, "--rounds", 1, "--against", pixel.bundle)
    assert answer.code == 0, answer.err
    first, *lines = answer.out.splitlines()
    assert "onnxruntime " in first
    assert first.endswith("1 rounds in turn")
    tables: list[list[list[str]]] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    assert [len(table) - 2 for table in tables] == [4, 6, 2]
    for head, rule, *rows in tables:
        assert all(set(cell) <= set("-:") for cell in rule)
        for row in rows:
            assert len(row) == len(rule) == len(head)
            assert row[:2] == [f"{pixel.bundle}:onnxruntime", str(PIXEL_BATCH)]
    assert tables[0][0][-1] == "to first (IQR)"
    assert tables[0][0][2:8] == ["precision", "run", "full + cached", "p50 ms", "IQR ms", "worst ms"]
    assert [row[2:5] for row in tables[0][2:4]] == [["fp32", "plan", "5 + 4"], ["fp32", "full", "9 + 0"]]
    assert "no efficiency for solver: its FLOPs are not counted" in lines


def test_which_bundle_and_backend_are_meant(tmp_path: Path) -> None:
    assert bundle_and_backend("engines/digits") == (Path("engines/digits"), None)
    assert bundle_and_backend("engines/digits:openvino") == (Path("engines/digits"), "openvino")
    (tmp_path / "night:2").mkdir()
    assert bundle_and_backend(f"{tmp_path}/night:2") == (tmp_path / "night:2", None)
    assert bundle_and_backend(f"{tmp_path}/night:2:openvino") == (tmp_path / "night:2", "openvino")


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("other", "code", "message"),
    [
        ("{folder}/nowhere", errors.BundleError, "{folder}/nowhere"),
        ("{folder}/bundle:abacus", errors.UsageError, "{folder}/bundle: unknown backend 'abacus'; known: onnxruntime"),
        ("{folder}/bundle", errors.BundleError, "no onnxruntime engine built there; build one with: tc-deploy build"),
        ("{folder}/bundle:", errors.UsageError, "unknown backend ''"),
    ],
)
def test_what_cannot_be_compared(
    mixed: Made, tmp_path: Path, other: str, code: type[errors.TcDeployError], message: str
) -> None:
    shutil.rmtree(mixed.copy(tmp_path / "bundle") / "onnxruntime")
    before = snapshot(tmp_path)
    answer = run_cli("bench", mixed.bundle, "--against", other.format(folder=tmp_path))
    assert message.format(folder=tmp_path) in answer.error
    assert (answer.code, answer.out) == (code.exit_code, "")
    assert snapshot(tmp_path) == before


def test_a_batch_that_a_bundle_does_not_have(mixed: Made, pixel: MadeByCommands) -> None:
    fixed = f"{pixel.bundle}: this bundle was exported for a batch of exactly {PIXEL_BATCH}, found"
    for words, found in (
        ((pixel.bundle, "--batch-size", PIXEL_BATCH, "--batch-size", 3), 3),
        ((mixed.bundle, "--against", pixel.bundle), 1),
    ):
        answer = run_cli("bench", *words)
        assert f"{fixed} {found}" in answer.error
        assert (answer.code, answer.out) == (errors.UsageError.exit_code, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--batch-size", 0), "'--batch-size': 0 is not in the range 1<=x"), (("--rounds", 0), "--rounds")],
)
def test_options_out_of_range(mixed: Made, options: tuple[object, ...], message: str) -> None:
    answer = run_cli("bench", mixed.bundle, *options)
    assert message in answer.error
    assert (answer.code, answer.out) == (errors.UsageError.exit_code, "")
