"""The plan document: the same plan gives the same bytes, and every kind of bad plan is refused by name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.bundle import FileRecord, canonical_json, sha256_of_bytes
from tc_deploy.errors import BundleError, PlanError, StorageError
from tc_deploy.plan import (
    FORMAT_VERSION,
    PLAN,
    TABLES,
    CacheRecord,
    CostRecord,
    ForecastRecord,
    MeasuredRecord,
    ModelRecord,
    OriginRecord,
    Plan,
    SamplingRecord,
    ScheduleRecord,
    check_plan,
    content_sha256,
    fitted_for_sha256,
    load_plan,
    plan_bytes,
    plan_sha256,
    save_plan,
)
from tc_deploy.tables import FORECAST_WEIGHTS, index_row, pruned_blocks, tables_bytes, tables_record, token_index_name
from tc_deploy.types import Attention, FloatArray, IntArray, Reuse, Skip

TOKENS = 8
KEEP_COUNTS = ((0, 3, TOKENS, 2), (0, 0, 0, 0))
Tables = dict[str, FloatArray | IntArray]


def make_tables() -> Tables:
    """Phase 1 has two cached steps and prunes blocks 1 and 3; phase 2 computes nothing, so it needs no table."""
    return {token_index_name(1): np.array([[0, 3, 7, 1, 2], [1, 2, 3, 6, 7]], dtype=np.int32)}


MEASURED = MeasuredRecord(plan_sha256="", seeds=(1, 2), psnr_db=40.25, fewer_steps=6, fewer_steps_psnr_db=30.0)


def make_plan(tables: Tables, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "kind": "plan",
        "format_version": FORMAT_VERSION,
        "model": ModelRecord(
            source="models/tiny",
            model_class="DiTTransformer2DModel",
            config={"num_layers": 4, "labels": {2: "two", 10: "ten"}, "sizes": (1, 2)},
            weights_sha256="0" * 64,
            blocks=len(KEEP_COUNTS[0]),
            tokens=TOKENS,
            width=16,
        ),
        "sampling": SamplingRecord(
            scheduler_class="DDIMScheduler",
            scheduler_config={"beta_schedule": "linear", "é": None},
            set_timesteps_kwargs={},
            timesteps=tuple(float(t) for t in range(900, -100, -100)),
            guidance_scale=1.5,
        ),
        "schedule": ScheduleRecord(steps=10, phase_start=4, cache_interval_early=2, cache_interval_late=3),
        "cache": CacheRecord(reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=1, keep_counts=KEEP_COUNTS),
        "cost": CostRecord(full_flops=1000, cached_flops=(400, 50)),
        "origin": OriginRecord(method="predictor", seed=0, settings={"iterations": 10}),
        "measured": MEASURED,
        "tables": tables_record(tables),
    }
    plan = Plan(**fields | changes)
    if plan.measured is not None and "measured" not in changes:
        measured = plan.measured.model_copy(update={"plan_sha256": content_sha256(plan)})
        plan = plan.model_copy(update={"measured": measured})
    return plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound plan on disk."""
    tables = make_tables()
    save_plan(make_plan(tables), tables, tmp_path / "plan")
    return tmp_path / "plan"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit ``plan.json`` by hand, as a user or an attacker would."""
    document = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    change(document)
    (folder / PLAN).write_text(canonical_json(document), encoding="utf-8")


def retable(folder: Path, data: bytes) -> None:
    """Replace the tables, and the checksum with them."""
    (folder / TABLES).write_bytes(data)
    record = FileRecord(size_bytes=len(data), sha256=sha256_of_bytes(data))
    rewrite(folder, lambda document: document.update(tables=record.model_dump()))


# ----------------------------------------------------------------------------------------------------- canonical bytes


def test_save_load_save_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    plan, tables = load_plan(folder)
    save_plan(plan, tables, tmp_path / "again")
    for name in (PLAN, TABLES):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert plan_sha256(plan) == sha256_of_bytes((folder / PLAN).read_bytes())
    assert sorted(path.name for path in folder.iterdir()) == [PLAN, TABLES]


def test_a_loaded_plan_is_the_saved_one(folder: Path) -> None:
    plan, tables = load_plan(folder)
    saved = make_plan(make_tables())
    assert plan.model_dump(exclude={"model"}) == saved.model_dump(exclude={"model"})
    # JSON has no tuples and no integer keys.
    assert plan.model.config == {"num_layers": 4, "labels": {"2": "two", "10": "ten"}, "sizes": [1, 2]}
    np.testing.assert_equal(tables, make_tables())


@given(st.permutations(list(Plan.model_fields)), st.permutations(["a", "b", "c"]))
def test_the_order_of_construction_leaves_no_trace(fields: list[str], names: list[str]) -> None:
    tables = make_tables() | {name: np.zeros(2, dtype=np.int32) for name in "abc"}
    reordered = make_tables() | {name: tables[name] for name in names}
    assert tables_bytes(reordered) == tables_bytes(tables)
    plan = make_plan(tables)
    config = dict(reversed(plan.model.config.items()))
    parts = dict(plan) | {"model": plan.model.model_copy(update={"config": config})}
    assert plan_bytes(Plan(**{field: parts[field] for field in fields if field in parts})) == plan_bytes(plan)


def test_tables_that_are_views_are_written_as_they_read() -> None:
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert tables_bytes({"t": table.T}) == tables_bytes({"t": table.T.copy()})


def test_a_plan_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_plan(make_tables()).cost = None  # type: ignore[assignment]


def test_numbers_that_json_lacks_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="finite"):
        MeasuredRecord(plan_sha256="", seeds=(1,), psnr_db=float("inf"), fewer_steps=1, fewer_steps_psnr_db=1.0)


# -------------------------------------------------------------------------------------------------------- what it says


def test_what_a_plan_says_of_itself() -> None:
    plan = make_plan(make_tables())
    assert plan.run_schedule().line() == "F c1 F c1 | F c2 c2 F c2 c2"
    assert plan.phases_used() == (1, 2)
    assert plan.keep_counts(1) == KEEP_COUNTS[0]
    assert plan.cost_in_full_steps() == pytest.approx(4 + 2 * 0.4 + 4 * 0.05)
    assert plan.cost_ratio() == pytest.approx(0.5)
    assert pruned_blocks(plan.keep_counts(1), TOKENS) == (1, 3)
    assert [index_row(plan.run_schedule(), step) for step in (1, 3, 5, 9)] == [0, 1, 0, 3]
    with pytest.raises(PlanError, match="step 2 is a full step"):
        index_row(plan.run_schedule(), 2)


def test_a_phase_without_cached_steps_needs_no_table() -> None:
    schedule = ScheduleRecord(steps=10, phase_start=4, cache_interval_early=1, cache_interval_late=3)
    assert make_plan({}, schedule=schedule).phases_used() == (2,)


# ----------------------------------------------------------------------------------------------------------- bad plans


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "colour: unknown key"),
        (lambda d: d["model"].update(colour="red"), "model.colour: unknown key"),
        (lambda d: d.update(kind="bundle"), "kind: must be 'plan', found 'bundle'"),
        (lambda d: d.pop("kind"), "kind: this key is required"),
        (lambda d: d.update(format_version=1), "a plan of format 1, and this tc-deploy reads format 3"),
        (
            lambda d: d.update(format_version=4),
            "a plan of format 4, and this tc-deploy reads format 3; update tc-deploy, or make it again with",
        ),
        (lambda d: d.update(format_version="3"), "format_version: must be 3, found '3'"),
        (lambda d: d.pop("format_version"), "format_version: this key is required"),
        (lambda d: d.pop("model"), "model: this key is required"),
        (lambda d: d["schedule"].update(cache_interval_early=0), "schedule.cache_interval_early: .*greater than 0"),
        (lambda d: d["schedule"].update(aRecord=0), "schedule.aRecord: unknown key"),
        (lambda d: d["schedule"].update(steps="10"), "schedule.steps: .*valid integer"),
        (lambda d: d["schedule"].update(phase_start=-1), "schedule.phase_start: "),
        (lambda d: d["cache"].update(forecast_order=3), "cache.forecast_order: "),
        (lambda d: d["cache"].update(reuse="magic"), "cache.reuse: .*'branch' or 'residual'"),
        (lambda d: d["cache"]["keep_counts"].append([]), "cache.keep_counts"),
        (lambda d: d["cache"]["keep_counts"][0].__setitem__(0, -1), "cache.keep_counts.0.0: "),
        (lambda d: d["cost"].update(full_flops=0), "cost.full_flops: "),
        (lambda d: d["origin"].update(method="guess"), "origin.method: "),
    ],
)
def test_json_that_is_no_plan(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(BundleError, match=message) as raised:
        load_plan(folder)
    assert str(folder / PLAN) in str(raised.value)
    assert "tc-deploy calibrate" in str(raised.value)


def test_a_bundle_s_plan_of_another_version_comes_from_an_export(folder: Path) -> None:
    (folder / "manifest.json").touch()
    rewrite(folder, lambda plan: plan.update(format_version=1))
    with pytest.raises(BundleError, match=r"make it again with: tc-deploy export calibration/NAME -o "):
        load_plan(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["schedule"].update(phase_start=11), "phase_start must lie in 0..10 .*found 11"),
        (lambda d: d["sampling"]["timesteps"].pop(), "9 timesteps for 10 steps"),
        (lambda d: d["cache"]["keep_counts"][1].pop(), "phase 2: expected one keep count .*4 blocks, found 3"),
        (
            lambda d: d["cache"]["keep_counts"][0].__setitem__(2, TOKENS + 1),
            f"phase 1, block 2: keep count must lie in 0..{TOKENS}, found {TOKENS + 1}",
        ),
        (
            lambda d: d["cache"]["keep_counts"][1].__setitem__(0, 4),
            r"token_index_2: expected \(4, 4\) int32, found noth",
        ),
        (
            lambda d: d["schedule"].update(cache_interval_early=4),
            r"token_index_1: expected \(3, 5\) int32, found \(2, 5\) int32",
        ),
        (lambda d: d["model"].update(tokens=7), "phase 1, block 2: keep count must lie in 0..7, found 8"),
    ],
)
def test_a_plan_at_odds_with_itself(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(PlanError, match=message):
        load_plan(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["cache"].update(forecast_order=2),
        lambda d: d["cache"].update(attention="kept"),
        lambda d: d["sampling"].update(guidance_scale=2.5),
        lambda d: d["sampling"]["timesteps"].__setitem__(3, 601.0),
        lambda d: d["cost"].update(full_flops=2000),
        lambda d: d["model"].update(weights_sha256="1" * 64),
        lambda d: d["measured"].update(plan_sha256="0" * 64),
    ],
)
def test_what_was_measured_on_another_plan_is_not_quoted(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(folder, change)
    with pytest.raises(PlanError, match=r'under measured is of another plan.*or set "measured" to null'):
        load_plan(folder)
    rewrite(folder, lambda document: document.update(measured=None))
    load_plan(folder)


def test_a_checkpoint_that_was_moved_leaves_a_measurement_what_it_was(folder: Path) -> None:
    rewrite(folder, lambda document: document["model"].update(source="elsewhere"))
    assert load_plan(folder)[0].measured is not None


GOOD_ROW = [0, 3, 7, 1, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.array([GOOD_ROW], dtype=np.int32), r"expected \(2, 5\) int32, found \(1, 5\) int32"),
        (np.array([GOOD_ROW, GOOD_ROW], dtype=np.int64), "found .* int64"),
        (np.array(GOOD_ROW * 2, dtype=np.int32), r"found \(10,\) int32"),
        (np.array([GOOD_ROW, [0, 7, 3, 1, 2]], dtype=np.int32), "block 1 must name ascending tokens in 0..7"),
        (np.array([GOOD_ROW, [0, 3, 3, 1, 2]], dtype=np.int32), "block 1 must name ascending"),
        (np.array([GOOD_ROW, [0, 3, 7, 1, 8]], dtype=np.int32), "block 3 must name ascending"),
        (np.array([GOOD_ROW, [-1, 3, 7, 1, 2]], dtype=np.int32), "block 1 must name ascending"),
    ],
)
def test_a_bad_index_table(folder: Path, tmp_path: Path, table: IntArray, message: str) -> None:
    tables = {token_index_name(1): table}
    retable(folder, tables_bytes(tables))
    with pytest.raises(PlanError, match=f"token_index_1.*{message}"):
        load_plan(folder)
    with pytest.raises(PlanError, match=f"token_index_1.*{message}"):
        save_plan(make_plan(tables), tables, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def unknown_element_type(dtype: str) -> bytes:
    """A sound safetensors file with an element type that numpy lacks."""
    size = {"BF16": 8, "F8_E4M3": 4}[dtype]
    header = json.dumps({"t": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.mark.parametrize(
    "data",
    [b"", b"no safetensors", struct.pack("<Q", 2**60), unknown_element_type("BF16"), unknown_element_type("F8_E4M3")],
)
def test_tables_that_cannot_be_read(folder: Path, data: bytes) -> None:
    retable(folder, data)
    # ml_dtypes, once something has imported it, gives numpy the types that it lacks; then the file has no right table.
    with pytest.raises(PlanError, match=f"{TABLES}: not a safetensors file|table t is unknown"):
        load_plan(folder)


@pytest.mark.parametrize(("name", "what"), [(PLAN, "plan.json is missing"), (TABLES, "tables.safetensors is missing")])
def test_a_missing_file(folder: Path, name: str, what: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=what):
        load_plan(folder)


def test_truncated_tables(folder: Path) -> None:
    (folder / TABLES).write_bytes((folder / TABLES).read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{TABLES}: expected .* bytes"):
        load_plan(folder)


def test_altered_tables(folder: Path) -> None:
    data = bytearray((folder / TABLES).read_bytes())
    data[-1] ^= 1
    (folder / TABLES).write_bytes(data)
    with pytest.raises(BundleError, match=f"{TABLES}: expected SHA-256"):
        load_plan(folder)


def test_a_plan_does_not_replace_another_kind_of_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").touch()
    tables = make_tables()
    with pytest.raises(StorageError, match=f"holds no {PLAN}"):
        save_plan(make_plan(tables), tables, tmp_path / "bundle")


# ------------------------------------------------------------------------------------------------------ fitted weights
SKIPS = CacheRecord(
    reuse=Reuse.BRANCH,
    attention=Attention.ALL,
    forecast_order=1,
    keep_counts=((0, 0, 0, 0), (0, 0, 0, 0)),
    skip=Skip.MODEL,
)
SKIPPED = CostRecord(full_flops=1000, cached_flops=(50, 50))
# F c1 F c1 | F c2 c2 F c2 c2
WEIGHTS = np.array(
    [[1, 0], [0.9, 0], [1, 0], [1.6, -0.7], [1, 0], [1.4, -0.5], [1.9, -0.8], [1, 0], [1.3, -0.3], [1.7, -0.6]],
    np.float32,
)


def make_fitted(table: FloatArray = WEIGHTS, **changes: Any) -> tuple[Plan, Tables]:
    tables: Tables = {FORECAST_WEIGHTS: table}
    bare = make_plan({}, cache=SKIPS, measured=None)
    fitted_for = fitted_for_sha256(bare.model, bare.sampling, bare.schedule, bare.cache)
    forecast = ForecastRecord(fitted_for=fitted_for, first_seed=10, samples=8)
    return make_plan(tables, **{"cache": SKIPS, "cost": SKIPPED, "forecast": forecast} | changes), tables


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A plan with fitted weights on disk."""
    save_plan(*make_fitted(), tmp_path / "fitted")
    return tmp_path / "fitted"


