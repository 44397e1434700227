"""``calibrate --device cuda`` on the demo's recipe: the same plan as on the CPU, or what differs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu.parts import ROOT, Kit, Measurements

from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import read_recipe
from tc_deploy.plan import PLAN, TABLES, load_plan

RECIPE, COMMITTED = ROOT / "calibration" / "recipes" / "digits.toml", ROOT / "calibration" / "digits"


def measurements(kit: Kit) -> Measurements:
    """The part's."""
    return {
        "the demo's plan": lambda: demo(kit, "first"),
        "the demo's plan again": lambda: again(kit),
    }


def demo(kit: Kit, name: str) -> dict[str, Any]:
    """The demo's plan made on the GPU, against the committed one, which was made on a CPU."""
    folder = kit.work / f"plan-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    plan = calibrate(read_recipe(RECIPE, {}), folder, device="cuda")
    seconds = time.perf_counter() - start
    found = {
        "seconds": round(seconds, 1),
        "psnr_db": None if plan.measured is None else plan.measured.psnr_db,
        "same_bytes": {name: same_bytes(folder / name, COMMITTED / name) for name in (PLAN, TABLES)},
        "differs_in": sorted(set(differences(document(folder), document(COMMITTED)))),
    }
    committed, made = load_plan(COMMITTED), load_plan(folder)
    if committed[0].measured is not None:
        found["committed_psnr_db"] = committed[0].measured.psnr_db
    found["tables_differ_at"] = {
        table: float(np.mean(made[1][table] != values)) if made[1][table].shape == values.shape else "another shape"
        for table, values in committed[1].items()
        if table in made[1]
    }
    return found


def again(kit: Kit) -> dict[str, Any]:
    """The same once more: whether a GPU gives the same bytes twice."""
    first, second = kit.work / "plan-first", kit.work / "plan-second"
    if not (first / PLAN).is_file():
        demo(kit, "first")
    demo(kit, "second")
    return {"same_bytes": {name: same_bytes(first / name, second / name) for name in (PLAN, TABLES)}}


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def document(folder: Path) -> Any:
    return json.loads((folder / PLAN).read_text(encoding="utf-8"))


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """The keys under which two documents differ; a checkpoint's own path does not count."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key != "source":
                yield from differences(one.get(key), other.get(key), f"{where}.{key}".lstrip("."))
    elif one != other:
        yield where
