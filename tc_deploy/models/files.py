"""The files of a checkpoint folder: configuration and weights, whole and of a kind that runs no code.

In: a folder that ``save_pretrained`` wrote. Out: paths and JSON. Never: reads a pickle, or a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tc_deploy.bundle import sha256_of_file
from tc_deploy.errors import ModelError, first_line

AGAIN = "download or save the checkpoint again"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path, weights: str = DIFFUSERS_WEIGHTS) -> tuple[Path, ...]:
    """The files that hold a model's weights: one, or its shards.

    Args:
        folder: the model's.
        weights: what the one file is called; the shards' index is named after it.

    Raises:
        ModelError: they are missing, or pickles.
    """
    index = folder / f"{weights}.index.json"
    # Where shards and one file stand side by side diffusers reads the shards, and the hash must be of what is read.
    if not index.is_file():
        if (folder / weights).is_file():
            return (folder / weights,)
        refuse_pickles(folder.iterdir())
        raise ModelError(f"{folder}: {weights} is missing; {AGAIN}")
    weight_map = read_json(index).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise ModelError(f"{index}: weight_map must name the shards' files; {AGAIN}")
    shards = sorted(set(shards))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; {AGAIN}")
    return tuple(folder / shard for shard in shards)


def check_whole(files: Iterable[Path]) -> None:
    """Check that each file is safetensors from its beginning to its end.

    Raises:
        ModelError: one is not.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: not a whole safetensors file: {first_line(error)}; {AGAIN}") from None


def refuse_pickles(files: Iterable[Path]) -> None:
    """Name the pickle that lies where safetensors were looked for.

    Raises:
        ModelError: there is one.
    """
    pickles = sorted(file for file in files if file.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{pickles[0]}: a pickle can run code when it is read, so it is refused; convert it on a machine that may,"
            " with model.save_pretrained(folder, safe_serialization=True)"
        )


def weights_sha256(files: Iterable[Path]) -> str:
    """One hash for the weights: a single file's own SHA-256, or that over the shards' in name order."""
    hashes = [sha256_of_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        ModelError: it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {first_line(error)}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}; {AGAIN}")
    return value
