"""What the steps' graphs read of a prologue, made for inputs of a step as PyTorch has them.

In: the prologue's graphs, written, and what PyTorch's steps read. Out: by example, what they make of it. So a step's
graph can be compared with the whole step in PyTorch, prologue and all. Never: compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tc_deploy.export.check import run_in_engine
from tc_deploy.manifest import PROLOGUE_GRAPHS, RUN_BATCH, GraphRecord, names_of
from tc_deploy.types import Precision


class PrologueRows:
    """The prologue of a bundle that is being made; one without graphs makes nothing.

    Args:
        folder: the bundle's.
        records: its graphs by name.
        precision: what they are in.
    """

    def __init__(self, folder: Path, records: Mapping[str, GraphRecord], precision: Precision) -> None:
        self._folder, self._precision = folder, precision
        self._records = [records[name] for name in PROLOGUE_GRAPHS if name in records]

    def of(self, examples: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What steps read, each of the inputs of its own example.

        Where one call may be for many steps it is for all examples, as it is at run time: so a model that mixes the
        rows of a batch is found out.
        """
        made: list[dict[str, Tensor]] = [{} for _ in examples]
        for record in self._records:
            together = any(RUN_BATCH in tensor.shape for tensor in record.inputs)
            for part in [list(range(len(examples)))] if together else [[each] for each in range(len(examples))]:
                feed = {name: torch.cat([examples[each][name] for each in part]) for name in names_of(record.inputs)}
                outputs = names_of(record.outputs)
                found = run_in_engine(self._folder / record.file, feed, outputs, self._precision)
                for name, rows in zip(outputs, found, strict=True):
                    for each, own in zip(part, rows.chunk(len(part)), strict=True):
                        made[each][name] = own.contiguous()
        return made
