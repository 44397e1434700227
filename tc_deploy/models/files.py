"""The files of a checkpoint folder: configuration and weights, whole and of a kind that runs no code.

In: a folder that ``save_pretrained`` wrote. Out: paths and JSON. Never: reads a pickle, or a tensor's values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from tc_deploy.bundle import real_path, sha256_of_file
from tc_deploy.errors import ModelError, first_line

AGAIN = "download or save the checkpoint again"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
SAFETENSORS, GGUF = ".safetensors", ".gguf"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_POINTER = b"version https://git-lfs"
"""What a file of Git LFS begins with where its content was not fetched."""


def weight_files(folder: Path, weights: str = DIFFUSERS_WEIGHTS, variant: str | None = None) -> tuple[Path, ...]:
    """The files that hold a model's weights: one, or its shards.

    Args:
        folder: the model's.
        weights: what the one file is called; the shards' index is named after it.
        variant: which of several copies of the weights, as ``fp16``; None is the one without a name.

    Raises:
        ModelError: they are missing, pickles, or not where they belong; what is there instead is named.
    """
    single, indexes = _names(weights, variant)
    # Where shards and one file stand side by side diffusers reads the shards, and the hash must be of what is read.
    index = next((folder / name for name in indexes if (folder / name).is_file()), None)
    if index is None:
        if (folder / single).is_file():
            return (folder / single,)
        _refuse_what_is_there(folder, weights, variant)
    document = read_json(index)
    weight_map = document.get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(shard, str) and shard for shard in shards):
        raise ModelError(f"{index}: weight_map must name the shards' files; {AGAIN}")
    shards = sorted(set(shards))
    outside = [shard for shard in shards if Path(shard).name != shard or shard == ".."]
    if outside:
        raise ModelError(f"{index}: shards lie beside it under plain names, found {outside[0]!r}; {AGAIN}")
    if not isinstance(document.get("metadata"), dict):
        raise ModelError(f"{index}: no metadata, as {{'total_size': ...}}, so diffusers refuses it; {AGAIN}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; {AGAIN}")
    return tuple(folder / shard for shard in shards)


def _names(weights: str, variant: str | None) -> tuple[str, tuple[str, ...]]:
    """What one file is called, and an index of shards: diffusers has changed its mind about the latter."""
    if variant is None:
        return weights, (f"{weights}.index.json",)
    named = f"{weights.removesuffix(SAFETENSORS)}.{variant}{SAFETENSORS}"
    return named, (f"{weights}.index.{variant}.json", f"{named}.index.json")


def variants_in(folder: Path, weights: str = DIFFUSERS_WEIGHTS) -> dict[str | None, str]:
    """The copies of the weights that lie in a folder: by variant, None being the one without a name, a file of each."""
    stem = weights.removesuffix(SAFETENSORS)
    found: dict[str | None, str] = {}
    for name in sorted(file.name for file in folder.glob(f"{stem}*") if file.is_file()):
        if name in (weights, f"{weights}.index.json"):
            found[None] = name
        elif name.startswith(f"{weights}.index.") and name.endswith(".json"):
            found.setdefault(name.removeprefix(f"{weights}.index.").removesuffix(".json"), name)
        elif name.endswith((SAFETENSORS, f"{SAFETENSORS}.index.json")):
            variant = name.removeprefix(stem).partition(SAFETENSORS)[0]
            if variant.startswith(".") and "-of-" not in variant:
                found.setdefault(variant[1:], name)
    return found


def _refuse_what_is_there(folder: Path, weights: str, variant: str | None) -> NoReturn:
    """Say what lies where a model's weights were looked for."""
    single, found = _names(weights, variant)[0], variants_in(folder, weights)
    if variant is not None and None in found:
        raise ModelError(f"{folder}: {single} is missing, but {found[None]} is there; leave --variant {variant} out")
    if found:
        name, file = next(iter(found.items()))
        raise ModelError(f"{folder}: {single} is missing, but {file} is there; take it with --variant {name}")
    present = sorted(folder.iterdir())
    refuse_pickles(present)
    for suffix in (GGUF, SAFETENSORS):
        other = next((file for file in present if file.suffix == suffix), None)
        if other is not None:
            refuse_single_file(other)
    raise ModelError(f"{folder}: {single} is missing; {AGAIN}")


def refuse_single_file(path: Path) -> NoReturn:
    """Say what to do with a checkpoint that is one file, and no diffusers folder.

    Raises:
        ModelError: always; or a pickle.
    """
    refuse_pickles([path])
    if path.suffix == GGUF:
        raise ModelError(
            f"{path}: GGUF holds quantised weights; give the diffusers folder of the checkpoint that it was made from"
        )
    raise ModelError(
        f"{path}: a single file, and no diffusers folder; load it with its pipeline's from_single_file(...) and write"
        " a folder with pipe.save_pretrained(folder)"
    )


def check_whole(files: Iterable[Path]) -> dict[str, str]:
    """Check that each file is safetensors from its beginning to its end.

    Returns:
        The tensors' types (``F32``) by name.

    Raises:
        ModelError: one is not.
    """
    types: dict[str, str] = {}
    for file in files:
        refuse_pointer(file)
        try:
            if not file.stat().st_size:
                raise ModelError(f"{file}: not a whole safetensors file: it is empty; {AGAIN}")
            with safe_open(file, framework="pt") as opened:
                types |= {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: not a whole safetensors file: {first_line(error)}; {AGAIN}") from None
    return types


def refuse_pointer(file: Path) -> None:
    """Name a file of Git LFS whose content was not fetched.

    Raises:
        ModelError: it is one, or cannot be read.
    """
    try:
        with file.open("rb") as opened:
            beginning = opened.read(len(_POINTER))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}") from None
    if beginning == _POINTER:
        raise ModelError(
            f"{file}: a pointer of Git LFS, and not the file itself; fetch it with: git lfs pull, in its repository"
        )


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


@contextlib.contextmanager
def under_usual_names(folder: Path, files: tuple[Path, ...], weights: str) -> Iterator[Path]:
    """A folder in which weights of a variant have the names that any loader looks for.

    Libraries differ in what they call the index of a variant's shards; links spare asking each for its way.

    Args:
        folder: the model's, with ``config.json``.
        files: its weights.
        weights: what the one file is usually called.
    """
    with tempfile.TemporaryDirectory(prefix="tc-deploy-model-") as name:
        staged = Path(name)
        for file in (folder / "config.json", *files):
            (staged / file.name).symlink_to(real_path(file))
        weight_map: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), file.name)
        index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": weight_map}
        (staged / f"{weights}.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield staged


def weights_sha256(files: Iterable[Path]) -> str:
    """One hash for the weights: a single file's own SHA-256, or that over the shards' in name order."""
    hashes = [sha256_of_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        ModelError: it is no JSON object.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {first_line(error)}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}; {AGAIN}")
    return value
