"""What leaves the steps' graphs, on graphs made by hand: the parts put together again compute what the whole did."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tc_deploy.export.prologue import Prologue
from tc_deploy.manifest import PROLOGUE, SCHEDULE, Role, TensorName, cache_tensor, condition_tensor, model_inputs

WIDTH, STEPS = 8, 4
INPUTS: dict[str, tuple[Any, ...]] = {
    "hidden_states": (None, 3, WIDTH),
    "timestep": (None,),
    "text": (None, 2, WIDTH),
    "label": (None, WIDTH),
    "cache.0.mlp": (None, 3, WIDTH),
}
SQUARE = (WIDTH, WIDTH)
HEAD = """
    time = Unsqueeze (timestep, one)
    angles = Mul (time, frequencies)
    wave = Sin (angles)
    embedded = Gemm (wave, in, bias)
    told = Add (embedded, label)
    gate = Sigmoid (told)
"""
STEP = f"""{HEAD}
    shift = Gemm (gate, out, bias)
    row = Unsqueeze (shift, one)
    moved = Add (hidden_states, row)
    keys = MatMul (text, key)
    seen = MatMul (moved, query)
    turned = Transpose <perm=[0, 2, 1]> (keys)
    scores = MatMul (seen, turned)
    sample = MatMul (scores, keys)
"""
CACHED = f"""{HEAD}
    scale = Gemm (gate, other, bias)
    shift = Gemm (gate, out, bias)
    row = Unsqueeze (shift, one)
    gain = Unsqueeze (scale, one)
    scaled = Mul (cache, gain)
    sample = Add (scaled, row)
