"""A family for any other transformer of diffusers: the model as one piece, whose output cached steps forecast.

In: a class whose forward is called by names that are known here (latents, timestep, prompt embeddings and their mask,
pooled embeddings, labels, guidance). Out: a family without blocks. Sizes that the configuration does not say by one
name are found by trying: the forward runs on tensors that have shapes and no values, so nothing is computed, and a
forward that asks for values, which no graph could, is found before anything is made. Never: guesses what an argument
means that it does not know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tc_deploy.errors import ModelError, first_line
from tc_deploy.models.convention import Convention
from tc_deploy.models.family import Family, call_diffusers
from tc_deploy.models.geometry import Condition, Geometry, ModelOptions, Values, latent_size, text_length, token_grid

LATENTS, TIMESTEP = "hidden_states", "timestep"
TEXT_TOKENS = 256
"""Prompt embeddings of a sample where nobody says how many."""
TRIAL_BATCH = 2
_TEXT_WIDTH = re.compile(r"text|caption|cap_|joint_attention|cross_attention_dim|context|prompt|llm")
"""What configurations call the width of prompt embeddings, and some of their other numbers."""
_POOLED_WIDTH = re.compile(r"pooled|clip")
_REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(ModelError, RuntimeError, TypeError, ValueError),
)
"""What a forward raises that is given wrong shapes, or asks for a value."""
_HOW = "adapters.md in the documentation shows how to describe it"


def is_transformer(kind: Any) -> bool:
    """Whether a class takes latents and a timestep, so that it may be taken as one piece."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return False
    return {LATENTS, TIMESTEP} <= inspect.signature(kind.forward).parameters.keys()


def generic_family(model_class: str, convention: Convention) -> Family:
    """The family of a class that has none of its own.

    Args:
        model_class: its name.
        convention: how its pipeline samples, as far as that is known.
    """
    return Family(model_class=model_class, blocks=(), geometry=_geometry, call=_call, convention=convention)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One guess at the shapes of a forward's inputs."""

    latent_shape: tuple[int, ...]
    conditions: tuple[Condition, ...]


def _call(module: nn.Module, inputs: Mapping[str, Any], geometry: Geometry) -> Tensor:
    masks = {item.name for item in geometry.conditions if item.values is Values.MASK}
    # Whole numbers, as tokenizers give them to a pipeline.
    given = {name: value.long() if name in masks else value for name, value in inputs.items()}
    scale = module.config.get("timestep_scale", 1.0)  # type: ignore[operator,union-attr]
    return call_diffusers(module, {**given, TIMESTEP: given[TIMESTEP] * scale} if scale != 1.0 else given, geometry)


def _geometry(module: nn.Module, options: ModelOptions) -> Geometry:
    config: Mapping[str, Any] = module.config  # type: ignore[assignment]
    name = type(module).__name__
    patch, default = _patch(config), _default_size(config)
    if options.latent_size is None and default is None:
        raise ModelError(f"latent size: the configuration of {name} names none; give --latent-size, as 128x128")
    axes = len(options.latent_size or default or ())
    if axes not in (2, 3):
        raise ModelError(f"latent size: expected (height, width) or (frames, height, width), found {axes} axes")
    patch = patch[-axes:]
    size = latent_size(options, default or (), patch)
    reason = "no width of the configuration fits"
    for trial in _trials(module, config, size, text_length(options, TEXT_TOKENS)):
        geometry = _of_trial(trial, config, token_grid(size, patch))
        try:
            return dataclasses.replace(geometry, output_channels=_output_channels(module, geometry))
        except _REFUSALS as error:
            reason = first_line(error).rstrip(".")
    raise ModelError(
        f"{name}: it has no family, and cannot be taken as one piece: its forward does not run on latents of"
        f" {'x'.join(map(str, size))}: {reason}; give another --latent-size, or {_HOW}"
    )


def _trials(module: nn.Module, config: Mapping[str, Any], size: tuple[int, ...], text: int) -> Iterator[_Trial]:
    """What the inputs may look like, likeliest first.

    Raises:
        ModelError: the forward needs an argument that is not known here.
    """
    parameters = inspect.signature(type(module).forward).parameters
    choices: list[list[Condition | None]] = []
    for name, parameter in itertools.islice(parameters.items(), 1, None):
        if name in (LATENTS, TIMESTEP) or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found = _condition(name, config, text)
        if found:
            choices.append(list(found))
        elif parameter.default is parameter.empty:
            raise ModelError(
                f"{type(module).__name__}: it has no family, and cannot be taken as one piece: its forward needs"
                f" {name!r}, which is no input that is known; {_HOW}"
            )
    channels = config.get("in_channels", 4)
    layouts = [(channels, *size)] if len(size) == 2 else [(channels, *size), (size[0], channels, *size[1:])]
    for layout, *conditions in itertools.product(layouts, *choices):
        given = tuple(item for item in conditions if isinstance(item, Condition))
        yield _Trial(latent_shape=layout, conditions=given)


