"""The order in which contenders are called: each once per round, in an order that changes and can be repeated."""

from __future__ import annotations

import functools
import itertools

from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.bench.interleave import interleaved


def called(names: list[str], rounds: int) -> tuple[list[str], dict[str, list[int]], list[tuple[int, int]]]:
    """The calls in their order, each contender's answers (the number of the call), and the progress that was told."""
    calls: list[str] = []
    told: list[tuple[int, int]] = []

    def answer(name: str) -> int:
        calls.append(name)
        return len(calls) - 1

    actions = {name: functools.partial(answer, name) for name in names}
    return calls, interleaved(actions, rounds, lambda done, total: told.append((done, total))), told


@given(count=st.integers(1, 6), rounds=st.integers(0, 8))
def test_each_is_called_once_per_round(count: int, rounds: int) -> None:
    names = [f"contender {number}" for number in range(count)]
    calls, answers, told = called(names, rounds)
    for turn in range(rounds):
        assert sorted(calls[turn * count : (turn + 1) * count]) == names
    for name in names:
        assert [calls[number] for number in answers[name]] == [name] * rounds
        assert [number // count for number in answers[name]] == list(range(rounds))
    assert told == [(done, rounds * count) for done in range(1, rounds * count + 1)]


def test_the_order_changes_from_round_to_round() -> None:
    calls, _, _ = called(["a", "b", "c"], rounds=40)
    orders = {tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)}
    assert orders == set(itertools.permutations("abc"))


def test_the_order_is_the_same_every_time() -> None:
    assert called(["a", "b", "c"], rounds=10)[0] == called(["a", "b", "c"], rounds=10)[0]
