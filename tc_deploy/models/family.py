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


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One input that conditions the model, beside latents and timestep."""

    name: str
    """The forward's argument."""
    dtype: str
    shape: tuple[int, ...]
    """Per sample, so without the batch axis."""
    classes: int | None
    """Labels run from 0 to classes - 1; the row after them means "no class". None where it is not a label."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one model."""

    tokens: int
    """N, image tokens of one sample."""
    width: int
    """D, the hidden width."""
    latent_shape: tuple[int, ...]
    """One sample's latents: (C, H, W), (C, F, H, W) for video, (tokens, channels) where they come packed."""
    output_channels: int
    """Channels of the model's output; twice C where the variance is learned."""
    conditions: tuple[Condition, ...]

    @property
    def pixels(self) -> bool:
        """Whether the latents are pictures in [-1, 1]: one or three channels; autoencoders have four and more."""
        return len(self.latent_shape) == 3 and self.latent_shape[0] in (1, 3)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class, described."""

    model_class: str
    block_lists: tuple[str, ...]
    branches: tuple[Branch, ...]
    self_attention: str
    """Submodule of a block inside which scaled_dot_product_attention is called once, on the tokens."""
    geometry: Callable[[nn.Module], Geometry]


@dataclass(frozen=True, kw_only=True)
class DiffusionTransformer:
    """A checkpoint in memory: the unmodified module and how to look at it."""

    source: str
    module: nn.Module
    family: Family
    geometry: Geometry
    config: Mapping[str, Any]
    weights_sha256: str

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
        )

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the model's own forward.

        Args:
            inputs: by :attr:`input_names`; ``hidden_states`` (B, C, H, W), ``timestep`` (B,) float32, conditions with
                a leading batch axis. Integer conditions may be int32: they are widened, as embeddings want int64.

        Returns:
            (B, output channels, H, W).
        """
        widened = {name: value.long() if value.dtype == torch.int32 else value for name, value in inputs.items()}
        output: torch.Tensor = self.module(**widened, return_dict=False)[0]
        return output

    def random_conditions(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Conditions to calibrate and check with: labels drawn from all classes, anything else from a normal.

        Returns:
            By name, ``(batch, *shape)``.
        """
        drawn: dict[str, torch.Tensor] = {}
        for condition in self.geometry.conditions:
            shape = (batch, *condition.shape)
            if condition.classes is not None:
                drawn[condition.name] = torch.randint(condition.classes, shape, generator=generator, dtype=torch.int32)
            else:
                drawn[condition.name] = torch.randn(shape, generator=generator)
        return drawn

    def with_unconditional(self, conditions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Append the unconditional half of a guided batch.

        Returns:
            By name, ``(2 * B, ...)``: the conditions as given, then "no class" (zeros where it is not a label).
        """
        doubled = {}
        for condition in self.geometry.conditions:
            given = conditions[condition.name]
            doubled[condition.name] = torch.cat([given, torch.full_like(given, condition.classes or 0)])
        return doubled
