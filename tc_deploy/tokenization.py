"""Prompts to token ids, as the pipeline that a bundle was exported from does it, with the ``tokenizers`` library alone.

In: prompts, and tokenizers as JSON files with their padding and cutting set. Out: ids and masks by the text encoder's
input names. Never: imports transformers, or reads a tokenizer that the manifest does not name.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
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
        self._cleaning = record.cleaning
        self._tokenizers = [(item, _loaded(bundle, item)) for item in record.tokenizers]

    def arrays(self, prompts: Sequence[str], *, warn: bool = True) -> dict[str, NDArray[np.int32]]:
        """Ids and masks of prompts; one that is longer than a tokenizer's limit is cut there, as diffusers does.

        Args:
            prompts: n of them.
            warn: say in the log where one is cut.

        Returns:
            By the text encoder's inputs, (n, tokens) int32; a mask is 1 for the prompt's tokens, 0 for padding.
        """
        cleaned = [clean(prompt, self._cleaning) for prompt in prompts]
        arrays = {}
        for record, tokenizer in self._tokenizers:
            encodings = [tokenizer.encode(prompt) for prompt in cleaned]
            for prompt, encoding in zip(prompts, encodings, strict=True):
                if warn and encoding.overflowing:
                    shown = prompt if len(prompt) <= _SHOWN else f"{prompt[: _SHOWN - 1]}…"
                    _LOG.warning(
                        "the prompt %r is cut after %d tokens, as many as %s takes; what comes later is not seen",
                        shown,
                        record.tokens,
                        Path(record.file).stem,
                    )
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
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise BundleError(f"{path}: not a tokenizer: {first_line(error)}; export again") from error
    lengths = [(tokenizer.truncation or {}).get("max_length"), (tokenizer.padding or {}).get("length")]
    if lengths != [record.tokens] * 2:
        raise BundleError(
            f"{path}: expected to cut and pad prompts to {record.tokens} tokens, found {lengths[0]} and {lengths[1]};"
            " export again"
        )
    return tokenizer
