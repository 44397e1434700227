"""Prompts to conditions, by a bundle's tokenizers and its text encoder's engine.

In: prompts. Out: by prompt, the conditions that the model takes. Each text is encoded once, whatever the number of
pictures that it is for. Never: imports transformers, or keeps what it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import NotFiniteError
from tc_deploy.manifest import TEXT_ENCODER, TextRecord
from tc_deploy.runtime.binding import Binder, Bundle
from tc_deploy.runtime.program import text_call
from tc_deploy.tokenization import Tokenizers


class PromptEncoder:
    """The text encoder of a bundle, bound to buffers.

    Args:
        bundle: whose it is.
        record: what its manifest says of it.
        binder: binds its graph.
        batch_size: prompts that run together.

    Raises:
        BackendError: the engine refuses the buffers.
    """

    def __init__(self, bundle: Bundle, record: TextRecord, binder: Binder, batch_size: int) -> None:
        self._bundle, self._record, self._batch_size = bundle, record, batch_size
        call = text_call(bundle.manifest.graphs[TEXT_ENCODER])
        self._graph = binder.bind(call)
        self._inputs = {name: binder.buffers[buffer] for name, buffer in call.inputs.items()}
        self._outputs = {name: binder.buffers[buffer] for name, buffer in call.outputs.items()}

    @cached_property
    def tokenizers(self) -> Tokenizers:
        """Read when the first prompt comes: who gives conditions as arrays needs no ``tokenizers`` library."""
        return Tokenizers(self._bundle.path, self._record)

    def warmup(self) -> None:
        """Run the graph once, on whatever lies there."""
        self._graph.run()

    def encode(self, prompts: Sequence[str]) -> dict[str, dict[str, NDArray[Any]]]:
        """Encode prompts, each text once.

        Returns:
            By prompt, its conditions by name, without the batch axis.

        Raises:
            BackendError: the ``tokenizers`` library is not installed, or the engine fails.
            NotFiniteError: the engine makes values that are not finite.
            BundleError: a file is no tokenizer.
        """
        texts = list(dict.fromkeys(prompts))
        arrays = self.tokenizers.arrays(texts)
        made: dict[str, dict[str, NDArray[Any]]] = {}
        for start in range(0, len(texts), self._batch_size):
            part = texts[start : start + self._batch_size]
            # A batch that is not full repeats its last prompt.
            rows = start + np.minimum(np.arange(self._batch_size), len(part) - 1)
            for name, buffer in self._inputs.items():
                buffer.write(arrays[name][rows])
            self._graph.run()
            outputs = {name: buffer.read() for name, buffer in self._outputs.items()}
            for row, text in enumerate(part):
                if not all(np.isfinite(output[row]).all() for output in outputs.values()):
                    raise NotFiniteError(
                        f"{self._bundle.path}: the text encoder makes values of {text!r} that are not finite; validate"
                        f" it with: tc-deploy validate {self._bundle.path}"
                    )
                made[text] = {name: output[row] for name, output in outputs.items()}
        return made
