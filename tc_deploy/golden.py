"""Golden inputs and outputs, which an export leaves behind to validate engines by, and trajectories.

In: arrays of a sampling run in PyTorch. Out: the folder ``polygraphy/`` of a bundle, whose files open in polygraphy as
they are, and back. The bundle's manifest holds their checksums. Never: imports torch, or runs anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tc_deploy.errors import BundleError, counted
from tc_deploy.manifest import POLYGRAPHY, GraphRecord, Manifest
from tc_deploy.plan import LABELS, RANDOM, PromptsRecord, TextsRecord
from tc_deploy.precisions import PRECISIONS
from tc_deploy.tensors import read_tensors
from tc_deploy.types import FloatArray

SCRIPT = f"{POLYGRAPHY}/inputs.py"
TRAJECTORY = f"{POLYGRAPHY}/trajectory.safetensors"
RUNNER = "pytorch"
"""What made the saved outputs, as polygraphy names it."""

Feed: TypeAlias = dict[str, NDArray[Any]]
"""Arrays by tensor name."""

_CONDITION, _UNCONDITIONAL, _TABLE, _STEPS = "condition.", "unconditional.", "table.", "steps."
_FULL, _EXACT, _CACHED = "latents.full", "latents.exact", "latents.cached"
_NOISE, _VARIANTS = "noise", "variants"

_SCRIPT_HEAD = '''"""Inputs of the graphs as they occur while sampling, for polygraphy's --data-loader-script."""

from pathlib import Path

from polygraphy.json import load_json


def _load(graph):
    return load_json(str(Path(__file__).with_name(f"{graph}.inputs.json")))
