"""The loop that every measurement runs in: one of each per round, in an order that changes from round to round.

A noisy or slowing machine hits all contenders of a round alike, and none always follows the same other one, so values
of one round may be compared. Never: takes a time or a median.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

ORDER_SEED = 0

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


def interleaved(
    actions: Mapping[KeyT, Callable[[], ValueT]],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[KeyT, list[ValueT]]:
    """Call every action once per round.

    Args:
        actions: what is measured, each answering with its measurement.
        rounds: how often each is called.
        progress: told how many calls are done, and of how many.

    Returns:
        Per action its answers; position r is round r. The order inside a round is drawn from a fixed seed.
    """
    order = np.random.default_rng(ORDER_SEED)
    keys = list(actions)
    answers: dict[KeyT, list[ValueT]] = {key: [] for key in keys}
    total = rounds * len(keys)
    for turn in range(rounds):
        for place, index in enumerate(order.permutation(len(keys))):
            answers[keys[index]].append(actions[keys[index]]())
            progress(turn * len(keys) + place + 1, total)
    return answers
