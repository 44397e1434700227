"""The parts of a diffusers pipeline beside its transformer: autoencoder, tokenizers, text encoders.

In: a pipeline folder. Out: each part by itself, in fp32 on the CPU, in evaluation mode, so that nobody needs two of
them in memory. Never: reads a pickle, fills a missing weight, or fetches anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from tc_deploy.errors import ModelError, first_line
from tc_deploy.models.files import (
    AGAIN,
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    check_whole,
    read_json,
    weight_files,
    weights_sha256,
)
from tc_deploy.models.text import TextPart

AUTOENCODER = "vae"
INDEX = "model_index.json"
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLWan")
"""The classes whose decoders are known to export."""
_LOADING = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part, loaded."""

    module: Any
    model_class: str
    weights_sha256: str


class PipelineFolder:
    """A diffusers pipeline on disk.

    Args:
        path: the folder.
        what: what of it is wanted, for messages.

    Raises:
        ModelError: it is no pipeline folder.
    """

    def __init__(self, path: Path, what: str) -> None:
        if not path.is_dir():
            raise ModelError(
                f"{path}: no such folder to take the {what} from; name the diffusers pipeline folder that holds them"
                " with --pipeline"
            )
        self.path = path
        self._index = read_json(path / INDEX) if (path / INDEX).is_file() else {}

    @property
    def folders(self) -> tuple[str, ...]:
        """What lies in it."""
        return tuple(sorted(entry.name for entry in self.path.iterdir() if entry.is_dir()))

    def check_autoencoder(self) -> None:
        """See that the autoencoder can be exported, before it is loaded.

        Raises:
            ModelError: it is missing, damaged, a pickle, or of a class that is not known.
        """
        self._autoencoder_config()
        check_whole(weight_files(self.path / AUTOENCODER))

    def autoencoder(self) -> Component:
        """Load the autoencoder, without its encoder.

        Raises:
            ModelError: as for ``check_autoencoder``, or the weights do not fit the configuration.
        """
        name = str(self._autoencoder_config()["_class_name"])
        folder = self.path / AUTOENCODER
        module = _loaded(getattr(diffusers, name), folder, torch_dtype=torch.float32)
        module.encoder, module.quant_conv = nn.Identity(), nn.Identity()
        return Component(module=module, model_class=name, weights_sha256=weights_sha256(weight_files(folder)))

    def _autoencoder_config(self) -> dict[str, Any]:
        config = read_json(self._part(AUTOENCODER) / "config.json")
        if config.get("_class_name") not in AUTOENCODERS:
            raise ModelError(
                f"{self.path / AUTOENCODER}: the decoder of {config.get('_class_name')!r} is not known to export;"
                f" known: {', '.join(AUTOENCODERS)}; export without --with-decoder"
            )
        return config

    def check_text(self, part: TextPart) -> None:
        """See that a text encoder can be exported, before it is loaded.

        Raises:
            ModelError: it is missing, damaged, a pickle, or of another class than the family's pipelines use.
        """
        folder = self._part(part.encoder)
        named = self._index.get(part.encoder)
        architectures = read_json(folder / "config.json").get("architectures") or [part.model_class]
        found = named[-1] if isinstance(named, list) and named else architectures[0]
        if found != part.model_class:
            raise ModelError(
                f"{folder}: a {found}, but this family's prompts are encoded by a {part.model_class}; name its own"
                " pipeline with --pipeline"
            )
        check_whole(weight_files(folder, TRANSFORMERS_WEIGHTS))

    def text_encoder(self, part: TextPart) -> Component:
        """Load a text encoder.

        Raises:
            ModelError: as for ``check_text``, or the weights do not fit the configuration.
        """
        import transformers

        folder = self.path / part.encoder
        module = _loaded(getattr(transformers, part.model_class), folder, dtype=torch.float32)
        files = weight_files(folder, TRANSFORMERS_WEIGHTS)
        return Component(module=module, model_class=part.model_class, weights_sha256=weights_sha256(files))

    def tokenizer(self, part: TextPart) -> Any:
        """Load a tokenizer of transformers, of the fast kind.

        Raises:
            ModelError: it is missing, cannot be read, has no fast form, or no padding token.
        """
        import transformers

        folder = self._part(part.tokenizer, file="tokenizer_config.json")
        try:
            with _quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
        except _LOADING as error:
            raise ModelError(
                f"{folder}: the tokenizer cannot be loaded in its fast form: {first_line(error)}; put the model's"
                " tokenizer.json there, or install sentencepiece for it to be converted"
            ) from None
        if not tokenizer.is_fast:
            raise ModelError(
                f"{folder}: {type(tokenizer).__name__} has no fast form, so nothing but transformers can run it; encode"
                " prompts with examples/encode_prompts.py instead, and export without --with-text-encoder"
            )
        # Without its vocabulary transformers makes one that knows no words, and says nothing.
        names = dict(type(tokenizer).vocab_files_names)
        whole = [folder / names.pop("tokenizer_file", "tokenizer.json")], [folder / name for name in names.values()]
        if not any(files and all(file.is_file() for file in files) for files in whole):
            raise ModelError(f"{folder}: the tokenizer's vocabulary is missing, as {whole[0][0].name}; {AGAIN}")
        if tokenizer.pad_token_id is None:
            raise ModelError(f"{folder}: the tokenizer has no padding token; {AGAIN}")
        return tokenizer

    def _part(self, name: str, file: str = "config.json") -> Path:
        if not (self.path / name / file).is_file():
            raise ModelError(
                f"{self.path}: {name}/{file} is missing; name the diffusers pipeline folder that holds it with"
                " --pipeline"
            )
        return self.path / name


def _loaded(kind: Any, folder: Path, **settings: Any) -> Any:
    files = weight_files(folder, DIFFUSERS_WEIGHTS if kind.__module__.startswith("diffusers") else TRANSFORMERS_WEIGHTS)
    check_whole(files)
    try:
        with _quiet():
            module, info = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **settings
            )
    except _LOADING as error:
        raise ModelError(
            f"{folder}: config.json and the weights do not make a {kind.__name__}: {first_line(error)}; {AGAIN}"
        ) from error
    # What else a checkpoint holds, as CLIP's picture half, does not matter.
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: the weights do not fit config.json: {len(missing)} missing keys, first {missing[0]}; {AGAIN}"
        )
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and giving advice; what is wrong comes as an error."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
