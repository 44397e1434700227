"""Whether an engine still makes pictures: one is ordered of it, as a client would.

In: an engine. Out: nothing, or an error. Never: takes a slot from a client: one that is busy shows by its ticks that it
lives.
"""

from __future__ import annotations

import queue
import time

from tc_deploy.conditions import placeholder_conditions
from tc_deploy.errors import BackendError
from tc_deploy.runtime.course import STANDARD
from tc_deploy.runtime.request import Request
from tc_deploy.serving.engine import End, Engine, Event, Full, Order, State, Unavailable


def check_engine(engine: Engine, limit_s: float) -> None:
    """Order a picture of an engine that has nothing to do, and wait for it.

    Args:
        engine: one that was loaded.
        limit_s: in which the picture must be done.

    Raises:
        BackendError: it is not, or the engine has failed.
    """
    if engine.state is State.FAILED:
        raise BackendError(f"{engine.name}: the engine has failed")
    if engine.state is not State.READY or engine.samples != (0, 0):
        return
    manifest = engine.maker.manifest
    request = Request(
        count=1,
        conditions=placeholder_conditions(manifest.conditions, 1),
        prompts=None,
        seed=0,
        latents=None,
        guidance_scale=manifest.solver.guidance_scale if manifest.guided else None,
    )
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    deadline_s = time.monotonic() + limit_s
    try:
        engine.submit(Order(request=request, course=STANDARD, deadline_s=deadline_s, tell=events.put))
        while (event := events.get(timeout=max(deadline_s - time.monotonic(), 0))).end is None:
            pass
    except (Full, Unavailable):
        return  # others came first, or it drains
    except queue.Empty:
        raise BackendError(f"{engine.name}: made no picture within {limit_s:g} s") from None
    if event.end is not End.DONE:
        raise BackendError(f"{engine.name}: its picture of a self-test ended as {event.end}")
