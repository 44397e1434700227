"""The checkpoint as a reference: its steps in PyTorch, what its modules read and make, its sampling run.

In: a bundle's plan and the checkpoint it was made for. Out: arrays. This is the one part of validation that needs
PyTorch and the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tc_deploy.conditions import Conditions
from tc_deploy.errors import UsageError
from tc_deploy.golden import Feed, Trajectory
from tc_deploy.manifest import read_manifest
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import Plan, load_plan
from tc_deploy.planned.model import model_of_plan, sampling_from_plan
from tc_deploy.planned.prompts import tensors_of
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.graphs import ModelGraph, step_graphs
from tc_deploy.tokencache.precision import half_products
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps
from tc_deploy.tokencache.trajectory import full_latents, latents_of
from tc_deploy.types import Precision


@dataclass(frozen=True, kw_only=True)
class ModuleValues:
    """What a module read and made in one step: all its floating-point tensors."""

    read: tuple[NDArray[Any], ...]
    made: tuple[NDArray[Any], ...]


class Checkpoint:
    """A bundle's plan and checkpoint.

    Args:
        bundle: ``engines/NAME``.
        model_path: the checkpoint, where it is not where the plan says.
        precision: what the graphs' products are in.
        fp32_blocks: names of blocks that are in fp32 all the same.

    Raises:
        ModelError: the checkpoint cannot be loaded.
        PlanError: it is another than the plan was made for.
        UsageError: the bundle's graphs are not the checkpoint's: LoRAs are part of them, or a prologue is not.
    """

    def __init__(
        self,
        bundle: Path,
        model_path: Path | None = None,
        precision: Precision = Precision.FP32,
        fp32_blocks: Collection[str] = (),
    ) -> None:
        self.precision, self.fp32_blocks = precision, fp32_blocks
        self.plan: Plan
        self.plan, tables = load_plan(bundle)
        if read_manifest(bundle).has_prologue:
            raise UsageError(
                f"{bundle}: a prologue makes part of what its steps read, so they are not the checkpoint's graphs;"
                " validate it against what its export recorded, or export with --no-prologue"
            )
        if loras := read_manifest(bundle).loras:
            raise UsageError(
                f"{bundle}: {loras[0].file} is part of its weights, so it is not the checkpoint's graphs; validate it"
                " against what its export recorded, without the checkpoint"
            )
        self.model: DiffusionTransformer = model_of_plan(self.plan, str(bundle), model_path)
        self._one_graph = read_manifest(bundle).one_graph
        self._step_tables: StepTables = self.plan.step_tables(tables)

    @cached_property
    def _sampling(self) -> Sampling:
        return sampling_from_plan(self.plan)

    def step_graph(self, variant: int) -> ModelGraph:
        """The graph of a variant."""
        graphs = step_graphs(self.model, self.plan.cache, self.plan.phases_used(), one_graph=self._one_graph)
        return graphs[variant]

    def outputs(self, variant: int, feed: Mapping[str, NDArray[Any]]) -> Feed:
        """Run a step once; returns its outputs by name."""
        graph = self.step_graph(variant)
        with torch.no_grad(), half_products(self.model, self.precision, self.fp32_blocks, stored=False):
            made = graph(*(torch.from_numpy(np.array(feed[name])) for name in graph.input_names))
        return {name: tensor.numpy() for name, tensor in zip(graph.output_names, made, strict=True)}

    def module_values(
        self, variant: int, feed: Mapping[str, NDArray[Any]], modules: Collection[str]
    ) -> dict[str, ModuleValues]:
        """Run a step once and look at some of its modules.

        Args:
            variant: which step.
            feed: its inputs.
            modules: names in the model; one that the step does not call is left out of the result.
        """
        seen: dict[str, tuple[list[NDArray[Any]], list[NDArray[Any]]]] = {}
        hooks = []
        for name, module in self.model.module.named_modules():
            if name in modules:

                def note(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    read, made = seen.setdefault(name, ([], []))
                    read += _arrays([*args, *kwargs.values()])
                    made += _arrays(output)

                hooks.append(module.register_forward_hook(note, with_kwargs=True))
        try:
            self.outputs(variant, feed)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: ModuleValues(read=tuple(read), made=tuple(made)) for name, (read, made) in seen.items()}

    def trajectory(self, saved: Trajectory) -> Trajectory:
        """The saved run made again, under the bundle's plan as it is now."""
        noise = torch.from_numpy(saved.noise)
        conditions = tensors_of(Conditions(count=len(noise), given=saved.conditions, unconditional=saved.unconditional))
        runs, solved = {}, self._sampling.under(self._step_tables)
        for precision in dict.fromkeys((Precision.FP32, self.precision)):
            steps = TokenCachedSteps(self.model, self.plan.cache, self.plan.run_schedule(), self._step_tables)
            with half_products(self.model, precision, self.fp32_blocks, stored=False):
                runs[precision] = latents_of(self.model, solved, noise, conditions, steps)
        full = full_latents(self.model, self.plan, self._sampling, noise, conditions)
        return replace(saved, exact=runs[Precision.FP32], cached=runs[self.precision], full=full)

    def is_other_weight(self, name: str, found: NDArray[Any]) -> bool:
        """Whether an initializer that is named after a parameter holds something else."""
        parameters: Mapping[str, Tensor] = dict(self.model.module.named_parameters())
        parameter = parameters.get(name.removesuffix(".T"))
        if parameter is None:
            return False
        expected = parameter.detach().numpy()
        expected = expected.T if name.endswith(".T") else expected
        return expected.shape != found.shape or not np.array_equal(expected.astype(found.dtype), found)


def _arrays(values: Any) -> list[NDArray[Any]]:
    """All floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        return [values.detach().numpy().copy()] if values.is_floating_point() else []
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [array for value in values for array in _arrays(value)]
