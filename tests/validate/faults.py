"""Faults that pass every checksum: a bundle is altered and then sealed as if it had been exported so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from bundles import edit_manifest, reseal

from tc_deploy.manifest import ONNX_FOLDER, WEIGHTS
from tc_deploy.plan import Plan, content_sha256, load_plan, write_plan_files
from tc_deploy.tables import tables_record, token_index_name
from tc_deploy.types import FloatArray, IntArray
from tc_deploy.validate.marking import module_of

HALF_MAX = 65504.0
Edit = Callable[[ir.Model], None]


def edit_graph(bundle: Path, graph: str, edit: Edit) -> None:
    """Alter one graph; its weights stay where they are."""
    path = bundle / ONNX_FOLDER / f"{graph}.onnx"
    model = ir.load(path)
    edit(model)
    model.graph.sort()
    ir.save(model, path)
    reseal(bundle)


def flip_sign(bundle: Path, weight: str) -> None:
    """Turn the sign of the largest number of one weight matrix, for every graph that holds it."""
    tensor = ir.load(bundle / ONNX_FOLDER / "full.onnx").graph.initializers[weight].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    path = bundle / ONNX_FOLDER / WEIGHTS
    data = bytearray(path.read_bytes())
    numbers = np.frombuffer(data, np.float32, tensor.size, tensor.offset or 0)
    numbers[np.abs(numbers).argmax()] *= -1
    path.write_bytes(data)
    reseal(bundle)


def swap_index_rows(bundle: Path, phase: int) -> None:
    """Swap the first two rows of a phase's index table."""
    plan, tables = load_plan(bundle)
    tables[token_index_name(phase)] = tables[token_index_name(phase)][
        [1, 0, *range(2, len(tables[token_index_name(phase)]))]
    ]
    put_plan(bundle, plan, tables)


def move_boundary(bundle: Path) -> None:
    """Let phase 2 begin a step later; the index tables keep as many rows as the plan's checks ask for."""
    plan, tables = load_plan(bundle)
    schedule = plan.schedule.model_copy(update={"phase_start": plan.schedule.phase_start + 1})
    moved = plan.model_copy(update={"schedule": schedule})
    for phase in moved.phases_used():
        rows, table = len(moved.run_schedule().cached_steps(phase)), tables[token_index_name(phase)]
        tables[token_index_name(phase)] = np.resize(table, (rows, table.shape[1]))
    put_plan(bundle, moved, tables)


def put_plan(bundle: Path, plan: Plan, tables: Mapping[str, FloatArray | IntArray]) -> None:
    """Put another plan into a bundle whose manifest says that it was exported from that one."""
    plan = plan.model_copy(update={"tables": tables_record(tables)})
    write_plan_files(plan, tables, bundle)
    edit_manifest(bundle, lambda document: document.update(plan_sha256=content_sha256(plan)))
    reseal(bundle)


def gate_twice(block: str) -> Edit:
    """Multiply what the block's attention gives by its gate once more."""

    def edit(model: ir.Model) -> None:
        gate = next(node for node in model.graph if node.op_type == "Mul" and module_of(node) == block)
        again = ir.node("Mul", [gate.inputs[0], gate.outputs[0]], name=f"{block}/gate_again")
        _insert(model, gate, again)

    return edit


def overflow(module: str, limit: float) -> Edit:
    """Send what a module makes last through fp16, scaled so that it overflows where it is larger than ``limit``."""

    def edit(model: ir.Model) -> None:
        last = [node for node in model.graph if module_of(node) == module][-1]
        scale = _constant(model, "overflow.scale", np.float32(HALF_MAX / limit))
        back = _constant(model, "overflow.back", np.float32(limit / HALF_MAX))
        large = ir.node("Mul", [last.outputs[0], scale], name=f"{module}/large")
        half = ir.node("Cast", [large.outputs[0]], {"to": ir.DataType.FLOAT16}, name=f"{module}/half")
        single = ir.node("Cast", [half.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{module}/single")
        small = ir.node("Mul", [single.outputs[0], back], name=f"{module}/small")
        _insert(model, last, large, half, single, small)
        half.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)

    return edit


def stale_row(module: str) -> Edit:
    """Leave the first computed row out of where the module writes rows over cached keys."""

    def edit(model: ir.Model) -> None:
        scatter = next(node for node in model.graph if node.op_type == "ScatterND" and module_of(node) == module)
        first, last, axis = (
            _constant(model, f"stale.{name}", np.array([value], np.int64))
            for name, value in (("first", 1), ("last", np.iinfo(np.int64).max), ("axis", 0))
        )
        for number in (1, 2):
            source = scatter.inputs[number]
            cut = ir.node("Slice", [source, first, last, axis], name=f"{module}/cut_{number}")
            cut.outputs[0].name = f"cut_{number}"
            cut.outputs[0].type = source.type
            model.graph.insert_before(scatter, cut)
            scatter.replace_input_with(number, cut.outputs[0])

    return edit


def _insert(model: ir.Model, after: ir.Node, *nodes: ir.Node) -> None:
    """Let whoever reads what ``after`` makes read what the last of ``nodes`` makes."""
    old, new = after.outputs[0], nodes[-1].outputs[0]
    for node in nodes:
        node.outputs[0].name = str(node.name).rpartition("/")[2]
        node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
    readers = [(use.node, use.idx) for use in old.uses() if use.node not in nodes]
    model.graph.insert_after(after, list(nodes))
    for node, number in readers:
        node.replace_input_with(number, new)


def _constant(model: ir.Model, name: str, value: np.ndarray | np.generic) -> ir.Value:
    made = ir.val(name, const_value=ir.tensor(np.asarray(value), name=name))
    made.type = ir.TensorType(made.const_value.dtype)
    made.shape = ir.Shape(np.asarray(value).shape)
    model.graph.register_initializer(made)
    return made
