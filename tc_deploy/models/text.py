"""How a family's pipelines make conditions of a prompt: which tokenizers and encoders read it, how the results join.

A description is data, as a family is: diffusers' ``encode_prompt`` in a few lines per family, over transformers' own
classes. In: token ids and masks. Out: the conditions by the transformer's names. Never: loads a model, or reads a
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tc_deploy.models.geometry import Geometry
from tc_deploy.types import Cleaning

TOKENIZER = "tokenizer"
"""Folders of tokenizers begin with it: ``tokenizer``, ``tokenizer_2``."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """One tokenizer and the encoder that reads what it makes."""

    encoder: str
    """The encoder's folder in a pipeline: ``text_encoder_2``."""
    tokenizer: str
    """The tokenizer's: ``tokenizer_2``."""
    model_class: str
    """Of transformers."""
    tokens: Callable[[int, int], int]
    """How many tokens a prompt is padded or cut to, given the text tokens of the transformer and the
    ``model_max_length`` of the pipeline's first tokenizer."""
    encode: Callable[[Any, Tensor, Tensor | None], tuple[Tensor, ...]]
    """Runs the encoder on ids (B, T) int64 and, where it is ``masked``, a mask (B, T) int64."""
    outputs: tuple[str, ...]
    """What ``encode`` returns."""
    masked: bool = False
    """Whether the encoder is told which tokens are padding."""
    optional: bool = False
    """Pipelines may lack it."""

    @property
    def ids(self) -> str:
        """Name of the graph's input with the token ids: ``input_ids``, ``input_ids_2``."""
        return f"input_ids{self.tokenizer.removeprefix(TOKENIZER)}"

    @property
    def mask(self) -> str | None:
        """Name of the input with the mask; None where there is none."""
        return f"attention_mask{self.tokenizer.removeprefix(TOKENIZER)}" if self.masked else None

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that the part reads."""
        return (self.ids,) if self.mask is None else (self.ids, self.mask)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs under names that no other part has: ``text_encoder_2.states``."""
        return tuple(f"{self.encoder}.{output}" for output in self.outputs)


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """What a family's pipelines do with a prompt."""

    parts: tuple[TextPart, ...]
    """The first one's tokenizer is ``tokenizer``."""
    join: Callable[[Mapping[str, Tensor], Geometry], dict[str, Tensor]]
    """Conditions by name, (B, ...) float32, of the parts' outputs and masks by name."""
    cleaning: Cleaning = Cleaning.NONE
    """What is done to a prompt before it is cut into tokens."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Conditions that are no text, with what the pipeline gives where it is not told."""


def prompt_tokens(text_tokens: int, model_max_length: int) -> int:  # noqa: ARG001 - as TextPart.tokens
    """As many as the transformer takes."""
    return text_tokens


def own_tokens(text_tokens: int, model_max_length: int) -> int:  # noqa: ARG001 - as above
    """As many as the pipeline's first tokenizer says: CLIP's 77."""
    return model_max_length


def last_states(encoder: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The last hidden states (B, T, C), as T5 and UMT5 are used."""
    return (encoder(ids, attention_mask=mask)[0],)


def pooled(encoder: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:  # noqa: ARG001 - CLIP is told no mask
    """CLIP's pooled output (B, C)."""
    return (encoder(ids, output_hidden_states=False).pooler_output,)


def penultimate_and_projected(encoder: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:  # noqa: ARG001
    """CLIP's hidden states before the last layer (B, T, C), and its projected pooled output (B, P)."""
    made = encoder(ids, output_hidden_states=True)
    return made.hidden_states[-2], made[0]
