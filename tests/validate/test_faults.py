"""Planted faults that pass every checksum: validation fails on each and names the block, the table or the cache."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import Made
from validate import faults

from tc_deploy.backends.build import build_target
from tc_deploy.runtime import layout
from tc_deploy.runtime.program import ProgramStep, program_of
from tc_deploy.validate.record import ValidationRecord
from tc_deploy.validate.validation import validate_bundle

BLOCK = "transformer_blocks.1"
LAST = "transformer_blocks.2"
CACHE = "cache.0.mlp"
WEIGHT = f"{BLOCK}.attn1.to_q.weight.T"


@pytest.fixture
def planted(mixed: Made, tmp_path: Path) -> Callable[..., ValidationRecord]:
    """Plants a fault in a copy of the bundle, builds it anew and validates it."""

    def validate(plant: Callable[[Path], None]) -> ValidationRecord:
        bundle = mixed.copy(tmp_path / "bundle")
        plant(bundle)
        build_target(bundle, options={"threads": 1})
        record = validate_bundle(bundle, "onnxruntime")
        assert not record.passed
        return record

    return validate


def test_flipped_sign_of_one_weight(planted: Callable[..., ValidationRecord]) -> None:
    record = planted(lambda bundle: faults.flip_sign(bundle, WEIGHT))
    assert {variant.name: variant.passed for variant in record.variants} == {
        "full": False,
        "cached-1": False,
        # It computes nothing of that block.
        "cached-2": True,
        "solver": True,
    }
    for blame in record.blame:
        assert (blame.origin, blame.block, blame.module) == ("export", BLOCK, f"{BLOCK}.attn1.to_q")
        assert blame.weights == (WEIGHT,)
        assert blame.runs <= 4
    assert not record.wiring
    assert any(BLOCK in words for words in record.drift.exceeded)


def test_gate_applied_twice(planted: Callable[..., ValidationRecord]) -> None:
    record = planted(lambda bundle: faults.edit_graph(bundle, "full", faults.gate_twice(BLOCK)))
    (blame,) = record.blame
    assert (blame.graph, blame.origin, blame.block) == ("full", "export", BLOCK)
    assert f"Mul {BLOCK}/gate_again" in blame.operators
    assert not blame.weights


def test_overflow_in_half_precision(planted: Callable[..., ValidationRecord]) -> None:
    # A run on zeros, which a build makes, stays far below; late latents of this model do not.
    record = planted(lambda bundle: faults.edit_graph(bundle, "full", faults.overflow(LAST, limit=100.0)))
    (blame,) = record.blame
    assert (blame.block, blame.module) == (LAST, LAST)
    assert f"Cast {LAST}/half" in blame.operators
    (full,) = (variant for variant in record.variants if variant.name == "full")
    assert full.worst.failures == ("not finite",)
    assert record.drift.image_psnr_db is None


def test_stale_row_of_keys(planted: Callable[..., ValidationRecord]) -> None:
    module = f"{LAST}.attn1"
    record = planted(lambda bundle: faults.edit_graph(bundle, "cached-1", faults.stale_row(module)))
    (blame,) = record.blame
    assert (blame.graph, blame.block) == ("cached-1", LAST)
    assert any("ScatterND" in operator for operator in blame.operators)


def test_swapped_index_rows(planted: Callable[..., ValidationRecord]) -> None:
    record = planted(lambda bundle: faults.swap_index_rows(bundle, phase=1))
    assert [(fault.step, fault.tensor) for fault in record.wiring] == [(1, "token_index_1")]
    assert "token_index_1" in record.wiring[0].text
    assert record.drift.exceeded
    # Each graph by itself is right.
    assert all(variant.passed for variant in record.variants)


def test_boundary_off_by_one(planted: Callable[..., ValidationRecord]) -> None:
    record = planted(faults.move_boundary)
    assert (record.wiring[0].step, record.wiring[0].tensor) == (4, "schedule")
    assert record.wiring[0].text == "ran full, but the plan that was exported runs cached-2"
    assert record.drift.exceeded


def test_cache_stale_by_one_step(planted: Callable[..., ValidationRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*arguments: Any, **options: Any) -> tuple[ProgramStep, ...]:
        steps = []
        for step in program_of(*arguments, **options):
            inputs = dict(step.model.inputs)
            if CACHE in inputs:
                inputs[CACHE] = inputs[f"{CACHE}.1"]
            steps.append(replace(step, model=replace(step.model, inputs=inputs)))
        return tuple(steps)

    monkeypatch.setattr(layout, "program_of", stale)
    record = planted(lambda bundle: None)
    # F c1 c1 | F c2 F c2 ...: the first step whose history holds two full steps.
    (fault,) = record.wiring
    assert (fault.step, fault.graph, fault.tensor) == (4, "cached-2", CACHE)
    assert fault.text == f"read {CACHE} that of step 0, expected that of step 3"
    assert record.drift.exceeded
