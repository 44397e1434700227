"""Step-level batching against request-level batching and none, on one bundle's engines.

python examples/compare_batching.py engines/digits                # by measured call times, under a simulated clock
python examples/compare_batching.py engines/digits --run          # every tick runs; the machine should be idle

Step-level: the server's own scheduler. Request-level, as most servers batch: a batch is put together when the engine is
free and runs to its end, while others wait. None: one request at a time. All three run the same code on the same
engines. Load is the rate of arrivals over what the engines do offline, in full batches without a pause; the same
arrivals go to all.
"""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tc_deploy.backends.load import load_target
from tc_deploy.bench.interleave import interleaved
from tc_deploy.conditions import placeholder_conditions
from tc_deploy.hardware import hardware_line
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.course import STANDARD, Course, Tick
from tc_deploy.runtime.request import noise_of
from tc_deploy.runtime.slots import Sample, Slots
from tc_deploy.serving.engine import PATIENCE_FULL_STEPS
from tc_deploy.serving.scheduler import Job, Policy, Scheduler
from tc_deploy.serving.simulation import Cost, Traffic, costs_of, poisson_arrivals, simulate

ENDLESS = 10**9
WAYS = {
    "steps, aligned": Policy.ALIGNED,
    "steps, oldest first": Policy.OLDEST_FIRST,
    "requests": None,
    "none": None,
}


class RequestLevel(Scheduler):
    """Lets requests in when nobody runs, as many as there are slots."""

    def _may_start(self, job: Job, now_s: float) -> bool:  # noqa: ARG002 - the base class gives it
        return all(other.step == 0 and other.since_s == now_s for other in self.running)


def scheduler_of(way: str, slots: Slots, call_s: Mapping[tuple[int, int], float]) -> Scheduler:
    count = 1 if way == "none" else slots.count
    arguments: dict[str, Any] = {
        "slots": count,
        "sizes": [size for size in slots.sizes if size <= count],
        "call_s": call_s,
        "queue": ENDLESS,
        "patience_s": PATIENCE_FULL_STEPS * call_s[0, slots.sizes[0]],
    }
    if way == "requests":
        return RequestLevel(**arguments)
    return Scheduler(**arguments, policy=WAYS[way] or Policy.OLDEST_FIRST)


def measured(slots: Slots, rounds: int) -> dict[tuple[int, int], float]:
    """What calls cost: medians, each call once per round."""
    tables = [slots.measured() for _ in range(rounds)]
    return {key: float(np.median([table[key] for table in tables])) for key in tables[0]}


def traffic_of(way: str, slots: Slots, call_s: Mapping[tuple[int, int], float], arrivals: Any, run: bool) -> Traffic:
    scheduler = scheduler_of(way, slots, call_s)
    if not run:
        return simulate(scheduler, arrivals, costs_of(call_s))
    return simulate(scheduler, arrivals, running(slots), starter(slots))


def running(slots: Slots) -> Cost:
    import time

    def cost(tick: Tick) -> float:
        start_s = time.perf_counter()
        slots.run(tick)
        slots.latents(tick.places[0].slot, tick.places[0].step)  # waits for the device
        return time.perf_counter() - start_s

    return cost


def starter(slots: Slots) -> Callable[[Job], None]:
    manifest = slots.manifest
    values = placeholder_conditions(manifest.conditions, 1)

    def start(job: Job) -> None:
        assert job.slot is not None
        slots.start(
            job.slot,
            Sample(
                course=job.course,
                noise=noise_of(manifest.latent_shape, job.what, 1)[0],
                given={name: array[0] for name, array in values.given.items()},
                unconditional={name: array[0] for name, array in values.unconditional.items()}
                if manifest.guided
                else {},
                guidance_scale=manifest.solver.guidance_scale,
            ),
        )

    return start


def offline(course: Course, slots: Slots, call_s: Mapping[tuple[int, int], float]) -> float:
    """Pictures per second in full batches without a pause."""
    run_s = sum(call_s[kind.variant, slots.count] for kind in course.kinds if kind is not None)
    return slots.count / run_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--rounds", type=int, default=9, help="of call times; with --run, of traffic: a third of them")
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args()
    bundle = read_bundle(options.bundle, options.backend)
    slots = Slots(bundle, *load_target(options.bundle, bundle.manifest, bundle.backend), options.slots)
    course = slots.courses[STANDARD]
    call_s = measured(slots, options.rounds)
    most = offline(course, slots, call_s)
    print(f"{hardware_line()}; {bundle.backend}; {dt.datetime.now(dt.UTC).date()}")
    print("call, ms: " + ", ".join(f"{variant} x {size}: {s * 1e3:.2f}" for (variant, size), s in call_s.items()))
    print(f"offline, batches of {slots.count}: {most:.2f} pictures/s; {options.requests} arrivals, Poisson\n")
    print("| load | batching | throughput / offline | p50, s | p99, s | p99 / requests' | slots used |")
    print("|---|---|---|---|---|---|---|")
    for load in options.loads:
        arrivals = [(time_s, course) for time_s in poisson_arrivals(load * most, options.requests, seed=0)]
        runs = {
            way: (lambda way=way, arrivals=arrivals: traffic_of(way, slots, call_s, arrivals, options.run))
            for way in WAYS
        }
        found = interleaved(runs, max(options.rounds // 3, 1) if options.run else 1)
        p99 = {way: float(np.median([each.latency_at(99) for each in traffics])) for way, traffics in found.items()}
        for way, traffics in found.items():
            throughput = float(np.median([each.throughput for each in traffics]))
            p50 = float(np.median([each.latency_at(50) for each in traffics]))
            used = sum(each.useful_rows for each in traffics) / sum(each.rows for each in traffics)
            print(
                f"| {load:.0%} | {way} | {throughput / most:.2f} | {p50:.2f} | {p99[way]:.2f}"
                f" | {p99[way] / p99['requests']:.2f} | {used:.0%} |"
            )


if __name__ == "__main__":
    main()
