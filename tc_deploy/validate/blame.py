"""Who is to blame: the first block of a failing graph that departs from its reference, then the nodes in it.

In: a graph that fails, the inputs it fails on, and a reference: the checkpoint where the graph itself is wrong, ONNX
Runtime where the graph is right and the engine is wrong. Blocks are bisected, one marked at a time; only in the block
that is found are inner values looked at. Never: marks all of a graph.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

from tc_deploy.backends.base import Device
from tc_deploy.golden import Feed, quiet_polygraphy
from tc_deploy.validate.marking import MarkableGraph, module_of
from tc_deploy.validate.metrics import is_close
from tc_deploy.validate.record import BlameRecord
from tc_deploy.validate.runners import run_graph

if TYPE_CHECKING:
    from tc_deploy.validate.checkpoint import Checkpoint

_LISTED = 6
"""Operators that a sentence names."""

_Origin: TypeAlias = Literal["export", "engine"]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Values that are looked at together: what a module reads or makes, or what one node makes."""

    values: tuple[str, ...]
    module: str
    made: bool
    """Made by the module, not read."""


class _Search:
    """One search; ``departing`` of the subclasses says which places of some are wrong."""

    origin: _Origin

    def __init__(self, graph: MarkableGraph, feed: Feed, backend: str, precision: str) -> None:
        self.graph, self.feed, self.backend, self.precision = graph, feed, backend, precision
        self.runs = 0

    def departing(self, places: Sequence[_Place]) -> list[bool | None]:
        """Whether each place departs from the reference; None where it cannot be compared."""
        raise NotImplementedError

    def places(self, block: str | None) -> list[_Place]:
        """What is looked at in a block, or outside of all."""
        raise NotImplementedError

    def block_places(self, block: str) -> list[_Place]:
        """What a block hands on."""
        return [_Place(values=self.graph.leaving(block), module=block, made=True)]

    def onnxruntime(self, values: Iterable[str]) -> Feed:
        """Marked values as ONNX Runtime computes them."""
        self.runs += 1
        return onnxruntime_outputs(self.graph.marked(values), self.feed)

    def first_block(self) -> str | None:
        """The first block that departs; None where none does."""
        blocks = self.graph.blocks()

        def departs(block: str) -> bool:
            return any(self.departing(self.block_places(block)))

        # What follows a block that departs departs too, so halving finds the first.
        number = bisect.bisect_left(range(len(blocks)), True, key=lambda index: departs(blocks[index]))
        return blocks[number] if number < len(blocks) else None

    def first_place(self, block: str | None) -> tuple[_Place | None, list[str]]:
        """The first place in a block, or before and behind all, that departs; and the values that are right."""
        places = [place for place in self.places(block) if place.values]
        if block is not None:
            # What enters the block may be wrong before any block.
            places += [place for place in self.places(None) if place.values]
        places.sort(key=lambda place: max(map(self.graph.position, place.values)))
        departing = self.departing(places)
        wrong = [place for place, departs in zip(places, departing, strict=True) if departs]
        right = [
            name for place, departs in zip(places, departing, strict=True) if departs is False for name in place.values
        ]
        return (wrong[0] if wrong else None), right


