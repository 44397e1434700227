"""What the method must know of a model class, and a loaded model that carries it.

A family is data: where the blocks stand, where in a block tokens enter and leave each residual branch, which module is
the self-attention, where text stands beside the picture. A family never copies model code: the model's own forward
runs, and only the forwards named here are wrapped while it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tc_deploy.bundle import real_path
from tc_deploy.errors import ModelError
from tc_deploy.models.convention import Convention
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.models.rows import Rows
from tc_deploy.models.scaling import by_factor_and_shift
from tc_deploy.models.text import TextEncoding
from tc_deploy.plan import ModelRecord


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One residual branch of a block: ``z + gate * branch(norm(z))``."""

    name: str
    """What the branch's cache is called: ``attention``, ``mlp``; that of its text rows ``text_attention``."""
    exit: str
    """Submodule of the block whose result is the branch's output before the adaLN gate."""
    rows: Rows = Rows.IMAGE
    """What the result holds."""
    then: Rows | None = None
    """What its second call in a block holds, where text goes through the same submodule after the picture."""
    optional: bool = False
    """Some blocks lack it."""

    @property
    def calls(self) -> tuple[Rows, ...]:
        """What each of its calls in a block holds."""
        return (self.rows,) if self.then is None else (self.rows, self.then)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary tables that a submodule is given: one tensor or a tuple of them, a row per token; real or complex."""

    argument: str
    """Its name, also where the forward takes it among others (``**kwargs``)."""
    axis: int
    """The axis that counts tokens: 0 for (N, ...), which the whole batch must share; 1 for (1, N, ...), or (B, N, ...)
    where all samples have the same positions."""
    rows: Rows = Rows.IMAGE
    """What the tables hold; ``IMAGE_AND_TEXT`` and its like: a table for each, in a tuple."""
    module: str = ""
    """The submodule, where it is no self-attention (:attr:`Block.rotaries`)."""


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """A submodule of a block in which the tokens attend to each other.

    It must call scaled_dot_product_attention once.
    """

    module: str
    keys: Rows = Rows.IMAGE
    """What its keys and values hold."""
    prefix: str = ""
    """Of the names ``key`` and ``value`` of its cache, where a block has two."""
    rotary: Rotary | None = None
    optional: bool = False
    """Some blocks lack it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A kind of block."""

    modules: str
    """The ModuleList of the blocks."""
    entries: tuple[str, ...]
    """Submodules whose first argument is the tokens: pruned ones stop here."""
    branches: tuple[Branch, ...]
    attentions: tuple[SelfAttention, ...]
    entry_rows: Rows = Rows.IMAGE
    """What the entries' first argument holds."""
    arguments: tuple[str, ...] = ("hidden_states",)
    """The block's arguments that hold tokens: one, or two where ``takes`` says so."""
    takes: Rows = Rows.IMAGE
    """What those arguments hold."""
    gives: Rows = Rows.IMAGE
    """What the block returns."""
    rotaries: tuple[Rotary, ...] = ()
    """Tables that go to other submodules than the self-attentions."""
    per_token: tuple[str, ...] = ()
    """Other arguments of the block that hold what its one argument of tokens holds: long skip connections."""

    def of(self, module: nn.Module, where: str) -> Block:
        """The description without the optional parts that a block lacks.

        Raises:
            ModelError: it lacks a part that is not optional.
        """

        def has(path: str, *, optional: bool) -> bool:
            try:
                module.get_submodule(path)
            except AttributeError:
                if not optional:
                    raise ModelError(
                        f"{where}: a {type(module).__name__} has no submodule {path!r}; its family must name those that"
                        " it has"
                    ) from None
                return False
            return True

        for entry in self.entries:
            has(entry, optional=False)
        return dataclasses.replace(
            self,
            branches=tuple(branch for branch in self.branches if has(branch.exit, optional=branch.optional)),
            attentions=tuple(item for item in self.attentions if has(item.module, optional=item.optional)),
        )


