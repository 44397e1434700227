"""What the runtime knows of an engine: buffers on a device, and graphs bound to them.

A backend file holds a :class:`Backend`. The runtime sees these Protocols alone, so a new kind of engine is one file.
They are Protocols and not base classes because a backend shares no code with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Buffer(Protocol):
    """Memory on the device, of one dtype and shape for its whole life."""

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` (same dtype and shape) to the device."""

    def read(self) -> NDArray[Any]:
        """A copy on the host."""


class BoundGraph(Protocol):
    """A graph whose every input and output is a fixed buffer."""

    def run(self) -> None:
        """Run it; results lie in the output buffers when the device gets there."""


class Graph(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundGraph:
        """Fix the buffers by tensor name; nothing is copied or allocated by running the result.

        Raises:
            BackendError: the engine refuses the graph for these buffers.
        """


class Device(Protocol):
    """A place where graphs of one backend run."""

    def buffer(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Buffer:
        """Allocate, filled with zeros."""

    def load(self, path: Path) -> Graph:
        """Load one graph.

        Raises:
            BackendError: the engine refuses it.
        """


class Backend(Protocol):
    """An engine kind."""

    name: str
    """Also the name of a target's folder."""

    def version(self) -> str:
        """The engine's version.

        Raises:
            BackendError: it is not installed; names the extra.
        """

    def open(self, options: Mapping[str, Any]) -> Device:
        """Open a device as a target's options say.

        Raises:
            BackendError: it is not installed, or an option is unknown or nothing that this machine can do.
        """