def _condition(name: str, config: Mapping[str, Any], text: int) -> Sequence[Condition]:
    """What an argument of a known name may be; none where it is unknown, or this configuration has no use for it."""
    match name:
        case "encoder_hidden_states":
            widths = _widths(config, _TEXT_WIDTH)
            return [Condition(name=name, dtype="float32", shape=(text, width)) for width in widths]
        case "encoder_attention_mask":
            return [Condition(name=name, dtype="float32", shape=(text,), values=Values.MASK)]
        case "pooled_projections":
            return [Condition(name=name, dtype="float32", shape=(width,)) for width in _widths(config, _POOLED_WIDTH)]
        case "class_labels":
            classes = config.get("num_embeds_ada_norm") or config.get("num_classes")
            label = Condition(name=name, dtype="int32", shape=(), classes=classes, values=Values.LABEL)
            return [label] if classes else []
        case "guidance" if config.get("guidance_embeds"):
            return [Condition(name=name, dtype="float32", shape=(), values=Values.GUIDANCE)]
        case _:
            return []


def _widths(config: Mapping[str, Any], pattern: re.Pattern[str]) -> list[int]:
    """Numbers that a configuration gives under such names, then the model's own width."""
    named = [value for key, value in config.items() if type(value) is int and value > 0 and pattern.search(key)]
    return list(dict.fromkeys([*named, _width(config)]))


def _width(config: Mapping[str, Any]) -> int:
    heads, each = config.get("num_attention_heads"), config.get("attention_head_dim")
    product = heads * each if type(heads) is int and type(each) is int else None
    return int(product or config.get("hidden_size") or config.get("in_channels") or 1)


def _patch(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Latents that one token covers, per axis."""
    patch = config.get("patch_size", 1)
    sides = tuple(patch) if isinstance(patch, list | tuple) else (patch,) * 2
    return sides if len(sides) > 2 else (config.get("patch_size_t") or 1, *sides)


def _default_size(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The size of the latents that a configuration names; None where it names none."""
    side = config.get("sample_size")
    plane = tuple(side) if isinstance(side, list | tuple) else (side, side)
    if "sample_height" in config:
        plane = (config["sample_height"], config["sample_width"])
    if not all(isinstance(axis, int) for axis in plane):
        return None
    frames = config.get("sample_frames") or config.get("video_length")
    return plane if frames is None else (frames, *plane)


def _of_trial(trial: _Trial, config: Mapping[str, Any], grid: tuple[int, ...]) -> Geometry:
    return Geometry(
        grid=grid,
        tokens=math.prod(grid),
        width=_width(config),
        latent_shape=trial.latent_shape,
        output_channels=trial.latent_shape[0],
        conditions=trial.conditions,
        text_tokens=next((item.shape[0] for item in trial.conditions if item.name == "encoder_hidden_states"), 0),
    )


def _output_channels(module: nn.Module, geometry: Geometry) -> int:
    """Channels of a forward's output on such inputs; nothing is computed.

    Raises:
        Exception: the forward does not take them, asks for a value, or gives something else than latents.
    """
    device = next(module.parameters()).device
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), torch.no_grad():
        inputs = {LATENTS: torch.empty(TRIAL_BATCH, *geometry.latent_shape), TIMESTEP: torch.empty(TRIAL_BATCH)}
        for item in geometry.conditions:
            kind = torch.int64 if item.values is Values.LABEL else torch.float32
            inputs[item.name] = torch.empty(TRIAL_BATCH, *item.shape, dtype=kind)
        shape = tuple(_call(module, inputs, geometry).shape)
    channels, *others = geometry.latent_shape
    if len(shape) != len(others) + 2 or shape[0] != TRIAL_BATCH or shape[1] < channels or shape[2:] != tuple(others):
        raise ModelError(f"its output has the shape {'x'.join(map(str, shape))}, unlike its latents")
    return shape[1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's own account of a trial that fails away from the user."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