'''
_SCRIPT_PART = """

def {function}():
    return _load("{graph}")
"""


@dataclass(frozen=True, kw_only=True)
class GoldenGraph:
    """Inputs and outputs of one graph at a few steps."""

    steps: tuple[int, ...]
    """The steps they are of."""
    inputs: tuple[Feed, ...]
    outputs: tuple[Feed, ...]
    """As PyTorch computed them."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One sampling run in PyTorch, under the plan and with every step full, and the tables that it used."""

    noise: FloatArray
    """(B, C, H, W) standard normal."""
    conditions: Feed
    """By name, (B, ...)."""
    unconditional: Feed
    """The same for the unconditional half of a guided batch; empty where there is none."""
    full: FloatArray
    """(T, B, C, H, W) latents after each step with every step full."""
    exact: FloatArray
    """(T, B, C, H, W) latents after each step under the plan, in fp32."""
    cached: FloatArray
    """The same with products in the graphs' precision."""
    variants: tuple[int, ...]
    """Which variant each step ran."""
    tables: Feed
    """What the steps took from tables, by the tables' names."""


def sampled_on_in_words(record: PromptsRecord | TextsRecord | str | None, samples: int) -> str:
    """What an export sampled on, for people.

    Args:
        record: the manifest's.
        samples: how many samples there are.
    """
    if isinstance(record, PromptsRecord | TextsRecord):
        count = record.prompts if isinstance(record, PromptsRecord) else len(record.prompts)
        source = "the plan" if isinstance(record, TextsRecord) else f"{record.file}, sha256 {record.sha256[:16]}"
        which = ", with the largest values," if samples < count else ""
        return f"{min(samples, count)} of {counted(count, 'prompt')}{which} of {source}"
    said = {LABELS: "class labels", RANDOM: "random conditions, so outliers of real prompts are not seen"}
    return said.get(str(record), "conditions that the export did not write down")


def function_name(graph: str) -> str:
    """The function of the data-loader script that loads a graph's inputs: ``cached-1`` is ``cached_1``."""
    return graph.replace("-", "_")


def inputs_file(graph: str) -> str:
    """A graph's saved inputs, by their path inside the bundle."""
    return f"{POLYGRAPHY}/{graph}.inputs.json"


def outputs_file(graph: str) -> str:
    """A graph's saved outputs, likewise."""
    return f"{POLYGRAPHY}/{graph}.outputs.json"


def write_golden(samples: Mapping[str, GoldenGraph], trajectory: Trajectory, bundle: Path) -> list[str]:
    """Write the folder into a bundle that is being made.

    Returns:
        The files, by their paths inside the bundle.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    (bundle / POLYGRAPHY).mkdir()
    names = []
    for graph, sample in samples.items():
        results = RunResults()
        results.add(list(sample.outputs), runner_name=RUNNER)
        with quiet_polygraphy():
            save_json(list(sample.inputs), str(bundle / inputs_file(graph)))
            results.save(str(bundle / outputs_file(graph)))
        names += [inputs_file(graph), outputs_file(graph)]
    parts = (_SCRIPT_PART.format(function=function_name(graph), graph=graph) for graph in samples)
    (bundle / SCRIPT).write_text(_SCRIPT_HEAD + "".join(parts), encoding="utf-8")
    arrays: Feed = {
        _NOISE: trajectory.noise,
        _FULL: trajectory.full,
        _EXACT: trajectory.exact,
        _CACHED: trajectory.cached,
        _VARIANTS: np.asarray(trajectory.variants, np.int32),
        **{_CONDITION + name: array for name, array in trajectory.conditions.items()},
        **{_UNCONDITIONAL + name: array for name, array in trajectory.unconditional.items()},
        **{_TABLE + name: array for name, array in trajectory.tables.items()},
        **{_STEPS + graph: np.asarray(sample.steps, np.int32) for graph, sample in samples.items()},
    }
    (bundle / TRAJECTORY).write_bytes(
        safetensors.numpy.save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})
    )
    return [*names, SCRIPT, TRAJECTORY]


def read_golden(bundle: Path, manifest: Manifest) -> tuple[dict[str, GoldenGraph], Trajectory]:
    """Read the folder of a bundle whose files have been checked.

    Raises:
        BundleError: the export left none, or a file is not what it should be.
    """
    wanted = [TRAJECTORY, *(file for graph in manifest.graphs for file in (inputs_file(graph), outputs_file(graph)))]
    missing = [name for name in wanted if name not in manifest.files]
    if missing and not PRECISIONS[manifest.precision].leaves_samples:
        raise BundleError(
            f"{bundle}: an export in {manifest.precision} leaves no samples to validate by, as polygraphy's files have"
            f" no {PRECISIONS[manifest.precision].element_type}; export in fp16 or fp32 to validate"
        )
    if missing:
        raise BundleError(
            f"{bundle}: no samples to validate by ({missing[0]} is missing, or without a checksum); export again,"
            " without --no-check"
        )
    from polygraphy.comparator import RunResults
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json

    samples = {}
    try:
        with quiet_polygraphy():
            loaded = {
                graph: (
                    load_json(str(bundle / inputs_file(graph))),
                    RunResults.load(str(bundle / outputs_file(graph)))[RUNNER],
                )
                for graph in manifest.graphs
            }
        arrays = read_tensors(bundle / TRAJECTORY)
        for graph, (inputs, outputs) in loaded.items():
            samples[graph] = GoldenGraph(
                steps=tuple(arrays[_STEPS + graph].tolist()),
                inputs=tuple(inputs),
                outputs=tuple({name: np.asarray(array) for name, array in output.items()} for output in outputs),
            )
            _check_samples(samples[graph], manifest.graphs[graph])
        trajectory = Trajectory(
            noise=arrays[_NOISE],
            conditions=_named(arrays, _CONDITION),
            unconditional=_named(arrays, _UNCONDITIONAL),
            full=arrays[_FULL],
            exact=arrays[_EXACT],
            cached=arrays[_CACHED],
            variants=tuple(arrays[_VARIANTS].tolist()),
            tables=_named(arrays, _TABLE),
        )
    except (PolygraphyException, AttributeError, KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{bundle / POLYGRAPHY}: the samples cannot be read: {error}; export again") from None
    return samples, trajectory


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy from printing; its results are read, not watched."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def chosen_steps(steps: Sequence[int], bytes_each: int, limit_bytes: int) -> tuple[int, ...]:
    """An early, a middle and a late one of ``steps``; the middle one alone where three would take too much room."""
    if not steps:
        return ()
    if 3 * bytes_each > limit_bytes:
        return (steps[len(steps) // 2],)
    return tuple(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])))


def _check_samples(samples: GoldenGraph, record: GraphRecord) -> None:
    """Check that there are as many inputs and outputs as steps, of the tensors that the graph has.

    Raises:
        ValueError: there are not.
    """
    if not samples.steps or {len(samples.inputs), len(samples.outputs)} != {len(samples.steps)}:
        raise ValueError(f"{record.file}: expected inputs and outputs of {len(samples.steps)} steps")
    for feeds, tensors in ((samples.inputs, record.inputs), (samples.outputs, record.outputs)):
        expected = {tensor.name: (tensor.numpy_dtype, len(tensor.shape)) for tensor in tensors}
        for feed in feeds:
            if {name: (np.asarray(array).dtype, np.ndim(array)) for name, array in feed.items()} != expected:
                raise ValueError(f"{record.file}: expected the tensors {', '.join(expected)}")


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Feed:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
