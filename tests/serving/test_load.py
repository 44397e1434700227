"""A server under load on purpose: the load generator of the examples, and traffic under a simulated clock."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import MadeByCommands
from serving.served import Served, wait_until
from serving.test_scheduler import CALLS, CYCLE, scheduler

from tc_deploy.serving.simulation import costs_of, poisson_arrivals, simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "load_server.py"


@pytest.fixture(scope="module")
def load() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("load_server", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["load_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int] = module.main
    return main


@pytest.mark.parametrize("kind", [["--rate", "30"], ["--rate", "20", "--bursts"], ["--clients", "16"]])
def test_whatever_comes_is_answered_rightly(
    pixel: MadeByCommands, load: Callable[[list[str]], int], kind: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=4) as server:
        arguments = [server.url, "--prompt", "7", "--seconds", "2.5", "--requests", "150", "--bad", "0.1"]
        assert load([*arguments, "--hang-up", "0.1", *kind]) == 0, capsys.readouterr().out
        wait_until(lambda: server.engine.samples == (0, 0), "the end of all orders")
        assert server.ask(prompt="7").status_code == 200
    assert "'200':" in capsys.readouterr().out


def test_only_this_machine_is_loaded(load: Callable[[list[str]], int]) -> None:
    with pytest.raises(SystemExit, match="only this machine's own address"):
        load(["http://192.0.2.1:8000", "--prompt", "7"])


def test_a_lone_request_takes_what_its_calls_take() -> None:
    traffic = simulate(scheduler(), [(3.0, CYCLE)], costs_of(CALLS))
    # F c c F c c: two full steps and four cached ones.
    assert traffic.latency_s == pytest.approx([2 * 5.0 + 4 * 1.25])
    assert (traffic.end_s, traffic.busy_s, traffic.refused) == (18.0, 15.0, 0)


def test_four_that_come_together_share_every_call() -> None:
    traffic = simulate(scheduler(), [(0.0, CYCLE)] * 4, costs_of(CALLS))
    assert traffic.latency_s == pytest.approx([2 * 8.0 + 4 * 2.0] * 4)
    assert traffic.useful_rows == traffic.rows == 24


def test_arrivals_come_at_their_rate() -> None:
    arrivals = poisson_arrivals(4.0, 4000, seed=0)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(1000, rel=0.05)
