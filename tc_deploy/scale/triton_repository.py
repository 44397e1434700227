"""A repository of Triton's with one model, which runs a bundle's engines.

In: a bundle. Out: ``NAME/config.pbtxt`` and ``NAME/1/model.py``, as text. The bundle stays where it is, and the model
imports this package. Never: loads an engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tc_deploy import __version__
from tc_deploy.bundle import FileKind
from tc_deploy.bundle.kinds import MADE_BY
from tc_deploy.errors import UsageError
from tc_deploy.manifest import DECODER, Manifest
from tc_deploy.serving.maker import picture_size

IMAGE, SEED = "image", "seed"
GIVEN: Final = ("prompt", "negative_prompt", "class_label", SEED, "guidance_scale", "quality")
"""The inputs that a model may have, by the server's names for them."""
_MARK = f"# Made by {MADE_BY}"
_HEAD_BYTES = 64

_MODEL = '''"""The bundle that config.pbtxt names, by tc_deploy's runtime; pip install tc-deploy where Triton runs."""

from tc_deploy.scale.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES).startswith(_MARK.encode())


TRITON_FILE: Final = FileKind(name="a file of a Triton model", is_ours=_is_ours)


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """Of a model."""

    name: str
    slots: int
    queue: int
    backend: str | None


def triton_files(bundle: Path, manifest: Manifest, settings: TritonSettings) -> dict[str, str]:
    """The files of a repository, by path inside it.

    Args:
        bundle: ``engines/NAME``, as the machine finds it that runs Triton.
        manifest: the bundle's.
        settings: of the model.

    Raises:
        UsageError: the bundle makes no pictures, or takes what no client can send.
    """
    return {
        f"{settings.name}/config.pbtxt": f"{_MARK}{__version__}\n{_config(bundle, manifest, settings)}",
        f"{settings.name}/1/model.py": f"{_MARK}{__version__}\n{_MODEL}",
    }


def _config(bundle: Path, manifest: Manifest, settings: TritonSettings) -> str:
    height, width = picture_size(bundle, manifest)
    channels = manifest.latent_shape[0]
    if manifest.decoder is not None:
        channels = int(manifest.graphs[DECODER].outputs[0].shape[1])
    size = [height, width] if channels == 1 else [height, width, channels]
    inputs = [("seed", "TYPE_INT64", True), ("quality", "TYPE_STRING", True)]
    if manifest.text is not None:
        inputs.insert(0, ("prompt", "TYPE_STRING", False))
    elif manifest.takes_labels:
        inputs.insert(0, ("class_label", "TYPE_INT32", False))
    elif manifest.conditions:
        raise UsageError(
            f"{bundle}: takes prompt embeddings; export it with --with-text-encoder, so that it takes text"
        )
    if manifest.text is not None and manifest.guided:
        inputs.append(("negative_prompt", "TYPE_STRING", True))
    if manifest.guided or manifest.embeds_guidance:
        inputs.append(("guidance_scale", "TYPE_FP32", True))
    parameters = {"bundle": str(bundle), "slots": str(settings.slots), "queue": str(settings.queue)}
    if settings.backend is not None:
        parameters["backend"] = settings.backend
    lines = [
        f"name: {_text(settings.name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        *(_tensor("input", name, kind, [1], optional=optional) for name, kind, optional in inputs),
        _tensor("output", IMAGE, "TYPE_UINT8", size),
        _tensor("output", SEED, "TYPE_INT64", [1]),
        *(
            f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, name: str, data_type: str, dims: list[int], *, optional: bool = False) -> str:
    more = " optional: true" if optional else ""
    return f"{kind} {{ name: {_text(name)} data_type: {data_type} dims: {dims}{more} }}"


def _text(words: str) -> str:
    """A string as protobuf's text format has it."""
    return json.dumps(words, ensure_ascii=False)
