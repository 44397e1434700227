"""A checkpoint folder to a model and its scheduler, through diffusers' own loaders.

In: a diffusers model folder (``config.json`` and safetensors) or a pipeline folder that holds one as ``transformer/``.
Out: the module in fp32 on the CPU, in evaluation mode, hashed. Never: reads a pickle, or fills a missing weight.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import load_file
from torch import nn

from tc_deploy.bundle import path_from_here
from tc_deploy.errors import ModelError, first_line
from tc_deploy.models import dit, pixart
from tc_deploy.models.convention import CONVENTIONS, Convention
from tc_deploy.models.families import FAMILIES
from tc_deploy.models.family import DiffusionTransformer, Family
from tc_deploy.models.files import (
    DIFFUSERS_WEIGHTS,
    GGUF,
    SAFETENSORS,
    read_json,
    refuse_pickles,
    refuse_single_file,
    weights_sha256,
)
from tc_deploy.models.generic import generic_family, is_transformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.hub import local_folder
from tc_deploy.models.obstacles import check_fit, missing_library, refuse_loading
from tc_deploy.models.pipeline_index import INDEX, TRANSFORMER, PipelineIndex
from tc_deploy.models.weights import LOADING, check_finite, checked_weights, from_pretrained

log = logging.getLogger(__name__)

ENTRY_POINTS = "tc_deploy.families"
"""Group of the entry points by which an installed package makes families known."""
_REGISTERED: dict[str, Family] = {}
LEGACY_CLASS = "Transformer2DModel"
"""What older checkpoints call DiT and PixArt; ``norm_type`` tells which."""
_LEGACY = {"ada_norm_zero": dit.FAMILY, "ada_norm_single": pixart.FAMILY}


def load_model(path: Path, options: ModelOptions | None = None) -> DiffusionTransformer:
    """Load a Diffusion Transformer.

    Args:
        path: a model folder, a pipeline folder with ``transformer/``, or a hub's id ``owner/name``.
        options: the size of the latents and of the prompt, where they are not the family's default.

    Raises:
        ModelError: the folder or a file is missing, half-written or a pickle, the class has no family, the
            configuration asks for what its family does not cover, or the options do not fit the model.
        NotFiniteError: a weight is NaN or infinite.
    """
    options = options or ModelOptions()
    folder = model_folder(local_folder(path, options.variant))
    config = read_json(folder / "config.json")
    family = family_of(config, folder / "config.json")
    files = checked_weights(folder, config, DIFFUSERS_WEIGHTS, options.variant)
    try:
        if family.build is not None:
            module, info = _built(family.build, config, files)
        else:
            kind = getattr(diffusers, family.model_class)
            module, info = from_pretrained(
                kind, folder, files, DIFFUSERS_WEIGHTS, options.variant, torch_dtype=torch.float32
            )
    except LOADING as error:
        raise refuse_loading(
            error, folder, f"config.json and the weights do not make a {family.model_class}"
        ) from error
    check_fit(info["missing_keys"], info["unexpected_keys"], len(module.state_dict()), folder)
    check_finite(module, files, folder)
    module.eval().requires_grad_(False)
    try:
        geometry = family.geometry(module, options)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    pipeline = pipeline_of(folder)
    if not family.blocks:
        log.warning(_whole(family, pipeline))
    autoencoder = options.autoencoder
    if autoencoder is None:
        autoencoder = pipeline.has_autoencoder
    geometry = dataclasses.replace(geometry, autoencoder=autoencoder)
    if options.text_tokens is not None and not geometry.text_tokens:
        raise ModelError(
            f"{folder}: text tokens: {family.model_class} takes no text, found {options.text_tokens}; leave them out"
        )
    return DiffusionTransformer(
        source=path_from_here(path),
        module=module,
        family=family,
        geometry=geometry,
        config={key: value for key, value in config.items() if not key.startswith("_")},
        weights_sha256=weights_sha256(files),
        options=options,
        pipeline=pipeline.class_name if not family.blocks else None,
    )


def _whole(family: Family, pipeline: PipelineIndex) -> str:
    """What is to be known of a model that is taken as one piece."""
    sampled = f"as {pipeline.class_name} does" if family.convention.pipelines else "by its scheduler's own timesteps"
    return (
        f"{family.model_class} has no family: it is taken as one piece, whose output cached steps forecast, and sampled"
        f" {sampled}; no tokens can be kept and no blocks skipped (adapters.md in the documentation shows how to"
        " describe it)"
    )


def pipeline_of(folder: Path) -> PipelineIndex:
    """The pipeline that a transformer's folder is a part of; one without parts where it stands alone."""
    in_one = folder.name == TRANSFORMER or (folder.parent / INDEX).is_file()
    return PipelineIndex(folder.parent if in_one else folder)


def _built(
    build: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any], files: tuple[Path, ...]
) -> tuple[nn.Module, dict[str, list[str]]]:
    """A module that is not diffusers', with its weights in fp32, and the keys that did not fit."""
    module = build(config)
    weights = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
    keys = module.load_state_dict(weights, strict=False, assign=True)
    return module, {"missing_keys": keys.missing_keys, "unexpected_keys": keys.unexpected_keys}


def register_family(family: Family) -> None:
    """Make a model class known to this process; an installed package does it by an entry point (docs/adapters.md).

    A class that was registered before gets the new family.

    Raises:
        ModelError: it is a class that the package knows by itself.
    """
    if family.model_class in FAMILIES:
        raise ModelError(f"model class {family.model_class!r} has a family already; give your class another name")
    _REGISTERED[family.model_class] = family


