"""Why a checkpoint cannot be loaded as it is, and the cure: looked for before a loader fails over it in its own words.

In: a configuration, the names and types of the tensors, a library's error. Out: nothing, or one line. Never: reads a
file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tc_deploy.errors import ModelError, first_line
from tc_deploy.models.files import AGAIN

QUANTIZATION = "quantization_config"
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
"""Types that hold values as they are. Eight bits and less are codes that a quantisation made."""
_QUANTISED = {
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
    "quanto": r"\.(weight|input|output)\._(data|scale|shift)$|\.(input|output)_scale$",
    "torchao": r"_weight_(qdata|scale|zero_point)$",
    "modelopt": r"_quantizer\.",
    "GPTQ, AWQ or SVDQuant": r"\.(qweight|qzeros|wscales|smooth_factor)$",
    "scaled float8": r"(^|\.)(scale_weight|weight_scale|scale_input|scaled_fp8)$",
}
"""Tensors that a method leaves beside or in the place of weights."""
_ADAPTER = r"\.base_layer\.|\.lora_[A-Za-z_]+(\.|$)|\.lora\.|^base_model\.model\."
_WRAPPERS = {
    r"(^|\.)_orig_mod\.": "torch.compile; save the module inside it: model._orig_mod.save_pretrained(folder)",
    r"(^|\.)_fsdp_wrapped_module\.": "FSDP; gather its full state dict and load that into the bare model, then"
    " model.save_pretrained(folder)",
    r"(^|\.)_checkpoint_wrapped_module\.": "activation checkpointing; load them into the bare model, then"
    " model.save_pretrained(folder)",
    r"^module\.": "DistributedDataParallel or DeepSpeed; save the module inside it:"
    " model.module.save_pretrained(folder)",
}
_LIBRARIES = (
    "sentencepiece",
    "protobuf",
    "tiktoken",
    "scipy",
    "torchsde",
    "ftfy",
    "accelerate",
    "bitsandbytes",
    "gguf",
)
"""What diffusers and transformers ask for at need, without naming it in a way that a program could read."""


def check_not_quantised(config: Mapping[str, Any], where: Path, types: Mapping[str, str] | None) -> None:
    """Check that a configuration speaks of no quantisation.

    Args:
        config: of a model.
        where: the file it was read from.
        types: of the model's tensors by name; None where they cannot be read.

    Raises:
        ModelError: it does; names the method.
    """
    given = config.get(QUANTIZATION)
    if not given:
        return
    method = _method(given)
    if types and not any(_is_quantised(name, kind) for name, kind in types.items()):
        raise ModelError(
            f"{where}: {QUANTIZATION} names {method}, though the weights beside it are plain; where they are"
            f" dequantised, take {QUANTIZATION} out of that file"
        )
    raise ModelError(f"{where}: the checkpoint is quantised with {method}; {_dequantised(method)}")


def check_tensors(types: Mapping[str, str], folder: Path) -> None:
    """Check that tensors are a model's bare weights, by their names and types.

    Raises:
        ModelError: they are quantised, hold an adapter, or carry a wrapper's prefix; names one of them and the cure.
    """
    for method, pattern in _QUANTISED.items():
        if name := _first(pattern, types):
            raise ModelError(
                f"{folder}: the weights are quantised with {method}, as {name} shows; {_dequantised(method)}"
            )
    if name := next((name for name, kind in sorted(types.items()) if kind not in _PLAIN), None):
        raise ModelError(
            f"{folder}: the weights are quantised: {name} is stored as {types[name]}; save them as fp32, bf16 or fp16,"
            " or give the checkpoint that they were made from"
        )
    if name := _first(_ADAPTER, types):
        raise ModelError(
            f"{folder}: an adapter's layers are in the weights, as {name}; make them part of the weights: after"
            " pipe.fuse_lora() call pipe.unload_lora_weights(), then save_pretrained(folder)"
        )
    for pattern, wrapper in _WRAPPERS.items():
        # A class may name a part of its own "module".
        whole = not pattern.startswith("^") or all(re.search(pattern, name) for name in types)
        if whole and (name := _first(pattern, types)):
            raise ModelError(f"{folder}: the weights are named as inside a wrapper, as {name}: {wrapper}")


def check_fit(missing: Collection[str], unexpected: Collection[str], expected: int, folder: Path) -> None:
    """Check that a model found all its weights, and no others.

    Args:
        missing: names of weights that it did not find.
        unexpected: names of tensors that it has no use for.
        expected: how many weights it has.
        folder: the model's.

    Raises:
        ModelError: it did not; names both kinds.
    """
    if not missing and not unexpected:
        return
    kinds = (("missing", missing), ("unexpected", unexpected))
    words = " and ".join(
        f"{len(names)} {kind} {'key' if len(names) == 1 else 'keys'}, first {min(names)}"
        for kind, names in kinds
        if names
    )
    if not unexpected:
        cause = f"the checkpoint is incomplete, {AGAIN}"
    elif prefix := _wrapper(missing, unexpected):
        cause = (
            f"they would fit without the {prefix!r} before each name, so they are of a module around the model: save"
            " the model itself, with its own save_pretrained(folder)"
        )
    elif len(missing) >= expected:
        cause = (
            "none fits, so they are of another class, or named as outside diffusers: load such with the pipeline's"
            " from_single_file(...) and save_pretrained(folder)"
        )
    elif not missing:
        cause = f"the model would leave them unread, so they are of another configuration; {AGAIN}, with its own"
    else:
        cause = f"the checkpoint is of another model, or of another size; {AGAIN}"
    raise ModelError(f"{folder}: the weights do not fit config.json: {words}; {cause}")


def _wrapper(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """What stands before the names of all weights, where nothing else is wrong with them; None where more is."""
    prefix = min(unexpected).removesuffix(min(missing, default=""))
    fits = prefix.endswith(".") and {name.removeprefix(prefix) for name in unexpected} == set(missing)
    return prefix if fits else None


def missing_library(error: BaseException) -> str | None:
    """The optional library that an error of diffusers or transformers asks for; None where it asks for none."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    text = str(error)
    asks = isinstance(error, ImportError) or re.search(r"(?i)\binstall|not found|requires", text) is not None
    named = (name for name in _LIBRARIES if re.search(rf"(?i)\b{name}\b", text))
    return next(named, None) if asks else None


