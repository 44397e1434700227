"""What the method must know of a model class, and a loaded model that carries it.

A family is data: where the blocks stand, where in a block tokens enter and leave each residual branch, which module is
the self-attention. A family never copies model code: the model's own forward runs, and only the forwards named here
are wrapped while it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.plan import ModelRecord


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One residual branch of a block: ``z + gate * branch(norm(z))``."""

    name: str
    """What the branch's cache is called: ``attention``, ``mlp``."""
    entry: str
    """Submodule of the block whose first argument is the branch's (B, N, D) input; pruned tokens stop here."""
    exit: str
    """Submodule of the block whose result is the branch's (B, N, D) output before the adaLN gate."""


def call_diffusers(module: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Run a forward that takes its inputs by name, as diffusers' transformers do."""
    output: torch.Tensor = module(**inputs, return_dict=False)[0]
    return output


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class, described."""

    model_class: str
    block_lists: tuple[str, ...]
    branches: tuple[Branch, ...]
    self_attention: str
    """Submodule of a block inside which scaled_dot_product_attention is called once, on the tokens."""
    geometry: Callable[[nn.Module, ModelOptions], Geometry]
    """Sizes of a loaded module; raises ModelError where the options do not fit it."""
    check: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """What a configuration asks for that the family does not cover, in words; None where it covers all."""
    call: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] = call_diffusers
    """Runs the module's forward on the inputs by name."""


@dataclass(frozen=True, kw_only=True)
class DiffusionTransformer:
    """A checkpoint in memory: the unmodified module and how to look at it."""

    source: str
    module: nn.Module
    family: Family
    geometry: Geometry
    config: Mapping[str, Any]
    weights_sha256: str
    options: ModelOptions
    """What the checkpoint left open and was chosen."""

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks in the order in which they run."""
        return tuple(block for name in self.family.block_lists for block in self.module.get_submodule(name).children())

    @property
    def input_names(self) -> tuple[str, ...]:
        """The arguments of one step: latents, timestep, conditions."""
        return ("hidden_states", "timestep", *(condition.name for condition in self.geometry.conditions))

    def record(self) -> ModelRecord:
        """How a plan names this model."""
        return ModelRecord(
            source=self.source,
            model_class=self.family.model_class,
            config=dict(self.config),
            weights_sha256=self.weights_sha256,
            blocks=len(self.blocks),
            tokens=self.geometry.tokens,
            width=self.geometry.width,
            latent_size=self.options.latent_size,
            text_tokens=self.options.text_tokens,
        )

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model's own forward.

        Args:
            inputs: by :attr:`input_names`; ``hidden_states`` (B, latent shape), ``timestep`` (B,) float32, conditions
                with a leading batch axis. Integer conditions may be int32: they are widened, as embeddings want int64.

        Returns:
            (B, output channels, ...), the other axes as the latents'.
        """
        widened = {name: value.long() if value.dtype == torch.int32 else value for name, value in inputs.items()}
        return self.family.call(self.module, widened)

    def random_conditions(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Conditions to calibrate and check with, as :class:`Values` says for each.

        Returns:
            By name, ``(batch, *shape)``.
        """
        return {condition.name: condition.draw(batch, generator) for condition in self.geometry.conditions}

    def with_unconditional(self, conditions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Append the unconditional half of a guided batch.

        Returns:
            By name, ``(2 * B, ...)``: the conditions as given, then what stands for none (:class:`Values`).
        """
        doubled = {}
        for condition in self.geometry.conditions:
            given = conditions[condition.name]
            doubled[condition.name] = torch.cat([given, condition.absent(given)])
        return doubled
