"""What is reported of runs whose times are known."""

from __future__ import annotations

import pytest
from bundles import Made

from tc_deploy.bench.clock import Run
from tc_deploy.bench.report import host_share, runs_report, start_up_report, variants_report
from tc_deploy.plan import Plan, load_plan


def runs(*walls_ms: float) -> list[Run]:
    return [Run(wall_ms=wall_ms, calls_ms={}) for wall_ms in walls_ms]


@pytest.fixture(scope="module")
def plan(mixed: Made) -> Plan:
    return load_plan(mixed.bundle)[0]


def test_whole_runs() -> None:
    first = {"plan": runs(10, 30, 20), "full": runs(40, 50, 60)}
    other = {"plan": runs(5, 60, 20), "full": runs(20, 100, 40)}
    found = runs_report(other, first, batch_size=4)
    assert found["plan"]["p50_ms"] == 20
    assert found["plan"]["images_per_s"] == 200
    assert found["plan"]["ratio_to_full"]["median"] == 0.5  # of 5/20, 60/100, 20/40
    assert found["plan"]["ratio_to_first"]["median"] == 1  # of 5/10, 60/30, 20/20
    assert found["full"]["ratio_to_full"] == {"median": 1, "iqr": 0}
    assert found["full"]["ratio_to_first"]["median"] == round(2 / 3, 4)  # of 20/40, 100/50, 40/60
    assert runs_report(first, first, batch_size=1)["plan"]["ratio_to_first"] == {"median": 1, "iqr": 0}


def test_the_hosts_share_is_what_no_graph_takes() -> None:
    calls = {"full": [20.0, 30.0], "solver": [10.0]}
    assert host_share([Run(wall_ms=80, calls_ms=calls)]) == {"median": 0.25, "iqr": 0}


def test_graphs_in_their_runs(plan: Plan) -> None:
    calls = {"full": [8.0, 8.0], "cached-1": [4.0], "cached-2": [2.0], "solver": [0.5, 0.5, 0.5, 0.5]}
    slow = {name: [10 * time for time in times] for name, times in calls.items()}
    found = variants_report([Run(wall_ms=30, calls_ms=calls), Run(wall_ms=300, calls_ms=slow)], plan, rows=6)
    assert list(found) == ["full", "cached-1", "cached-2", "solver"]
    assert [row["calls"] for row in found.values()] == [2, 1, 1, 4]
    assert [row["time_ratio"] for row in found.values()] == [1, 0.5, 0.25, 0.0625]
    assert found["full"]["gflops"] == pytest.approx(6e-9 * plan.cost.full_flops, abs=1e-4)
    assert found["full"]["compile_efficiency"] == found["full"]["flops_ratio"] == 1
    for name, flops in zip(("cached-1", "cached-2"), plan.cost.cached_flops, strict=True):
        row = found[name]
        assert row["flops_ratio"] == round(flops / plan.cost.full_flops, 4)
        assert row["compile_efficiency"] == pytest.approx(row["flops_ratio"] / row["time_ratio"], abs=1e-3)
        assert row["note"] is None
    for absent in ("gflops", "flops_ratio", "compile_efficiency"):
        assert found["solver"][absent] is None
    assert found["solver"]["note"] == "its FLOPs are not counted"


def test_a_step_that_keeps_nothing_has_no_efficiency(plan: Plan) -> None:
    keep_counts = ((0, 0, 0), plan.keep_counts(2))
    plan = plan.model_copy(update={"cache": plan.cache.model_copy(update={"keep_counts": keep_counts})})
    calls = {"full": [8.0], "cached-1": [4.0], "cached-2": [2.0], "solver": [0.5]}
    found = variants_report([Run(wall_ms=30, calls_ms=calls)], plan, rows=2)
    assert found["cached-1"]["compile_efficiency"] is None
    assert "keeps no token" in found["cached-1"]["note"]
    assert found["cached-1"]["time_ratio"] == 0.5
    assert found["cached-2"]["compile_efficiency"] > 0


def test_fresh_processes() -> None:
    def process(load_s: float, torch_imported: bool) -> dict[str, object]:
        sizes = {"first_step_s": 2 * load_s, "resident_mib": 100.0, "peak_mib": 110.0}
        return {"load_s": load_s, "torch_imported": torch_imported, **sizes}

    found = start_up_report([process(0.5, False), process(9.0, True), process(0.7, False)])
    expected = {"load_s": 0.7, "first_step_s": 1.4, "resident_mib": 100.0, "peak_mib": 110.0}
    assert found == expected | {"torch_imported": True}