class ExportSearch(_Search):
    """ONNX Runtime against the checkpoint: the graph is wrong."""

    origin = "export"

    def __init__(
        self, graph: MarkableGraph, feed: Feed, backend: str, precision: str, checkpoint: Checkpoint, variant: int
    ) -> None:
        super().__init__(graph, feed, backend, precision)
        self._checkpoint, self._variant = checkpoint, variant

    def places(self, block: str | None) -> list[_Place]:
        """What the modules read and make."""
        return [
            _Place(values=find(module), module=module, made=made)
            for module in self.graph.modules(block)
            for find, made in ((self.graph.entering, False), (self.graph.leaving, True))
        ]

    def departing(self, places: Sequence[_Place]) -> list[bool | None]:
        """Whether a place's values are not what the checkpoint's module reads or makes."""
        found = self.onnxruntime(name for place in places for name in place.values)
        expected = self._checkpoint.module_values(self._variant, self.feed, {place.module for place in places})
        answers: list[bool | None] = []
        for place in places:
            seen = expected.get(place.module)
            theirs = () if seen is None else (seen.made if place.made else seen.read)
            answers.append(self._departs([found[name] for name in place.values], theirs))
        return answers

    def _departs(self, ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]]) -> bool | None:
        """Whether values that leave or enter a module are not the module's.

        The graph may hold some of them only (what nobody reads is left out) and others beside them (caches), so they
        are right where every one of ours is among theirs, or every one of theirs among ours.
        """
        shapes = {array.shape for array in ours} & {array.shape for array in theirs}
        if not shapes:
            return None
        ours = [array for array in ours if array.shape in shapes]
        theirs = [array for array in theirs if array.shape in shapes]
        return not (self._all_among(ours, theirs) or self._all_among(theirs, ours))

    def _all_among(self, some: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> bool:
        return all(any(is_close(one, other, self.backend, self.precision) for other in others) for one in some)


class EngineSearch(_Search):
    """The target against ONNX Runtime on the same marked graph: the engine is wrong."""

    origin = "engine"

    def __init__(self, graph: MarkableGraph, feed: Feed, backend: str, precision: str, device: Device) -> None:
        super().__init__(graph, feed, backend, precision)
        self._device = device

    def places(self, block: str | None) -> list[_Place]:
        """What the nodes make."""
        nodes = self.graph.nodes_of(block)
        return [
            _Place(values=(str(value.name),), module=module_of(node), made=True)
            for node in nodes
            for value in node.outputs
            if value.name in self.graph.values
        ]

    def departing(self, places: Sequence[_Place]) -> list[bool | None]:
        """Whether a value is another than in ONNX Runtime."""
        values = dict.fromkeys(name for place in places for name in place.values)
        expected = self.onnxruntime(values)
        path = self.graph.marked(values)
        record = self.graph.marked_record({name: expected[name].shape for name in values}, path)
        self.runs += 1
        found = run_graph(self._device, self._device.load(path), record, self.feed)
        return [
            not all(is_close(found[name], expected[name], self.backend, self.precision) for name in place.values)
            for place in places
        ]


def blame(name: str, step: int, search: _Search, checkpoint: Checkpoint | None = None) -> BlameRecord:
    """Find what departs first.

    Args:
        name: the graph's.
        step: whose inputs it fails on.
        search: how.
        checkpoint: to compare weights with.

    Raises:
        BackendError: an engine refuses a marked graph.
    """
    block = search.first_block()
    place, right = search.first_place(block)
    graph = search.graph
    suspects: tuple[int, ...] = ()
    if place is not None:
        feeding = graph.feeding(place.values)
        made_here = map(graph.position, place.values)
        # Where errors pile up slowly, what is right may depend on what is not.
        suspects = tuple(sorted(feeding - graph.feeding(right) or made_here))
    nodes = [graph.nodes[number] for number in suspects]
    weights = []
    for node in nodes:
        for value in node.inputs:
            tensor = None if value is None or not value.is_initializer() else value.const_value
            if (
                checkpoint is not None
                and tensor is not None
                and checkpoint.is_other_weight(str(tensor.name), tensor.numpy())
            ):
                weights.append(str(tensor.name))
    module = place.module if place is not None else None
    operators = tuple(f"{node.op_type} {node.name}" for node in nodes)
    return BlameRecord(
        graph=name,
        step=step,
        origin=search.origin,
        block=block,
        module=module,
        operators=operators,
        weights=tuple(dict.fromkeys(weights)),
        runs=search.runs,
        text=_text(block, place, [f"{node.op_type} {node.outputs[0].name}" for node in nodes], weights),
    )


def onnxruntime_outputs(path: Path, feed: Mapping[str, NDArray[Any]]) -> Feed:
    """All outputs of an ONNX graph in ONNX Runtime, through polygraphy's runner."""
    with quiet_polygraphy(), OnnxrtRunner(SessionFromOnnx(str(path))) as runner:
        names = runner.get_input_metadata(use_numpy_dtypes=False)
        outputs = runner.infer({name: np.asarray(feed[name]) for name in names}, check_inputs=False)
        return {name: np.array(array) for name, array in outputs.items()}


def _text(block: str | None, place: _Place | None, operators: Sequence[str], weights: Sequence[str]) -> str:
    if place is None:
        return "departs in its outputs and nowhere where it can be looked at: marking a value may undo a fusion"
    where = f"in {block}" if block is not None else "outside of the blocks"
    side = "makes" if place.made else "reads"
    what = f"first departs {where}: what {place.module or 'the graph'} {side}"
    if operators:
        more = f" and {len(operators) - _LISTED} more" if len(operators) > _LISTED else ""
        what += f"; to blame: {', '.join(operators[:_LISTED])}{more}"
    return what + (f"; not the checkpoint's: {', '.join(dict.fromkeys(weights))}" if weights else "")