def call_diffusers(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:  # noqa: ARG001
    """Run a forward that takes its inputs by name, as diffusers' transformers do."""
    output: Tensor = module(**inputs, return_dict=False)[0]
    return output


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class, described."""

    model_class: str
    blocks: tuple[Block, ...]
    """Kinds of blocks in the order in which they run; none where the model is taken as one piece, of which no tokens
    can be kept and no blocks skipped."""
    geometry: Callable[[nn.Module, ModelOptions], Geometry]
    """Sizes of a loaded module; raises ModelError where the options do not fit it."""
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] = lambda config, pipeline: None
    """What the configurations of a model and of its pipeline (empty where there is none) ask for that the family does
    not cover, in words; None where it covers all."""
    call: Callable[[nn.Module, Mapping[str, Any], Geometry], Tensor] = call_diffusers
    """Runs the module's forward on the inputs by name."""
    received: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda arguments: arguments
    """What a pipeline calls the forward with, by the forward's names, as ``call`` is given it; what is no input of a
    graph stays as it is."""
    returned: Callable[[Tensor], Any] = lambda output: output
    """What a pipeline expects of the forward, for the output of ``call``."""
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None
    """Makes an empty module from a configuration; None: the class is diffusers' own."""
    convention: Convention = field(default_factory=Convention)
    """What its pipelines decide about sampling."""
    text: TextEncoding | None = None
    """How its pipelines encode a prompt; None where they take none, or it is not described."""
    unpacked: Callable[[Tensor, Geometry], Tensor] = lambda latents, geometry: latents
    """The latents (B, latent shape) as an autoencoder takes them, (B, C, H, W) or (B, C, F, H, W)."""
    unscaled: Callable[[Tensor, Mapping[str, Any]], Tensor] = by_factor_and_shift
    """Those with the scaling undone that an autoencoder's configuration tells; raises ModelError where it does not."""

    @property
    def shares_index(self) -> bool:
        """Whether all samples of a batch must compute the same tokens, as rotary tables without batch axis demand."""
        attentions = [item.rotary for block in self.blocks for item in block.attentions]
        rotaries = [*attentions, *(item for block in self.blocks for item in block.rotaries)]
        return any(item is not None and item.axis == 0 for item in rotaries)


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
    pipeline: str | None = None
    """The class of the pipeline that it was found in, where it is taken as one piece."""

    @cached_property
    def described_blocks(self) -> tuple[tuple[nn.Module, Block], ...]:
        """The blocks in the order in which they run, each with what it has of its kind's description.

        Raises:
            ModelError: a block is not as its family says.
        """
        return tuple(
            (module, kind.of(module, f"{kind.modules}.{name}"))
            for kind in self.family.blocks
            for name, module in self.module.get_submodule(kind.modules).named_children()
        )

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks in the order in which they run."""
        return tuple(module for module, _ in self.described_blocks)

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' names in the module, in the order in which they run: ``transformer_blocks.0``."""
        return tuple(
            f"{kind.modules}.{name}"
            for kind in self.family.blocks
            for name, _ in self.module.get_submodule(kind.modules).named_children()
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """The arguments of one step: latents, timestep, conditions."""
        return ("hidden_states", "timestep", *(condition.name for condition in self.geometry.conditions))

    def record(self) -> ModelRecord:
        """How a plan names this model."""
        return ModelRecord(
            # A hub's id is no folder.
            source=real_path(Path(self.source)).as_posix() if Path(self.source).exists() else self.source,
            model_class=self.family.model_class,
            config=dict(self.config),
            weights_sha256=self.weights_sha256,
            blocks=len(self.blocks),
            tokens=self.geometry.tokens,
            width=self.geometry.width,
            latent_size=self.options.latent_size,
            text_tokens=self.options.text_tokens,
            variant=self.options.variant,
            autoencoder=self.geometry.autoencoder,
            pipeline=self.pipeline,
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model's own forward.

        Args:
            inputs: by :attr:`input_names`; ``hidden_states`` (B, latent shape), ``timestep`` (B,) float32 as the
                scheduler gives it, conditions with a leading batch axis. Integer conditions may be int32: they are
                widened, as embeddings want int64.

        Returns:
            (B, output channels, ...), the other axes as the latents'.
        """
        given = {name: value.long() if value.dtype == torch.int32 else value for name, value in inputs.items()}
        divisor = self.family.convention.timestep_divisor
        if divisor != 1:
            given["timestep"] = given["timestep"] / divisor
        return self.family.call(self.module, given, self.geometry)

    def index_row(self, row: Tensor, batch: int) -> Tensor:
        """A row (sum of M,) of an index table as a step takes it: as it is where the batch shares it, else (B, sum)."""
        return row if self.family.shares_index else row.expand(batch, -1)

    def random_conditions(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Conditions to calibrate and check with, as :class:`Values` says for each.

        Returns:
            By name, ``(batch, *shape)``.
        """
        return {condition.name: condition.draw(batch, generator) for condition in self.geometry.conditions}

    def with_unconditional(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Append the unconditional half of a guided batch.

        Returns:
            By name, ``(2 * B, ...)``: the conditions as given, then what stands for none (:class:`Values`).
        """
        doubled = {}
        for condition in self.geometry.conditions:
            given = conditions[condition.name]
            doubled[condition.name] = torch.cat([given, condition.absent(given)])
        return doubled
