"""The device memory of a sampling run as data: every buffer with its place in the one piece that holds them all.

In: the graphs' tensors, the calls of the programs that share the buffers, the sizes of the batch axes. Out: a list of
buffers. A device that takes its memory in one piece uses these very offsets; the others only the sizes. What an engine
holds beside its buffers (weights, scratch memory) is its own and not in here. Never: touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tc_deploy.backends.arena import arena_offsets
from tc_deploy.backends.base import BufferSpec
from tc_deploy.conditions import whole_number
from tc_deploy.errors import UsageError
from tc_deploy.manifest import DECODER, RUN_BATCH, TEXT_ENCODER, GraphRecord, Manifest, TensorRecord
from tc_deploy.plan import Plan
from tc_deploy.runtime.buffers import BufferKey, Kind
from tc_deploy.runtime.program import Call, ProgramStep, decoder_call, program_of, prologue_calls, text_call
from tc_deploy.schedule import full_schedule


@dataclass(frozen=True, kw_only=True)
class PlannedBuffer:
    """A buffer and its place."""

    key: BufferKey
    """As the programs call it."""
    tensor: TensorRecord
    """One of the tensors that are bound to it; all are alike."""
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int

    def spec(self) -> BufferSpec:
        """What to ask a device for.

        Raises:
            BackendError: as for :attr:`TensorRecord.numpy_dtype`.
        """
        exchanged = self.key.kind not in (Kind.CACHE, Kind.TABLE)
        return BufferSpec(dtype=self.tensor.numpy_dtype, shape=self.shape, exchanged=exchanged)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a buffer that are bound as one."""

    whole: BufferKey
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All buffers of one owner, in the order of their offsets."""

    buffers: tuple[PlannedBuffer, ...]
    parts: Mapping[BufferKey, Part]
    """What is bound and is no buffer of its own."""
    size_bytes: int


def layout_of(graphs: Mapping[str, GraphRecord], calls: Iterable[Call], axes: Mapping[str, int]) -> Layout:
    """Lay out every buffer that some call mentions.

    Args:
        graphs: the bundle's.
        calls: of all programs that are to share the buffers.
        axes: the size of each batch axis; the rows of what is made for all steps at once are a whole run's.

    Returns:
        Each buffer once, in the order of first mention.
    """
    found: dict[BufferKey, tuple[TensorRecord, tuple[int, ...]]] = {}
    parts: dict[BufferKey, Part] = {}
    for call in calls:
        record = graphs[call.graph]
        for keys, tensors in ((call.inputs, record.inputs), (call.outputs, record.outputs)):
            for tensor in tensors:
                key, shape = keys[tensor.name], tensor.shape_at(axes)
                if key.whole is not None and key.step is not None:
                    rows = shape[0]
                    parts[key] = Part(whole=key.whole, start=key.step * rows, stop=(key.step + 1) * rows)
                    key, shape = key.whole, (axes[RUN_BATCH], *shape[1:])
                found.setdefault(key, (tensor, shape))
    sizes_bytes = [itemsize(tensor) * math.prod(shape) for tensor, shape in found.values()]
    offsets, size_bytes = arena_offsets(sizes_bytes)
    buffers = tuple(
        PlannedBuffer(key=key, tensor=tensor, shape=shape, offset_bytes=offset, size_bytes=buffer_bytes)
        for (key, (tensor, shape)), offset, buffer_bytes in zip(found.items(), offsets, sizes_bytes, strict=True)
    )
    return Layout(buffers=buffers, parts=parts, size_bytes=size_bytes)


def pipeline_programs(manifest: Manifest, plan: Plan) -> tuple[tuple[ProgramStep, ...], tuple[ProgramStep, ...]]:
    """What a pipeline can run: the plan, and every step in full, which is solved as the scheduler does."""
    graphs, order, history = manifest.graphs, plan.cache.forecast_order, manifest.solver.history
    planned = program_of(graphs, plan.run_schedule(), order, history)
    full = full_schedule(plan.schedule.steps)
    return planned, program_of(graphs, full, order, history, own_solver=plan.solver_fitted)


def pipeline_layout(manifest: Manifest, programs: Sequence[Sequence[ProgramStep]], batch_size: int) -> Layout:
    """The buffers of a pipeline, whose two programs share them."""
    steps = len(programs[0])
    calls = [*prologue_calls(manifest.graphs, steps)]
    calls += [call for program in programs for step in program for call in (step.model, step.solver)]
    if manifest.decoder is not None:
        calls.append(decoder_call(manifest.graphs[DECODER], programs[0]))
    if manifest.text is not None:
        calls.append(text_call(manifest.graphs[TEXT_ENCODER]))
    return layout_of(manifest.graphs, calls, manifest.batch_axes(batch_size, steps))


def checked_batch_size(manifest: Manifest, batch_size: int | None) -> int:
    """The samples that run together.

    Args:
        manifest: the bundle's.
        batch_size: what is asked for; None takes the bundle's own, or 1.

    Raises:
        UsageError: it is no whole number from 1 on, or not the one that the bundle was exported for.
    """
    if batch_size is not None and whole_number(batch_size, "batch size") < 1:
        raise UsageError(f"batch size must be at least 1, found {batch_size}")
    if manifest.batch_size is None:
        return batch_size or 1
    if batch_size not in (None, manifest.batch_size):
        raise UsageError(
            f"this bundle was exported for a batch of exactly {manifest.batch_size}, found {batch_size};"
            " export again with another --static-batch, or without it"
        )
    return manifest.batch_size


def itemsize(tensor: TensorRecord) -> int:
    """Bytes of one number of a tensor."""
    # numpy knows bfloat16 only where ml_dtypes is installed, and its size is no secret.
    return 2 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).itemsize
