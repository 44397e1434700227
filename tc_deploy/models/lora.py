"""A LoRA made part of a model's weights: ``W + scale * alpha / rank * up @ down`` (arXiv 2106.09685, section 4.1).

In: a safetensors file in any of the formats that the family's pipeline of diffusers reads (diffusers', peft's,
kohya's), by that pipeline's own ``lora_state_dict``. Out: the model, changed in place. Never: reads a pickle, or leaves
a key of the file unused without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tc_deploy.bundle import sha256_of_file
from tc_deploy.errors import ModelError, first_line
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.files import SAFETENSORS, refuse_pickles

_TRANSFORMER = "transformer."
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_METADATA = "lora_adapter_metadata"
"""What diffusers writes beside the tensors: how peft made them."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A file and how strongly it counts."""

    path: Path
    scale: float = 1.0

    @property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_of_file(self.path)


def fuse_lora(model: DiffusionTransformer, lora: Lora) -> None:
    """Make a LoRA part of a model's weights.

    Raises:
        ModelError: the file is missing, no safetensors file or none that the family's pipeline reads, holds a key that
            is unknown or of another part of the pipeline, or a layer that the model has not or has otherwise.
    """
    layers = dict(model.module.named_modules())
    state, alphas = _read(model, lora.path)
    used: set[str] = set()
    for key in [key for key in state if key.endswith(_DOWN)]:
        name = key.removesuffix(_DOWN)
        layer, up, down = layers.get(name), state.get(name + _UP), state[key]
        if up is None:
            raise ModelError(f"{lora.path}: {key} has no {name + _UP} beside it; save the LoRA again")
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"{lora.path}: {name} is no linear layer of a {model.family.model_class}; is it for another model?"
            )
        rank = down.shape[0]
        if (down.shape[1:], up.shape[:1], up.shape[1:]) != (layer.weight.shape[1:], layer.weight.shape[:1], (rank,)):
            raise ModelError(
                f"{lora.path}: {name}: expected a LoRA for {'x'.join(map(str, layer.weight.shape))}, found"
                f" {'x'.join(map(str, (up.shape[0], *down.shape[1:])))}; it is for another size of this model"
            )
        alpha = alphas.get(name, alphas.get("", float(rank)))
        with torch.no_grad():
            layer.weight.add_(up.float() @ down.float(), alpha=lora.scale * alpha / rank)
        used |= {key, name + _UP}
    left = sorted(set(state) - used)
    if left or not used:
        found = f"key {left[0]} is unknown" if left else "it holds nothing for the transformer"
        raise ModelError(
            f"{lora.path}: {found}; give a LoRA whose keys are {_TRANSFORMER}LAYER{_DOWN} and {_UP}, or one that the"
            " pipeline's load_lora_weights reads"
        )


def _read(model: DiffusionTransformer, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors by name without ``transformer.``, and by layer the alphas; ``""`` is that of all others."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the LoRA's safetensors file")
    refuse_pickles([path])
    if path.suffix != SAFETENSORS:
        raise ModelError(f"{path}: expected a {SAFETENSORS} file, found {path.suffix or 'no ending'}")
    kind: Any = next(
        (getattr(diffusers, name) for name in model.family.convention.pipelines if hasattr(diffusers, name)), None
    )
    if kind is None or not hasattr(kind, "lora_state_dict"):
        raise ModelError(
            f"{path}: no pipeline of diffusers reads a LoRA for a {model.family.model_class}; make it part of the"
            " weights with the tool that trained it, and save the model"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            own, metadata = set(opened.keys()), opened.metadata() or {}
            given = {name: float(opened.get_tensor(name)) for name in own if name.endswith(_ALPHA)}
        state = kind.lora_state_dict(str(path), use_safetensors=True, local_files_only=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"{path}: {kind.__name__} does not read it: {first_line(error)}") from None
    state = state[0] if isinstance(state, tuple) else state
    others = sorted(key for key in state if not key.startswith(_TRANSFORMER))
    if others:
        raise ModelError(f"{path}: {others[0]} is of another part than the transformer, whose LoRA alone is fused")
    state = {key.removeprefix(_TRANSFORMER): value for key, value in state.items()}
    alphas = {key.removesuffix(_ALPHA): float(state.pop(key)) for key in [*state] if key.endswith(_ALPHA)}
    # Where the keys are diffusers' already nothing was converted, so what stood beside them counts.
    alphas |= {
        name.removesuffix(_ALPHA).removeprefix(_TRANSFORMER): value
        for name, value in given.items()
        if name.removesuffix(_ALPHA) + _DOWN in own and name.startswith(_TRANSFORMER)
    }
    return state, {**_alpha_of(metadata, path), **alphas}


def _alpha_of(metadata: Mapping[str, str], path: Path) -> dict[str, float]:
    """What peft's own configuration says of all layers' alpha.

    Raises:
        ModelError: it has another alpha for single layers, or scales otherwise.
    """
    try:
        said = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        said = {}
    for key in ("alpha_pattern", "use_rslora", "use_dora"):
        if said.get(_TRANSFORMER + key):
            raise ModelError(f"{path}: {key} is not covered; fuse the LoRA with peft, and save the model")
    alpha = said.get(f"{_TRANSFORMER}lora_alpha")
    return {"": float(alpha)} if isinstance(alpha, int | float) else {}
