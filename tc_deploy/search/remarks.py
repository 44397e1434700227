"""What a search's figures say, in words: computed from the points, good news and bad."""

from __future__ import annotations

from collections.abc import Sequence

from tc_deploy.search.pareto import dominates, front
from tc_deploy.search.record import Kind, LatencySource, PointRecord

SHARES = (0.5, 0.25, 0.125)
"""Of the full run's latency, at which the best points are compared."""
CLOSE_DB = 1.0
SLACK = 1.05
"""Latency ratios are measured; what is five per cent over a limit counts as at it, ours and others alike."""

DISTURBED = 0.1
"""A latency whose rounds are spread by more than this share says little."""

OURS = (Kind.TOKEN_CACHE,)
PEERS = (Kind.CACHE_DIT, Kind.SPECTRUM)
BASELINES = (Kind.FEWER_STEPS, Kind.BETTER_SOLVER, Kind.SKIP_REUSE, Kind.SKIP_FORECAST, *PEERS)
TWINS = {
    Kind.RANDOM_TOKENS: "the same number of random tokens",
    Kind.UNIFORM_BLOCKS: "the same budget spread evenly over the blocks",
}


def best_at(points: Sequence[PointRecord], kinds: Sequence[Kind], latency_ratio: float) -> PointRecord | None:
    """The point of these kinds closest to the full run that takes no longer; None where there is none."""
    fits = [point for point in points if point.kind in kinds and point.latency_ratio <= latency_ratio * SLACK]
    return max(fits, key=lambda point: point.psnr_db, default=None)


def front_names(points: Sequence[PointRecord]) -> set[str]:
    """The front of the points on the engines."""
    return {point.name for point in front([point for point in points if point.runtime == "engines"])}


def remarks_of(points: Sequence[PointRecord], latency_source: LatencySource = "measured") -> tuple[str, ...]:
    """Sentences, each a statement about these points alone."""
    said = [line for share in SHARES for line in _at(points, share)]
    said += _tokens(points)
    for point in points:
        if point.kind in OURS:
            said += _beaten(point, points)
    said += _disturbed(points)
    foreign = dict.fromkeys(point.kind for point in points if point.runtime == "pytorch")
    what = {"measured": "to PyTorch's own full run", "flops": "of FLOPs, as all are"}[latency_source]
    said += [
        f"{kind} ran in PyTorch, and its ratios are {what}: it stands beside the points on engines, never on their"
        " front."
        for kind in foreign
    ]
    return tuple(said)


def is_beaten_by(point: PointRecord, other: PointRecord) -> bool:
    """Whether another is better in a figure and worse in none; by more than their spread, where only times tell."""
    closer = other.psnr_db > point.psnr_db
    return dominates(other, point) and (closer or point.latency_ratio - other.latency_ratio > _spread(other, point))


def _spread(one: PointRecord, other: PointRecord) -> float:
    """What two times must differ by to be told apart: the larger of their interquartile ranges."""
    return max(one.latency_iqr, other.latency_iqr)


def is_disturbed(point: PointRecord) -> bool:
    """Whether a point's times are spread so far that they say little: all tries were."""
    return point.latency_iqr > DISTURBED * point.latency_ratio


def _disturbed(points: Sequence[PointRecord]) -> list[str]:
    names = [point.name for point in points if is_disturbed(point)]
    if not names:
        return []
    share = f"{DISTURBED:.0%}"
    said = f"Something else ran while these were timed, again and again: their ratios are spread by more than {share}"
    return [f"{said}, and say little: {', '.join(names)}. Search again on a machine that does nothing else."]


def _beaten(point: PointRecord, points: Sequence[PointRecord]) -> list[str]:
    """What is better than a point of ours: on the same engines, and in PyTorch."""
    said = []
    for runtime, words in (
        ("engines", "{name} is not recommended: {kind} ({other}) is {how}."),
        (
            "pytorch",
            "{name}: {kind} ({other}, {figures}) is {how}, if ratios in PyTorch and on engines may be compared.",
        ),
    ):
        better = [
            other
            for other in points
            if other.runtime == runtime and other.kind in (Kind.FULL, *BASELINES) and is_beaten_by(point, other)
        ]
        if better:
            other = max(better, key=lambda other: other.psnr_db)
            how, figures = _how(other, point), _figures(other)
            said.append(words.format(name=point.name, kind=other.kind, other=other.name, how=how, figures=figures))
    return said


