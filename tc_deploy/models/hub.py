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

_MODEL = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json")
WANTED = [
    *(f"{folder}{name}" for folder in ("", "transformer/") for name in _MODEL),
    "model_index.json",
    "scheduler/scheduler_config.json",
]
UNWANTED = ["*.fp16.*", "*.bf16.*"]
"""Second copies of the weights in another precision."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OTHERWISE = "give a diffusers folder that is on this machine"


def local_folder(path: Path, *, endpoint: str | None = None) -> Path:
    """The folder itself, or that of the hub's model where ``path`` is no folder and reads like ``owner/name``.

    Args:
        path: a folder or a hub's id.
        endpoint: of another hub than the usual one.

    Raises:
        ModelError: the hub's model is gated, unknown, or cannot be fetched.
    """
    if path.exists() or not _ID.fullmatch(path.as_posix()):
        return path
    repository = path.as_posix()
    nowhere = f"{repository}: no such folder, and as a model of the hub"
    try:
        found = huggingface_hub.snapshot_download(
            repository, allow_patterns=WANTED, ignore_patterns=UNWANTED, endpoint=endpoint
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
