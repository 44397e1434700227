"""Every graph of a bundle on its saved inputs, compared with a reference through polygraphy's Comparator.

In: samples, a runner of the target and one of the reference. Out: one record per graph. Never: judges by anything but
the package's table of tolerances.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, RunResults

from tc_deploy.golden import RUNNER, GoldenGraph, quiet_polygraphy
from tc_deploy.validate.metrics import failures_of, metrics_of
from tc_deploy.validate.record import Metrics, OutputRecord, VariantRecord, badness


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """An output of one sample, true where it passes: what polygraphy's Comparator asks of a comparison."""

    metrics: Metrics
    failures: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.failures


def compare_graph(
    name: str, samples: GoldenGraph, target: BaseRunner, reference: BaseRunner | None, backend: str, precision: str
) -> VariantRecord:
    """Compare one graph.

    Args:
        name: the graph's.
        samples: its inputs, and what PyTorch made of them.
        target: what is judged.
        reference: what it is compared with; None takes what PyTorch made when the graph was exported.
        backend: whose tolerances hold.
        precision: likewise.

    Returns:
        The worst sample of every output.

    Raises:
        BackendError: an engine refuses the graph, or fails.
    """

    def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> OrderedDict[str, _Compared]:
        compared = OrderedDict()
        for output, array in expected.items():
            metrics = metrics_of(np.asarray(found[output]), np.asarray(array))
            compared[output] = _Compared(metrics=metrics, failures=failures_of(metrics, backend, precision))
        return compared

    with quiet_polygraphy():
        runners = [target] if reference is None else [reference, target]
        results = Comparator.run(runners, data_loader=list(samples.inputs))
        if reference is None:
            saved = RunResults()
            saved.add(list(samples.outputs), runner_name=RUNNER)
            results = RunResults([*saved, *results])
        # One comparison function on one pair of runners.
        ((pair,),) = (result.values() for result in Comparator.compare_accuracy(results, compare_func=compare))
    outputs = []
    for output in samples.outputs[0]:
        records = [
            OutputRecord(name=output, step=step, metrics=found[output].metrics, failures=found[output].failures)
            for step, found in zip(samples.steps, pair, strict=True)
        ]
        outputs.append(max(records, key=badness))
    return VariantRecord(name=name, steps=samples.steps, outputs=tuple(outputs))
