"""What no step needs to compute: the part of the steps' graphs that follows from the request and the timesteps.

Under a plan the timesteps are known, and a request's conditions stay what they are. So whatever depends on these alone,
as an adaLN's modulation or the keys and values of a prompt, is cut out of the steps' graphs, which read it instead, and
becomes two graphs of its own, which run once for a request. It is found by what each value of a graph depends on, and
by nothing that is known of a family. In: the graphs of the steps, whose weights are packed. Out: the same, cut, and the
two graphs. Never: computes, or copies a weight.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from tc_deploy.manifest import (
    MODEL_BATCH,
    PROLOGUE,
    RUN_BATCH,
    SCHEDULE,
    Role,
    TensorName,
    model_inputs,
    prologue_tensor,
)

_PRODUCTS = ("MatMul", "Gemm")
"""Operators whose weights are worth moving."""
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


class _Depends(enum.IntEnum):
    """What a value follows from; of several inputs the last counts."""

    CONSTANT = 0
    REQUEST = 1
    """Conditions."""
    TIMESTEP = 2
    """The timestep, and maybe conditions."""
    STEP = 3
    """What the steps before have made, and what tables hold."""


_KINDS = {Role.CONDITION: _Depends.REQUEST, Role.TIMESTEP: _Depends.TIMESTEP}
_MADE_BY = {_Depends.REQUEST: Role.PROLOGUE, _Depends.TIMESTEP: Role.SCHEDULED}
"""What a step reads of it."""
_GRAPHS = {Role.PROLOGUE: PROLOGUE, Role.SCHEDULED: SCHEDULE}


class Prologue:
    """Gathers what leaves the graphs of a model's steps; the same serves them all.

    Args:
        steps: T. A product's rows for a whole run must be fewer numbers than its weights, or it stays in the steps.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._parts = {role: _Part() for role in _GRAPHS}
        self._opsets: dict[str, int] = {}
        self._ir_version = 0

    def cut(self, model: ir.Model, inputs: Iterable[TensorName]) -> tuple[TensorName, ...]:
        """Cut a graph, in place.

        Args:
            model: a step's, whose weights are packed.
            inputs: what its inputs are for.

        Returns:
            What it reads now.
        """
        self._opsets, self._ir_version = dict(model.graph.opset_imports), int(model.ir_version or 0)
        roles = {tensor.name: tensor for tensor in inputs}
        analysis = _Analysis(model.graph, roles, self._steps)
        # All are taken before one is replaced: one may be made of another.
        read = {}
        for value in analysis.cuts():
            role = _MADE_BY[analysis.depends(value)]
            tensor = prologue_tensor(role, self._parts[role].take(value, role, analysis))
            roles[tensor.name] = tensor
            read[value] = ir.Value(name=tensor.name, shape=value.shape, type=value.type)
        for value, given in read.items():
            model.graph.inputs.append(given)
            ir.convenience.replace_all_uses_with(value, given)
        _drop_unread(model.graph)
        return tuple(roles[str(value.name)] for value in model.graph.inputs)

    def tensors(self, name: str) -> tuple[TensorName, ...]:
        """What the tensors of one of the graphs are for."""
        role = next(role for role, graph in _GRAPHS.items() if graph == name)
        part = self._parts[role]
        return (
            *model_inputs(part.input_names),
            *(prologue_tensor(role, number) for number in range(len(part.outputs))),
        )

    def models(self) -> dict[str, ir.Model]:
        """The graphs of what has left, by name; none where nothing has."""
        return {
            _GRAPHS[role]: ir.Model(
                part.graph(_GRAPHS[role], self._opsets), ir_version=self._ir_version, producer_name="tc-deploy"
            )
            for role, part in self._parts.items()
            if part.outputs
        }


class _Analysis:
    """What the values of one graph follow from, and where it is cut."""

    def __init__(self, graph: ir.Graph, inputs: Mapping[str, TensorName], steps: int) -> None:
        self._graph, self._steps = graph, steps
        self._depends = {value: _KINDS.get(inputs[str(value.name)].role, _Depends.STEP) for value in graph.inputs}
        self.keys = {value: f"input {value.name}" for value in graph.inputs}
        """The same for values that are computed alike, of whatever graph; not of those of a step."""
        self.keys |= {value: _content(value.const_value) for value in graph.initializers.values()}
        self.nodes = tuple(graph)
        self._batches = {value.shape[0] for value in graph.inputs if value.shape and self.depends(value) in _MADE_BY}
        for node in self.nodes:
            kind = max((self.depends(value) for value in node.inputs), default=_Depends.CONSTANT)
            if kind is _Depends.STEP or not _is_plain(node):
                self._depends |= dict.fromkeys(node.outputs, _Depends.STEP)
                continue
            self._depends |= dict.fromkeys(node.outputs, kind)
            key = _key_of(node, ["" if value is None else self.keys[value] for value in node.inputs])
            self.keys |= {value: f"{key} {number}" for number, value in enumerate(node.outputs)}

    def depends(self, value: ir.Value | None) -> _Depends:
        """What a value follows from."""
        return _Depends.CONSTANT if value is None else self._depends.get(value, _Depends.CONSTANT)

    def cuts(self) -> list[ir.Value]:
        """The values at which the graph is cut, in the order of their making.

        Those that stand first on the way back from its outputs: what they are made of is then no step's affair, unless
        something else needs it. So what costs nothing may stand on both sides.
        """
        found: set[ir.Value] = set()
        seen: set[ir.Node] = set()
        todo = [node for value in self._graph.outputs if (node := value.producer()) is not None]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for value in node.inputs:
                made_by = None if value is None else value.producer()
                if value is None or made_by is None:
                    continue
                if self._is_cut(value, made_by):
                    found.add(value)
                else:
                    todo.append(made_by)
        return [value for node in self.nodes for value in node.outputs if value in found]

    def _is_cut(self, value: ir.Value, node: ir.Node) -> bool:
        """Whether a value is a product worth moving, one row for each of the batch."""
        kind = self.depends(value)
        if kind not in _MADE_BY or node.op_type not in _PRODUCTS or value.is_graph_output():
            return False
        weight = next((given for given in node.inputs[:2] if self.depends(given) is _Depends.CONSTANT), None)
        if weight is None or weight.shape is None or not value.shape or value.shape[0] not in self._batches:
            return False
        sizes = [size for size in (*value.shape[1:], *weight.shape) if isinstance(size, int)]
        if len(sizes) < len(value.shape) - 1 + len(weight.shape):
            return False
        row = math.prod(sizes[: len(value.shape) - 1])
        rows = self._steps if kind is _Depends.TIMESTEP else 1
        return rows * row <= math.prod(sizes[len(value.shape) - 1 :])


