"""A bundle's documents against each other: the one place where a manifest, a plan and tables must agree.

Checksums only say that a folder is as somebody left it. In: what the documents say, each checked by itself. Out:
nothing, or one line about what contradicts what. Whatever reads a bundle calls :func:`read_documents` first. Never:
loads a graph, or allocates what a document asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.bundle import MANIFEST, check_files
from tc_deploy.errors import BundleError
from tc_deploy.figures import other_timesteps
from tc_deploy.groups import TokenGroup, token_groups
from tc_deploy.manifest import (
    BATCH,
    DECODER,
    MODEL_BATCH,
    ONNX_FOLDER,
    PROLOGUE,
    PROLOGUE_GRAPHS,
    RUN_BATCH,
    RUNTIME_TABLES,
    SCHEDULE,
    SOLVER,
    TEXT_ENCODER,
    TOKENIZERS_FOLDER,
    GraphRecord,
    Manifest,
    Role,
    TensorName,
    TensorRecord,
    cache_rows_tensor,
    cache_tensor,
    condition_tensor,
    latents_tensor,
    only_tensor,
    prologue_tensor,
    read_manifest,
    solver_inputs,
    solver_outputs,
    token_inputs,
    variant_name,
)
from tc_deploy.onnx_files import check_graph_file
from tc_deploy.plan import TABLES, Plan, content_sha256, load_plan
from tc_deploy.schedule import FULL
from tc_deploy.tables import SOLVER_COEFFICIENTS, StepTables, pruned_blocks, reads_before_start
from tc_deploy.tensors import read_tensors, what_is_wrong
from tc_deploy.types import FloatArray

Shape: TypeAlias = tuple[int | str, ...]
_Tensor: TypeAlias = tuple[TensorName, str, Shape]
"""What it is for, type and shape."""
_Tensors: TypeAlias = Mapping[str, _Tensor]
"""By name."""
_LARGEST_HEADER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """A bundle's documents, which agree, and whose files are as the manifest says."""

    manifest: Manifest
    plan: Plan
    step_tables: StepTables
    """The plan's."""
    runtime_tables: Mapping[str, FloatArray]
    """``timesteps`` (T,), ``input_scale`` (T,), ``coefficients`` (T, 2(h+1)), ``init_noise_sigma`` (1,)."""


