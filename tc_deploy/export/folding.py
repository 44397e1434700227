"""What follows from no input, computed once in PyTorch; and complex numbers as pairs of real ones.

In: a program of torch.export. Out: the same program, where positions, rotary tables and the like are constants and no
tensor is complex. Engines compute sines of large angles otherwise than PyTorch does, and know no complex numbers; so a
graph agrees with PyTorch to the last bits of a product only if these are PyTorch's own. Never: touches a parameter.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, TensorArgument

from tc_deploy.errors import ExportError

aten = torch.ops.aten
_PREFIX = "c_folded_"


def folded_program(program: ExportedProgram, largest: int) -> ExportedProgram:
    """Fold a program, in place where it is plain.

    Args:
        program: as it was traced.
        largest: elements of the largest constant that may be made.

    Returns:
        The folded program.

    Raises:
        ExportError: an operation on complex numbers has no real form here.
    """
    if not all(map(_is_plain, program.graph.nodes)):
        program = program.run_decompositions({})
    _Folding(program, largest).run()
    return program


class _Folding:
    def __init__(self, program: ExportedProgram, largest: int) -> None:
        self.program, self.largest = program, largest
        self.graph = program.graph_module.graph
        self.values: dict[fx.Node, Any] = {}
        """Of nodes that follow from no input: tensors, or lists of them."""
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        """Placeholders of constants, by content."""
        self.pairs: dict[fx.Node, fx.Node] = {}
        """Of complex nodes: a real one, with the two parts along a last axis."""

    def run(self) -> None:
        self._evaluate()
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self.values:
                if node.target is aten._assert_tensor_metadata.default:
                    self.graph.erase_node(node)  # It has done its work, and an engine does none for it.
                    continue
                self._take_constants(node)
                if _is_complex(node) or any(map(_is_complex, node.all_input_nodes)):
                    self._make_real(node)
            elif node.op == "output":
                self._take_constants(node)
        self.graph.eliminate_dead_code()
        self._drop_unused()
        self.graph.lint()
        self.program.graph_module.recompile()

    def _evaluate(self) -> None:
        """Compute what follows from buffers and constants alone."""
        placeholders = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER) and not isinstance(
                spec.arg, ConstantArgument
            ):
                target = str(spec.target)
                constants = self.program.constants
                value = constants[target] if target in constants else self.program.state_dict[target]
                self.values[placeholders[spec.arg.name]] = value
        for node in self.graph.nodes:
            if node.op != "call_function" or not all(given in self.values for given in node.all_input_nodes):
                continue
            if not _is_pure(node.target):
                continue
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
            value = node.target(*args, **kwargs)
            tensors = value if isinstance(value, tuple | list) else [value]
            if all(isinstance(item, Tensor) and item.numel() <= self.largest for item in tensors):
                self.values[node] = value

    def _take_constants(self, node: fx.Node) -> None:
        """Let a node read constants where its inputs were computed."""
        for given in list(node.all_input_nodes):
            value = self.values.get(given)
            if given.op == "call_function" and isinstance(value, Tensor) and not value.is_complex():
                node.replace_input_with(given, self._constant(value))

    def _constant(self, value: Tensor) -> fx.Node:
        """A placeholder that holds a value."""
        value = value.detach().resolve_conj().contiguous()
        content = value.flatten().view(torch.uint8) if value.numel() else value
        key = (hashlib.sha256(content.cpu().numpy().tobytes()).digest(), tuple(value.shape), value.dtype)
        if key in self.made:
            return self.made[key]
        name = f"{_PREFIX}{len(self.made)}"
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node: fx.Node = self.graph.placeholder(name)
        fake = next(
            item.meta["val"].fake_mode
            for item in self.graph.nodes
            if item.op == "placeholder" and isinstance(item.meta.get("val"), Tensor)
        )
        value = value.clone()
        node.meta["val"] = fake.from_tensor(value, static_shapes=True)
        spec = InputSpec(
            kind=InputKind.CONSTANT_TENSOR, arg=TensorArgument(name=node.name), target=name, persistent=None
        )
        # It comes before all others, in the graph as in the signature.
        self.program.graph_signature.input_specs.insert(0, spec)
        self.program._constants[name] = value
        self.made[key] = node
        return node

    def _make_real(self, node: fx.Node) -> None:
        """Give a node that makes or takes complex numbers a real form.

        Raises:
            ExportError: there is none here.
        """
        for given in node.all_input_nodes:
            if _is_complex(given) and given not in self.pairs and given in self.values:
                self.pairs[given] = self._constant(torch.view_as_real(self.values[given].resolve_conj()))
        if node.target is aten.view_as_real.default:
            node.replace_all_uses_with(self.pairs[node.args[0]])  # type: ignore[index]
            return
        rule = _REAL.get(node.target)
        if rule is None or not _is_complex(node):
            raise ExportError(f"complex numbers in {node.target}, which has no real form in a graph")
        self.pairs[node] = rule(self, node)

    def emit(self, at: fx.Node, function: Any, *args: Any) -> fx.Node:
        """A new node before ``at``, as if it came from the same module."""
        with self.graph.inserting_before(at):
            node: fx.Node = self.graph.call_function(function, args)
        node.meta = dict(at.meta)
        node.meta["val"] = function(*fx.node.map_arg(args, lambda given: given.meta["val"]))
        return node

    def _drop_unused(self) -> None:
        """Leave out the buffers and constants that nothing reads any more."""
        signature = self.program.graph_signature
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and node in self.values:
                signature.input_specs[:] = [spec for spec in signature.input_specs if spec.arg.name != node.name]
                self.graph.erase_node(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node can be folded as it was traced: to decompose a program takes a fifth of an export's time.

    Otherwise it changes a tensor in place, holds a program of its own, or computes with complex numbers, which have
    their real forms by the operations that are left of them.
    """
    if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator) or _is_complex(node):
        return False
    return not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _is_pure(target: Any) -> bool:
    """Whether an operation gives the same for the same, and does nothing else."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _product(folding: _Folding, node: fx.Node) -> fx.Node:
    """(a + bi)(c + di); one of the two may be real."""

    def parts(given: Any) -> tuple[Any, Any]:
        if given not in folding.pairs:
            return given, None
        return tuple(folding.emit(node, aten.select.int, folding.pairs[given], -1, part) for part in (0, 1))  # type: ignore[return-value]

    (real, imaginary), (other_real, other_imaginary) = map(parts, node.args)

    def times(one: Any, other: Any) -> Any:
        return None if one is None or other is None else folding.emit(node, aten.mul.Tensor, one, other)

    def both(operation: Any, one: Any, other: Any) -> Any:
        return one if other is None else other if one is None else folding.emit(node, operation, one, other)

    whole = (
        both(aten.sub.Tensor, times(real, other_real), times(imaginary, other_imaginary)),
        both(aten.add.Tensor, times(real, other_imaginary), times(imaginary, other_real)),
    )
    return folding.emit(node, aten.stack.default, list(whole), -1)


def _same(folding: _Folding, node: fx.Node) -> fx.Node:
    """Operations that move complex numbers about, and count axes from the front."""
    first = node.args[0]
    pair: Any = [folding.pairs[item] for item in first] if isinstance(first, list | tuple) else folding.pairs[first]  # type: ignore[index]
    rank = node.meta["val"].ndim
    others = list(node.args[1:])
    if others and isinstance(others[0], int) and others[0] < 0:
        others[0] += rank + (node.target in (aten.select.int, aten.squeeze.dim))
    return folding.emit(node, node.target, pair, *others)


def _shaped(folding: _Folding, node: fx.Node) -> fx.Node:
    """Operations that are given a shape."""
    return folding.emit(node, node.target, folding.pairs[node.args[0]], [*node.args[1], 2])  # type: ignore[index,misc]


def _turned(folding: _Folding, node: fx.Node) -> fx.Node:
    rank = node.meta["val"].ndim
    order = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr]
    return folding.emit(node, aten.permute.default, folding.pairs[node.args[0]], [*order, rank])  # type: ignore[index]


def _swapped(folding: _Folding, node: fx.Node) -> fx.Node:
    rank = node.meta["val"].ndim
    axes = [axis % rank for axis in node.args[1:]]
    return folding.emit(node, aten.transpose.int, folding.pairs[node.args[0]], *axes)  # type: ignore[index]


_MOVES = (
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.index_select.default, aten.select.int, aten.slice.Tensor),
    *(aten.cat.default, aten.clone.default, aten.alias.default, aten.detach.default),
)
_REAL: dict[Any, Callable[[_Folding, fx.Node], fx.Node]] = {
    aten.view_as_complex.default: lambda folding, node: node.args[0],  # type: ignore[return-value,dict-item]
    aten.mul.Tensor: _product,
    aten.permute.default: _turned,
    aten.transpose.int: _swapped,
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default), _shaped),
    **dict.fromkeys(_MOVES, _same),
}