def test_fitted_weights_come_back_bit_for_bit(fitted: Path, tmp_path: Path) -> None:
    plan, tables = load_plan(fitted)
    np.testing.assert_array_equal(plan.step_tables(tables).forecast_weights, WEIGHTS)
    save_plan(plan, tables, tmp_path / "again")
    for name in (PLAN, TABLES):
        assert (tmp_path / "again" / name).read_bytes() == (fitted / name).read_bytes()


def test_a_plan_without_a_fit_forecasts_by_polynomials_and_says_nothing_of_it(folder: Path) -> None:
    plan, tables = load_plan(folder)
    assert "forecast" not in json.loads((folder / PLAN).read_text(encoding="utf-8"))
    steps = plan.step_tables(tables)
    np.testing.assert_array_equal(steps.forecast_weights[3], [1.5, -0.5])
    np.testing.assert_array_equal(steps.token_index[1], tables["token_index_1"])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["sampling"].update(guidance_scale=2.5),
        lambda d: d["sampling"].update(guidance_scale=None),
        lambda d: d["sampling"].update(scheduler_class="EulerDiscreteScheduler"),
        lambda d: d["sampling"]["timesteps"].__setitem__(3, 601.0),
        lambda d: d["schedule"].update(cache_interval_late=2),
        lambda d: d["cache"].update(forecast_order=2),
        lambda d: d["model"].update(weights_sha256="1" * 64),
        lambda d: d["forecast"].update(fitted_for="0" * 64),
    ],
)
def test_weights_that_were_fitted_for_something_else_are_refused(
    fitted: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(fitted, lambda document: document.update(measured=None))
    load_plan(fitted)
    rewrite(fitted, change)
    with pytest.raises(PlanError, match=r"fitted for another model, sampler, schedule or cache .*calibrate again"):
        load_plan(fitted)


def test_a_plan_that_was_measured_on_what_it_was_fitted_on_is_refused() -> None:
    plan, tables = make_fitted(measured=MEASURED.model_copy(update={"seeds": (17, 18)}))
    with pytest.raises(PlanError, match="measured on seeds that its forecast weights were fitted on"):
        check_plan(plan, tables, "plan")


def test_a_fit_and_its_table_come_together(fitted: Path, folder: Path) -> None:
    rewrite(fitted, lambda document: document.update(measured=None, forecast=None))
    with pytest.raises(PlanError, match="says nothing under forecast, and has a table forecast_weights"):
        load_plan(fitted)
    plan, _ = make_fitted()
    with pytest.raises(PlanError, match="says a fit under forecast, and has no table forecast_weights"):
        check_plan(plan, {}, "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], r"expected finite float32 \(10, 2\), found float32 \(9, 2\)"),
        (lambda table: table[:, :1], r"expected finite float32 \(10, 2\)"),
        (lambda table: table.astype(np.float64), r"found float64"),
        (lambda table: put(table, 3, 0, np.nan), "found values that are not"),
        (lambda table: put(table, 3, 0, np.inf), "found values that are not"),
        (
            lambda table: put(table, 2, 1, 0.5),
            r"step 2: expected 1 and then 0, as it is a full step, found \[1.0, 0.5\]",
        ),
        (lambda table: put(table, 4, 0, 0.0), "step 4: expected 1 and then 0"),
        (lambda table: put(table, 1, 1, 0.5), "step 1: expected 0 from column 1 on, as no more full steps have run"),
    ],
)
def test_a_bad_table_of_weights(change: Callable[[FloatArray], FloatArray], message: str) -> None:
    plan, tables = make_fitted(change(WEIGHTS.copy()))
    with pytest.raises(PlanError, match=f"plan: table forecast_weights: .*{message}.*; calibrate again"):
        check_plan(plan, tables, "plan")


def put(table: FloatArray, step: int, column: int, value: float) -> FloatArray:
    table[step, column] = value
    return table


def test_what_reuses_has_no_weights() -> None:
    reuses = SKIPS.model_copy(update={"forecast_order": 0})
    bare = make_plan({}, cache=reuses, measured=None)
    fitted_for = fitted_for_sha256(bare.model, bare.sampling, bare.schedule, bare.cache)
    forecast = ForecastRecord(fitted_for=fitted_for, first_seed=10, samples=8)
    plan, tables = make_fitted(WEIGHTS[:, :1], cache=reuses, forecast=forecast)
    with pytest.raises(PlanError, match="expected none, as forecast order 0 reuses"):
        check_plan(plan, tables, "plan")