def read_documents(bundle: Path, *, graphs: bool = True) -> Documents:
    """Read everything that a bundle says of itself, and check it.

    Args:
        bundle: ``engines/NAME``.
        graphs: check all other files too. Who only runs a target leaves it to ``load_target``, which knows what that
            reads of the bundle.

    Raises:
        BundleError: nothing is exported there, a file is missing, truncated or altered, or one document contradicts
            another.
        PlanError: the plan is inconsistent.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, {name: manifest.files[name] for name in manifest.files if graphs or name in manifest.documents})
    _check_places(manifest, bundle)
    plan, tables = load_plan(bundle)
    where = bundle / RUNTIME_TABLES
    largest_bytes = 4 * plan.schedule.steps * (4 + 2 * manifest.solver.history) + _LARGEST_HEADER_BYTES
    try:
        runtime_tables = read_tensors(where, largest_bytes)
    except ValueError as error:
        raise BundleError(f"{where}: {error}; export again") from None
    check_documents(manifest, plan, runtime_tables, bundle)
    for file, held in manifest.graphs_by_file().items() if graphs else ():
        check_graph_file(bundle / file, list(held.values()))
    step_tables = plan.step_tables(tables)
    fitted = step_tables.solver_coefficients
    if fitted is not None and fitted.shape != (expected := runtime_tables["coefficients"].shape):
        _refuse(str(bundle / TABLES), SOLVER_COEFFICIENTS, f"{expected}, as {RUNTIME_TABLES} has its own", fitted.shape)
    return Documents(manifest=manifest, plan=plan, step_tables=step_tables, runtime_tables=runtime_tables)


def with_another_plan(
    documents: Documents, plan: Plan, tables: StepTables, runtime_tables: Mapping[str, FloatArray], bundle: Path
) -> Documents:
    """A bundle's documents with those of another plan that needs the same graphs: its engines can run that too.

    Args:
        documents: the bundle's.
        plan: the other plan.
        tables: the other plan's.
        runtime_tables: its solver's.
        bundle: whose they are, for messages.

    Raises:
        BundleError: the plan needs other graphs, or its tables contradict it.
    """
    sigma = float(runtime_tables["init_noise_sigma"][0])
    solver = documents.manifest.solver.model_copy(update={"init_noise_sigma": sigma})
    changes = {"plan_sha256": content_sha256(plan), "solver": solver}
    manifest = documents.manifest.model_copy(update=changes)
    check_documents(manifest, plan, runtime_tables, bundle)
    return Documents(manifest=manifest, plan=plan, step_tables=tables, runtime_tables=runtime_tables)


def check_documents(manifest: Manifest, plan: Plan, runtime_tables: Mapping[str, NDArray[Any]], bundle: Path) -> None:
    """Check documents that are each sound by themselves against each other.

    Raises:
        BundleError: they disagree; the message names the two, and what each says.
    """
    where = str(bundle / MANIFEST)
    if manifest.plan_sha256 != content_sha256(plan):
        raise BundleError(
            f"{where}: exported from another plan than the one beside it, which was changed; export again"
        )
    facts: dict[str, tuple[object, object]] = {
        "solver.guidance_scale": (plan.sampling.guidance_scale, manifest.solver.guidance_scale),
        "solver.guidance_rule": (plan.sampling.guidance_rule, manifest.solver.guidance_rule),
        "solver.true_cfg": (plan.sampling.true_cfg, manifest.solver.true_cfg),
        "graphs": (_graph_names(manifest, plan), sorted(manifest.graphs)),
    }
    told = plan.sampling.embedded_guidance if manifest.embeds_guidance else None
    if told is not None or not manifest.embeds_guidance:
        facts["solver.embedded_guidance"] = (told, manifest.solver.embedded_guidance)
    for what, (expected, found) in facts.items():
        if expected != found:
            _refuse(where, what, f"{expected}, as the plan has it", found)
    _check_runtime_tables(manifest, plan, runtime_tables, str(bundle / RUNTIME_TABLES))
    _check_conditions(manifest, where)
    _check_model_graphs(manifest, plan, where)
    _check_solver(manifest, where)
    _check_decoder(manifest, where)
    _check_text(manifest, where)


def _refuse(where: str, what: str, expected: object, found: object) -> NoReturn:
    raise BundleError(f"{where}: {what}: expected {expected}, found {found}; export again")


def _rows(manifest: Manifest, axis: str) -> int | str:
    """The size of a batch axis, or its name where it is open."""
    return axis if manifest.batch_size is None else manifest.batch_axes(manifest.batch_size)[axis]


def _graph_names(manifest: Manifest, plan: Plan) -> list[str]:
    names = [SOLVER, *(name for name in PROLOGUE_GRAPHS if name in manifest.graphs)]
    names += [*(variant_name(variant) for variant in (FULL, *plan.phases_used()))]
    parts = {DECODER: manifest.decoder, TEXT_ENCODER: manifest.text}
    return sorted([*names, *(name for name, record in parts.items() if record is not None)])


def _check_places(manifest: Manifest, bundle: Path) -> None:
    """Check that files lie where an export puts them: a graph finds its weights beside it."""
    places = [(graph.file, ONNX_FOLDER, ".onnx") for graph in manifest.graphs.values()]
    if manifest.text is not None:
        places += [(item.file, TOKENIZERS_FOLDER, ".json") for item in manifest.text.tokenizers]
    for file, folder, suffix in places:
        parts = file.split("/")
        if len(parts) != 2 or parts[0] != folder or not parts[1].endswith(suffix) or parts[1].startswith("."):
            _refuse(str(bundle / MANIFEST), "file", f"{folder}/NAME{suffix}", repr(file))


def _check_runtime_tables(manifest: Manifest, plan: Plan, tables: Mapping[str, NDArray[Any]], where: str) -> None:
    steps, terms = plan.schedule.steps, manifest.solver.history + 1
    shapes: dict[str, tuple[int, ...]] = {
        "coefficients": (steps, 2 * terms),
        "init_noise_sigma": (1,),
        "input_scale": (steps,),
        "timesteps": (steps,),
    }
    if tables.keys() != shapes.keys():
        _refuse(where, "tables", ", ".join(shapes), ", ".join(sorted(tables)) or "none")
    for name, shape in shapes.items():
        wrong = what_is_wrong(tables[name], np.float32, shape)
        if wrong is not None:
            raise BundleError(f"{where}: {name}: {wrong}; export again")
    found = tuple(tables["timesteps"].tolist())
    if found != plan.sampling.timesteps:
        raise BundleError(f"{where}: {other_timesteps(plan.sampling.timesteps, found)} in the tables; export again")
    sigma = np.float32(manifest.solver.init_noise_sigma)
    if tables["init_noise_sigma"][0] != sigma:
        _refuse(where, "init_noise_sigma", f"{sigma}, as the manifest has it", tables["init_noise_sigma"][0])
    # What an earlier request left there is not to be read.
    if reads_before_start(tables["coefficients"]):
        raise BundleError(f"{where}: coefficients: a step reads from before step 0; export again")


def _check_conditions(manifest: Manifest, where: str) -> None:
    names = [item.name for item in manifest.conditions]
    if len(set(names)) != len(names) or any(not name.isidentifier() or name in list(Role) for name in names):
        _refuse(where, "conditions", "each name once, and none that the runtime has for something else", names)
    for item in manifest.conditions:
        if item.classes is not None and (item.dtype, item.shape) != ("int32", ()):
            _refuse(where, f"conditions: {item.name}", "int32 () as a label is", f"{item.dtype} {item.shape}")


def _check_model_graphs(manifest: Manifest, plan: Plan, where: str) -> None:
    """Check the inputs and outputs of every variant: what a request gives, what tables give, what caches give."""
    rows = _rows(manifest, MODEL_BATCH)
    channels = _sample_shape(manifest, where)[1:2]
    if not channels or not isinstance(channels[0], int) or channels[0] < manifest.latent_shape[0]:
        _refuse(where, f"graphs.full: {Role.SAMPLE}", f"at least {manifest.latent_shape[0]} channels", channels)
    sample = _tensors((only_tensor(Role.SAMPLE), "float32", (rows, *channels, *manifest.latent_shape[1:])))
    caches = _caches(manifest, where)
    made = _check_prologue(manifest, where)
    groups = token_groups(plan.cache, plan.phases_used(), plan.model.tokens) if manifest.one_graph else ()
    for variant in (FULL, *plan.phases_used()):
        what = f"graphs.{variant_name(variant)}"
        graph = manifest.graphs[variant_name(variant)]
        inputs, outputs = _named(graph.inputs, where), _named(graph.outputs, where)
        skips = variant != FULL and plan.cache.skips_model(variant)
        open_groups = () if skips else groups
        expected = [] if skips else _given(manifest, rows)
        if made and not skips:
            # What of these a step still reads is its own affair, and so is which of the prologue's results.
            optional = [tensor for tensor in expected if tensor[0].role is not Role.HIDDEN_STATES] + made
            expected = [tensor for tensor in (*expected, *made) if tensor not in optional or tensor[0].name in inputs]
        if open_groups:
            expected += _group_tensors(open_groups, variant, inputs, rows)
        elif variant != FULL and (pruned := pruned_blocks(plan.keep_counts(variant), plan.model.tokens)):
            kept = sum(plan.keep_counts(variant)[block] for block in pruned)
            expected.append(_index(inputs, only_tensor(Role.TOKEN_INDEX), rows, (kept,)))
        if variant != FULL or open_groups:
            expected += _read_caches(plan, graph, caches, rows)
        _check_tensors(inputs, _tensors(*expected), where, f"{what}.inputs")
        # What a full step leaves for later is its own affair; in the one graph a cached step's goes where nobody reads.
        leaves = variant == FULL or open_groups
        left = {name: found for name, found in outputs.items() if leaves and found[0].role is Role.CACHE}
        _check_tensors(outputs, {**left, **sample}, where, f"{what}.outputs")


def _sample_shape(manifest: Manifest, where: str) -> Shape:
    """Of the full step's output; empty where it has none."""
    outputs = _named(manifest.graphs[variant_name(FULL)].outputs, where)
    return outputs[Role.SAMPLE][2] if Role.SAMPLE in outputs else ()