def refuse_loading(error: BaseException, where: Path | str, otherwise: str) -> ModelError:
    """What a loader's error means: a library that is missing here, or else the checkpoint.

    Args:
        error: what was raised.
        where: what was being loaded.
        otherwise: what to say, before the first line of the error, where no library is missing.
    """
    library = missing_library(error)
    if library is not None:
        return ModelError(f"{where}: needs {library}, which is not installed here; pip install {library}")
    # diffusers' advice that follows would fill missing weights with random ones.
    reason = first_line(error).partition(". If you want to instead overwrite")[0]
    return ModelError(f"{where}: {otherwise}: {reason}; {AGAIN}")


def _method(given: Any) -> str:
    if not isinstance(given, Mapping):
        return str(given)
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return "bitsandbytes"
    return str(given.get("quant_method") or given.get("quant_type") or "an unnamed method")


def _dequantised(method: str) -> str:
    """How plain weights are had."""
    whole = "give the checkpoint that it was made from"
    if "bitsandbytes" not in method:
        return f"engines are made of plain weights: {whole}, or save it dequantised"
    return (
        f"engines are made of plain weights: {whole}, or where bitsandbytes runs save it dequantised, with"
        f" pipe.transformer.dequantize() and save_pretrained(folder), and take {QUANTIZATION} out of its config.json"
    )


def _is_quantised(name: str, kind: str) -> bool:
    return kind not in _PLAIN or any(re.search(pattern, name) for pattern in _QUANTISED.values())


def _first(pattern: str, names: Collection[str]) -> str | None:
    return next((name for name in sorted(names) if re.search(pattern, name)), None)
