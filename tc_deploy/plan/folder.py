"""A plan's folder: ``plan.json`` and ``tables.safetensors``, and what a search leaves beside them.

In: ``calibration/NAME``. Out: a checked plan and its tables; or the folder written, all or nothing. Never: takes a plan
unchecked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from tc_deploy.bundle import (
    MANIFEST,
    Earlier,
    FolderKind,
    NotOursError,
    absolute_path,
    check_files,
    file_names,
    known_document,
    new_folder,
    read_document,
    reading,
    relative_path,
)
from tc_deploy.errors import BundleError, PlanError
from tc_deploy.plan.plan import PLAN, Plan, check_plan, plan_bytes
from tc_deploy.plan.records import PromptsRecord
from tc_deploy.tables import tables_bytes
from tc_deploy.tensors import read_tensors
from tc_deploy.types import FloatArray, IntArray

TABLES = "tables.safetensors"
SEARCH = "search.json"
"""What a search found, beside the plan that it chose."""
SAMPLES = "samples.safetensors"
"""Final latents of a few pictures per point of a search, ``(n, *latent shape)`` float32 under the point's name."""
POINTS = "points"
"""The plan of every point of a search, each in a folder of its own."""


def save_plan(plan: Plan, tables: Mapping[str, FloatArray | IntArray], folder: Path) -> None:
    """Write a plan folder, all or nothing.

    Raises:
        PlanError: the plan is inconsistent.
        StorageError: the place cannot be written.
    """
    check_plan(plan, tables, str(folder))
    with new_folder(folder, PLAN_FOLDER) as temporary:
        write_plan_files(plan, tables, temporary, folder)


def write_plan_files(
    plan: Plan, tables: Mapping[str, FloatArray | IntArray], folder: Path, place: Path | None = None
) -> None:
    """Write the two files of a plan into a folder that is being made; the JSON last.

    Args:
        plan: the plan.
        tables: its tables.
        folder: where they are written.
        place: where the folder will lie; None: where it is.
    """
    (folder / TABLES).write_bytes(tables_bytes(tables))
    (folder / PLAN).write_bytes(plan_bytes(_with_paths(plan, lambda path: relative_path(path, place or folder))))


def _with_paths(plan: Plan, said: Callable[[str], str]) -> Plan:
    """A plan whose paths are said otherwise."""
    model = plan.model.model_copy(update={"source": said(plan.model.source)})
    origin, prompts = plan.origin, plan.origin.conditions
    if isinstance(prompts, PromptsRecord):
        prompts = prompts.model_copy(update={"file": said(prompts.file)})
        origin = origin.model_copy(update={"conditions": prompts})
    return plan.model_copy(update={"model": model, "origin": origin})


def load_plan(folder: Path) -> tuple[Plan, dict[str, FloatArray | IntArray]]:
    """Read and check a plan folder. Paths that its file has relative to it are absolute in what is returned.

    Returns:
        The plan and its tables by name.

    Raises:
        BundleError: a file is missing, truncated or altered.
        PlanError: the plan is inconsistent.
    """
    plan, tables = load_plan_as_written(folder)
    return _with_paths(plan, lambda path: absolute_path(path, folder)), tables


def load_plan_as_written(folder: Path) -> tuple[Plan, dict[str, FloatArray | IntArray]]:
    """The same with paths as the file has them, to show or to identify the plan by.

    Raises:
        BundleError: as for :func:`load_plan`.
        PlanError: likewise.
    """
    with reading(folder, PLAN_FOLDER):
        is_bundle_s = (folder / MANIFEST).is_file()
        maker = f"tc-deploy {'export calibration/NAME' if is_bundle_s else 'calibrate MODEL'} -o {folder}"
        plan = read_document(Plan, folder / PLAN, "plan", maker)
        check_files(folder, {TABLES: plan.tables})
        try:
            tables = read_tensors(folder / TABLES)
        except ValueError as error:
            raise PlanError(f"{folder / TABLES}: {error}; calibrate again") from None
    check_plan(plan, tables, str(folder))
    return plan, tables


_KEYS = frozenset({"format_version", "model", "sampling", "schedule", "cache", "cost", "origin", "measured", "tables"})
_EARLIER = {
    1: Earlier(required=_KEYS),
    2: Earlier(required=_KEYS | {"kind"}, optional=frozenset({"forecast"})),
}
_SEARCH_KEYS = frozenset(
    {"kind", "format_version", "made_by", "date", "model", "hardware", "latency_source", "backend", "backend_version"}
    | {"batch_size", "seed", "confirmation_seeds", "settings", "points", "remarks", "samples"}
)
_SEARCHES = {
    **dict.fromkeys((1, 2, 3), Earlier(required=_SEARCH_KEYS | {"screening_seeds", "variants", "screened"})),
    4: Earlier(required=_SEARCH_KEYS),
}
"""The record's class is in a room above; here it is known by its keys."""


def _written_names(folder: Path) -> Iterator[str]:
    """The files of a plan folder, of a search's the points' too.

    Raises:
        NotOursError: it is none.
    """
    found = known_document(folder / PLAN, "plan", Plan, _EARLIER)
    file_names({TABLES: found["tables"]})
    points = [path.name for path in sorted((folder / POINTS).glob("*")) if _is_plan(path)]
    for point in points:
        yield from (f"{POINTS}/{point}/{TABLES}", f"{POINTS}/{point}/{PLAN}")
    if (folder / SEARCH).exists():
        try:
            known_document(folder / SEARCH, "search", None, _SEARCHES)
        except NotOursError as error:
            raise NotOursError(f"beside it {SEARCH} is no search of tc-deploy: {error}") from None
        yield from (SAMPLES, SEARCH)
    elif points:
        yield SAMPLES
    yield from (TABLES, PLAN)


def _is_plan(folder: Path) -> bool:
    try:
        known_document(folder / PLAN, "plan", Plan, _EARLIER)
    except NotOursError:
        return False
    return not folder.is_symlink()


PLAN_FOLDER: Final = FolderKind(name="a plan", marker=PLAN, names=_written_names)


def places_read(folder: Path) -> list[Path]:
    """A plan folder or a bundle, with the checkpoint and the prompts that it was made from, as far as they are there.

    What a command reads that is given the folder, and so what no output of that command may lie in.
    """
    with contextlib.suppress(BundleError, PlanError):
        plan = read_document(Plan, folder / PLAN, "plan", "tc-deploy calibrate")
        prompts = plan.origin.conditions
        said = [plan.model.source, *([prompts.file] if isinstance(prompts, PromptsRecord) else [])]
        sources = [absolute_path(path, folder) for path in said]
        return [folder, *(Path(source) for source in sources if Path(source).exists())]
    return [folder]
