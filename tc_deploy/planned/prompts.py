"""What a plan's samples are conditioned on: labels, prompts, a file of embeddings, or random draws by explicit wish.

In: a recipe's or a plan's conditions and a model. Out: :class:`tc_deploy.tokencache.sampler.Prompts`, checked against
the model; None where conditions are drawn. Never: keeps a text encoder in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tc_deploy.bundle import real_path, sha256_of_file
from tc_deploy.conditions import GUIDANCE, UNCONDITIONAL, Conditions, checked_conditions, read_conditions
from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.encoders import encoded, text_plan
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.hub import local_folder
from tc_deploy.models.loading import model_folder, pipeline_of
from tc_deploy.plan import LABELS, RANDOM, Plan, PromptsRecord, TextsRecord
from tc_deploy.tokencache.sampler import Prompts, Sampling

_LOG = logging.getLogger(__name__)
_DRAWN = "random conditions stand in for the plan's prompts, and their outliers are not seen"


def takes_prompts(model: DiffusionTransformer) -> bool:
    """Whether a model is conditioned on more than labels."""
    return any(condition.classes is None for condition in model.geometry.conditions)


def prompts_for(
    model: DiffusionTransformer,
    conditions: TextsRecord | str | None,
    *,
    guided: bool,
    embedded_guidance: float | None = None,
    pipeline: PipelineFolder | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Prompts | None:
    """What a recipe's conditions stand for.

    Args:
        model: the model.
        conditions: prompts, a safetensors file of their embeddings, ``random``, or None, which will do for labels
            alone.
        guided: whether there must be an unconditional half.
        embedded_guidance: strength that the model is told of a guidance that was distilled, in place of the file's;
            None takes the file's, or the pipeline's default where the file has none.
        pipeline: holds the text encoders; None: the one that the checkpoint is a part of.
        progress: told what is being done.

    Returns:
        Prompts, encoded; None where conditions are drawn.

    Raises:
        UsageError: the model needs prompts and nothing was said, it takes none, the file cannot be read, or it does not
            fit the model.
        ModelError: the pipeline's text encoders are missing, cannot be loaded, or are not the model's.
        NotFiniteError: one of their weights is NaN or infinite.
    """
    if conditions is None and takes_prompts(model):
        names = " and ".join(item.name for item in model.geometry.conditions if item.classes is None)
        raise UsageError(
            f"{model.source}: the model is conditioned on {names}, and a plan is only as good as the prompts that it is"
            " made with; give some of your users' with --prompt TEXT or --prompts FILE, embeddings with --conditions"
            f" FILE, or --conditions {RANDOM} for a trial"
        )
    if conditions == RANDOM and not takes_prompts(model):
        _LOG.warning("%s takes no prompts: --conditions %s changes nothing, labels are drawn", model.source, RANDOM)
    if conditions is None or conditions == RANDOM:
        return None
    record: PromptsRecord | TextsRecord
    if isinstance(conditions, TextsRecord):
        record, where = conditions, "prompts"
        given, unconditional = _encoded(model, conditions, pipeline, progress)
    else:
        path, where = Path(conditions), conditions
        given, unconditional = read_conditions(path)
        record = PromptsRecord(file=real_path(path).as_posix(), sha256=sha256_of_file(path), prompts=1)
    if model.geometry.embeds_guidance:
        default = model.family.convention.embedded_guidance
        for half in (given, unconditional):
            rows = max((len(array) for array in half.values() if array.ndim), default=0)
            if rows and (embedded_guidance is not None or GUIDANCE not in half):
                half[GUIDANCE] = np.full(rows, default if embedded_guidance is None else embedded_guidance, np.float32)
    checked = checked_conditions(model.geometry.conditions, given, unconditional, guided=guided, where=where)
    if isinstance(record, PromptsRecord):
        record = record.model_copy(update={"prompts": checked.count})
    return Prompts(conditions=checked, record=record)


def _encoded(
    model: DiffusionTransformer,
    texts: TextsRecord,
    pipeline: PipelineFolder | None,
    progress: Callable[[str], None],
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Embeddings of prompts, and of what guidance goes away from."""
    if not takes_prompts(model):
        raise UsageError(f"{model.source} takes class labels, which are drawn, and no prompts; leave the prompts out")
    if pipeline is None:
        pipeline = pipeline_folder(model, progress)
    plan = text_plan(pipeline, model.family, model.geometry)
    rows = encoded(pipeline, plan, [*texts.prompts, texts.negative_prompt], progress)
    arrays = {name: tensor.numpy() for name, tensor in rows.items()}
    given = {name: array[:-1] for name, array in arrays.items()}
    return given, {name: array[-1:] for name, array in arrays.items()}