"""


def graph(body: str, inputs: tuple[str, ...], batch: int | str = "model_batch") -> ir.Model:
    """A graph of these operators whose output is ``sample``; its weights are the same for every graph."""
    generator = np.random.default_rng(0)
    weights: dict[str, NDArray[Any]] = {
        name: generator.standard_normal(SQUARE, np.float32) for name in ("in", "out", "other", "key", "query")
    }
    weights |= {"bias": generator.standard_normal(WIDTH, np.float32)}
    weights |= {"frequencies": np.linspace(0.1, 2, WIDTH, dtype=np.float32)[None], "one": np.array([1])}
    given = ", ".join(
        f"float[{', '.join(str(batch if size is None else size) for size in INPUTS[name])}] {name.split('.')[0]}"
        for name in inputs
    )
    text = f'<ir_version: 10, opset_import: ["" : 20]> steps ({given}) => (float[{batch}, N, M] sample) {{{body}}}'
    proto = onnx.parser.parse_model(text)
    for name, value in weights.items():
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for value in model.graph.inputs:
        if value.name == "cache":
            value.name = "cache.0.mlp"
    return model


def tensors(names: tuple[str, ...]) -> tuple[TensorName, ...]:
    given = {
        tensor.name: tensor for tensor in (*model_inputs(("hidden_states", "timestep")), cache_tensor("cache.0.mlp"))
    }
    return tuple(given.get(name) or condition_tensor(name) for name in names)


def arrays(names: tuple[str, ...], rows: int = 2) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(1)
    return {name: generator.standard_normal((rows, *INPUTS[name][1:]), np.float32) for name in names}


def run(model: ir.Model, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Every operator as it stands there: what differs then is not the engine's doing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    names = [value.name for value in session.get_inputs()]
    return dict(zip(outputs, session.run(outputs, {name: feed[name] for name in names}), strict=True))


def batches(model: ir.Model) -> set[str]:
    """The sizes of the first axes of what a graph reads and makes."""
    return {str(value.shape[0]) for value in (*model.graph.inputs, *model.graph.outputs) if value.shape}


ALL = ("hidden_states", "timestep", "text", "label")
LATER = ("hidden_states", "timestep", "label", "cache.0.mlp")


def test_parts_together_compute_what_the_whole_did() -> None:
    names = ALL
    feed = arrays(names)
    expected = run(graph(STEP, names), feed)
    prologue, step = Prologue(STEPS), graph(STEP, names)
    reads = prologue.cut(step, tensors(names))
    parts = prologue.models()

    assert set(parts) == {PROLOGUE, SCHEDULE}
    assert [(tensor.name, tensor.role) for tensor in reads] == [
        ("hidden_states", Role.HIDDEN_STATES),
        ("scheduled.0", Role.SCHEDULED),
        ("prologue.0", Role.PROLOGUE),
    ]
    assert [value.name for value in parts[PROLOGUE].graph.inputs] == ["text"]
    assert {value.name for value in parts[SCHEDULE].graph.inputs} == {"timestep", "label"}
    made = run(parts[PROLOGUE], feed) | run(parts[SCHEDULE], feed)
    np.testing.assert_array_equal(run(step, feed | made)["sample"], expected["sample"])


def test_weights_leave_with_what_they_are_for() -> None:
    step = graph(STEP, ALL)
    prologue = Prologue(STEPS)
    prologue.cut(step, tensors(ALL))
    parts = prologue.models()
    assert set(step.graph.initializers) == {"one", "query"}
    assert set(parts[PROLOGUE].graph.initializers) == {"key"}
    assert {"in", "out", "bias"} <= set(parts[SCHEDULE].graph.initializers)


def test_all_steps_of_a_run_are_one_batch() -> None:
    prologue = Prologue(STEPS)
    prologue.cut(graph(STEP, ALL), tensors(ALL))
    schedule = prologue.models()[SCHEDULE]
    assert batches(schedule) == {"run_batch"}
    feed = arrays(ALL, rows=STEPS * 2)
    together = run(schedule, feed)["scheduled.0"]
    for row in range(STEPS * 2):
        alone = run(schedule, {name: array[row : row + 1] for name, array in feed.items()})["scheduled.0"]
        np.testing.assert_allclose(together[row : row + 1], alone, rtol=0, atol=1e-6)


def test_one_prologue_serves_all_variants() -> None:
    prologue, full, cached = Prologue(STEPS), graph(STEP, ALL), graph(CACHED, LATER)
    expected = run(cached, arrays(LATER))["sample"]
    of_full = {tensor.name for tensor in prologue.cut(full, tensors(ALL))}
    of_cached = {tensor.name for tensor in prologue.cut(cached, tensors(LATER))}
    # The shift is the same in both; a scale is the cached step's alone, as keys are the full step's.
    assert of_full == {"hidden_states", "scheduled.0", "prologue.0"}
    assert of_cached == {"cache.0.mlp", "scheduled.0", "scheduled.1"}
    parts = prologue.models()
    assert [value.name for value in parts[SCHEDULE].graph.outputs] == ["scheduled.0", "scheduled.1"]
    assert len([node for node in parts[SCHEDULE].graph if node.op_type == "Sin"]) == 1
    feed = arrays(LATER)
    found = run(cached, feed | run(parts[SCHEDULE], feed))["sample"]
    np.testing.assert_array_equal(found, expected)


def test_one_value_may_be_made_of_another_that_a_step_reads_too() -> None:
    body = STEP.replace("row = Unsqueeze (shift, one)", "both = Add (shift, embedded)\n row = Unsqueeze (both, one)")
    feed, prologue, step = arrays(ALL), Prologue(STEPS), graph(body, ALL)
    expected = run(step, feed)["sample"]
    reads = prologue.cut(step, tensors(ALL))
    assert {"scheduled.0", "scheduled.1"} <= {tensor.name for tensor in reads}
    made = {name: array for part in prologue.models().values() for name, array in run(part, feed).items()}
    np.testing.assert_array_equal(run(step, feed | made)["sample"], expected)


NO_PRODUCT = STEP.replace("Gemm (gate, out, bias)", "Identity (gate)").replace(
    "Gemm (wave, in, bias)", "Identity (wave)"
)
STAYING = {
    "its rows for a run are more than its weights": (STEP, WIDTH + 1),
    "it is drawn anew at every step": (STEP.replace("Sin (angles)", "Bernoulli (angles)"), STEPS),
    "it has no weights to speak of": (NO_PRODUCT, STEPS),
}


@pytest.mark.parametrize("why", STAYING)
def test_what_depends_on_the_timestep_stays_where(why: str) -> None:
    body, steps = STAYING[why]
    prologue, step = Prologue(steps), graph(body, ALL)
    reads = prologue.cut(step, tensors(ALL))
    assert set(prologue.models()) == {PROLOGUE}
    assert {"timestep", "label"} <= {tensor.name for tensor in reads}


def test_nothing_to_move_leaves_a_graph_alone() -> None:
    names = ("hidden_states", "timestep")
    body = "time = Unsqueeze (timestep, one)\n row = Unsqueeze (time, one)\n sample = Add (hidden_states, row)"
    prologue, step = Prologue(STEPS), graph(body, names)
    assert prologue.cut(step, tensors(names)) == tensors(names)
    assert prologue.models() == {}
    assert [node.op_type for node in step.graph] == ["Unsqueeze", "Unsqueeze", "Add"]


def test_a_product_over_samples_is_not_a_row_of_one() -> None:
    body = """
        turned = Transpose <perm=[1, 2, 0]> (text)
        back = Transpose <perm=[1, 0, 2]> (text)
        mixed = MatMul (back, key)
        again = Transpose <perm=[1, 0, 2]> (mixed)
        pooled = ReduceMean (again, one)
        sample = Add (hidden_states, pooled)
    """
    names = ("hidden_states", "text")
    prologue, step = Prologue(STEPS), graph(body, names)
    assert prologue.cut(step, tensors(names)) == tensors(names)
    assert prologue.models() == {}


def test_a_fixed_batch_stays_fixed() -> None:
    prologue, step = Prologue(STEPS), graph(STEP, ALL, batch=2)
    prologue.cut(step, tensors(ALL))
    schedule = prologue.models()[SCHEDULE]
    assert batches(schedule) == {"2"}
