"""A server under load on purpose: the load generator of the examples, and traffic under a simulated clock."""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MadeByCommands, run_cli
from PIL import Image
from serving.served import Served, wait_until
from serving.test_scheduler import CALLS, CYCLE, scheduler

from tc_deploy.serving.simulation import costs_of, poisson_arrivals, simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "load_server.py"


@pytest.fixture(scope="module")
def load_server() -> Any:
    spec = importlib.util.spec_from_file_location("load_server", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["load_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def load(load_server: Any) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = load_server.main
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


@pytest.mark.slow
def test_64_clients_for_a_minute_get_their_own_picture_or_a_time_to_come_back(
    pixel: MadeByCommands, load_server: Any, tmp_path: Path
) -> None:
    with Served({"pixel": pixel.bundle}, slots=4, queue=16) as server:
        options = argparse.Namespace(
            url=server.url, prompt="7", clients=64, requests=10**6, seconds=60.0, bad=0.0, hang_up=0.0, seed=0
        )
        counts = asyncio.run(load_server.load(options))
        wait_until(lambda: server.engine.samples == (0, 0), "the end of all orders")
    assert counts.wrong == []  # another status, or a 429 without Retry-After
    assert counts.statuses.keys() == {"200", "429"}
    words = ("generate", pixel.bundle, "--class-label", 7, "-n", load_server.SEEDS, "-o", tmp_path / "x.png")
    assert run_cli(*words).code == 0
    assert counts.images.keys() == set(range(load_server.SEEDS))
    for seed, images in counts.images.items():
        with Image.open(tmp_path / f"x-{seed:02}.png") as picture:
            expected = np.asarray(picture, int)
        for image in images:
            with Image.open(io.BytesIO(base64.b64decode(image))) as picture:
                assert np.abs(np.asarray(picture, int) - expected).max() <= 1


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
