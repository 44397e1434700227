"""What the runtime knows of an engine: buffers on a device, and graphs bound to them.

A backend file holds a :class:`Backend`. The runtime sees these Protocols alone, so a new kind of engine is one file:
it builds a bundle's engines into a folder, and opens a device that loads them.
They are Protocols and not base classes because most backends share no code with another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.manifest import GpuRecord, GraphRecord, Manifest, TargetManifest

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class BufferSpec:
    """Memory that is asked for."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    exchanged: bool = False
    """The host writes or reads it at every request, so it is worth pinned memory where a device has that."""

    @property
    def size_bytes(self) -> int:
        """Of the tensor."""
        return self.dtype.itemsize * math.prod(self.shape)


class Buffer(Protocol):
    """Memory on the device, of one dtype and shape for its whole life."""

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` (same dtype and shape) to the device."""

    def read(self) -> NDArray[Any]:
        """A copy on the host."""

    def rows(self, start: int, stop: int) -> Buffer:
        """The same memory, seen as some of the rows of its first axis: what one writes, the other reads.

        Raises:
            BackendError: the device has no such view.
        """

    def copy(self, source: Buffer) -> None:
        """Copy a buffer of the same device, dtype and shape in, without a detour where the device can."""


class BoundGraph(Protocol):
    """A graph whose every input and output is a fixed buffer."""

    def run(self) -> None:
        """Run it; results lie in the output buffers when the device gets there."""


class Capture(BoundGraph, Protocol):
    """Bound graphs that run as one."""

    def prepare(self) -> None:
        """Do now what only the first run would do, but compute nothing; every engine in it has run once before.

        Raises:
            BackendError: the device cannot capture them.
        """


class Graph(Protocol):
    """A loaded graph, or several that differ in the sizes of their axes."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundGraph:
        """Fix the buffers by tensor name; nothing is copied or allocated by running the result.

        Raises:
            BackendError: the engine refuses the graph for these buffers.
        """


class Device(Protocol):
    """A place where graphs of one backend run."""

    def buffers(self, specs: Sequence[BufferSpec]) -> list[Buffer]:
        """Allocate all of an owner's memory, filled with zeros; it is freed when the last of the buffers is.

        Raises:
            BackendError: a GPU has not that much.
            OutOfMemoryError: the machine has not.
        """

    def capture(self, graphs: Sequence[BoundGraph]) -> Capture:
        """Make one of several graphs that always run in this order.

        A device that can launch recorded work at once records it at the first run and launches it at later ones, so
        what is bound must stay as it is. Any other device runs them in turn, and so does every device with graphs that
        are not its own, as those that somebody watches.
        """

    def load(self, path: Path) -> Graph:
        """Load one graph.

        Raises:
            BackendError: the engine refuses it.
        """


def loaded_graphs(device: Device, bundle: Path, files: Mapping[str, str]) -> dict[str, Graph]:
    """Load each of a bundle's files once, whatever number of graphs it holds; ``files`` names it for each graph.

    Raises:
        BackendError: the engine refuses one.
    """
    loaded = {file: device.load(bundle / file) for file in dict.fromkeys(files.values())}
    return {name: loaded[file] for name, file in files.items()}


class Backend(Protocol):
    """An engine kind."""

    name: str
    """Also the name of a target's folder."""

    def version(self) -> str:
        """The engine's version.

        Raises:
            BackendError: it is not installed; names the extra.
        """

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with what would otherwise be chosen unasked, as the device: a target records it and is run so.

        Raises:
            BackendError: it is not installed.
        """

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> GpuRecord | None:
        """Make the engines of a bundle whose files have been checked.

        Args:
            bundle: ``engines/NAME``.
            manifest: the bundle's.
            folder: the target that is being made; every file left there becomes part of it.
            options: the engine kind's own settings.
            progress: told about each graph.

        Returns:
            The GPU that the engines are for, where the build needs one.

        Raises:
            UsageError: an option is unknown, out of range, or does not fit the bundle.
            BackendError: it is not installed, refuses a graph, or lacks memory or a GPU.
        """

    def engine_file(self, record: GraphRecord) -> str:
        """The file that a device loads for a graph, by its path inside the bundle; graphs of one file share it."""

    def reads(self, manifest: Manifest, options: Mapping[str, Any]) -> tuple[str, ...]:
        """All files that loading a target opens, by their paths inside the bundle."""

    def check(self, bundle: Path, target: TargetManifest) -> None:
        """Check, before anything is loaded, that this machine can run a target whose files have been checked.

        Raises:
            BackendError: it cannot; says what differs and which command builds again.
        """

    def open(self, options: Mapping[str, Any]) -> Device:
        """Open a device as a target's options say.

        Raises:
            BackendError: it is not installed, or an option is unknown or nothing that this machine can do.
        """
