"""The server as clients see it: pictures, refusals, health; on a real socket, with OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from bundles import MadeByCommands
from numpy.typing import NDArray
from PIL import Image
from serving.served import Served, wait_until

import tc_deploy
from tc_deploy.errors import BackendError
from tc_deploy.serving.engine import State

SLOTS, QUEUE = 2, 2
KEY = "sesame"
ROUNDING = 1
"""Levels by which a picture may differ that was computed in another batch."""
INTERNALS = re.compile(r"tc_deploy|Traceback|\.py\b|/tmp|/home|site-packages|File \"")


@pytest.fixture(scope="module")
def served(pixel: MadeByCommands) -> Iterator[Served]:
    """F c1 F c1 F c1 F c1 F, pictures of 8x8, ten classes; tests leave it idle."""
    with Served({"pixel": pixel.bundle}, slots=SLOTS, queue=QUEUE) as server:
        yield server


@pytest.fixture(scope="module")
def pictures(pixel: MadeByCommands) -> dict[tuple[int, int, bool], NDArray[np.uint8]]:
    """By label, seed and whether every step is full, what the pipeline makes."""
    made = {}
    with tc_deploy.load(pixel.bundle) as pipeline:
        for label, seed, full in ((7, 5, False), (7, 6, False), (7, 7, False), (7, 5, True), (3, 9, False)):
            images = pipeline(class_labels=[label], seed=seed, full=full).images
            assert images is not None
            made[label, seed, full] = images[0]
    return made


def picture_of(b64_json: str | None) -> NDArray[np.uint8]:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def assert_same(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= ROUNDING


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert not INTERNALS.search(response.text)
    fields: dict[str, Any] = response.json()["error"]
    assert fields["request_id"] == response.headers["x-request-id"]
    return fields


# ---------------------------------------------------------------------------------------------------------- pictures


def test_openai_s_client_gets_the_pipeline_s_pictures(
    served: Served, pictures: dict[tuple[int, int, bool], NDArray[np.uint8]]
) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["pixel"]
    answer = client.images.generate(model="pixel", prompt="7", n=3, size="auto", extra_body={"seed": 5})
    assert answer.data is not None
    for number, picture in enumerate(answer.data):
        assert_same(picture_of(picture.b64_json), pictures[7, 5 + number, False])
    fields = answer.model_extra or {}
    assert (fields["seed"], fields["steps_full"], fields["steps_cached"]) == (5, 5, 4)
    assert (fields["model"], answer.size, answer.quality) == ("pixel", "8x8", "standard")

    full = client.images.generate(model="pixel", prompt="7", quality="hd", extra_body={"seed": 5})
    assert full.data is not None
    assert_same(picture_of(full.data[0].b64_json), pictures[7, 5, True])
    assert np.abs(pictures[7, 5, True].astype(int) - pictures[7, 5, False]).max() > ROUNDING
    assert (full.model_extra or {})["steps_full"] == 9

    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model="pixel", prompt="a cat")
    assert refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="other", prompt="7")


def test_a_seed_that_is_drawn_is_told_and_gives_the_same_again(served: Served) -> None:
    first = served.ask(class_label=2).json()
    again = served.ask(class_label=2, seed=first["seed"]).json()
    assert first["data"] == again["data"]
    assert served.ask(class_label=2).json()["seed"] != first["seed"]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_that_is_asked_for(served: Served, output_format: str) -> None:
    answer = served.ask(prompt="7", output_format=output_format).json()
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        assert (image.format, image.size) == (output_format.upper(), (8, 8))


def test_a_stream_shows_every_step_and_as_many_previews_as_asked(
    served: Served, pictures: dict[tuple[int, int, bool], NDArray[np.uint8]]
) -> None:
    body = {"prompt": "3", "seed": 9, "stream": True, "partial_images": 2}
    with served.client() as client, client.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds[0] == "accepted"
    assert kinds[-2:] == ["completed", "done"]
    assert [event["step"] for event in events[1:-2]] == list(range(1, 9))
    assert [event["step"] for event in events if event["type"].endswith("partial_image")] == [3, 6]
    assert_same(picture_of(events[-2]["b64_json"]), pictures[3, 9, False])


def test_many_clients_at_once_each_get_their_own_picture(
    served: Served, pictures: dict[tuple[int, int, bool], NDArray[np.uint8]]
) -> None:
    asked = [(7, 5, False), (7, 6, False), (3, 9, False), (7, 5, True)] * 3

    def patient(one: tuple[int, int, bool]) -> NDArray[np.uint8]:
        while True:
            response = served.ask(class_label=one[0], seed=one[1], quality="hd" if one[2] else "standard")
            if response.status_code != 429:
                return picture_of(response.json()["data"][0]["b64_json"])
            assert int(response.headers["retry-after"]) >= 1
            time.sleep(0.02)

    with ThreadPoolExecutor(len(asked)) as pool:
        for one, found in zip(asked, pool.map(patient, asked), strict=True):
            assert_same(found, pictures[one])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "7", "seeds": 1}, "seeds"),
        ({"prompt": "7", "n": 0}, "n"),
        ({"prompt": "7", "n": 11}, "n"),
        ({"prompt": "7", "n": SLOTS + QUEUE + 1}, "n"),
        ({"prompt": "7", "n": "2"}, "n"),
        ({"prompt": "7", "n": 1.5}, "n"),
        ({"prompt": "7", "size": "16x16"}, "size"),
        ({"prompt": "7", "size": "large"}, "size"),
        ({"prompt": "7", "quality": "ultra"}, "quality"),
        ({"prompt": "7", "response_format": "url"}, "response_format"),
        ({"prompt": "7", "output_format": "exe"}, "output_format"),
        ({"prompt": "10"}, "prompt"),
        ({"prompt": "-1"}, "prompt"),
        ({"prompt": "٣"}, "prompt"),
        ({"prompt": "a cat"}, "prompt"),
        ({"prompt": "7" * 5000}, "prompt"),
        ({"class_label": 10}, "class_label"),
        ({"class_label": -1}, "class_label"),
        ({"class_label": True}, "class_label"),
        ({"class_label": 2**40}, "class_label"),
        ({"class_label": 1, "prompt": "1"}, "class_label"),
        ({}, "class_label"),
        ({"prompt": "7", "negative_prompt": "blurry"}, "negative_prompt"),
        ({"prompt": "7", "guidance_scale": 3.0}, "guidance_scale"),
        ({"prompt": "7", "guidance_scale": -1}, "guidance_scale"),
        ({"prompt": "7", "seed": -1}, "seed"),
        ({"prompt": "7", "seed": 2**64}, "seed"),
        ({"prompt": "7", "partial_images": 2}, "partial_images"),
        ({"prompt": "7", "partial_images": 51, "stream": True}, "partial_images"),
        ({"prompt": ["7"]}, "prompt"),
        ({"prompt": "7", "user": 7}, "user"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_field_s_name(served: Served, body: dict[str, Any], param: str) -> None:
    fields = error_of(served.ask(**body), 400)
    assert (fields["param"], fields["type"]) == (param, "invalid_request_error")
    assert served.engine.samples == (0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"7"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": "7", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "7", "guidance_scale": NaN}',
        b"[" * 30_000,
        b'{"prompt": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_request_is_refused(served: Served, content: bytes) -> None:
    with served.client() as client:
        response = client.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    error_of(response, 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
def test_another_type_of_content_is_refused(served: Served, content_type: str) -> None:
    """A page from elsewhere could send these without being asked for permission."""
    with served.client() as client:
        response = client.post(
            "/v1/images/generations", content=b'{"prompt": "7"}', headers={"content-type": content_type}
        )
    error_of(response, 400)


def test_a_long_body_is_refused_before_it_has_come(served: Served) -> None:
    error_of(served.ask(prompt="7" * 70_000), 413)
    host, port = served.socket.getsockname()
    for head in (b"Content-Length: 100000000", b"Transfer-Encoding: chunked"):
        with socket.create_connection((host, port), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + head
                + b"\r\n\r\n"
            )
            if b"chunked" in head:
                connection.sendall(b"10001\r\n" + b"7" * 0x10001 + b"\r\n")
            assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_unknown_routes_and_methods_are_errors_of_the_same_shape(served: Served) -> None:
    with served.client() as client:
        error_of(client.get("/v1/nothing"), 404)
        error_of(client.get("/v1/images/generations"), 405)
        error_of(client.get("/static/../app.py"), 404)
        error_of(client.post("/admin/reload"), 404)


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    with served.held() as go, ThreadPoolExecutor(SLOTS + QUEUE) as pool:
        waiting: list[Future[httpx.Response]] = [pool.submit(served.ask, prompt="7") for _ in range(SLOTS + QUEUE)]
        wait_until(lambda: sum(served.engine.samples) == SLOTS + QUEUE, "a full queue")
        response = served.ask(prompt="7")
        assert error_of(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        # Health answers all the same.
        with served.client() as client:
            assert client.get("/readyz").status_code == 200
        go.set()
        assert {future.result().status_code for future in waiting} == {200}


def test_a_client_that_hangs_up_frees_its_place(served: Served) -> None:
    with served.held() as go:
        host, port = served.socket.getsockname()
        for body in (b'{"prompt": "7"}', b'{"prompt": "7", "stream": true}'):
            connection = socket.create_connection((host, port), timeout=30)
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            wait_until(lambda: sum(served.engine.samples) > 0, "the order")
            connection.close()
        wait_until(lambda: served.engine._cancelled, "the hang-up")
        go.set()
        wait_until(lambda: served.engine.samples == (0, 0), "a free place")
    assert served.ask(prompt="7").status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/ima", b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_client_that_hangs_up_before_it_has_asked_harms_nobody(served: Served, sent: bytes) -> None:
    connection = socket.create_connection(served.socket.getsockname(), timeout=30)
    connection.sendall(sent)
    connection.close()
    assert served.ask(prompt="7").status_code == 200
    assert served.engine.samples == (0, 0)


# ------------------------------------------------------------------------------------------- health, keys, failures


def test_metrics_count_what_happened_and_say_nothing_of_who_asked(served: Served) -> None:
    def value(line: str, text: str) -> float:
        found = [each for each in text.splitlines() if each.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else 0.0

    done = 'tc_deploy_requests_total{model="pixel",status="200"}'
    full = 'tc_deploy_tick_seconds_count{model="pixel",variant="full"}'
    with served.client() as client:
        before = client.get("/metrics").text
        served.ask(prompt="7", seed=424242, user="somebody")
        after = client.get("/metrics").text
    assert value(done, after) == value(done, before) + 1
    assert value(full, after) == value(full, before) + 5
    assert value('tc_deploy_ready{model="pixel"}', after) == 1
    assert "424242" not in after
    assert "somebody" not in after


def test_a_key_is_asked_for_and_only_where_it_must_be(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=0, key=KEY) as server, server.client() as client:
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}):
            for path in ("/v1/models", "/v1/nothing"):
                response = client.get(path, headers=shown)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            assert client.get("/readyz", headers=shown).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_an_id_that_a_client_gives_is_kept_if_it_is_one(served: Served) -> None:
    with served.client() as client:
        assert client.get("/livez", headers={"x-request-id": "a-7.b"}).headers["x-request-id"] == "a-7.b"
        assert client.get("/livez", headers={"x-request-id": "a b<script>"}).headers["x-request-id"] != "a b<script>"


def test_a_request_that_takes_too_long_ends_and_its_neighbours_do_not(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2, timeout_s=0.6) as server:
        with server.held() as go, ThreadPoolExecutor(1) as pool:
            late = pool.submit(server.ask, prompt="7")
            time.sleep(0.8)
            go.set()
            assert error_of(late.result(), 504)["code"] == "late"
        assert server.ask(prompt="7").status_code == 200


def test_a_picture_that_is_not_finite_fails_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    start = served.engine.maker.slots.start

    def spoil(number: int, sample: Any) -> None:
        if sample.given["class_labels"] == 4:
            sample.noise[...] = np.nan
        start(number, sample)

    monkeypatch.setattr(served.engine.maker.slots, "start", spoil)
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(served.ask, prompt="4"), pool.submit(served.ask, prompt="7", seed=1)
        assert "not finite" in error_of(bad.result(), 400)["message"]
        assert good.result().status_code == 200


def test_a_device_that_fails_ends_readiness_and_all_requests(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as server:
        with server.held() as go, ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(server.ask, prompt="7") for _ in range(3)]
            wait_until(lambda: sum(server.engine.samples) == 3, "the orders")

            def fail(*_: Any) -> None:
                raise BackendError("the GPU at /dev/nvidia0 has fallen off the bus")

            server.engine.maker.slots._run_solver = fail  # type: ignore[method-assign, assignment]
            go.set()
            for future in waiting:
                error_of(future.result(), 503)
        error_of(server.ask(prompt="7"), 503)
        with server.client() as client:
            assert client.get("/readyz").status_code == 503
            assert client.get("/livez").status_code == 503
    [failure] = server.failures
    assert isinstance(failure, BackendError)


def test_draining_first_stops_being_ready_then_stops_taking_and_loses_nothing(pixel: MadeByCommands) -> None:
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as server, server.client() as client:
        server.fleet.close_door()
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        with server.held() as go, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.ask, prompt="7")
            wait_until(lambda: sum(server.engine.samples) == 1, "the order")
            server.fleet.drain()
            response = server.ask(prompt="7")
            assert error_of(response, 503)["code"] == "draining"
            go.set()
            assert waiting.result().status_code == 200
        wait_until(lambda: server.fleet.is_drained, "the end")
        assert server.engine.state is State.CLOSED


def test_a_bundle_is_replaced_while_it_serves(pixel: MadeByCommands) -> None:
    options = {"admin_key": "open"}
    with Served({"pixel": pixel.bundle}, slots=2, queue=2, **options) as server, server.client() as client:
        old = server.engine
        error_of(client.post("/admin/reload"), 401)
        with server.held() as go, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.ask, prompt="7", seed=3)
            wait_until(lambda: sum(old.samples) == 1, "the order")
            assert client.post("/admin/reload", headers={"Authorization": "Bearer open"}).status_code == 202
            wait_until(lambda: server.engine is not old, "the new engine")
            # The new one answers while the old one still has work.
            new = server.ask(prompt="7", seed=3)
            assert old.state is State.DRAINING
            go.set()
            assert waiting.result().json()["data"] == new.json()["data"]
        wait_until(lambda: old.state is State.CLOSED, "the old one's end")
        assert client.get("/readyz").status_code == 200
