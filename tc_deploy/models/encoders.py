"""A pipeline's text encoders in PyTorch, run as its ``encode_prompt`` runs them.

In: a pipeline folder and prompts. Out: the transformer's conditions by name. Encoders are loaded and freed one after
another, in fp32. Never: reads a pickle, fetches anything, or encodes with a part that the family's pipelines do not
have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tc_deploy.errors import ModelError, UsageError, counted, first_line
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry
from tc_deploy.models.text import TextEncoding, TextPart
from tc_deploy.tokenization import clean

LONGEST_PROMPT = 2**20
"""Tokens; transformers gives a far larger number where a tokenizer names no limit."""
ROWS = 8
"""Prompts that an encoder reads at once: more take memory and save no time on a processor."""


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """What reads a prompt, checked against the folder before anything heavy is loaded."""

    encoding: TextEncoding
    parts: tuple[TextPart, ...]
    tokens: Mapping[str, int]
    """By encoder, what prompts are padded or cut to."""
    tokenizers: Mapping[str, Any]
    """By encoder, of transformers."""
    geometry: Geometry


def text_plan(pipeline: PipelineFolder, family: Family, geometry: Geometry) -> TextPlan:
    """Check what can be checked of a pipeline's text encoders without loading one.

    Raises:
        UsageError: the family takes no prompt.
        ModelError: a part is missing, damaged, a pickle or of another class, a tokenizer has no fast form, or the
            plan's prompts are too short for it.
    """
    if family.text is None:
        raise UsageError(
            f"{family.model_class} takes no prompt, or its family does not say how one is encoded; give embeddings with"
            " --conditions, and export without --with-text-encoder"
        )
    parts = pipeline.text_parts(family.text)
    tokens, tokenizers = {}, {}
    for part in parts:
        pipeline.check_text(part)
        tokenizers[part.encoder] = pipeline.tokenizer(part)
        first = tokenizers[parts[0].encoder].model_max_length
        tokens[part.encoder] = part.tokens(geometry.text_tokens, int(first))
        if abs(tokens[part.encoder]) > LONGEST_PROMPT:
            raise ModelError(
                f"{pipeline.path / parts[0].tokenizer}: the tokenizer does not say how many tokens it takes; set"
                " model_max_length in its tokenizer_config.json"
            )
        if tokens[part.encoder] < 1:
            raise ModelError(
                f"{pipeline.path}: of the plan's {geometry.text_tokens} text tokens none are left for {part.tokenizer},"
                f" as {first} are the first tokenizer's; calibrate with --text-tokens of at least {first + 1}"
            )
    return TextPlan(encoding=family.text, parts=parts, tokens=tokens, tokenizers=tokenizers, geometry=geometry)


def encoded(
    pipeline: PipelineFolder, plan: TextPlan, prompts: Sequence[str], progress: Callable[[str], None]
) -> dict[str, Tensor]:
    """Encode prompts.

    Args:
        pipeline: holds the encoders.
        plan: what of it reads a prompt.
        prompts: n of them, at least one.
        progress: told what is being done.

    Returns:
        Conditions by name, (n, ...) float32; those that are no text are left out.

    Raises:
        ModelError: an encoder cannot be loaded, or does not make what the transformer takes.
        NotFiniteError: a weight is NaN or infinite.
    """
    cleaned = [clean(prompt, plan.encoding.cleaning) for prompt in prompts]
    made: dict[str, Tensor] = {}
    for part in plan.parts:
        progress(f"encoding {counted(len(prompts), 'text')} with {part.encoder}")
        made |= _encoded_by(pipeline, plan, part, cleaned)
    with torch.no_grad(), fitting(pipeline, "its text encoders"):
        conditions = plan.encoding.join(made, plan.geometry)
    check_conditions(pipeline, plan.geometry, conditions)
    return conditions


def _encoded_by(pipeline: PipelineFolder, plan: TextPlan, part: TextPart, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What one encoder makes of cleaned prompts, and their mask; the encoder is freed on return."""
    read = plan.tokenizers[part.encoder](
        list(prompts), padding="max_length", max_length=plan.tokens[part.encoder], truncation=True, return_tensors="pt"
    )
    module = pipeline.text_encoder(part).module
    mask = None if part.mask is None else read["attention_mask"]
    with torch.no_grad(), fitting(pipeline, part.encoder):
        pieces = [
            part.encode(module, ids, None if mask is None else mask[first : first + ROWS])
            for first, ids in zip(range(0, len(prompts), ROWS), read["input_ids"].split(ROWS), strict=True)
        ]
    made = dict(zip(part.output_names, map(torch.cat, zip(*pieces, strict=True)), strict=True))
    return made if part.mask is None or mask is None else made | {part.mask: mask}


@contextlib.contextmanager
def fitting(pipeline: PipelineFolder, part: str) -> Iterator[None]:
    """Say it in one line where PyTorch finds that parts of a pipeline are not for each other or for this model."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        raise ModelError(
            f"{pipeline.path}: {part} and the prompts of this plan do not fit each other: {first_line(error)}; name the"
            f" model's own pipeline {pipeline.named}, or calibrate with other --text-tokens"
        ) from error


def check_conditions(pipeline: PipelineFolder, geometry: Geometry, conditions: Mapping[str, Tensor]) -> None:
    """Check that conditions have the shapes that the transformer takes.

    Raises:
        ModelError: one has not.
    """
    for item in geometry.conditions:
        found = tuple(conditions[item.name].shape[1:]) if item.name in conditions else item.shape
        if found != item.shape:
            raise ModelError(
                f"{pipeline.path}: its text encoders make {item.name} of shape {found}, the transformer takes"
                f" {item.shape}; name the model's own pipeline {pipeline.named}"
            )