def known_families() -> dict[str, Family]:
    """Families by model class: the package's own, those of installed packages, and those registered.

    Raises:
        ModelError: an installed package's family cannot be imported.
    """
    installed = {}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            family: Family = entry.load()
        except (ImportError, AttributeError) as error:
            raise ModelError(
                f"entry point {entry.name!r} of {ENTRY_POINTS}: {first_line(error)}; repair or remove the package that"
                " declares it"
            ) from error
        installed[family.model_class] = family
    return {**installed, **_REGISTERED, **FAMILIES}


def family_of_class(model_class: str, pipeline: str | None = None) -> Family | None:
    """The family of a class: its own, or a generic one where it is some other transformer of diffusers.

    Args:
        model_class: its name.
        pipeline: the class of the pipeline that it was found in, by which a generic family samples.

    Returns:
        None where nothing is known of the class.
    """
    family = known_families().get(model_class)
    convention = CONVENTIONS.get(pipeline or "")
    if family is None and is_transformer(getattr(diffusers, model_class, None)):
        return generic_family(model_class, convention or Convention())
    return family if family is None or convention is None else dataclasses.replace(family, convention=convention)


def family_of(config: Mapping[str, Any], where: Path) -> Family:
    """The family of a configuration.

    Args:
        config: of the model.
        where: the file it was read from.

    Raises:
        ModelError: the class has no family, or the configuration asks for what its family does not cover.
    """
    name, pipeline = config.get("_class_name"), pipeline_of(where.parent)
    legacy = name == LEGACY_CLASS
    family = _LEGACY.get(str(config.get("norm_type"))) if legacy else family_of_class(str(name), pipeline.class_name)
    if family is None:
        raise ModelError(
            f"{where}: no family for model class {name!r}, and it is no transformer of diffusers that takes latents and"
            " a timestep; adapters.md in the documentation lists the known classes, and shows how to describe another"
        )
    family.convention.check_pipeline(pipeline.entries, str(where.parent.parent))
    uncovered = family.check(config, pipeline.entries)
    if uncovered is not None:
        raise ModelError(
            f"{where}: {family.model_class} with {uncovered} is not covered; use a checkpoint without it, or"
            " adapters.md in the documentation to describe it"
        )
    return family


def load_scheduler(path: Path, variant: str | None = None) -> Any:
    """Load the scheduler that stands beside a model.

    Args:
        path: what :func:`load_model` takes; ``scheduler/`` is looked for in it and beside ``transformer/``.
        variant: of the model's weights, where they are of a hub.

    Returns:
        A diffusers scheduler.

    Raises:
        ModelError: no scheduler folder, or one that diffusers does not know.
    """
    local = local_folder(path, variant)
    for folder in (local / "scheduler", model_folder(local).parent / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            config = read_json(folder / "scheduler_config.json")
            return scheduler_from_config(str(config.get("_class_name")), config, str(folder))
    raise ModelError(
        f"{path}: no scheduler/scheduler_config.json in it or beside it; save the pipeline's scheduler there"
    )


def scheduler_from_config(class_name: str, config: Mapping[str, Any], where: str) -> Any:
    """Make a diffusers scheduler.

    Raises:
        ModelError: diffusers has no such class, or the class refuses the configuration.
    """
    kind: Any = getattr(diffusers, class_name, None)
    if not _is_scheduler(kind):
        _refuse_stand_in(kind, class_name, where)
        raise ModelError(
            f"{where}: diffusers {diffusers.__version__} has no scheduler {class_name!r}; save one that it has, or"
            " update diffusers"
        )
    try:
        return kind.from_config(dict(config))
    except (TypeError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        if library := missing_library(error):
            raise ModelError(
                f"{where}: {class_name} needs {library}, which is not installed here; pip install {library}"
            ) from None
        raise ModelError(
            f"{where}: {class_name} refuses its configuration: {first_line(error)}; save the scheduler again"
        ) from error


def _refuse_stand_in(kind: Any, class_name: str, where: str) -> None:
    """Name the library for want of which diffusers puts a class in a scheduler's place that only says so.

    Raises:
        ModelError: it is such a class.
    """
    if not isinstance(kind, type) or not hasattr(kind, "_backends"):
        return
    try:
        kind()
    except ImportError as error:
        library = missing_library(error) or first_line(error)
        raise ModelError(
            f"{where}: {class_name} needs {library}, which is not installed here; pip install {library}"
        ) from None


def _is_scheduler(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin) and issubclass(kind, ConfigMixin)


def model_folder(path: Path) -> Path:
    """The folder that holds the transformer's ``config.json``.

    Raises:
        ModelError: there is none.
    """
    if path.is_file():
        refuse_single_file(path)
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such folder; give a diffusers model folder, a pipeline folder with transformer/, or a hub's id"
            " like owner/name"
        )
    PipelineIndex(path).check_transformer()
    for folder in (path / TRANSFORMER, path):
        if (folder / "config.json").is_file():
            return folder
    present = sorted(path.iterdir())
    refuse_pickles(present)
    single = next((file for file in present if file.suffix in (GGUF, SAFETENSORS)), None)
    if single is not None:
        refuse_single_file(single)
    raise ModelError(
        f"{path}: neither config.json nor transformer/config.json; not a diffusers model folder;"
        " give one that save_pretrained wrote"
    )