def _caches(manifest: Manifest, where: str) -> dict[str, tuple[str, Shape]]:
    """Type and shape of what a full step leaves for later, each once and by its own name."""
    found: dict[str, tuple[str, Shape]] = {}
    for tensor in manifest.graphs[variant_name(FULL)].outputs:
        if tensor.cache is not None:
            expected = (cache_rows_tensor if tensor.rows else cache_tensor)(tensor.cache)
            if tensor.cache in found or _name_of(tensor) != expected:
                _refuse(where, f"graphs.full: {tensor.name}", f"{tensor.cache}, once", f"{tensor.name}")
            found[tensor.cache] = (tensor.dtype, tensor.shape)
    return found


def _given(manifest: Manifest, rows: int | str) -> list[_Tensor]:
    """What a variant that runs the model takes of a request and of the step."""
    return [
        (only_tensor(Role.HIDDEN_STATES), "float32", (rows, *manifest.latent_shape)),
        (only_tensor(Role.TIMESTEP), "float32", (rows,)),
        *((condition_tensor(item.name), item.dtype, (rows, *item.shape)) for item in manifest.conditions),
    ]


def _check_prologue(manifest: Manifest, where: str) -> list[_Tensor]:
    """Check the graphs that run before the first step; returns what a step may read of them."""
    rows, run_rows = _rows(manifest, MODEL_BATCH), _rows(manifest, MODEL_BATCH if manifest.batch_size else RUN_BATCH)
    made: list[_Tensor] = []
    for name, role, batch in ((PROLOGUE, Role.PROLOGUE, rows), (SCHEDULE, Role.SCHEDULED, run_rows)):
        if name not in manifest.graphs:
            continue
        graph = manifest.graphs[name]
        inputs, outputs = _named(graph.inputs, where), _named(graph.outputs, where)
        given = [each for each in _given(manifest, batch) if each[0].role is not Role.HIDDEN_STATES]
        if name == PROLOGUE:
            given = [each for each in given if each[0].role is not Role.TIMESTEP]
        expected = _tensors(*(each for each in given if each[0].name in inputs))
        _check_tensors(inputs, expected, where, f"graphs.{name}.inputs")
        found = [
            (prologue_tensor(role, number), dtype, (batch, *shape[1:]))
            for number, (_, dtype, shape) in enumerate(outputs.values())
        ]
        _check_tensors(outputs, _tensors(*found), where, f"graphs.{name}.outputs")
        made += [(tensor, dtype, (rows, *shape[1:])) for tensor, dtype, shape in found]
    return made


