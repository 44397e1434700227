"""A bundle's prologue for one sample, as slots need it.

In: a sample's conditions. Out: what steps read of what follows from these and the timesteps, put where a slot keeps it.
It runs in buffers of its own, since a slot's sample comes while others run; where the batch is fixed it is computed for
as many, of which one counts. Never: knows which slots are free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import Buffer, Device, Graph
from tc_deploy.manifest import MODEL_BATCH, PROLOGUE_GRAPHS, Role
from tc_deploy.runtime.binding import Binder, Bundle
from tc_deploy.runtime.buffers import condition_arrays, own_buffer, scheduled_buffer
from tc_deploy.runtime.layout import layout_of
from tc_deploy.runtime.program import prologue_calls


class SlotPrologue:
    """See the module.

    Args:
        bundle: one with a prologue.
        device: where the buffers are made.
        graphs: the bundle's, loaded on that device.

    Raises:
        BackendError: the device has not that much memory.
    """

    def __init__(self, bundle: Bundle, device: Device, graphs: Mapping[str, Graph]) -> None:
        manifest, self._steps = bundle.manifest, bundle.plan.schedule.steps
        axes = manifest.batch_axes(manifest.batch_size or 1, self._steps)
        calls = prologue_calls(manifest.graphs, self._steps)
        binder = Binder(bundle, device, graphs, layout_of(manifest.graphs, calls, axes))
        self._buffers, self._rows, self._halves = binder.buffers, axes[MODEL_BATCH], 2 if manifest.guided else 1
        self._graph = device.capture([binder.bind(call) for call in calls])
        self._made = [
            tensor for name in PROLOGUE_GRAPHS if name in manifest.graphs for tensor in manifest.graphs[name].outputs
        ]

    def run(self, conditions: Mapping[str, NDArray[Any]], place: Callable[[str, int, int], Buffer]) -> None:
        """Run it for a sample.

        Args:
            conditions: by name, a row for each half of guidance.
            place: gives some rows of where a slot keeps a tensor, by its name: the halves of one step after another's.

        Raises:
            BackendError: the engine fails.
        """
        for name, rows in conditions.items():
            filled = rows[np.arange(self._rows) % len(rows)]
            for key, array in condition_arrays(self._buffers, name, filled, self._steps).items():
                self._buffers[key].write(array)
        self._graph.run()
        for tensor in self._made:
            scheduled = tensor.role is Role.SCHEDULED
            made = self._buffers[scheduled_buffer(tensor) if scheduled else own_buffer(tensor)]
            steps = self._steps if scheduled else 1
            # Of a batch of one the rows of all steps stand together.
            halves = self._halves
            span = steps if halves == self._rows else 1
            for step in range(0, steps, span):
                first = step * self._rows
                kept = place(tensor.name, step * halves, (step + span) * halves)
                kept.copy(made.rows(first, first + span * halves))
