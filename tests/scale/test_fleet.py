"""Many machines under a simulated clock: one of them is what a single machine is; many share what comes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from serving.test_scheduler import CALLS, CYCLE, scheduler

from tc_deploy.serving.simulation import costs_of, poisson_arrivals, simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "estimate_fleet.py"


@pytest.fixture(scope="module")
def fleet() -> Any:
    spec = importlib.util.spec_from_file_location("estimate_fleet", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimate_fleet"] = module
    spec.loader.exec_module(module)
    return module


def test_one_machine_is_what_the_simulation_of_one_says(fleet: Any) -> None:
    arrivals = [(at_s, CYCLE) for at_s in poisson_arrivals(0.2, 300, seed=1)]
    found = fleet.simulate_fleet([scheduler(queue=1000)], arrivals, costs_of(CALLS), seed=0)
    expected = simulate(scheduler(queue=1000), arrivals, costs_of(CALLS))
    assert found == expected


def test_a_machine_whose_queue_is_full_refuses(fleet: Any) -> None:
    found = fleet.simulate_fleet([scheduler(slots=2, queue=1)], [(0.0, CYCLE)] * 5, costs_of(CALLS), seed=0)
    assert (len(found.latency_s), found.refused) == (3, 2)


def test_twice_as_many_machines_serve_twice_as_much_and_nobody_waits_longer(fleet: Any) -> None:
    def traffic(machines: int) -> Any:
        arrivals = [(at_s, CYCLE) for at_s in poisson_arrivals(0.15 * machines, 400 * machines, seed=2)]
        return fleet.simulate_fleet([scheduler(queue=100) for _ in range(machines)], arrivals, costs_of(CALLS), seed=0)

    one, many = traffic(1), traffic(16)
    assert many.throughput == pytest.approx(16 * one.throughput, rel=0.1)
    assert many.refused == 0
    # Who may choose between two waits less.
    assert many.latency_at(99) < one.latency_at(99)
