"""The solver as an ONNX graph: guidance, then one update of the sampler, then the model's next input.

In: how far the update looks back, and the shapes. Out: an ONNX model of elementwise operations without weights; the
numbers of :class:`tc_deploy.models.solver.SolverTable` are its inputs. Never: knows a scheduler, or imports torch.
"""

from __future__ import annotations

from functools import reduce

import onnx_ir as ir
from onnxscript import GraphBuilder

from tc_deploy.errors import ExportError
from tc_deploy.manifest import (
    BATCH,
    MODEL_BATCH,
    MODEL_OUTPUT,
    NEXT_LATENTS,
    SOLVER,
    Role,
    TensorName,
    guided_output_tensor,
    latents_tensor,
    only_tensor,
)
from tc_deploy.types import LEAST_NORM, GuidanceRule

OPSET = 20
IR_VERSION = 10


def solver_model(
    table_history: int,
    latent_shape: tuple[int, ...],
    output_channels: int,
    guided: bool,
    batch: int | None,
    rule: GuidanceRule = GuidanceRule.PLAIN,
) -> ir.Model:
    """Build the solver's graph.

    With B samples, G = 2 if guided else 1, h = ``table_history``, and all tensors float32:

    ==================== ============================ ==============================================================
    input                shape                        holds
    ==================== ============================ ==============================================================
    ``model_output``     (G*B, output_channels, H, W) the model's output; rows 0..B-1 conditional, the rest
                                                      unconditional; channels from C on (a learned variance) are unused
    ``latents``          (B, C, H, W)                 x_s
    ``latents.j``        (B, C, H, W)                 x_{s-j}, for j = 1..h; finite before step 0, where the
                                                      coefficient is 0
    ``guided_output.j``  (B, C, H, W)                 m_{s-j}, likewise
    ``coefficients``     (B, 2(h+1))                  row s of the table; per sample, so that the samples of a batch
                                                      may stand at different steps
    ``input_scale``      (B,)                         scale of the next model input, element s+1 of the table
    ``guidance_scale``   (B,)                         g, only if guided
    ==================== ============================ ==============================================================

    ==================== ============================ ==============================================================
    output               shape                        holds
    ==================== ============================ ==============================================================
    ``next_latents``     (B, C, H, W)                 x_{s+1}
    ``hidden_states``    (G*B, C, H, W)               x_{s+1} * input_scale, G times over
    ``guided_output``    (B, C, H, W)                 m_s = unconditional + g (conditional - unconditional)
                                                      (arXiv 2207.12598, with g = w + 1), or as ``rule`` has it; only
                                                      if h > 0
    ==================== ============================ ==============================================================

    Args:
        table_history: h, at least 0.
        latent_shape: (C, H, W), (C, F, H, W) for video, or (tokens, channels) where they come packed, which then
            stand for C and the rest.
        output_channels: the model's output channels, at least C.
        guided: whether the model runs on conditional and unconditional rows.
        rule: how the two halves are combined.
        batch: B, or None for a dynamic axis ``batch`` (and ``model_batch``, which is G*B, if guided).

    Returns:
        The model, opset 20. The same arguments give the same bytes.

    Raises:
        ExportError: a number is out of range.
    """
    channels, *_ = latent_shape
    for what, minimum, found in (
        ("history", 0, table_history),
        ("output channels", channels, output_channels),
        ("batch", 1, 1 if batch is None else batch),
    ):
        if found < minimum:
            raise ExportError(f"solver graph: {what} must be at least {minimum}, found {found}")

    rows: int | str = BATCH if batch is None else batch
    model_rows: int | str = rows
    if guided:
        model_rows = MODEL_BATCH if batch is None else 2 * batch
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=SOLVER)
    op = GraphBuilder(graph).op

    def given(tensor: TensorName, *shape: int | str) -> ir.Value:
        graph.inputs.append(ir.val(tensor.name, ir.DataType.FLOAT, shape))
        return graph.inputs[-1]

    def made(value: ir.Value, tensor: TensorName, *shape: int | str) -> None:
        value.name, value.dtype, value.shape = tensor.name, ir.DataType.FLOAT, ir.Shape(shape)
        graph.outputs.append(value)

    ages = range(table_history + 1)
    terms = 2 * len(ages)
    model_output = given(MODEL_OUTPUT, model_rows, output_channels, *latent_shape[1:])
    latents = [given(latents_tensor(age), rows, *latent_shape) for age in ages]
    earlier_outputs = [given(guided_output_tensor(age), rows, *latent_shape) for age in ages[1:]]
    coefficients = given(only_tensor(Role.COEFFICIENTS), rows, terms)
    input_scale = given(only_tensor(Role.INPUT_SCALE), rows)

    # -1 in place of a fixed batch would hide the batch from engines that plan their memory ahead.
    count = -1 if batch is None else batch
    per_sample = [count, *[1] * len(latent_shape)]
    if output_channels > channels:
        model_output = op.Slice(model_output, [0], [channels], [1])
    guided_output = model_output
    if guided:
        scale = op.Reshape(given(only_tensor(Role.GUIDANCE_SCALE), rows), per_sample)
        halves = op.Reshape(model_output, [2, count, *latent_shape])
        conditional, unconditional = (op.Gather(halves, half, axis=0) for half in (0, 1))
        start = conditional if rule is GuidanceRule.BEYOND else unconditional
        guided_output = op.Add(start, op.Mul(scale, op.Sub(conditional, unconditional)))
        if rule.rescales:
            own, found = (op.ReduceL2(half, [-1], keepdims=1) for half in (conditional, guided_output))
            if rule is GuidanceRule.RESCALED_DOWN:
                ratio = op.Min(op.Div(own, op.Add(found, LEAST_NORM)), 1.0)
            else:
                ratio = op.Div(own, found)
            guided_output = op.Mul(guided_output, ratio)

    columns = op.Reshape(coefficients, [count, terms, *per_sample[2:]])
    factors = op.Split(columns, [1] * terms, axis=1, _outputs=terms)
    values = [*latents, guided_output, *earlier_outputs]
    next_latents = reduce(op.Add, [op.Mul(factor, value) for factor, value in zip(factors, values, strict=True)])
    scaled = op.Mul(next_latents, op.Reshape(input_scale, per_sample))
    hidden_states = op.Concat(scaled, scaled, axis=0) if guided else scaled

    made(next_latents, NEXT_LATENTS, rows, *latent_shape)
    made(hidden_states, only_tensor(Role.HIDDEN_STATES), model_rows, *latent_shape)
    if table_history > 0:
        # A value has one name, and the graph keeps its input's.
        copied = op.Identity(guided_output) if guided_output.is_graph_input() else guided_output
        made(copied, guided_output_tensor(), rows, *latent_shape)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="tc-deploy")
