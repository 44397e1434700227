"""A model of the Hugging Face hub as a folder on this machine.

In: ``owner/name``. Out: the folder of the hub's own cache that holds its transformer and its scheduler, downloaded
where there is network. Never: fetches text encoders, autoencoders or pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tc_deploy.errors import ModelError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OTHERWISE = "give a diffusers folder that is on this machine"
_FILES = (".safetensors", ".gguf", ".json", ".toml", ".bin", ".pt", ".pth", ".ckpt", ".zip", ".tar", ".gz")
"""What a file's name ends with; a repository's may hold dots as well."""
_OTHER_VARIANTS = ["*.fp16.*", "*.bf16.*"]
"""Further copies of the weights in another precision."""


def wanted(variant: str | None = None) -> list[str]:
    """What is fetched of a model: its transformer, its scheduler, and the pipeline's index."""
    named = "" if variant is None else f".{variant}"
    weights = "diffusion_pytorch_model"
    model = ["config.json", f"{weights}*{named}*.safetensors", f"{weights}*.index*{named}.json"]
    if variant is not None:
        model.append(f"{weights}{named}.safetensors.index.json")
    return [
        *(f"{folder}{name}" for folder in ("", "transformer/") for name in model),
        "model_index.json",
        "scheduler/scheduler_config.json",
    ]


def is_hub_id(path: Path) -> bool:
    """Whether a path that is not there reads like ``owner/name`` of the hub, and not like a place on this machine."""
    return (
        _ID.fullmatch(path.as_posix()) is not None
        and not path.exists()
        and not path.parent.exists()
        and path.suffix not in _FILES
    )


def local_folder(path: Path, variant: str | None = None, *, endpoint: str | None = None) -> Path:
    """The folder itself, or that of the hub's model where ``path`` is no folder and reads like ``owner/name``.

    Args:
        path: a folder or a hub's id.
        variant: which copy of the weights to fetch.
        endpoint: of another hub than the usual one.

    Raises:
        ModelError: the hub's model is gated, unknown, or cannot be fetched.
    """
    if not is_hub_id(path):
        return path
    repository = path.as_posix()
    nowhere = f"{repository}: no such folder, and as a model of the hub"
    try:
        found = huggingface_hub.snapshot_download(
            repository,
            allow_patterns=wanted(variant),
            ignore_patterns=_OTHER_VARIANTS if variant is None else None,
            endpoint=endpoint,
        )
    except GatedRepoError:
        raise ModelError(
            f"{nowhere} it is gated: accept its licence on the hub's page and log in with: hf auth login; or"
            f" {_OTHERWISE}"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{nowhere} it is unknown or private; check the name, log in with: hf auth login, or {_OTHERWISE}"
        ) from None
    except (OSError, ValueError) as error:
        # Being offline, refused or cut off has many classes there, all of them OSError or ValueError.
        raise ModelError(
            f"{nowhere} it cannot be fetched, and is not in the cache: {first_line(error)}; connect this machine and"
            f" try again, or {_OTHERWISE}"
        ) from None
    return Path(found)
