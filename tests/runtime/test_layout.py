"""Where the buffers of a sampling run lie: arithmetic that needs no device."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from bundles import PIXEL_BATCH, Made, MadeByCommands
from hypothesis import given
from hypothesis import strategies as st
from runtime.test_program import HISTORIES, ORDERS, graphs_of, schedules

import tc_deploy
from tc_deploy.backends.arena import ALIGNMENT_BYTES, arena_offsets
from tc_deploy.errors import UsageError
from tc_deploy.manifest import BATCH, MODEL_BATCH, GraphRecord, Role, only_tensor, read_manifest
from tc_deploy.plan import load_plan
from tc_deploy.runtime.buffers import BufferKey, Kind, role_buffer, table_row
from tc_deploy.runtime.layout import Layout, checked_batch_size, layout_of, pipeline_layout, pipeline_programs
from tc_deploy.runtime.program import Call, program_of
from tc_deploy.schedule import Schedule, full_schedule

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64")


def assert_sound(layout: Layout) -> None:
    """Aligned, in order, disjoint, and within the whole."""
    assert [planned.offset_bytes % ALIGNMENT_BYTES for planned in layout.buffers] == [0] * len(layout.buffers)
    for one, other in itertools.pairwise(layout.buffers):
        assert one.offset_bytes + one.size_bytes <= other.offset_bytes
        assert one.offset_bytes < other.offset_bytes
    last = layout.buffers[-1]
    assert last.offset_bytes + last.size_bytes <= layout.size_bytes
    assert layout.size_bytes % ALIGNMENT_BYTES == 0


def dressed(draw: st.DataObject, graphs: Mapping[str, GraphRecord]) -> dict[str, GraphRecord]:
    """The same graphs with types and shapes; a tensor that several have, or that is handed on, is alike in all."""
    sizes = st.one_of(st.sampled_from([BATCH, MODEL_BATCH]), st.integers(1, 300))
    chosen: dict[str, tuple[str, tuple[int | str, ...]]] = {}

    def tensors(graph: str, record: GraphRecord) -> GraphRecord:
        made = []
        for tensor in (*record.inputs, *record.outputs):
            name = tensor.cache or (tensor.name if tensor.role is Role.CONDITION else tensor.role.value)
            # The rows of this one differ from phase to phase.
            name = f"{name} of {graph}" if tensor.role is Role.TOKEN_INDEX else name
            if name not in chosen:
                shape = draw.draw(st.lists(sizes, max_size=3), label=name)
                chosen[name] = (draw.draw(st.sampled_from(DTYPES)), tuple(shape))
            dtype, shape_of = chosen[name]
            made.append(tensor.model_copy(update={"dtype": dtype, "shape": shape_of}))
        inputs = len(record.inputs)
        return record.model_copy(update={"inputs": tuple(made[:inputs]), "outputs": tuple(made[inputs:])})

    return {name: tensors(name, record) for name, record in graphs.items()}


@given(schedules(), ORDERS, HISTORIES, st.integers(1, 9), st.data())
def test_every_buffer_of_both_programs_has_a_place_of_its_own(
    schedule: Schedule, order: int, history: int, batch: int, data: st.DataObject
) -> None:
    graphs = dressed(data, graphs_of(order, history))
    calls: list[Call] = []
    for turn in (schedule, full_schedule(schedule.steps)):
        calls += [call for step in program_of(graphs, turn, order, history) for call in (step.model, step.solver)]
    axes = {BATCH: batch, MODEL_BATCH: 2 * batch}
    layout = layout_of(graphs, calls, axes)
    assert_sound(layout)
    found = {planned.key: planned for planned in layout.buffers}
    assert len(found) == len(layout.buffers)
    mentioned = {name for call in calls for name in (*call.inputs.values(), *call.outputs.values())}
    assert found.keys() == mentioned
    for call in calls:
        record = graphs[call.graph]
        for tensor in (*record.inputs, *record.outputs):
            planned = found[{**call.inputs, **call.outputs}[tensor.name]]
            shape = tuple(axes[size] if isinstance(size, str) else size for size in tensor.shape)
            assert (planned.shape, planned.tensor.dtype) == (shape, tensor.dtype)
            assert planned.size_bytes == planned.tensor.numpy_dtype.itemsize * int(np.prod(shape, dtype=np.int64))


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_offsets_are_aligned_and_apart(sizes: list[int]) -> None:
    offsets, end = arena_offsets(sizes)
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in offsets)
    for offset, size, following in zip(offsets, sizes, [*offsets[1:], end], strict=True):
        assert offset + max(size, 1) <= following < offset + size + ALIGNMENT_BYTES + (size == 0)
    assert arena_offsets([]) == ([], 0)


@pytest.mark.parametrize("bundle", ["mixed", "multistep", "pixel"])
def test_a_pipeline_asks_for_the_layout(bundle: str, request: pytest.FixtureRequest) -> None:
    made: Made | MadeByCommands = request.getfixturevalue(bundle)
    with tc_deploy.load(made.bundle, "onnxruntime") as pipeline:
        programs = pipeline_programs(pipeline.manifest, pipeline.plan)
        layout = pipeline_layout(pipeline.manifest, programs, pipeline.batch_size)
        assert_sound(layout)
        found = {key: buffer.read() for key, buffer in pipeline._buffers.items()}
    assert list(found) == [planned.key for planned in layout.buffers]
    for planned in layout.buffers:
        assert (found[planned.key].shape, found[planned.key].nbytes) == (planned.shape, planned.size_bytes)


def test_buffers_are_told_apart_by_what_they_are_for(mixed: Made) -> None:
    manifest = read_manifest(mixed.bundle)
    layout = pipeline_layout(manifest, pipeline_programs(manifest, load_plan(mixed.bundle)[0]), 2)
    kinds = {planned.key: planned.key.kind for planned in layout.buffers}

    def of(kind: Kind) -> set[BufferKey]:
        return {key for key, found in kinds.items() if found is kind}

    assert set(map(str, of(Kind.CONDITION))) == {"class_labels", "guidance_scale"}
    assert of(Kind.OUTPUT) == {role_buffer(Role.SAMPLE)}
    assert set(map(str, of(Kind.LATENTS))) == {"hidden_states", "latents@0", "latents@1"}
    assert of(Kind.CACHE)
    assert all(key.tensor.startswith("cache.") for key in of(Kind.CACHE))
    rows = {(Role.TIMESTEP, 0), (Role.TOKEN_INDEX, 1), (Role.COEFFICIENTS, 9), (Role.INPUT_SCALE, 9)}
    assert {table_row(only_tensor(role), step) for role, step in rows} <= of(Kind.TABLE)
    exchanged = {planned.key.kind for planned in layout.buffers if planned.spec().exchanged}
    assert exchanged == {Kind.CONDITION, Kind.OUTPUT, Kind.LATENTS}


def test_which_batch_sizes_a_bundle_takes(mixed: Made, pixel: MadeByCommands) -> None:
    free, fixed = read_manifest(mixed.bundle), read_manifest(pixel.bundle)
    assert [checked_batch_size(free, size) for size in (None, 1, 7)] == [1, 1, 7]
    assert [checked_batch_size(fixed, size) for size in (None, PIXEL_BATCH)] == [PIXEL_BATCH] * 2
    for manifest, size, message in (
        (free, 0, "batch size must be at least 1"),
        (free, 1.5, "batch size"),
        (fixed, PIXEL_BATCH + 1, f"a batch of exactly {PIXEL_BATCH}, found {PIXEL_BATCH + 1}; export again"),
    ):
        with pytest.raises(UsageError, match=message):
            checked_batch_size(manifest, size)
