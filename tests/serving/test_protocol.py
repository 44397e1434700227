"""A connection whose client is slow with its head is closed; whoever waits for an answer is not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from bundles import MadeByCommands
from serving.served import PATIENT_S, Served, wait_until

from tc_deploy.serving import protocol

HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
SHORT_S = 0.3


@pytest.fixture
def served(pixel: MadeByCommands, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(protocol, "HEAD_S", SHORT_S)
    with Served({"pixel": pixel.bundle}, slots=2, queue=2) as server:
        yield server


def connected(server: Served) -> socket.socket:
    return socket.create_connection(server.socket.getsockname(), timeout=PATIENT_S)


def answer(client: socket.socket) -> bytes:
    """Whatever comes until an answer's last byte, or the end."""
    found = b""
    while not found.endswith(b"alive"):
        part = client.recv(4096)
        if not part:
            return found
        found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"GET", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(served: Served, sent: bytes) -> None:
    with connected(served) as client:
        client.sendall(sent)
        start_s = time.monotonic()
        assert client.recv(1) == b""
        assert SHORT_S / 2 < time.monotonic() - start_s < PATIENT_S / 2


def test_a_byte_now_and_then_does_not_hold_a_connection(served: Served) -> None:
    with connected(served) as client:
        start_s = time.monotonic()
        try:
            for byte in HEAD * 100:
                client.sendall(bytes([byte]))
                time.sleep(SHORT_S / 10)
        except OSError:
            pass
        assert time.monotonic() - start_s < SHORT_S * 10


def test_nor_the_second_head_of_a_connection(served: Served) -> None:
    with connected(served) as client:
        client.sendall(HEAD + b"\r\n")
        assert answer(client).endswith(b"alive")
        client.sendall(HEAD)
        start_s = time.monotonic()
        assert client.recv(1) == b""
        assert time.monotonic() - start_s < 4  # sooner than uvicorn's own limit to idle connections


def test_who_waits_for_an_answer_is_not_cut_off(served: Served) -> None:
    statuses: list[int] = []
    with served.held() as go:
        asking = threading.Thread(target=lambda: statuses.append(served.ask(prompt="7", seed=0).status_code))
        asking.start()
        wait_until(lambda: served.engine.samples == (1, 0), "the request")
        time.sleep(SHORT_S * 3)
        go.set()
        asking.join(PATIENT_S)
    assert statuses == [200]
