"""Rows by many engines, through Ray Data.

In: rows, and a bundle that every machine finds at the same path. Out: what became of each row, as blocks of them come
back; the caller alone writes. Ray starts a worker that dies again, and gives its rows to another. Never: starts a
cluster where there is one: RAY_ADDRESS names it, else this machine is one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tc_deploy.errors import BackendError, first_line
from tc_deploy.libraries import imported
from tc_deploy.scale.rows import Made, Row
from tc_deploy.scale.worker import AHEAD, RowMaker, Workers

PURPOSE = "rows go to many machines through it: "
STORE_BYTES = 256 * 2**20
"""Of Ray's object store, where this process starts it: rows and pictures are small."""
_FILLS = 4
"""How many times a block of rows fills a worker's slots; what is lost with a worker is a block."""


class RayWorker:
    """An engine in a process of Ray's; rows come and go as columns.

    Args:
        settings: fields of :class:`Workers`.
    """

    def __init__(self, settings: Workers) -> None:
        self._maker = RowMaker(settings)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """Do a block of rows."""
        rows = [Row(**json.loads(text)) for text in block["row"]]
        return {"made": [json.dumps(asdict(made)) for made in self._maker.made(rows)]}


def made_with_ray(rows: Sequence[Row], settings: Workers, count: int | None) -> Iterator[Made]:
    """Do rows.

    Args:
        rows: at least one.
        settings: of each worker.
        count: of workers; None takes one for each of the cluster's GPUs, or one.

    Raises:
        BackendError: Ray is not installed, does not start, or its workers fail.
    """
    ray: Any = imported("ray", purpose=PURPOSE)
    data: Any = imported("ray.data", purpose=PURPOSE)
    with _cluster(ray):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        block = _FILLS * AHEAD * settings.slots
        table = data.from_items(
            [{"row": json.dumps(asdict(row))} for row in rows], override_num_blocks=math.ceil(len(rows) / block)
        )
        made = table.map_batches(
            RayWorker,
            batch_size=None,
            compute=data.ActorPoolStrategy(size=count or max(gpus, 1)),
            fn_constructor_args=[settings],
            num_gpus=1 if gpus else None,
            max_restarts=-1,
            max_task_retries=-1,
        )
        try:
            for item in made.iter_rows():
                found = json.loads(item["made"])
                yield Made(line=found["line"], pictures=tuple(found["pictures"]), error=found["error"])
        except ray.exceptions.RayError as error:
            raise BackendError(f"Ray's workers failed: {_cause(error)}") from error


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A connection to the cluster; one that was there before is left open."""
    if ray.is_initialized():
        yield
        return
    own = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(log_to_driver=False, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"Ray does not start: {first_line(error)}; RAY_ADDRESS names a cluster") from error
    try:
        yield
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> str:
    """What a worker raised, of which Ray makes a traceback in words."""
    while isinstance(cause := getattr(error, "cause", None) or error.__cause__, BaseException):
        error = cause
    return first_line(error)