def _how(better: PointRecord, point: PointRecord) -> str:
    """In which of the two figures a point is better than one that it dominates."""
    if point.latency_ratio - better.latency_ratio <= _spread(better, point):
        return "as fast and closer"
    return f"faster and {'closer' if better.psnr_db > point.psnr_db else 'as close'}"


def _at(points: Sequence[PointRecord], share: float) -> list[str]:
    ours = best_at(points, OURS, share)
    if ours is None:
        other = best_at(points, BASELINES, share)
        best = "" if other is None else f"; the best that does is {other.kind} ({other.name}, {_figures(other)})"
        return [f"At {share:.0%} of the full run's latency no plan of the search fits{best}."]
    said = []
    fewer = best_at(points, (Kind.FEWER_STEPS,), share)
    gain = "" if fewer is None else f", {_gain(ours, fewer)} fewer steps ({fewer.name}, {_figures(fewer)})"
    said.append(f"At {share:.0%} of the full run's latency: {ours.name}, {_figures(ours)}{gain}.")
    for kind in BASELINES:
        peer = best_at(points, (kind,), share)
        if kind is Kind.FEWER_STEPS or peer is None:
            continue
        difference = peer.psnr_db - ours.psnr_db
        if difference > -CLOSE_DB:
            how = "better" if difference > 0 else f"within {CLOSE_DB:g} dB"
            said.append(f"At {share:.0%}, {kind} is {how}: {peer.name}, {_figures(peer)}.")
    return said


def _tokens(points: Sequence[PointRecord]) -> list[str]:
    with_tokens = [point for point in points if point.kind in OURS and _keeps_tokens(point)]
    if not with_tokens:
        return ["No plan that keeps tokens was built."]
    said = []
    without = [point for point in points if point.kind in OURS and not _keeps_tokens(point)]
    if all(any(dominates(other, point) for other in without) for point in with_tokens):
        said.append(
            "Keeping tokens adds nothing here: each plan that keeps some is slower than one that keeps none, and no"
            " closer to the full run."
        )
    unproven = unproven_tokens(points)
    for point in with_tokens:
        for twin in _twins(point, points):
            gain = point.psnr_db - twin.psnr_db
            said.append(f"{point.name}: {gain:+.1f} dB against {TWINS[twin.kind]}.")
        if point.name in unproven:
            said.append(
                f"{point.name} is not recommended: its tokens are not shown to be {CLOSE_DB:g} dB better than random"
                " ones and an even spread."
            )
    return said


def unproven_tokens(points: Sequence[PointRecord]) -> set[str]:
    """Names of plans that keep tokens, and are not clearly better than the same budget spent otherwise."""
    ours = [point for point in points if point.kind in OURS and _keeps_tokens(point)]
    return {
        point.name
        for point in ours
        if not (twins := _twins(point, points)) or any(point.psnr_db < twin.psnr_db + CLOSE_DB for twin in twins)
    }


def _twins(point: PointRecord, points: Sequence[PointRecord]) -> list[PointRecord]:
    return [twin for twin in points if twin.kind in TWINS and twin.name.startswith(f"{point.name}, ")]


def _keeps_tokens(point: PointRecord) -> bool:
    return point.settings is not None and bool(point.settings.token_phases())


def _gain(ours: PointRecord, other: PointRecord) -> str:
    gain = ours.psnr_db - other.psnr_db
    return f"{abs(gain):.1f} dB {'above' if gain >= 0 else 'BELOW'}"


def _figures(point: PointRecord) -> str:
    where = " in PyTorch" if point.runtime == "pytorch" else ""
    return f"{point.psnr_db:.1f} dB at {point.latency_ratio:.2f}{where}"
