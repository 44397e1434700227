"""A plan's figures against each other, and against what the checkpoint says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo
from bundles import Made, edit_resealed, run_cli

from tc_deploy.figures import contradiction_of_cost, contradiction_of_model
from tc_deploy.plan import CacheRecord
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.types import Attention, Reuse


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("attention", list(Attention))
def test_what_is_counted_on_a_model_contradicts_nothing(name: str, attention: Attention) -> None:
    model = zoo.model(name)
    record, tokens = model.record(), model.geometry.tokens
    config = json.loads(json.dumps(record.config))
    assert contradiction_of_model(config, record.latent_size, tokens, record.width) is None
    for keep in ((1, tokens), (tokens // 2, tokens - 1)):
        counts = tuple((count,) * record.blocks for count in keep)
        cache = CacheRecord(
            reuse=Reuse.BRANCH, attention=attention, forecast_order=0, keep_counts=(counts[0], counts[1])
        )
        cost = count_flops(model, cache)
        assert contradiction_of_cost(cost.full_flops, cost.cached_flops, counts, tokens) is None


@pytest.mark.parametrize(
    ("cached", "kept", "said"),
    [
        ((1001, 50), ((8,), (0,)), "phase 1: expected 250 to 1000, found 1001"),
        ((249, 50), ((8,), (0,)), "phase 1: expected 250 to 1000, found 249"),
        ((300, 400), ((8,), (16,)), "phase 2: expected 1000 to 1000, found 400"),
        ((300, 400), ((8, 0), (4, 0)), "300 and 400, and the phase that computes no fewer tokens is the cheaper one"),
        ((400, 300), ((8, 0), (8, 0)), "300 and 400, and the phase that computes no fewer tokens is the cheaper one"),
    ],
)
def test_costs_that_cannot_be(cached: tuple[int, int], kept: tuple[tuple[int, ...], ...], said: str) -> None:
    found = contradiction_of_cost(1000, cached, kept, 16)
    assert found is not None
    assert said in found


def test_phases_that_keep_more_here_and_less_there_say_nothing_of_each_other() -> None:
    assert contradiction_of_cost(1000, (300, 400), ((8, 0), (0, 8)), 16) is None
    assert contradiction_of_cost(1000, (400, 300), ((8, 0), (0, 8)), 16) is None


@pytest.fixture
def plan(tmp_path: Path, save_dit: Callable[..., Path]) -> Path:
    words = ("--steps", 4, "--samples", 0, "--keep-counts", 8, 0)
    assert run_cli("calibrate", save_dit(tmp_path / "dit", num_layers=2), "-o", tmp_path / "plan", *words).code == 0
    return tmp_path / "plan"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "plan.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


EDITS = {
    "dearer than a full step": (lambda d: d["cost"].update(cached_flops=[10**9, 0]), "cost.cached_flops: phase 1: "),
    "for nothing": (lambda d: d["cost"].update(cached_flops=[1, 1]), "cost.cached_flops: phase 1: "),
    "width": (lambda d: d["model"].update(width=128), "model.width: expected 64, 4 heads of 16 as .*, found 128"),
    "tokens": (lambda d: d["model"].update(tokens=32), "model.tokens: latents of 8 x 8 in patches of 4 do not make 32"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("command", ["inspect", "report", "export"])
def test_an_edited_plan_is_refused_wherever_it_is_read(plan: Path, name: str, command: str) -> None:
    change, said = EDITS[name]
    edit(plan, change)
    output = {"inspect": (), "report": ("-o", plan.parent / "x.html"), "export": ("-o", plan.parent / "bundle")}
    answer = run_cli(command, plan, *output[command])
    assert answer.code == 4, answer.err
    assert re.search(said, answer.error)
    assert sorted(path.name for path in plan.parent.iterdir()) == ["dit", "plan"]


@pytest.mark.parametrize("key", ["full_flops", "cached_flops"])
def test_a_cost_that_only_the_checkpoint_contradicts_is_refused_by_an_export(plan: Path, key: str) -> None:
    def change(document: dict[str, Any]) -> None:
        cost = document["cost"]
        if key == "full_flops":
            cost.update(full_flops=2 * cost["full_flops"], cached_flops=[2 * flops for flops in cost["cached_flops"]])
        else:
            cost["cached_flops"][0] = int(0.8 * cost["cached_flops"][0])

    edit(plan, change)
    assert run_cli("inspect", plan).code == 0
    answer = run_cli("export", plan, "-o", plan.parent / "bundle", "--no-check")
    assert answer.code == 4, answer.err
    assert f"cost.{key}" in answer.error
    assert "counted on the checkpoint" in answer.error


def test_a_resealed_bundle_with_such_a_plan_is_refused(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    edit_resealed(bundle, "plan.json", lambda document: document["model"].update(width=128))
    answer = run_cli("inspect", bundle)
    assert answer.code == 4, answer.err
    assert "model.width" in answer.error
