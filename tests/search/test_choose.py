"""The choice of a plan among points: by a wish, among plans alone, and with a plain answer where none fits."""

import pytest
from points import point

from tc_deploy.errors import UsageError
from tc_deploy.search.choose import Wish, chosen_point
from tc_deploy.search.record import Kind, PointRecord, SearchRecord

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


def test_the_fastest_plan_is_named_where_none_fits() -> None:
    with pytest.raises(UsageError, match=r"the fastest takes 0\.50 of the full run's latency of 100\.0 ms, at 40\.0"):
        chosen_point(search_record(FULL, OURS, PEER), Wish(max_latency_ms=1.0))


def test_milliseconds_are_not_asked_of_flops() -> None:
    record = search_record(FULL, OURS).model_copy(update={"latency_source": "flops"})
    with pytest.raises(UsageError, match="--max-latency-ms needs measured latencies"):
        chosen_point(record, Wish(max_latency_ms=50.0))
