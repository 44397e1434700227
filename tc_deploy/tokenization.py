"""Prompts to token ids, as the pipeline that a bundle was exported from does it, with the ``tokenizers`` library alone.

In: prompts, and tokenizers as JSON files with their padding and cutting set. Out: ids and masks by the text encoder's
input names. Never: imports transformers, or reads a tokenizer that the manifest does not name.
"""

from __future__ import annotations

import contextlib
import html
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import BundleError, first_line
from tc_deploy.libraries import imported
from tc_deploy.manifest import TextRecord, TokenizerRecord
from tc_deploy.types import Cleaning

_LOG = logging.getLogger(__name__)
_SPACES = re.compile(r"[^\S\x1c-\x1f]+")
"""White space as Unicode has it; to Python four control characters, too, are spaces."""
_SHOWN = 60
"""Characters of a prompt in a message."""


class Tokenizers:
    """The tokenizers of a bundle whose files have been checked.

    Args:
        bundle: ``engines/NAME``.
        record: what the manifest says of them.

    Raises:
        BackendError: the library is not installed.
        BundleError: a file is no tokenizer, or pads and cuts to another length than the manifest says.
    """

    def __init__(self, bundle: Path, record: TextRecord) -> None:
        self._bundle, self._cleaning = bundle, record.cleaning
        self._tokenizers = [(item, _loaded(bundle, item)) for item in record.tokenizers]

    def arrays(self, prompts: Sequence[str], *, warn: bool = True) -> dict[str, NDArray[np.int32]]:
        """Ids and masks of prompts; one that is longer than a tokenizer's limit is cut there, as diffusers does.

        Args:
            prompts: n of them.
            warn: say in the log where one is cut.

        Returns:
            By the text encoder's inputs, (n, tokens) int32; a mask is 1 for the prompt's tokens, 0 for padding.

        Raises:
            BundleError: a tokenizer fails, or makes another number of tokens than the manifest says.
        """
        cleaned = [clean(prompt, self._cleaning) for prompt in prompts]
        arrays = {}
        for record, tokenizer in self._tokenizers:
            path = self._bundle / record.file
            with _blamed_on(path):
                encodings = [tokenizer.encode(prompt) for prompt in cleaned]
            lengths = sorted({len(encoding.ids) for encoding in encodings})
            if lengths not in ([], [record.tokens]):
                raise BundleError(
                    f"{path}: expected {record.tokens} tokens of every prompt, found {lengths}; export again"
                )
            for prompt, encoding in zip(prompts, encodings, strict=True):
                if warn and encoding.overflowing:
                    shown = prompt if len(prompt) <= _SHOWN else f"{prompt[: _SHOWN - 1]}…"
                    _LOG.warning(
                        "the prompt %r is cut after %d tokens, as many as %s takes; what comes later is not seen",
                        shown,
                        record.tokens,
                        Path(record.file).stem,
                    )
            with _blamed_on(path):  # an id may be larger than any vocabulary
                arrays[record.ids] = np.array([encoding.ids for encoding in encodings], np.int32)
                if record.mask is not None:
                    arrays[record.mask] = np.array([encoding.attention_mask for encoding in encodings], np.int32)
        return arrays


def clean(prompt: str, cleaning: Cleaning) -> str:
    """What a pipeline's tokenizers are given of a prompt."""
    match cleaning:
        case Cleaning.NONE:
            return prompt
        case Cleaning.LOWER:
            return prompt.lower().strip()
        case Cleaning.WEB:
            try:
                from ftfy import fix_text
            except ImportError:
                pass
            else:
                prompt = fix_text(prompt)
            return _SPACES.sub(" ", html.unescape(html.unescape(prompt))).strip()


def _loaded(bundle: Path, record: TokenizerRecord) -> Any:
    tokenizers = imported("tokenizers", purpose="prompts need a library: ")
    path = bundle / record.file
    with _blamed_on(path):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        cut, filled = tokenizer.truncation or {}, tokenizer.padding or {}
    lengths = [cut.get("max_length"), filled.get("length")]
    if lengths != [record.tokens] * 2:
        raise BundleError(
            f"{path}: expected to cut and pad prompts to {record.tokens} tokens, found {lengths[0]} and {lengths[1]};"
            " export again"
        )
    # The one makes more tokens of a prompt, as many as memory holds; with the other what is cut off comes back.
    if filled.get("pad_to_multiple_of") or cut.get("stride"):
        raise BundleError(f"{path}: pads to a multiple or cuts with a stride, which no export sets; export again")
    return tokenizer


@contextlib.contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Whatever the library raises is the file's fault.

    Raises:
        BundleError: it raised something.
    """
    try:
        yield
    except BaseException as error:  # tokenizers raises Exception itself, and a panic of Rust is not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{path}: not a tokenizer: {first_line(error)}; export again") from error
