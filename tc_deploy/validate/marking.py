"""An exported graph with some of its inner values marked as outputs, so that an engine shows them.

In: a graph of a bundle. Out: its blocks and modules by the names of its nodes, and copies of it, in a folder of their
own, that give out what is asked for and no more: of a large model all inner values together fill a disk.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from tc_deploy.manifest import MODULE_END, ONNX_FOLDER, WEIGHTS, GraphRecord, Role, TensorRecord

_BLOCK = re.compile(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\.\d+(?=\.|$)")
"""The first numbered module of a path: ``transformer_blocks.3`` of ``transformer_blocks.3.attn1.to_q``."""


class MarkableGraph:
    """One graph, read once.

    Args:
        bundle: ``engines/NAME``, whose files have been checked.
        record: the graph.
        folder: where marked copies are written; the weights are copied there, as engines refuse links to them.
    """

    def __init__(self, bundle: Path, record: GraphRecord, folder: Path) -> None:
        self.record = record
        self._source, self._folder = bundle / record.file, folder
        weights = folder / WEIGHTS
        if not weights.exists():
            shutil.copyfile(bundle / ONNX_FOLDER / WEIGHTS, weights)
        graph = ir.load(self._source).graph
        self.nodes = tuple(graph)
        self._position = {id(node): position for position, node in enumerate(self.nodes)}
        self._outputs = {str(value.name) for value in graph.outputs}
        self.values = {str(value.name): value for node in self.nodes for value in node.outputs if _is_float(value)}

    def blocks(self) -> tuple[str, ...]:
        """The transformer blocks that the graph holds something of, in the order in which they run."""
        found = (_BLOCK.match(module_of(node)) for node in self.nodes)
        return tuple(dict.fromkeys(match[0] for match in found if match))

    def modules(self, block: str | None) -> tuple[str, ...]:
        """All modules in a block, itself included; None gives those that are in no block."""
        names: dict[str, None] = {}
        for node in self.nodes:
            path = module_of(node)
            match = _BLOCK.match(path)
            if (match[0] if match else None) == block:
                parts = path.split(".")
                names |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return tuple(name for name in names if name and (block is None or _is_within(name, block)))

    def nodes_of(self, block: str | None) -> tuple[ir.Node, ...]:
        """The nodes of a block; None gives those that are in no block."""
        matches = ((node, _BLOCK.match(module_of(node))) for node in self.nodes)
        return tuple(node for node, match in matches if (match[0] if match else None) == block)

    def leaving(self, module: str) -> tuple[str, ...]:
        """The values that a module makes and something outside of it reads."""
        return tuple(
            name
            for name, value in self.values.items()
            if _is_within(_made_in(value), module)
            and (name in self._outputs or any(not _is_within(module_of(use.node), module) for use in value.uses()))
        )

    def entering(self, module: str) -> tuple[str, ...]:
        """The values that a module reads and something outside of it makes."""
        return tuple(
            name
            for name, value in self.values.items()
            if not _is_within(_made_in(value), module)
            and any(_is_within(module_of(use.node), module) for use in value.uses())
        )

    def position(self, value: str) -> int:
        """When a value is made: the number of its node."""
        node = self.values[value].producer()
        assert node is not None, "values holds what nodes make"
        return self._position[id(node)]

    def feeding(self, values: Iterable[str]) -> frozenset[int]:
        """The numbers of all nodes that some of ``values`` depend on."""
        found: set[int] = set()
        waiting = [self.values[name].producer() for name in values]
        while waiting:
            node = waiting.pop()
            if node is None or self._position[id(node)] in found:
                continue
            found.add(self._position[id(node)])
            waiting += [value.producer() for value in node.inputs if value is not None]
        return frozenset(found)

    def marked(self, values: Iterable[str]) -> Path:
        """A copy that also gives out ``values``."""
        model = ir.load(self._source)
        wanted = set(values) - self._outputs
        for node in model.graph:
            model.graph.outputs.extend(value for value in node.outputs if value.name in wanted)
        path = self._folder / self._source.name
        ir.save(model, path)
        return path

    def marked_record(self, shapes: Mapping[str, tuple[int, ...]], path: Path) -> GraphRecord:
        """How the manifest would name the copy, given the shapes of the values that it also gives out."""
        extra = []
        for name in shapes.keys() - self._outputs:
            dtype = self.values[name].dtype
            assert dtype is not None, "values holds floats"
            extra.append(TensorRecord(name=name, role=Role.VALUE, dtype=str(dtype.numpy()), shape=shapes[name]))
        return self.record.model_copy(update={"file": path.name, "outputs": (*self.record.outputs, *extra)})


def module_of(node: ir.Node) -> str:
    """The module whose forward a node is part of; empty where it is of none."""
    return (node.name or "").rpartition(MODULE_END)[0]


def _made_in(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else module_of(node)


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
