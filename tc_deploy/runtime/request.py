"""A request's arguments, checked against a bundle before anything runs.

In: labels, prompts or conditions, a seed, noise, a guidance scale. Out: a :class:`Request`. Never: touches a buffer, an
engine or a tokenizer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.bounds import MAX_GUIDANCE
from tc_deploy.conditions import (
    GUIDANCE,
    Arrays,
    Conditions,
    array_of,
    checked_conditions,
    labelled_conditions,
    whole_number,
)
from tc_deploy.errors import UsageError
from tc_deploy.manifest import Manifest
from tc_deploy.types import FloatArray

log = logging.getLogger(__name__)

MAX_SEED = 2**64 - 1
GUIDANCE_SCALE, TRUE_CFG_SCALE = "guidance_scale", "true_cfg_scale"
"""What pipelines of diffusers call their guidance."""
EXPORT_TEXT = "tc-deploy export PLAN -o BUNDLE --with-text-encoder"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """What conditions n pictures as text."""

    given: tuple[str, ...]
    negative: tuple[str, ...]
    """As many, for the unconditional half; empty without guidance."""
    more: Arrays
    """Conditions that no text makes, by name, (n, ...)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A request whose arguments have been checked, before it is cut into batches."""

    count: int
    """n, its pictures."""
    conditions: Conditions | None
    """None until the prompts are encoded."""
    prompts: Prompts | None
    seed: int
    latents: FloatArray | None
    """(n, *latent shape)"""
    guidance_scale: float | None

    def encoded(self, manifest: Manifest, made: Mapping[str, Arrays]) -> Request:
        """The request with its prompts' conditions.

        Args:
            manifest: of the bundle.
            made: by prompt, what the text encoder makes of it: conditions by name, without the batch axis.

        Raises:
            UsageError: a value is not finite.
        """
        assert self.prompts is not None, "there is something to encode"
        halves: list[dict[str, NDArray[Any]]] = []
        for texts in (self.prompts.given, self.prompts.negative):
            rows = {name: np.stack([made[text][name] for text in texts]) for name in made[texts[0]]} if texts else {}
            halves.append({**rows, **self.prompts.more})
        checked = checked_conditions(manifest.conditions, *halves, guided=manifest.guided, where="prompt")
        return dataclasses.replace(self, conditions=checked)

    def count_in(self, part: slice) -> int:
        """How many of the pictures are in a part."""
        return len(range(self.count)[part])

    def rows(self, index: Any) -> Conditions:
        """The conditions of some of the pictures; call it when the prompts are encoded."""
        assert self.conditions is not None, "the prompts are encoded"
        return self.conditions.rows(index)


def checked_request(
    manifest: Manifest,
    *,
    class_labels: Sequence[int] | None,
    prompt: Sequence[str] | str | None,
    negative_prompt: Sequence[str] | str | None,
    conditions: Arrays | None,
    unconditional: Arrays | None,
    count: int | None,
    seed: int,
    guidance_scale: float | None,
    true_cfg_scale: float | None,
    latents: FloatArray | None,
) -> Request:
    """Check the arguments of a request; ``Pipeline.__call__`` says what they are.

    Raises:
        UsageError: one is out of range, or does not fit the bundle or the others.
    """
    needed, guided = manifest.conditions, manifest.guided
    cfg, embedded = _checked_guidance(manifest, guidance_scale, true_cfg_scale)
    kinds = [class_labels, conditions] if prompt is None else [prompt, class_labels]
    if not needed:
        if class_labels is not None or prompt is not None or conditions:
            raise UsageError("this model takes no condition; give count (-n), how many pictures to make")
    elif count is not None:
        raise UsageError("count is for a model without conditions; this one makes a picture per label, prompt or row")
    elif sum(kind is not None for kind in kinds) != 1:
        raise UsageError("give class_labels, prompt or conditions, one of them")
    if (unconditional is not None or negative_prompt is not None) and not guided:
        raise UsageError("this bundle was exported without guidance, so it has no unconditional half; leave it out")
    if prompt is None and negative_prompt is not None:
        raise UsageError("negative_prompt goes with prompt; give unconditional beside conditions")
    if conditions is not None and not isinstance(conditions, Mapping):
        raise UsageError(f"conditions must be arrays by name, found {type(conditions).__name__}")
    checked = texts = None
    if not needed:
        given = 1 if latents is None else len(np.atleast_1d(array_of(latents, "latents")))
        count = given if count is None else whole_number(count, "count")
        if count < 1:
            raise UsageError(f"count must be at least 1, found {count}")
        checked = Conditions(count=count, given={}, unconditional={})
    elif prompt is not None:
        texts = _checked_prompts(manifest, prompt, negative_prompt, conditions, unconditional, embedded)
        count = len(texts.given)
    elif class_labels is not None:
        if unconditional is not None:
            raise UsageError('with class_labels the unconditional half is "no class"; leave out unconditional')
        checked = labelled_conditions(needed, class_labels, guided=guided)
        count = checked.count
    else:
        checked = checked_conditions(
            needed,
            _with_guidance(manifest, conditions or {}, embedded),
            None if unconditional is None else _with_guidance(manifest, unconditional, embedded),
            guided=guided,
        )
        count = checked.count
    seed = checked_seed(seed, count)
    none = manifest.solver.guidance_rule.none
    if guided and cfg is not None and cfg <= none:
        # Both halves alike, so that what guidance adds to the one is nothing.
        log.warning(
            "a guidance scale of %g is none, as in diffusers; this bundle calls the model for two halves all the same,"
            " one that was calibrated without guidance is twice as fast",
            cfg,
        )
        cfg = none
        checked = None if checked is None else dataclasses.replace(checked, unconditional=checked.given)
        texts = None if texts is None else dataclasses.replace(texts, negative=texts.given)
    return Request(
        count=count,
        conditions=checked,
        prompts=texts,
        seed=seed,
        latents=None if latents is None else _checked_latents(manifest, latents, count),
        guidance_scale=cfg,
    )


def _checked_prompts(
    manifest: Manifest,
    prompt: Sequence[str] | str,
    negative: Sequence[str] | str | None,
    conditions: Arrays | None,
    unconditional: Arrays | None,
    embedded: float | None,
) -> Prompts:
    record = manifest.text
    if record is None:
        raise UsageError(
            "this bundle takes class labels, no prompts; give class_labels (--class-label)"
            if manifest.takes_labels
            else f"this bundle has no text encoder, so it takes no prompts; export it with one: {EXPORT_TEXT}, or give"
            " conditions, as encode_prompt of the diffusers pipeline makes them"
        )
    if unconditional is not None:
        raise UsageError("with prompt the unconditional half is that of negative_prompt; leave out unconditional")
    given = _texts([prompt] if isinstance(prompt, str) else prompt, "prompt")
    other: tuple[str, ...] = ()
    if manifest.guided:
        negative = "" if negative is None else negative
        other = _texts([negative] if isinstance(negative, str) else negative, "negative_prompt")
        if len(other) not in (1, len(given)):
            raise UsageError(f"negative_prompt: expected one, or {len(given)} as there are prompts, found {len(other)}")
        other = other * len(given) if len(other) == 1 else other
    more = dict(conditions or {})
    for name in sorted(more.keys() - record.defaults.keys()):
        made = any(item.name == name for item in manifest.conditions)
        raise UsageError(
            f"conditions: {name} is not for a request to give beside prompts, "
            + ("which make it; leave it out" if made else "as this model takes none; leave it out")
        )
    needed = [item for item in manifest.conditions if item.name in record.defaults]
    defaults = dict(record.defaults)
    if manifest.solver.embedded_guidance is not None:
        defaults[GUIDANCE] = manifest.solver.embedded_guidance
    if embedded is not None and manifest.embeds_guidance:
        defaults[GUIDANCE] = embedded
        more.pop(GUIDANCE, None)
    for item in needed:
        more.setdefault(item.name, np.full((len(given), *item.shape), defaults[item.name], item.dtype))
    if needed:
        found = checked_conditions(needed, more, None, guided=False)
        if found.count != len(given):
            raise UsageError(f"conditions: expected {len(given)} samples, as there are prompts, found {found.count}")
    return Prompts(given=given, negative=other, more=more)


def _texts(given: Sequence[str], what: str) -> tuple[str, ...]:
    if not isinstance(given, Sequence):
        raise UsageError(f"{what} must be a text or a list of texts, found {given!r}")
    for text in given:
        if not isinstance(text, str):
            raise UsageError(f"{what} must hold text, found {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what}: {text!r} is not Unicode text; give it in UTF-8") from None
    if not given:
        raise UsageError(f"no text in {what}; a request makes one picture per prompt, so at least one is needed")
    return tuple(given)


def checked_seed(seed: int, count: int = 1) -> int:
    """The first of ``count`` seeds, one after the other, that noise can be drawn from.

    Raises:
        UsageError: it is out of range, or the last one is.
    """
    seed = whole_number(seed, "seed")
    largest = MAX_SEED - max(count - 1, 0)
    if not 0 <= seed <= largest:
        why = "" if largest == MAX_SEED else f", as picture i has seed + i and there are {count}"
        raise UsageError(f"seed must lie in 0..{largest}{why}, found {seed}")
    return seed


def noise_of(shape: tuple[int, ...], seed: int, count: int) -> FloatArray:
    """Standard normal noise of seeds ``seed`` .. ``seed + count - 1``: (count, ``*shape``), each of its seed alone."""
    streams = [np.random.Generator(np.random.Philox(key=seed + index)) for index in range(count)]
    return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])


def _checked_latents(manifest: Manifest, latents: FloatArray, count: int) -> FloatArray:
    latents, expected = array_of(latents, "latents"), (count, *manifest.latent_shape)
    if latents.shape != expected:
        raise UsageError(f"latents: expected shape {expected}, found {latents.shape}")
    if not np.issubdtype(latents.dtype, np.floating):
        raise UsageError(f"latents: expected floating point numbers, found {latents.dtype}")
    with np.errstate(over="ignore"):
        used = latents.astype(np.float32)
        start = used * np.float32(manifest.solver.init_noise_sigma)
    if not np.isfinite(start).all():
        raise UsageError("latents: hold values that are not finite in float32, in which they are used")
    return used


def _checked_guidance(
    manifest: Manifest, guidance_scale: Any, true_cfg_scale: Any
) -> tuple[float | None, float | None]:
    """What a request's guidance means to the bundle's model.

    Returns:
        The scale of classifier-free guidance, None where the bundle has none, and the strength that a model is told
        whose guidance is distilled.

    Raises:
        UsageError: a scale is no number in its range, or the bundle has no such guidance.
    """
    scales = {"guidance_scale": guidance_scale, "true_cfg_scale": true_cfg_scale}
    for name, scale in scales.items():
        # Comparisons that NaN fails.
        if scale is not None and not (
            isinstance(scale, (int, float, np.integer, np.floating))
            and not isinstance(scale, bool)
            and 0 <= scale <= MAX_GUIDANCE
        ):
            raise UsageError(f"{name}: guidance scale must be a number from 0 to {MAX_GUIDANCE:g}, found {scale!r}")
    solver, embedded = manifest.solver, None
    name = TRUE_CFG_SCALE if solver.true_cfg else GUIDANCE_SCALE
    asked = scales[name]
    if solver.true_cfg:
        embedded = guidance_scale
        if embedded is not None and not manifest.embeds_guidance:
            log.warning("guidance_scale %g is ignored: no guidance was distilled into this model", embedded)
    elif true_cfg_scale is not None:
        raise UsageError("true_cfg_scale: the pipeline of this model has none; its guidance is guidance_scale")
    if not manifest.guided:
        if asked is not None and asked > solver.guidance_rule.none:
            raise UsageError(
                "this bundle was exported without guidance; to have it, calibrate with"
                f" --{name.replace('_', '-')} {asked:g}, then export and build"
            )
        return None, embedded
    return solver.guidance_scale if asked is None else float(asked), embedded


def _with_guidance(manifest: Manifest, half: Arrays, embedded: float | None) -> Arrays:
    """Conditions in which a model is told how strong its distilled guidance is."""
    strength = manifest.solver.embedded_guidance if embedded is None else embedded
    if not manifest.embeds_guidance or strength is None or (embedded is None and GUIDANCE in half):
        return half
    count = max(
        (len(array) for array in (array_of(given, name) for name, given in half.items()) if array.ndim), default=0
    )
    return {**half, GUIDANCE: np.full(count, strength, np.float32)}
