"""Progress where no person watches: lines that say when a part began and that it still moves."""

import logging

import pytest
from rich.progress import Progress

from tc_deploy.cli.progress import LINE_EVERY_S, _bars, _lines


def test_a_part_that_takes_long_is_seen_to_move(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    report = _lines(lambda: now_s)
    with caplog.at_level(logging.INFO, "tc_deploy"):
        for done in range(7):
            report("training", done, 6)
            now_s += LINE_EVERY_S / 2
        report("measuring", 0, 1)
    assert caplog.messages == ["training", "training: 2 of 6", "training: 4 of 6", "training: 6 of 6", "measuring"]


def test_work_without_a_length_ends_where_the_next_begins() -> None:
    bars = Progress(disable=True)
    report = _bars(bars)
    report("loading", 0, 1)
    assert [(task.total, task.finished) for task in bars.tasks] == [(None, False)]
    report("training", 3, 6)
    report("training", 6, 6)
    report("measuring", 0, 1)
    assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
        ("loading", 1, 1),
        ("training", 6, 6),
        ("measuring", 0, None),
    ]
