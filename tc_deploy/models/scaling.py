"""How pipelines undo the scaling of latents before the autoencoder decodes them: a family names one of three ways.

In: latents as the transformer makes them, and the autoencoder's configuration. Out: latents as it knows them. A setting
that a family's pipelines do not look at is not looked at here either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tc_deploy.errors import ModelError


def by_factor(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """As DiT's and PixArt's do.

    Raises:
        ModelError: the configuration has no such number.
    """
    return latents / _number(config, "scaling_factor")


def by_factor_and_shift(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """As those of Stable Diffusion 3 and FLUX do.

    Raises:
        ModelError: the configuration has no such numbers.
    """
    shift = 0.0 if config.get("shift_factor") is None else _number(config, "shift_factor")
    return latents / _number(config, "scaling_factor") + shift


def by_moments(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """As Wan's do: each channel's mean and standard deviation.

    Raises:
        ModelError: the configuration has none, or not one of each for every channel.
    """
    moments = []
    for key in ("latents_mean", "latents_std"):
        values: Any = config.get(key)
        if not isinstance(values, list | tuple) or len(values) != latents.shape[1] or not all(map(_is_number, values)):
            raise ModelError(f"{key}: expected {latents.shape[1]} finite numbers, found {values}")
        moments.append(
            torch.tensor(values, dtype=torch.float32, device=latents.device).reshape(1, -1, *[1] * (latents.ndim - 2))
        )
    mean, deviation = moments
    return latents * deviation + mean


def _number(config: Mapping[str, Any], key: str) -> float:
    value: Any = config.get(key)
    divides = key == "scaling_factor"
    if not _is_number(value) or (divides and value == 0):
        raise ModelError(f"{key}: expected a finite number{', not 0' if divides else ''}, found {value}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
