"""The choice of a plan among points: by a wish, among plans alone, and with a plain answer where none fits."""

import dataclasses
from pathlib import Path

import diffusers
import pytest
from report.folders import edit, write_search
from search_points import point

from tc_deploy.bundle import sha256_of_bytes
from tc_deploy.errors import BundleError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import SAMPLES, SEARCH
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.choose import Wish, check_wish, choose_again, chosen_point, uniquely_named
from tc_deploy.search.record import Kind, PointRecord, SearchRecord
from tc_deploy.tokencache.sampler import Sampling

FULL = point(Kind.FULL, "full", 1.0, 140.0)
OURS = point(Kind.TOKEN_CACHE, "ours", 0.5, 40.0)
FEWER = point(Kind.FEWER_STEPS, "5 steps", 0.5, 36.0)
PEER = point(Kind.CACHE_DIT, "theirs", 0.3, 45.0)


def search_record(*points: PointRecord) -> SearchRecord:
    """As much of a record as a choice looks at."""
    return SearchRecord.model_construct(points=points, latency_source="measured")


@pytest.mark.parametrize("wish", [Wish(), Wish(target_psnr_db=36.0), Wish(max_latency_ms=50.0)])
def test_a_peer_that_is_no_plan_takes_no_plan_away(wish: Wish) -> None:
    record = search_record(FULL, OURS, FEWER, PEER)
    assert not OURS.on_front
    assert chosen_point(record, wish) == OURS


def test_of_equally_fast_plans_the_closer_is_chosen_and_of_equally_close_ones_the_faster() -> None:
    assert chosen_point(search_record(FULL, FEWER, OURS), Wish(target_psnr_db=30.0)) == OURS
    slower = point(Kind.SKIP_REUSE, "skipped", 0.52, 40.0)
    assert chosen_point(search_record(FULL, slower, OURS), Wish()) == OURS


def test_tokens_that_nothing_speaks_for_are_not_chosen() -> None:
    kept = point(Kind.TOKEN_CACHE, "kept", 0.5, 45.0, keep=4)
    random = point(Kind.RANDOM_TOKENS, "kept, random tokens", 0.5, 43.0, keep=4)
    assert chosen_point(search_record(FULL, OURS, kept), Wish()) == OURS
    assert chosen_point(search_record(FULL, OURS, kept, random), Wish()) == kept


def test_the_fastest_plan_is_named_where_none_fits() -> None:
    with pytest.raises(UsageError, match=r"the fastest takes 0\.50 of the full run's latency of 100\.0 ms, at 40\.0"):
        chosen_point(search_record(FULL, OURS, PEER), Wish(max_latency_ms=1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_wish_that_is_no_amount_is_refused(value: float) -> None:
    for option, wish in {
        "--target-psnr": Wish(target_psnr_db=value),
        "--max-latency-ms": Wish(max_latency_ms=value),
    }.items():
        with pytest.raises(UsageError, match=f"{option} must be a finite number, 0 or more, found {value}"):
            check_wish(wish, "measured")


def test_points_that_rounding_names_alike_are_numbered(tiny_dit: DiffusionTransformer) -> None:
    sampling = Sampling(
        scheduler=diffusers.DDIMScheduler(clip_sample=False), steps=4, guidance_scale=None, set_timesteps_kwargs={}
    )
    one = Baselines(tiny_dit, sampling, 0).full()
    alike = [one, dataclasses.replace(one, name="Full!"), one, dataclasses.replace(one, name="other")]
    assert [point.name for point in uniquely_named(alike)] == ["full", "Full! #2", "full #3", "other"]


def test_milliseconds_are_not_asked_of_flops() -> None:
    record = search_record(FULL, OURS).model_copy(update={"latency_source": "flops"})
    with pytest.raises(UsageError, match="--max-latency-ms needs measured latencies"):
        chosen_point(record, Wish(max_latency_ms=50.0))


def test_samples_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "digits")
    (folder / SAMPLES).write_bytes(b"nothing")
    record = {"size_bytes": 7, "sha256": sha256_of_bytes(b"nothing")}
    edit(folder / SEARCH, lambda search: search.update(samples=record))
    with pytest.raises(BundleError, match="not a safetensors file"):
        choose_again(folder, Wish())