def _read_caches(
    plan: Plan, graph: GraphRecord, caches: Mapping[str, tuple[str, Shape]], rows: int | str
) -> list[_Tensor]:
    """The caches that a variant reads, as the full step leaves them, and their weights; an unknown one is left out."""
    read = sorted({tensor.cache for tensor in graph.inputs if tensor.cache is not None} & caches.keys())
    ages = range(plan.cache.forecast_order + 1)
    found: list[_Tensor] = [(cache_tensor(name, age), *caches[name]) for name in read for age in ages]
    if read and len(ages) > 1:
        found.append((only_tensor(Role.FORECAST_WEIGHTS), "float32", (rows, len(ages))))
    return found


def _group_tensors(groups: Iterable[TokenGroup], variant: int, inputs: _Tensors, rows: int | str) -> list[_Tensor]:
    found: list[_Tensor] = []
    for group in groups:
        found.append(_index(inputs, group.index, rows, (len(group.blocks), group.size(variant))))
        if group.may_keep_none:
            found.append((group.computed, "int32", (rows,)))
    return found


def _index(inputs: _Tensors, tensor: TensorName, rows: int | str, shape: Shape) -> _Tensor:
    """A token index, which some families' samples share: it has no batch axis then."""
    shared = tensor.name in inputs and len(inputs[tensor.name][2]) == len(shape)
    return tensor, "int32", shape if shared else (rows, *shape)


