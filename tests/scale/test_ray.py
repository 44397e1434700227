"""Ray itself: replicas, one of which is killed under load, and rows that are spread. ``make ray`` installs it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bundles import MadeByCommands, run_cli
from PIL import Image
from serving.served import PATIENT_S, wait_until

from tc_deploy.scale.ray_app import application
from tc_deploy.scale.rows import RESULTS

# Ray's own warnings are its own.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
APPLICATION = f"pixel{os.getpid()}"
IMAGES = "/v1/images/generations"
SLOTS, QUEUE = 2, 2
STORE_BYTES = 80 * 2**20
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        # Its workers import what this process does.
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        library = pytest.importorskip("ray", reason="Ray is needed: make ray")
        library.init(num_cpus=4, include_dashboard=False, object_store_memory=STORE_BYTES, log_to_driver=False)
        yield library
        library.shutdown()


@pytest.fixture(scope="module")
def url(ray: Any, pixel: MadeByCommands) -> Iterator[str]:
    """Two replicas, and where they are reached."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {"bundles": str(pixel.bundle), "slots": SLOTS, "queue": QUEUE, "replicas": 2, "watchdog_s": 30}
    serve.run(application(settings), name=APPLICATION)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def alone(pixel: MadeByCommands, tmp_path_factory: pytest.TempPathFactory) -> dict[int, np.ndarray[Any, Any]]:
    """The pictures of label 7 by seed, as ``generate`` makes them."""
    folder = tmp_path_factory.mktemp("alone")
    words = ("generate", pixel.bundle, "--class-label", 7, "-n", 8, "-o", folder / "x.png")
    assert run_cli(*words).code == 0
    return {seed: pixels((folder / f"x-{seed}.png").read_bytes()) for seed in range(8)}


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture, int)


def replicas() -> set[int]:
    """The processes of the application."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and f"Replica:{APPLICATION}:".encode() in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def is_right(response: httpx.Response, picture: np.ndarray[Any, Any]) -> bool:
    (item,) = response.json()["data"]
    return bool(np.abs(pixels(base64.b64decode(item["b64_json"])) - picture).max() <= 1)


def test_one_of_two_replicas_is_killed_and_nobody_is_answered_wrongly(
    url: str, alone: dict[int, np.ndarray[Any, Any]]
) -> None:
    before, statuses, answered = replicas(), [], threading.Semaphore(0)
    assert len(before) == 2

    def ask(number: int) -> bool:
        """Until there is a picture, as clients do; a request is the same whoever answers it."""
        end_s = time.monotonic() + PATIENT_S
        while time.monotonic() < end_s:
            body = {"prompt": "7", "seed": number % 8}
            response = httpx.post(url + IMAGES, json=body, timeout=PATIENT_S)
            statuses.append(response.status_code)
            if response.status_code == 200:
                answered.release()
                return is_right(response, alone[number % 8])
            time.sleep(0.1)
        return False

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(300)]
        for _ in range(60):
            assert answered.acquire(timeout=PATIENT_S)
        os.kill(min(before), signal.SIGKILL)
        left = sum(not one.done() for one in asked)
        assert all(one.result() for one in asked)
    assert left > 100, "it was killed under load"
    assert set(statuses) <= {200, 429, 500, 503}
    # What the dead one had taken, and little more: the proxy learns at once that it is gone.
    assert statuses.count(500) + statuses.count(503) <= 4 * (SLOTS + QUEUE)
    wait_until(lambda: len(replicas() - {min(before)}) == 2, "another replica", PATIENT_S * 5)
    assert httpx.get(f"{url}/readyz", timeout=PATIENT_S).status_code == 200


def test_more_than_both_hold_is_refused_with_a_time_to_come_back(url: str) -> None:
    def ask(seed: int) -> httpx.Response:
        body = {"prompt": "7", "seed": seed, "n": SLOTS, "quality": "hd"}
        return httpx.post(url + IMAGES, json=body, timeout=PATIENT_S)

    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(ask, range(40)))
    assert {response.status_code for response in responses} == {200, 429}
    assert all(int(response.headers["retry-after"]) >= 1 for response in responses if response.status_code == 429)


def test_an_application_that_is_deleted_answers_what_it_had_taken(ray: Any, url: str) -> None:
    from ray import serve

    started, statuses = threading.Semaphore(0), []

    def ask_again_and_again(first: int) -> None:
        """Until nobody is there."""
        for seed in range(first, first + 10_000):
            started.release()
            body = {"prompt": "7", "seed": seed, "quality": "hd"}
            statuses.append(httpx.post(url + IMAGES, json=body, timeout=PATIENT_S).status_code)
            if statuses[-1] in (404, 503):
                return

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_again_and_again, 10_000 * number) for number in range(4)]
        for _ in range(40):
            assert started.acquire(timeout=PATIENT_S)
        serve.delete(APPLICATION)
        for one in asking:
            one.result()
    # Refused because it is gone, or because one replica had too many; nothing that was taken is lost.
    assert set(statuses) <= {200, 404, 429, 503}
    assert statuses.count(200) > 20
    wait_until(lambda: not replicas(), "the end of the replicas", PATIENT_S * 5)


def command(pixel: MadeByCommands, file: Path, folder: Path) -> list[str]:
    words = ["--ray", "--workers", "2", "--batch-size", "2", "--json"]
    program = [sys.executable, "-m", "tc_deploy", "generate", str(pixel.bundle)]
    return [*program, "--input", str(file), "-o", str(folder), *words]


def test_rows_are_spread_and_a_job_that_was_killed_goes_on(
    pixel: MadeByCommands, alone: dict[int, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": "7", "seed": number % 8}) for number in range(400)]
    rows[7] = '{"prompt": "seven"}'
    file, folder = tmp_path / "requests.jsonl", tmp_path / "out"
    file.write_text("\n".join(rows), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ENVIRONMENT
    first = subprocess.Popen(command(pixel, file, folder), env=environment, stdout=subprocess.DEVNULL)
    with first:
        journal = folder / RESULTS
        try:
            begun = lambda: first.poll() is not None or (journal.exists() and journal.stat().st_size)  # noqa: E731
            wait_until(begun, "a row", PATIENT_S * 5)
        finally:
            first.kill()
    made = journal.read_bytes().count(b"\n")
    assert 0 < made < 399, "it was killed in the middle"
    second = subprocess.run(
        command(pixel, file, folder),
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENT_S * 5,
        check=False,
    )
    assert second.returncode == 2, second.stderr
    facts = json.loads(second.stdout)
    assert (facts["made"] + facts["skipped"], facts["failed"]) == (399, [8])
    assert made <= facts["skipped"] + 1
    assert f"{file}:8: this model takes no text" in second.stderr
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["line"] for line in lines) == [line for line in range(1, 401) if line != 8]
    for line in lines:
        (name,) = line["files"]
        assert np.abs(pixels((folder / name).read_bytes()) - alone[(line["line"] - 1) % 8]).max() <= 1
