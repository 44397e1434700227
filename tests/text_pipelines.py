"""Every family's pipeline with tiny random text encoders, and what diffusers' encode_prompt makes of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import transformers
import zoo
from diffusers_pipelines import tiny_clip, tiny_t5, tiny_tokenizer, tiny_umt5
from torch import Tensor

from tc_deploy.models import flux, pixart, sd3, wan
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry, ModelOptions

CLIP, TEXT = 6, 7
"""Tokens of the tiny CLIP's tokenizers, and what the others pad to."""
WIDTH = 24
PROMPTS = ["A cat on a mat", " a red  bridge &amp; a dog ", "a cat a cat a cat a cat a cat", ""]


def _pixart(transformer: Any) -> Any:
    return diffusers.PixArtSigmaPipeline(tiny_tokenizer(300), tiny_t5(WIDTH), None, transformer, _scheduler())


def _sd3(transformer: Any, *, t5: bool = True) -> Any:
    kind = transformers.CLIPTextModelWithProjection
    third = (tiny_t5(WIDTH), tiny_tokenizer(256)) if t5 else (None, None)
    first, second = (tiny_clip(kind, 8, projection, seed) for projection, seed in ((8, 1), (12, 2)))
    clips = (first, tiny_tokenizer(CLIP), second, tiny_tokenizer(CLIP))
    return diffusers.StableDiffusion3Pipeline(transformer, _scheduler(), None, *clips, *third)


def _flux(transformer: Any) -> Any:
    clip = tiny_clip(transformers.CLIPTextModel, 20)
    parts = (clip, tiny_tokenizer(CLIP), tiny_t5(WIDTH), tiny_tokenizer(512))
    return diffusers.FluxPipeline(_scheduler(), None, *parts, transformer)


def _wan(transformer: Any) -> Any:
    return diffusers.WanPipeline(tiny_tokenizer(512), tiny_umt5(WIDTH), None, _scheduler(), transformer)


def _scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _encoded_by_pixart(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.float()}


def _encoded_by_sd3(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, _, pooled, _ = pipe.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _encoded_by_flux(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, pooled, _ = pipe.encode_prompt(prompts, prompts, max_sequence_length=TEXT)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _encoded_by_wan(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    states, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT)
    return {"encoder_hidden_states": states}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One family's pipeline."""

    model: str
    """Of the zoo."""
    family: Family
    make: Callable[[Any], Any]
    encode: Callable[[Any, list[str]], dict[str, Tensor]]
    tokens: int = TEXT
    """Text tokens of the transformer."""
    limits: Mapping[str, int] = field(default_factory=lambda: {"tokenizer": TEXT})
    batch_size: int | None = None


CASES = {
    "pixart": Case(model="pixart", family=pixart.FAMILY, make=_pixart, encode=_encoded_by_pixart),
    "sd3": Case(
        model="sd3",
        family=sd3.FAMILY,
        make=_sd3,
        encode=_encoded_by_sd3,
        tokens=CLIP + TEXT,
        limits={"tokenizer": CLIP, "tokenizer_2": CLIP, "tokenizer_3": TEXT},
    ),
    "sd3-without-t5": Case(
        model="sd3",
        family=sd3.FAMILY,
        make=lambda transformer: _sd3(transformer, t5=False),
        encode=_encoded_by_sd3,
        tokens=CLIP + TEXT,
        limits={"tokenizer": CLIP, "tokenizer_2": CLIP},
        batch_size=4,
    ),
    "flux": Case(
        model="flux",
        family=flux.FAMILY,
        make=_flux,
        encode=_encoded_by_flux,
        limits={"tokenizer": CLIP, "tokenizer_2": TEXT},
    ),
    "wan": Case(model="wan", family=wan.FAMILY, make=_wan, encode=_encoded_by_wan),
}


def geometry_of(case: Case) -> Geometry:
    model = zoo.model(case.model)
    return case.family.geometry(
        model.module, ModelOptions(latent_size=zoo.MODELS[case.model][2].latent_size, text_tokens=case.tokens)
    )


def save(pipe: Any, folder: Path) -> None:
    """The pipeline without its transformer, which belongs to the zoo."""
    transformer, pipe.transformer = pipe.transformer, None
    pipe.save_pretrained(folder)
    pipe.register_modules(transformer=transformer)
