"""``tc-deploy serve`` as a process: how it starts, how it ends, and what its own description of itself is worth."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from bundles import MadeByCommands, run_cli
from serving.served import PATIENT_S, Served, wait_until
from serving.test_http import INTERNALS


class Process:
    """A server that the command line started."""

    def __init__(self, *words: object, **environment: str) -> None:
        command = [sys.executable, "-m", "tc_deploy", "serve", *map(str, words), "--port", "0"]
        self.running = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
        self.log: list[dict[str, object]] = []
        self.url = str(self.line("listening")["url"])

    def line(self, event: str) -> dict[str, object]:
        """The next line of its log that says this."""
        assert self.running.stderr is not None
        for text in self.running.stderr:
            self.log.append(json.loads(text))
            if self.log[-1]["event"] == event:
                return self.log[-1]
        raise AssertionError(f"it never said {event}: {self.log}")

    def end(self) -> int:
        """Its exit code; what it said till then is in the log."""
        assert self.running.stderr is not None
        for text in self.running.stderr:
            self.log.append(json.loads(text) if text.startswith("{") else {"event": text})
        self.running.stderr.close()
        return self.running.wait(PATIENT_S)


@pytest.fixture
def process(pixel: MadeByCommands) -> Iterator[Process]:
    started = Process(pixel.bundle, "--slots", 2, "--queue", 6)
    with started.running:  # which closes its stream
        yield started
        started.running.kill()


def ask(url: str, seed: int) -> int:
    body = {"prompt": "7", "seed": seed, "n": 2}
    try:
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=PATIENT_S).status_code
    except httpx.TransportError:
        return 0


def test_sigterm_under_load_loses_no_accepted_request_and_exits_0(process: Process) -> None:
    process.line("ready")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, process.url, seed) for seed in range(40)]
        wait_until(lambda: sum(one.done() for one in asked) >= 4, "the first answers")
        process.running.send_signal(signal.SIGTERM)
        statuses = [one.result() for one in asked]
    assert process.end() == 0
    # Accepted ones are answered with pictures; later ones are refused, or find the door closed.
    assert set(statuses) <= {200, 503, 0}
    assert statuses.count(200) >= 4
    logged = [line["status"] for line in process.log if line["event"] == "request"]
    assert logged.count(200) == statuses.count(200)
    assert 499 not in logged
    order = [line["event"] for line in process.log]
    assert order.index("draining") < order.index("closed")


def test_ctrl_c_ends_in_order_and_says_so(process: Process) -> None:
    process.line("ready")
    assert httpx.get(f"{process.url}/readyz").status_code == 200
    process.running.send_signal(signal.SIGINT)
    assert process.end() == 130
    assert process.log[-1]["event"] in ("closed", "error: interrupted\n", "interrupted\n", "error: cancelled\n")


def test_sighup_loads_the_bundles_anew(process: Process) -> None:
    process.line("ready")
    process.running.send_signal(signal.SIGHUP)
    process.line("replaced")
    assert ask(process.url, 0) == 200
    process.running.send_signal(signal.SIGTERM)
    assert process.end() == 0


def test_what_cannot_be_served_ends_it_with_the_error_s_own_code(
    pixel: MadeByCommands, mixed: MadeByCommands, tmp_path: Path
) -> None:
    answer = run_cli("serve", tmp_path / "nothing", "--port", 0)
    assert (answer.code, "nothing" in answer.error) == (5, True)
    answer = run_cli("serve", mixed.bundle, "--port", 0)
    assert answer.code == 2
    assert "makes latents, no pictures" in answer.error
    answer = run_cli("serve", pixel.bundle, "--port", 0, "--slots", 1)
    assert answer.code == 2
    assert "slots must be at least 2" in answer.error
    answer = run_cli("serve", pixel.bundle, pixel.bundle, "--port", 0)
    assert answer.code == 2
    assert "has the name bundle too" in answer.error


def test_a_port_that_is_taken_is_said_in_one_line(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=0) as server:
        answer = run_cli("serve", pixel.bundle, "--port", server.socket.getsockname()[1])
    assert answer.code == 8
    assert "cannot be listened at" in answer.error


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_no_client_could_send_is_refused(
    pixel: MadeByCommands, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TC_DEPLOY_API_KEY", key)
    answer = run_cli("serve", pixel.bundle, "--port", 0)
    assert (answer.code, "TC_DEPLOY_API_KEY must be printable ASCII" in answer.error) == (2, True)


@pytest.mark.slow
def test_whatever_the_schema_allows_and_whatever_it_does_not_is_never_a_defect(pixel: MadeByCommands) -> None:
    """schemathesis against the description that the server gives of itself."""
    import schemathesis

    with Served({"pixel": pixel.bundle}, slots=2, queue=16) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        counts: dict[int, int] = {}

        def check(response: object, case: object) -> None:
            status, text = response.status_code, response.text  # type: ignore[attr-defined]
            counts[status] = counts.get(status, 0) + 1
            assert status < 500
            assert status < 400 or not INTERNALS.search(text)
            assert status < 400 or re.fullmatch(r"[\x20-\x7e]*", text) or json.loads(text)

        from hypothesis import HealthCheck, given, settings

        for operation in schema.get_all_operations():
            api = operation.ok()
            for mode in schemathesis.GenerationMode:

                @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
                @given(case=api.as_strategy(generation_mode=mode))
                def fuzz(case: schemathesis.Case) -> None:
                    check(case.call(base_url=server.url), case)

                try:
                    fuzz()
                except Exception as error:
                    if type(error).__name__ != "Unsatisfiable":
                        raise
        # Few bodies at random name a label that the model has.
        assert counts.get(200, 0) > 3
        assert counts.get(400, 0) > 20
        wait_until(lambda: server.engine.samples == (0, 0), "the end of all orders")
        assert server.ask(prompt="7").status_code == 200


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_memory_behind(process: Process) -> None:
    """In the server's own process; its clients are in this one."""
    process.line("ready")
    ending = threading.Thread(target=process.end)  # which reads what it says, so that it never waits for a reader
    ending.start()

    def resident_pages() -> int:
        return int(Path(f"/proc/{process.running.pid}/statm").read_text(encoding="ascii").split()[1])

    def many(count: int) -> None:
        with httpx.Client(base_url=process.url, timeout=PATIENT_S) as client, ThreadPoolExecutor(4) as pool:
            asked = pool.map(
                lambda seed: client.post("/v1/images/generations", json={"prompt": "7", "seed": seed}).status_code,
                range(count),
            )
            assert set(asked) == {200}

    many(2_000)
    before, start_s = resident_pages(), time.monotonic()
    many(10_000)
    grown = resident_pages() / before - 1
    print(f"10,000 requests in {time.monotonic() - start_s:.0f} s, {grown:.2%} more memory")
    process.running.send_signal(signal.SIGTERM)
    ending.join(PATIENT_S)
    assert grown < 0.01