def pipeline_folder(
    model: DiffusionTransformer,
    progress: Callable[[str], None] = lambda message: None,
    *,
    path: Path | None = None,
    named: str = "in the place of the model",
) -> PipelineFolder:
    """The pipeline that a model was loaded from, or another one at ``path``, for its text encoders.

    Raises:
        ModelError: it is no folder.
    """
    variant = model.options.variant
    if path is None:
        path = pipeline_of(model_folder(local_folder(Path(model.source), variant))).folder
    return PipelineFolder(path, "text encoders", variant, progress, named=named)


def prompts_of_plan(
    model: DiffusionTransformer,
    plan: Plan,
    conditions: str | None = None,
    *,
    pipeline_path: Path | None = None,
    progress: Callable[[str], None],
) -> Prompts | None:
    """The prompts to compare graphs on, those with the largest values first: real encoders' outliers overflow fp16.

    Args:
        model: the model.
        plan: may say the prompts that it was made with.
        conditions: a file in their place, or ``random``.
        pipeline_path: holds the text encoders, where they are not beside the model.
        progress: told what is being done, and where the plan's prompts cannot be had, so that conditions are drawn.

    Returns:
        None where conditions are drawn.

    Raises:
        UsageError: a file cannot be read, or does not fit the model.
    """
    record = plan.origin.conditions
    asked = conditions
    if conditions is None and isinstance(record, PromptsRecord):
        path = Path(record.file)
        if not path.is_file() or sha256_of_file(path) != record.sha256:
            what = "was changed since the plan was made" if path.is_file() else "is gone"
            progress(f"{record.file} {what}: {_DRAWN}; name a file with --conditions")
            return None
        asked = record.file
    texts = record if conditions is None and isinstance(record, TextsRecord) else None
    if asked is None and texts is None:
        return None
    try:
        prompts = prompts_for(
            model,
            asked if texts is None else texts,
            guided=plan.sampling.guidance_scale is not None,
            embedded_guidance=plan.sampling.embedded_guidance,
            pipeline=None
            if texts is None
            else pipeline_folder(model, progress, path=pipeline_path, named="with --pipeline"),
            progress=progress,
        )
    except ModelError as error:
        progress(f"{error}: {_DRAWN}")
        return None
    return None if prompts is None else _largest_first(prompts)


def _largest_first(prompts: Prompts) -> Prompts:
    """The prompts ordered by their largest value; equal ones in the file's order."""
    conditions = prompts.conditions
    arrays = [array for array in (*conditions.given.values(), *conditions.unconditional.values()) if array.ndim > 1]
    largest = np.max([np.abs(array).reshape(conditions.count, -1).max(axis=1) for array in arrays], axis=0)
    return Prompts(conditions=conditions.rows(np.argsort(-largest, kind="stable")), record=prompts.record)


def sampled_on(
    model: DiffusionTransformer, prompts: Prompts | None
) -> PromptsRecord | TextsRecord | Literal["random", "labels"]:
    """What samples are conditioned on, for a document to say."""
    if prompts is not None:
        return prompts.record
    return RANDOM if takes_prompts(model) else LABELS


def draw_batch(
    model: DiffusionTransformer, sampling: Sampling, seeds: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise and conditions of samples, each a function of its own seed.

    The sample of seed i takes prompt i modulo their number; without prompts its conditions are drawn.

    Returns:
        Noise (B, *latent shape), and what :func:`tc_deploy.tokencache.sampler.denoise` takes as conditions.
    """
    noise, drawn = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn((1, *model.geometry.latent_shape), generator=generator))
        drawn.append(model.random_conditions(1, generator))
    if sampling.prompts is not None:
        return torch.cat(noise), tensors_of(conditions_of(model, sampling.prompts, seeds))
    conditions = {name: torch.cat([given[name] for given in drawn]) for name in drawn[0]}
    if sampling.embedded_guidance is not None:
        conditions[GUIDANCE] = torch.full_like(conditions[GUIDANCE], sampling.embedded_guidance)
    return torch.cat(noise), conditions


def conditions_of(model: DiffusionTransformer, prompts: Prompts | None, seeds: Sequence[int]) -> Conditions:
    """Conditions of samples as arrays: of each seed its prompt, or draws of the first seed where there are none."""
    if prompts is not None:
        return prompts.conditions.rows(np.array(seeds) % prompts.conditions.count)
    given = model.random_conditions(len(seeds), torch.Generator().manual_seed(seeds[0]))
    absent = {item.name: item.absent(given[item.name]) for item in model.geometry.conditions}
    return Conditions(
        count=len(seeds),
        given={name: tensor.numpy() for name, tensor in given.items()},
        unconditional={name: tensor.numpy() for name, tensor in absent.items()},
    )


def tensors_of(conditions: Conditions) -> dict[str, Tensor]:
    """Conditions as tensors, named as in a file."""
    named = {**conditions.given, **{UNCONDITIONAL + name: array for name, array in conditions.unconditional.items()}}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in named.items()}