class _Part:
    """One of the two graphs, as it grows."""

    def __init__(self) -> None:
        self.outputs: dict[str, ir.Value] = {}
        """By key."""
        self._made: dict[str, ir.Value] = {}
        """Every value by key."""
        self._inputs: list[ir.Value] = []
        self._weights: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._names: set[str] = set()

    @property
    def input_names(self) -> tuple[str, ...]:
        """What it reads."""
        return tuple(str(value.name) for value in self._inputs)

    def take(self, value: ir.Value, role: Role, analysis: _Analysis) -> int:
        """Take what a value is made of, unless that was taken from another graph; returns which output it is."""
        key = analysis.keys[value]
        if key not in self.outputs:
            wanted = _feeding(value)
            for node in analysis.nodes:
                if node in wanted and analysis.keys[node.outputs[0]] not in self._made:
                    self._copy(node, role, analysis)
            made = self.outputs[key] = self._made[key]
            made.name = prologue_tensor(role, len(self.outputs) - 1).name
        return list(self.outputs).index(key)

    def _copy(self, node: ir.Node, role: Role, analysis: _Analysis) -> None:
        inputs = [None if value is None else self._given(value, role, analysis) for value in node.inputs]
        outputs = [
            ir.Value(name=self._named(value.name), shape=_shape(value, role), type=value.type) for value in node.outputs
        ]
        name = self._named(node.name)
        self._nodes.append(
            ir.Node(node.domain, node.op_type, inputs, dict(node.attributes), outputs=outputs, name=name)
        )
        self._made |= {analysis.keys[old]: new for old, new in zip(node.outputs, outputs, strict=True)}

    def _given(self, value: ir.Value, role: Role, analysis: _Analysis) -> ir.Value:
        key = analysis.keys[value]
        if key not in self._made:
            # What no node has made is an input or a weight.
            weight = value.const_value
            made = ir.Value(
                name=value.name if weight is None else self._named(value.name),
                shape=_shape(value, role),
                type=value.type,
                const_value=weight,
            )
            (self._inputs if weight is None else self._weights).append(made)
            self._made[key] = made
        return self._made[key]

    def _named(self, name: str | None) -> str:
        """A name that the graphs may have for different things, once."""
        given = unique = str(name)
        while unique in self._names:
            unique = f"{given}.{len(self._names)}"
        self._names.add(unique)
        return unique

    def graph(self, name: str, opsets: Mapping[str, int]) -> ir.Graph:
        """The graph; the part is used up."""
        outputs = list(self.outputs.values())
        return ir.Graph(
            self._inputs, outputs, nodes=self._nodes, initializers=self._weights, opset_imports=dict(opsets), name=name
        )


def _feeding(value: ir.Value) -> set[ir.Node]:
    """The nodes that a value is made by."""
    found: set[ir.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [given for given in node.inputs if given is not None]
    return found


def _shape(value: ir.Value, role: Role) -> ir.Shape | None:
    """A value's shape; in the graph that runs for all steps at once the batch is another one."""
    if value.shape is None or role is Role.PROLOGUE or value.const_value is not None:
        return value.shape
    sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    if not {size for size in sizes if isinstance(size, str)} <= {MODEL_BATCH}:
        return None
    return ir.Shape([RUN_BATCH if size == MODEL_BATCH else size for size in sizes])


def _is_plain(node: ir.Node) -> bool:
    """Whether a node's outputs follow from its inputs, and from nothing outside of it."""
    inner = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    standard = node.domain in ("", "ai.onnx") and node.op_type not in _RANDOM
    return standard and not any(attribute.type in inner for attribute in node.attributes.values())


def _key_of(node: ir.Node, inputs: list[str]) -> str:
    attributes = sorted((name, _plain(attribute.value)) for name, attribute in node.attributes.items())
    return hashlib.sha256(repr((node.op_type, attributes, inputs)).encode()).hexdigest()


def _plain(value: object) -> object:
    return _content(value) if isinstance(value, ir.TensorProtocol) else value


def _content(tensor: ir.TensorProtocol | None) -> str:
    """The same for equal tensors; of one in the weights file, where each lies once, its place."""
    if tensor is None:
        return ""
    if isinstance(tensor, ir.ExternalTensor):
        place = f"{tensor.location} {tensor.offset} {tensor.length}"
    else:
        place = hashlib.sha256(tensor.tobytes()).hexdigest()
    return f"{tensor.dtype.name} {tuple(tensor.shape.numpy())} {place}"


def _drop_unread(graph: ir.Graph) -> None:
    """Leave out what nothing reads any more."""
    for node in reversed(tuple(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for value in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        graph.inputs.remove(value)
