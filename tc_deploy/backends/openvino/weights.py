"""A graph's weights as inputs, so that all graphs of a bundle multiply by the same memory.

OpenVINO arranges a copy of every constant matrix for its kernels, in each compiled graph anew. A matrix that comes as
an input it takes as it lies, and there lies the mapping of the weights file, whose pages all graphs have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

SMALLEST_BYTES = 1024
"""Of a matrix that is worth an input."""
_NAME = "weights."


@dataclass(frozen=True, kw_only=True)
class WeightInputs:
    """What to set the inputs to that stand for weights."""

    tensors: dict[str, openvino.Tensor]
    """By input; views of the constants' memory."""
    constants: tuple[openvino.Node, ...]
    """They own the memory."""


def weights_as_inputs(model: openvino.Model, module: Any) -> WeightInputs:
    """Replace the constants that a graph multiplies by.

    The inner axis of such an input is left open, though only one size fits: for an input of a known shape OpenVINO
    allocates memory of its own, which nobody reads once a tensor is set.

    Args:
        model: the graph; its inputs grow.
        module: ``openvino``.

    Returns:
        What to set the new inputs to.
    """
    opset = module.opset13
    tensors: dict[str, openvino.Tensor] = {}
    constants = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant" or constant.get_byte_size() < SMALLEST_BYTES:
            continue
        shape = list(constant.get_output_shape(0))
        shape[-1 if node.get_attributes()["transpose_b"] else -2] = -1
        parameter = opset.parameter(shape, constant.get_element_type())
        name = f"{_NAME}{len(tensors)}"
        parameter.output(0).get_tensor().set_names({name})
        tensors[name] = constant.tensor_view
        constants.append(constant)
        constant.output(0).replace(parameter.output(0))
        model.add_parameters([parameter])
    return WeightInputs(tensors=tensors, constants=tuple(constants))
