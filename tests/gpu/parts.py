"""What parts of the measurement on a GPU have in common.

A part is a list of named measurements, most valuable first, that answer in JSON. One that cannot be had raises, and
what it says is its result. ``measure.py`` runs them, and knows the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "examples" / "digits-dit"
"""The demo's checkpoint; a bundle that was moved does not find it by itself."""
Measurements: TypeAlias = Mapping[str, Callable[[], Any]]
"""By name, in the order of their worth."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What parts work with."""

    bundle: Path
    """The demo's, built for ONNX Runtime on the CPU."""
    work: Path
    """A folder for whatever they write."""
    size: str = "XL/2"
    """Of the large model."""
    rounds: int = 20
    """How often each contender of a comparison is timed."""
    emoji: Path | None = None
    """npm's emoji-datasource-google, unpacked, where the kit carries it."""
    output: Path = Path()
    """A folder for what comes back beside the numbers."""
    end: float = math.inf
    """When the time is up, as ``time.time()`` has it."""


def taken_bytes() -> int:
    """What is taken of the GPU's memory, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free
