"""Load for a server on this machine: arrivals at random or in bursts, hang-ups, duplicates, bad bodies.

python examples/load_server.py http://127.0.0.1:8000 --prompt 7 --rate 20 --seconds 30
python examples/load_server.py http://127.0.0.1:8000 --prompt 7 --clients 64 --seconds 60

With --rate clients come on their own, Poisson, or all of a second at once with --bursts; with --clients so many ask
again and again. Prints what was answered, how fast, and what was wrong: an answer that is no answer, a 429 without
Retry-After, two images of one seed that differ. Ends with 1 if anything was. Loopback only; bounded in number and time.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ipaddress
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

MOST_REQUESTS, MOST_SECONDS, MOST_CLIENTS = 20_000, 600.0, 256
SEEDS = 50
"""So few that many requests are duplicates."""
PATH = "/v1/images/generations"
BAD = (b"", b"{", b'{"prompt": 7}', b'{"prompt": "7", "n": 99}', b'{"nothing": 1}', b"\xff" * 1000, b" " * 100_000)
EXPECTED = {200, 429}
REFUSED = {400, 413}


@dataclass
class Counts:
    """What happened."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    latency_s: list[float] = field(default_factory=list)
    images: dict[int, set[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, prompt: str, draw: random.Random, shares: Any, counts: Counts) -> None:
    """One client, well-behaved or not."""
    kind = draw.random()
    if kind < shares.bad:
        response = await client.post(PATH, content=draw.choice(BAD), headers={"content-type": "application/json"})
        counts.statuses[f"bad body: {response.status_code}"] += 1
        if response.status_code not in REFUSED:
            counts.wrong.append(f"a bad body was answered with {response.status_code}")
        return
    seed, start_s = draw.randrange(SEEDS), time.perf_counter()
    body = {"prompt": prompt, "seed": seed}
    if kind < shares.bad + shares.hang_up:
        with contextlib.suppress(httpx.TimeoutException):
            await client.post(PATH, json=body, timeout=draw.uniform(0.001, 0.2))
        counts.statuses["hung up"] += 1
        return
    response = await client.post(PATH, json=body)
    counts.statuses[str(response.status_code)] += 1
    if response.status_code not in EXPECTED:
        counts.wrong.append(f"answered with {response.status_code}: {response.text[:200]}")
    elif response.status_code == 429:
        if int(response.headers.get("retry-after", 0)) < 1:
            counts.wrong.append("429 without Retry-After")
    else:
        counts.latency_s.append(time.perf_counter() - start_s)
        counts.images.setdefault(seed, set()).add(json.loads(response.text)["data"][0]["b64_json"])


async def load(options: argparse.Namespace) -> Counts:
    """All clients, until the time or the number is reached."""
    counts, draw = Counts(), random.Random(options.seed)  # noqa: S311 - for load, not for secrets
    end_s, left = time.monotonic() + options.seconds, options.requests
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.url, timeout=120, limits=limits) as client:

        async def again_and_again() -> None:
            nonlocal left
            while left > 0 and time.monotonic() < end_s:
                left -= 1
                await ask(client, options.prompt, draw, options, counts)

        if options.clients:
            await asyncio.gather(*(again_and_again() for _ in range(options.clients)))
            return counts
        async with asyncio.TaskGroup() as group:
            while left > 0 and time.monotonic() < end_s:
                burst = min(left, max(round(options.rate), 1)) if options.bursts else 1
                left -= burst
                for _ in range(burst):
                    group.create_task(ask(client, options.prompt, draw, options, counts))
                await asyncio.sleep(1.0 if options.bursts else draw.expovariate(options.rate))
    return counts


def check_loopback(url: str) -> None:
    """Refuse to load anything but this machine."""
    host = urlsplit(url).hostname or ""
    if host != "localhost" and not (host and ipaddress.ip_address(host).is_loopback):
        raise SystemExit(f"{url}: only this machine's own address is loaded, as http://127.0.0.1:8000")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--bursts", action="store_true")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--requests", type=int, default=MOST_REQUESTS)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--bad", type=float, default=0.02, help="share of bad bodies")
    parser.add_argument("--hang-up", type=float, default=0.03, help="share of clients that leave")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_loopback(options.url)
    options.requests = min(options.requests, MOST_REQUESTS)
    options.seconds = min(options.seconds, MOST_SECONDS)
    options.clients = min(options.clients, MOST_CLIENTS)
    start_s = time.perf_counter()
    counts = asyncio.run(load(options))
    seconds = time.perf_counter() - start_s
    differing = sum(len(images) > 1 for images in counts.images.values())
    print(f"{sum(counts.statuses.values())} requests in {seconds:.1f} s: {dict(counts.statuses)}")
    if counts.latency_s:
        p50, p99 = np.percentile(counts.latency_s, [50, 99])
        print(f"{len(counts.latency_s) / seconds:.2f} images/s; latency p50 {p50:.3f} s, p99 {p99:.3f} s")
    # Calls of another size round differently, which may move a pixel by one.
    print(f"seeds whose images differ in some bit: {differing} of {len(counts.images)}")
    for words, times in collections.Counter(counts.wrong).most_common():
        print(f"wrong, {times} times: {words}")
    return int(bool(counts.wrong))


if __name__ == "__main__":
    sys.exit(main())
