"""Many machines on paper: latency and cost per picture, from measured call times and the server's own scheduler.

python examples/estimate_fleet.py engines/digits --machines 100 --price 2.0

Calls are timed on this machine. Then requests arrive at random, Poisson, each goes to the less busy of two machines
drawn at random, as Ray Serve's router does it, and every machine runs the server's own scheduler under a simulated
clock. What the network, the router and the encoding of pictures take is left out. Prices are per machine and hour.
"""

from __future__ import annotations

import argparse
import datetime as dt
import heapq
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tc_deploy.backends.load import load_target
from tc_deploy.hardware import hardware_line
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.course import HD, STANDARD, Course, Tick
from tc_deploy.runtime.slots import Slots
from tc_deploy.serving.engine import PATIENCE_FULL_STEPS
from tc_deploy.serving.scheduler import Job, Scheduler
from tc_deploy.serving.simulation import Cost, Traffic, costs_of, poisson_arrivals

MACHINES, PRICE = 100, 2.0


def simulate_fleet(
    schedulers: Sequence[Scheduler], arrivals: Sequence[tuple[float, Course]], cost: Cost, seed: int
) -> Traffic:
    """Let jobs arrive at many machines; see :func:`tc_deploy.serving.simulation.simulate` for one."""
    traffic, draw = Traffic(), random.Random(seed)  # noqa: S311 - for load, not for secrets
    # Time, order, and an arrival or a machine with its tick: who comes as a tick ends joins the next.
    events: list[tuple[float, int, int, Tick | None]] = [
        (time_s, number, number, None) for number, (time_s, _) in enumerate(arrivals)
    ]
    order, idle = len(events), set(range(len(schedulers)))

    def go_on(machine: int, now_s: float) -> None:
        nonlocal order
        schedulers[machine].admit(now_s)
        tick = schedulers[machine].tick(now_s)
        if tick is None:
            idle.add(machine)
            return
        idle.discard(machine)
        seconds = cost(tick)
        traffic.busy_s += seconds
        traffic.rows += tick.size
        traffic.useful_rows += len(tick.places)
        order += 1
        heapq.heappush(events, (now_s + seconds, order, machine, tick))

    while events:
        now_s, _, number, tick = heapq.heappop(events)
        if tick is not None:
            for job in schedulers[number].done(tick, now_s):
                traffic.latency_s.append(now_s - job.arrived_s)
                traffic.end_s = now_s
            go_on(number, now_s)
            continue
        two = draw.sample(range(len(schedulers)), min(2, len(schedulers)))
        machine = min(two, key=lambda one: len(schedulers[one].running) + schedulers[one].waiting)
        if not schedulers[machine].submit([Job(course=arrivals[number][1], arrived_s=now_s)]):
            traffic.refused += 1
        elif machine in idle:
            go_on(machine, now_s)
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--machines", type=int, default=MACHINES)
    parser.add_argument("--price", type=float, default=PRICE, help="of a machine for an hour")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--requests", type=int, default=100, help="arrivals for each machine")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.1])
    parser.add_argument("--rounds", type=int, default=9, help="of call times, whose least is taken")
    options = parser.parse_args()
    bundle = read_bundle(options.bundle, options.backend)
    slots = Slots(bundle, *load_target(options.bundle, bundle.manifest, bundle.backend), options.slots)
    tables = [slots.measured() for _ in range(options.rounds)]
    call_s = {key: min(table[key] for table in tables) for key in tables[0]}
    print(f"{hardware_line()}; {bundle.backend}; {dt.datetime.now(dt.UTC).date()}")
    print("call, ms: " + ", ".join(f"{variant} x {size}: {s * 1e3:.2f}" for (variant, size), s in call_s.items()))
    print(f"{options.machines} machines like this one, {options.slots} slots and a queue of {options.queue} each\n")
    print("| load | steps | pictures/s | p50, s | p99, s | refused | machines busy | cost of 1,000 pictures |")
    print("|---|---|---|---|---|---|---|---|")
    make: Callable[[], Scheduler] = lambda: Scheduler(  # noqa: E731
        slots=options.slots,
        sizes=slots.sizes,
        call_s=call_s,
        queue=options.queue,
        patience_s=PATIENCE_FULL_STEPS * call_s[0, slots.sizes[0]],
    )
    for load in options.loads:
        for name in (STANDARD, HD):
            course = slots.courses[name]
            most = slots.count / sum(call_s[kind.variant, slots.count] for kind in course.kinds if kind is not None)
            count = options.requests * options.machines
            arrivals = [(at_s, course) for at_s in poisson_arrivals(load * most * options.machines, count, seed=0)]
            traffic = simulate_fleet([make() for _ in range(options.machines)], arrivals, costs_of(call_s), seed=0)
            p50, p99 = np.percentile(traffic.latency_s, [50, 99])
            busy = traffic.busy_s / traffic.end_s / options.machines
            cost = options.price * options.machines / 3600 / traffic.throughput * 1000
            words = "the plan" if name == STANDARD else "all full"
            print(
                f"| {load:.0%} | {words} | {traffic.throughput:.1f} | {p50:.2f} | {p99:.2f}"
                f" | {traffic.refused / count:.1%} | {busy:.0%} | {cost:.3f} |"
            )


if __name__ == "__main__":
    main()
