"""Several graphs to one: what one makes, a later one reads.

In: models whose weights are packed. Out: one model that holds their nodes; the models given are used up. Never:
computes, or copies a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from tc_deploy.errors import ExportError


def merged_model(models: Mapping[str, ir.Model], name: str) -> ir.Model:
    """Join models in the order in which they run.

    An input that an earlier model makes, or already has as its own input, is connected; every other becomes an input of
    the whole. The outputs are those of the last model.

    Args:
        models: by the prefix that keeps their values' names apart; at least one.
        name: the graph's.

    Raises:
        ExportError: two models are of different opsets, or one has functions of its own.
    """
    parts = list(models.items())
    opsets = dict(parts[-1][1].graph.opset_imports)
    whole = ir.Graph([], [], nodes=[], opset_imports=opsets, name=name)
    known: dict[str, ir.Value] = {}
    for prefix, model in parts:
        graph = model.graph
        if dict(graph.opset_imports) != opsets or model.functions:
            raise ExportError(f"{name}: {prefix} was exported for another opset or with functions, found {opsets}")
        last = prefix == parts[-1][0]
        inputs, outputs = list(graph.inputs), list(graph.outputs)
        initializers = list(graph.initializers.values())
        graph.inputs.clear()
        graph.outputs.clear()
        graph.initializers.clear()
        nodes = list(graph)
        graph.remove(nodes)
        made = {str(value.name): value for value in outputs}
        for node in nodes:
            node.name = f"{prefix}.{node.name}"
            for value in node.outputs:
                if not (last and value in outputs):
                    value.name = f"{prefix}:{value.name}"
        for value in initializers:
            value.name = f"{prefix}.{value.name}"
            if value.const_value is not None:
                value.const_value.name = value.name
            whole.initializers[value.name] = value
        whole.extend(nodes)
        for value in inputs:
            earlier = known.get(str(value.name))
            if earlier is None:
                known[str(value.name)] = value
                whole.inputs.append(value)
            else:
                ir.convenience.replace_all_uses_with(value, earlier)
        if last:
            whole.outputs.extend(outputs)
        known |= made
    return ir.Model(whole, ir_version=parts[-1][1].ir_version, producer_name="tc-deploy")
