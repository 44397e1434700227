"""Other methods in PyTorch, where no plan can say what they do: what runs of them have in common.

In: batches of noise, and functions that sample. Out: latents' records, and times over those of PyTorch's own full run.
Never: knows a method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tc_deploy.bench.clock import Clock
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import ratio_of
from tc_deploy.bundle import canonical_json, sha256_of_bytes, write_state
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling, denoise

FULL = "full"
"""PyTorch's own full run, among the runs that are timed."""


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """What one setting made of the noise."""

    name: str
    kind: Kind
    latents: Tensor
    """(n, C, H, W)."""
    latency_ratio: float | None
    """Of a run over PyTorch's own full run, median over rounds in which both ran; None where nothing was timed."""
    latency_iqr: float | None
    cost_in_full_steps: float
    """FLOPs over those of one full step; mean over batches."""
    steps_full: int
    steps_cached: int
    """Median over batches, each of which cache-dit decides for anew."""


def batches_of(
    noise: Tensor, conditions: Mapping[str, Tensor], batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Noise and conditions in batches, all of one size."""
    for start in range(0, len(noise), batch_size):
        rows = torch.arange(start, start + batch_size) % len(noise)
        yield noise[rows], {name: given[rows] for name, given in conditions.items()}


def key_of(facts: Sequence[Any]) -> str:
    """What a kept result is called, by what it depends on beside what its folder stands for."""
    return sha256_of_bytes(canonical_json(facts).encode())[:16]


def kept_tensors(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was made before, or is made now and kept."""
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError):
        pass
    made = make()
    write_state(path, safetensors.torch.save(made))
    return made


def ratios_to_full(
    requests: Mapping[str, Callable[[], object]], rounds: int, path: Path, progress: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Each request's time over that of the full run, unless that was taken before: ``median`` and ``iqr`` by name."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    interleaved(requests, 1)  # the first run of each allocates, and picks kernels
    timed = {name: partial(Clock().timed, request, graphs=False) for name, request in requests.items()}
    runs = interleaved(timed, rounds, progress)
    times_ms = {name: [run.wall_ms for run in found] for name, found in runs.items()}
    ratios = {name: ratio_of(times_ms[name], times_ms[FULL]) for name in requests if name != FULL}
    write_state(path, canonical_json(ratios).encode())
    return ratios


def sample(model: DiffusionTransformer, sampling: Sampling, noise: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """A run in which the model is called at every step."""
    return denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs))
