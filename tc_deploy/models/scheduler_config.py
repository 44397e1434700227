"""A scheduler's settings as a plan records them.

In: any diffusers scheduler. Out: the settings that its class takes, in types that JSON has. Never: lets a value that is
not finite through without naming it.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch

from tc_deploy.errors import ModelError


def plain_config(scheduler: Any) -> dict[str, Any]:
    """The settings of a scheduler.

    What ``from_config`` carried over from another class is left out, since the class does not take it. JSON has no
    infinity; where it is the class's default, as DPM-Solver's ``lambda_min_clipped``, the class fills it in again.

    Raises:
        ModelError: a setting is not finite, or of a type that JSON lacks; the message names it.
    """
    plain = {}
    for name, parameter in inspect.signature(type(scheduler)).parameters.items():
        if name not in scheduler.config:
            continue
        value = _plain(scheduler.config[name])
        if isinstance(value, float) and not math.isfinite(value) and value == parameter.default:
            continue
        _check(value, f"{type(scheduler).__name__}: {name}")
        plain[name] = value
    return plain


def _plain(value: Any) -> Any:
    """Numbers and lists in Python's own types."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _check(value: Any, what: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check(item, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(item, f"{what}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ModelError(
            f"{what} is {value}, expected a finite number; set it in scheduler_config.json, or leave the setting out"
        )
    elif not (value is None or isinstance(value, (str, int, float))):
        raise ModelError(
            f"{what} is a {type(value).__name__}, which JSON has not; set a number, a text or a list in"
            " scheduler_config.json"
        )
