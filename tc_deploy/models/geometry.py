"""Sizes of one model: its latents, its token grid, and what conditions it.

In: a checkpoint's configuration and the options it is used with. Out: a :class:`Geometry`. Never: touches a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from tc_deploy.errors import ModelError
from tc_deploy.plan import ModelRecord

LARGEST_GUIDANCE = 4.0
"""Guidance strengths are drawn from 1 to this; FLUX's pipeline uses 3.5. Models take the sine of a thousand times it,
so rounding grows with it: at 7, the last bit of a frequency moves the output by 1e-4 of its standard deviation."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What a checkpoint leaves open. None takes the family's default."""

    latent_size: tuple[int, ...] | None = None
    """(H, W) or, for video, (F, H, W) of the latents, before they are packed where the family packs them."""
    text_tokens: int | None = None
    """T, how many prompt embeddings one sample has."""
    variant: str | None = None
    """Which of several copies of the weights, as ``fp16``; None is the one without a name."""
    autoencoder: bool | None = None
    """Whether pictures are made of the latents by an autoencoder; None: as what lies beside the checkpoint says."""

    @staticmethod
    def of(record: ModelRecord) -> ModelOptions:
        """The options that a plan was made with."""
        return ModelOptions(
            latent_size=record.latent_size,
            text_tokens=record.text_tokens,
            variant=record.variant,
            autoencoder=record.autoencoder or None,
        )


class Values(StrEnum):
    """What the values of a condition mean, so how they are drawn and what stands for "no condition"."""

    LABEL = "label"
    """A class; the row after the last class stands for none."""
    EMBEDDING = "embedding"
    """Of order 1; zeros stand for none."""
    MASK = "mask"
    """1 for prompt tokens that count, 0 for padding behind them; of an empty prompt the first one counts."""
    GUIDANCE = "guidance"
    """Strength that a guidance-distilled model is told; the same with and without condition."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One input that conditions the model, beside latents and timestep."""

    name: str
    """The forward's argument."""
    dtype: str
    shape: tuple[int, ...]
    """Per sample, so without the batch axis."""
    classes: int | None = None
    """Labels run from 0 to classes - 1; the row after them means "no class". None where it is not a label."""
    values: Values = Values.EMBEDDING

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Values to calibrate and check with.

        Returns:
            ``(batch, *shape)``.
        """
        shape = (batch, *self.shape)
        match self.values:
            case Values.LABEL:
                return torch.randint(self.classes or 1, shape, generator=generator, dtype=torch.int32)
            case Values.MASK:
                lengths = torch.randint(1, self.shape[-1] + 1, (*shape[:-1], 1), generator=generator)
                return (torch.arange(self.shape[-1]) < lengths).float()
            case Values.GUIDANCE:
                return 1 + (LARGEST_GUIDANCE - 1) * torch.rand(shape, generator=generator)
            case Values.EMBEDDING:
                return torch.randn(shape, generator=generator)

    def absent(self, given: Tensor) -> Tensor:
        """What stands for "no condition" beside ``given`` (B, ...), of its shape."""
        match self.values:
            case Values.LABEL:
                return torch.full_like(given, self.classes or 0)
            case Values.MASK:
                return (torch.arange(given.shape[-1], device=given.device) < 1).to(given.dtype).expand_as(given)
            case Values.GUIDANCE:
                return given
            case Values.EMBEDDING:
                return torch.zeros_like(given)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one model."""

    grid: tuple[int, ...]
    """Tokens along each axis of the latents: (rows, columns), or (frames, rows, columns)."""
    tokens: int
    """N, image tokens of one sample."""
    width: int
    """D, the hidden width."""
    latent_shape: tuple[int, ...]
    """Of one sample as the model takes it: (C, H, W); (C, F, H, W) for video; (N, C) where latents are packed."""
    output_channels: int
    """The model's output along the latents' first axis: C, twice C where the variance is learned; N where packed."""
    conditions: tuple[Condition, ...]
    text_tokens: int = 0
    """T, text tokens of one sample."""

    autoencoder: bool = False
    """Whether the pipeline that the model was found in makes pictures of the latents by an autoencoder."""

    @property
    def embeds_guidance(self) -> bool:
        """Whether the model is told the strength of a guidance that was distilled into it."""
        return any(condition.values is Values.GUIDANCE for condition in self.conditions)

    @property
    def pixels(self) -> bool:
        """Whether the latents are pictures in [-1, 1]: of one or three channels, and no autoencoder to decode them."""
        return not self.autoencoder and self.image_like

    @property
    def image_like(self) -> bool:
        """Whether they have a picture's channels, as the latents of some autoencoders do too."""
        return len(self.latent_shape) == 3 and self.latent_shape[0] in (1, 3)


def latent_size(options: ModelOptions, default: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """The size of the latents that a model is used with.

    Args:
        options: may name one.
        default: the family's, as many axes as the latents have.
        patch: latents that one token covers, per axis.

    Raises:
        ModelError: the size has other axes, or is no multiple of the patch.
    """
    size = tuple(default) if options.latent_size is None else options.latent_size
    fits = len(size) == len(patch) and all(
        axis > 0 and axis % part == 0 for axis, part in zip(size, patch, strict=True)
    )
    if not fits:
        raise ModelError(
            f"latent size: expected {len(patch)} axes, multiples of {'x'.join(map(str, patch))} (the patch), found"
            f" {'x'.join(map(str, size))}; choose another"
        )
    return size


def token_grid(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Tokens along each axis of latents of that size."""
    return tuple(axis // part for axis, part in zip(size, patch, strict=True))


def text_length(options: ModelOptions, default: int) -> int:
    """T, how many prompt embeddings a model is used with.

    Raises:
        ModelError: not at least one.
    """
    length = default if options.text_tokens is None else options.text_tokens
    if length < 1:
        raise ModelError(f"text tokens: expected at least 1, found {length}; choose the length of the text encoder")
    return length
