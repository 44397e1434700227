"""The parts of a diffusers pipeline beside its transformer: autoencoder, tokenizers, text encoders.

In: a pipeline folder. Out: each part by itself, in fp32 on the CPU, in evaluation mode, so that nobody needs two of
them in memory. Never: reads a pickle, fills a missing weight, or fetches anything.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from tc_deploy.errors import ModelError, first_line
from tc_deploy.models.files import (
    AGAIN,
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    read_json,
    refuse_pointer,
    variants_in,
    weights_sha256,
)
from tc_deploy.models.obstacles import check_fit, missing_library, refuse_loading
from tc_deploy.models.pipeline_index import AUTOENCODER, INDEX, PipelineIndex, Said
from tc_deploy.models.text import TOKENIZER, TextEncoding, TextPart
from tc_deploy.models.weights import LOADING, check_finite, checked_weights, from_pretrained


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """A class whose decoder is known to export."""

    axes: int
    """Of its latents: 4, or 5 for video."""
    channels: str
    """The setting that says how many channels they have."""


AUTOENCODERS = {
    "AutoencoderKL": Autoencoder(axes=4, channels="latent_channels"),
    "AutoencoderKLWan": Autoencoder(axes=5, channels="z_dim"),
}
_SCALING = re.compile(r"scal|shift|mean|std|bn_|batch_norm")
"""What settings are called that change the latents on their way to the decoder."""
_TEXT = ("text_encoder", TOKENIZER)
"""What the parts are called that read a prompt."""


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
        variant: which copy of the parts' weights to take, where a part has it.
        progress: told where a part has no such copy.
        named: how the user names another folder, for messages.

    Raises:
        ModelError: it is no pipeline folder.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        variant: str | None = None,
        progress: Callable[[str], None] = lambda message: None,
        *,
        named: str = "with --pipeline",
    ) -> None:
        if not path.is_dir():
            raise ModelError(
                f"{path}: no such folder to take the {what} from; name the diffusers pipeline folder that holds them"
                f" {named}"
            )
        self.path, self.named, self._variant, self._progress = path, named, variant, progress
        self.index = PipelineIndex(path)
        self._said: set[str] = set()

    def check_autoencoder(self) -> dict[str, Any]:
        """See that the autoencoder can be exported, before it is loaded.

        Returns:
            Its configuration, with the class's own values where the file has none.

        Raises:
            ModelError: it is missing, damaged, a pickle, of a class that is not known, or has a scaling that is not.
        """
        config = self._autoencoder_config()
        self._weights(AUTOENCODER, DIFFUSERS_WEIGHTS)
        known = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
        unknown = [key for key in config if key[0] != "_" and key not in known and _SCALING.search(key)]
        if unknown:
            raise ModelError(
                f"{self.path / AUTOENCODER}: {unknown[0]} is no setting of {config['_class_name']} in diffusers"
                f" {diffusers.__version__}, and seems to scale latents; install the diffusers that wrote it"
                f" ({config.get('_diffusers_version', 'unknown')}), or export without --with-decoder"
            )
        return {name: parameter.default for name, parameter in known.items()} | config

    def autoencoder(self) -> Component:
        """Load the autoencoder, without its encoder.

        Raises:
            ModelError: as for ``check_autoencoder``, or the weights do not fit the configuration.
            NotFiniteError: a weight is NaN or infinite.
        """
        name = str(self._autoencoder_config()["_class_name"])
        made = self._loaded(getattr(diffusers, name), AUTOENCODER, DIFFUSERS_WEIGHTS, torch_dtype=torch.float32)
        made.module.encoder, made.module.quant_conv = nn.Identity(), nn.Identity()
        return made

    def _autoencoder_config(self) -> dict[str, Any]:
        self._check_named(AUTOENCODER)
        config = read_json(self._part(AUTOENCODER) / "config.json")
        found = config.get("_class_name")
        named = self.index.class_of(AUTOENCODER) or found
        if named != found:
            raise ModelError(
                f"{self.path}: {INDEX} names {named} as {AUTOENCODER}, {AUTOENCODER}/config.json is of {found}; {AGAIN}"
            )
        if found not in AUTOENCODERS:
            raise ModelError(
                f"{self.path / AUTOENCODER}: the decoder of {found!r} is not known to export;"
                f" known: {', '.join(AUTOENCODERS)}; export without --with-decoder"
            )
        return config

    def text_parts(self, encoding: TextEncoding) -> tuple[TextPart, ...]:
        """The text encoders that the pipeline runs: what its index names, and where that says "none", none.

        Raises:
            ModelError: the index names other parts than the family's pipelines have, a part is missing, or without an
                index nothing says whether there should be one.
        """
        known = {name for part in encoding.parts for name in (part.encoder, part.tokenizer)}
        others = [name for name in self.index.parts if name.startswith(_TEXT) and name not in known]
        if others:
            raise ModelError(
                f"{self.path}: {INDEX} names {others[0]}, which this family's prompts are not encoded by; name the"
                f" model's own pipeline {self.named}"
            )
        return tuple(part for part in encoding.parts if self._runs(part))

    def _runs(self, part: TextPart) -> bool:
        if not part.optional:
            for name in (part.encoder, part.tokenizer):
                self._check_named(name)
            return True
        said = self.index.said(part.encoder)
        if said is Said.ABSENT:
            return False
        if said is Said.NOTHING and not (self.path / part.encoder).is_dir():
            why = f"{INDEX} does not name it" if self.index.is_there else f"there is no {INDEX}"
            raise ModelError(
                f"{self.path}: {part.encoder}/ is missing, and {why}, so nothing says whether the pipeline runs without"
                f' it; where it does, have {INDEX} say "{part.encoder}": [null, null]'
            )
        self._check_named(part.tokenizer)
        return True

    def _check_named(self, name: str) -> None:
        """Check that the index does not deny a part that is needed.

        Raises:
            ModelError: it does.
        """
        if self.index.said(name) is Said.ABSENT:
            raise ModelError(
                f"{self.path}: {INDEX} says that the pipeline has no {name}; name one that has {self.named}"
            )
        if self.index.is_there and self.index.said(name) is Said.NOTHING and not (self.path / name).is_dir():
            raise ModelError(f"{self.path}: {INDEX} names no {name}; name the model's own pipeline {self.named}")

    def check_text(self, part: TextPart) -> None:
        """See that a text encoder can be exported, before it is loaded.

        Raises:
            ModelError: it is missing, damaged, a pickle, or of another class than the family's pipelines use.
        """
        folder = self._part(part.encoder)
        architectures = read_json(folder / "config.json").get("architectures") or [part.model_class]
        found = self.index.class_of(part.encoder) or architectures[0]
        if found != part.model_class:
            raise ModelError(
                f"{folder}: a {found}, but this family's prompts are encoded by a {part.model_class}; name its own"
                f" pipeline {self.named}"
            )
        self._weights(part.encoder, TRANSFORMERS_WEIGHTS)

    def text_encoder(self, part: TextPart) -> Component:
        """Load a text encoder.

        Raises:
            ModelError: as for ``check_text``, or the weights do not fit the configuration.
            NotFiniteError: a weight is NaN or infinite.
        """
        import transformers

        return self._loaded(
            getattr(transformers, part.model_class), part.encoder, TRANSFORMERS_WEIGHTS, dtype=torch.float32
        )

    def tokenizer(self, part: TextPart) -> Any:
        """Load a tokenizer of transformers, of the fast kind.

        Raises:
            ModelError: it is missing, cannot be read, has no fast form, or no padding token.
        """
        import transformers

        folder = self._part(part.tokenizer, file="tokenizer_config.json")
        for file in sorted(folder.iterdir()):
            refuse_pointer(file)
        try:
            with _quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
        except LOADING as error:
            library = missing_library(error)
            if any(folder.glob("*.model")) and find_spec("sentencepiece") is None:
                library = "sentencepiece"  # transformers takes its files for others then, and asks for what reads those
            if library is not None:
                raise ModelError(
                    f"{folder}: to make the tokenizer's fast form of these files {library} is needed, which is not"
                    f" installed here; pip install {library}, or put the model's tokenizer.json there"
                ) from None
            raise ModelError(
                f"{folder}: the tokenizer cannot be loaded in its fast form: {first_line(error)}; put the model's"
                " tokenizer.json there"
            ) from None
        if not tokenizer.is_fast:
            raise ModelError(
                f"{folder}: {type(tokenizer).__name__} has no fast form, so nothing but transformers can run it; put a"
                " tokenizer.json of the fast form there, or give embeddings with --conditions and export without"
                " --with-text-encoder"
            )
        # Without its vocabulary transformers makes one that knows no words, and says nothing.
        names = dict(type(tokenizer).vocab_files_names)
        whole = [folder / names.pop("tokenizer_file", "tokenizer.json")], [folder / name for name in names.values()]
        if not any(files and all(file.is_file() for file in files) for files in whole):
            raise ModelError(f"{folder}: the tokenizer's vocabulary is missing, as {whole[0][0].name}; {AGAIN}")
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f"{folder}: the tokenizer has no padding token; name its own as pad_token in tokenizer_config.json"
            )
        return tokenizer

    def _part(self, name: str, file: str = "config.json") -> Path:
        if not (self.path / name / file).is_file():
            named = f"{INDEX} names {name}, and " if self.index.said(name) is Said.PRESENT else ""
            raise ModelError(
                f"{self.path}: {named}{name}/{file} is missing; name the diffusers pipeline folder that holds it"
                f" {self.named}"
            )
        return self.path / name

    def _variant_of(self, name: str, weights: str) -> str | None:
        """The copy that is taken of a part's weights; said where it is not the one that was asked for."""
        found = variants_in(self.path / name, weights)
        if self._variant is None or self._variant in found or None not in found:
            return self._variant
        if name not in self._said:
            self._said.add(name)
            self._progress(f"{name} has no weights of variant {self._variant}: {found[None]} is taken")
        return None

    def _weights(self, name: str, weights: str) -> tuple[tuple[Path, ...], str | None]:
        variant = self._variant_of(name, weights)
        config = read_json(self.path / name / "config.json")
        return checked_weights(self.path / name, config, weights, variant), variant

    def _loaded(self, kind: Any, name: str, weights: str, **settings: Any) -> Component:
        folder = self.path / name
        files, variant = self._weights(name, weights)
        try:
            with _quiet():
                module, info = from_pretrained(kind, folder, files, weights, variant, **settings)
        except LOADING as error:
            raise refuse_loading(error, folder, f"config.json and the weights do not make a {kind.__name__}") from error
        # What else a checkpoint holds, as CLIP's picture half, does not matter.
        check_fit(info["missing_keys"], (), len(module.state_dict()), folder)
        check_finite(module, files, folder)
        return Component(
            module=module.eval().requires_grad_(False),
            model_class=kind.__name__,
            weights_sha256=weights_sha256(files),
        )


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