def _check_solver(manifest: Manifest, where: str) -> None:
    """Check the solver's tensors; ``export/solver_graph.py`` says what they are."""
    rows = _rows(manifest, BATCH)
    model_rows = _rows(manifest, MODEL_BATCH) if manifest.guided else rows
    history = manifest.solver.history
    latents = (rows, *manifest.latent_shape)
    shapes: dict[Role, Shape] = {
        Role.SAMPLE: (model_rows, *_sample_shape(manifest, where)[1:]),
        Role.LATENTS: latents,
        Role.GUIDED_OUTPUT: latents,
        Role.COEFFICIENTS: (rows, 2 * (history + 1)),
        Role.INPUT_SCALE: (rows,),
        Role.GUIDANCE_SCALE: (rows,),
        Role.HIDDEN_STATES: (model_rows, *manifest.latent_shape),
    }
    inputs, outputs = (
        _tensors(*((tensor, "float32", shapes[tensor.role]) for tensor in tensors))
        for tensors in (solver_inputs(history, guided=manifest.guided), solver_outputs(history))
    )
    _check_graph(manifest.graphs[SOLVER], inputs, outputs, where, SOLVER)


def _check_decoder(manifest: Manifest, where: str) -> None:
    if manifest.pixels and (len(manifest.latent_shape) not in (3, 4) or manifest.latent_shape[0] not in (1, 3)):
        _refuse(where, "latent_shape", "that of pictures, since pixels says so", manifest.latent_shape)
    if manifest.decoder is None:
        return
    rows = _rows(manifest, BATCH)
    graph = manifest.graphs[DECODER]
    made = _named(graph.outputs, where)
    images = made[Role.IMAGES][2] if Role.IMAGES in made else ()
    if len(images) not in (4, 5) or images[1] not in (1, 3):
        _refuse(where, f"graphs.{DECODER}: {Role.IMAGES}", "pictures (B, 3, H, W) or video (B, 3, F, H, W)", images)
    latents = _tensors((latents_tensor(), "float32", (rows, *manifest.latent_shape)))
    outputs = _tensors((only_tensor(Role.IMAGES), "float32", (rows, *images[1:])))
    _check_graph(graph, latents, outputs, where, DECODER)


def _check_text(manifest: Manifest, where: str) -> None:
    text = manifest.text
    if text is None:
        return
    rows = _rows(manifest, BATCH)
    conditions = {item.name: item for item in manifest.conditions}
    unknown = sorted(text.defaults.keys() - conditions.keys())
    if unknown:
        _refuse(where, "text.defaults", f"some of {', '.join(conditions)}", unknown[0])
    names = [name for item in text.tokenizers for name in item.inputs]
    if len(set(names)) != len(names):
        _refuse(where, "text.tokenizers", "inputs of their own", names)
    inputs = _tensors(
        *(
            (tensor, "int32", (rows, item.tokens))
            for item in text.tokenizers
            for tensor in token_inputs(item.ids, item.mask)
        )
    )
    made = _tensors(
        *(
            (condition_tensor(name), item.dtype, (rows, *item.shape))
            for name, item in conditions.items()
            if name not in text.defaults
        )
    )
    _check_graph(manifest.graphs[TEXT_ENCODER], inputs, made, where, TEXT_ENCODER)


def _check_graph(graph: GraphRecord, inputs: _Tensors, outputs: _Tensors, where: str, name: str) -> None:
    _check_tensors(_named(graph.inputs, where), inputs, where, f"graphs.{name}.inputs")
    _check_tensors(_named(graph.outputs, where), outputs, where, f"graphs.{name}.outputs")


def _tensors(*tensors: _Tensor) -> dict[str, _Tensor]:
    return {tensor[0].name: tensor for tensor in tensors}


def _name_of(tensor: TensorRecord) -> TensorName:
    return TensorName(**{name: getattr(tensor, name) for name in TensorName.model_fields})


def _named(tensors: Iterable[TensorRecord], where: str) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise BundleError(f"{where}: a graph has the tensor {tensor.name} twice; export again")
        found[tensor.name] = (_name_of(tensor), tensor.dtype, tensor.shape)
    return found


def _check_tensors(found: _Tensors, expected: _Tensors, where: str, what: str) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            wanted, present = (_in_words(tensors.get(name)) for tensors in (expected, found))
            if wanted == present:
                wanted, present = (_purpose(tensors[name][0]) for tensors in (expected, found))
            _refuse(where, f"{what}: {name}", wanted, present)


def _in_words(tensor: _Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    _, dtype, shape = tensor
    return f"{dtype} ({', '.join(map(str, shape))})"


def _purpose(tensor: TensorName) -> str:
    return ", ".join(f"{key} {value}" for key, value in tensor.model_dump(mode="json").items() if key != "name")
