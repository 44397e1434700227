"""A module of diffusers or transformers from its folder, by the library's own loader, over weights that were checked.

In: a folder. Out: the module, and which weights it did not find or had no use for. Never: reads a pickle, or fetches
anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tc_deploy.errors import ModelError, NotFiniteError
from tc_deploy.models.files import AGAIN, check_whole, under_usual_names, weight_files
from tc_deploy.models.obstacles import check_not_quantised, check_tensors

LOADING = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    ImportError,
    SafetensorError,
)
"""What a loader may raise over a configuration and weights that are not for each other."""


def checked_weights(folder: Path, config: Mapping[str, Any], weights: str, variant: str | None) -> tuple[Path, ...]:
    """The files of a model's weights, whole, and bare weights.

    Args:
        folder: the model's.
        config: its configuration.
        weights: what its one file is usually called.
        variant: which copy of the weights.

    Raises:
        ModelError: they are missing, half-written, pickles, quantised, or those of an adapter or a wrapper.
    """
    files: tuple[Path, ...] = ()
    types: dict[str, str] | None = None
    problem: ModelError | None = None
    try:
        files = weight_files(folder, weights, variant)
        types = check_whole(files)
    except ModelError as error:
        problem = error
    # Quantised weights may lie there in a form that only their method reads; then that is the cause to name.
    check_not_quantised(config, folder / "config.json", types)
    if problem is not None or types is None:
        raise problem or ModelError(f"{folder}: no weights")
    check_tensors(types, folder)
    return files


def from_pretrained(
    kind: Any, folder: Path, files: tuple[Path, ...], weights: str, variant: str | None, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a module from checked files.

    Args:
        kind: its class.
        folder: the model's.
        files: its weights.
        weights: what its one file is usually called.
        variant: which copy of the weights they are.
        settings: of the loader.

    Returns:
        The module and the loader's account: ``missing_keys``, ``unexpected_keys``.
    """
    with contextlib.nullcontext(folder) if variant is None else under_usual_names(folder, files, weights) as place:
        module, info = kind.from_pretrained(
            place, use_safetensors=True, local_files_only=True, output_loading_info=True, **settings
        )
    return module, info


def check_finite(module: nn.Module, files: tuple[Path, ...], folder: Path) -> None:
    """Check that a module's weights are finite, as they were loaded.

    Args:
        module: the module.
        files: of its weights.
        folder: the model's.

    Raises:
        NotFiniteError: one is not; names it as its file does.
    """
    wrong = next((name for name, values in module.state_dict().items() if not _is_finite(values)), None)
    if wrong is None:
        return
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - an open file is no mapping
                values = tensors.get_tensor(name)
                if not _is_finite(values):
                    found = "NaN" if values.isnan().any() else "infinity"
                    raise NotFiniteError(f"{file}: the weights of {name} hold {found}; {AGAIN}")
    raise NotFiniteError(f"{folder}: the weights of {wrong} do not fit into float32; {AGAIN}")


def _is_finite(values: Tensor) -> bool:
    # One pass without a copy; a sum of finite values may overflow, and only then each is looked at.
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())
