"""The steps of one sample as kinds: what can be one call of the engine when samples stand at different steps.

In: a bundle and which of its steps are full. Out: a :class:`Course`, which a scheduler walks through, and ticks, which
it makes of slots. Pure data: never touches an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tc_deploy.manifest import Role, TensorRecord, variant_name
from tc_deploy.runtime.binding import Bundle
from tc_deploy.schedule import FULL, full_schedule

STANDARD, HD = "standard", "hd"
"""The plan; every step in full. As OpenAI's images API calls its qualities."""


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """Steps of one kind can be one call, whatever samples they are of."""

    variant: int
    index: int | None = None
    """Of a family whose samples share the token index: which of the plan's rows it is. None where samples have their
    own, and where a step has none."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A sample's way through the steps."""

    name: str
    variants: tuple[int, ...]
    kinds: tuple[StepKind | None, ...]
    """For each step; None where it skips the model, so that it costs nothing. The first one runs the model."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.kinds)

    def following(self, step: int) -> int:
        """The next step after this one that runs the model; T where there is none."""
        later = range(step + 1, self.steps)
        return next((each for each in later if self.kinds[each] is not None), self.steps)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A slot and the step at which its sample stands."""

    slot: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One call of the model for some slots; then each sample's solver, and its steps that skip the model."""

    kind: StepKind
    size: int
    """How many samples the call is for, at least as many as there are places; the rest is computed in vain."""
    places: tuple[Place, ...]
    """The samples that go on, each in a slot of its own."""


def is_shared(tensor: TensorRecord) -> bool:
    """Whether an input has no batch axis: the token index of a family whose samples share it.

    A sample's own is a row of it, one row for all its blocks or one for each block of a group.
    """
    return tensor.role is Role.TOKEN_INDEX and len(tensor.shape) == (1 if tensor.group is None else 2)


def courses_of(bundle: Bundle) -> dict[str, Course]:
    """The courses that a bundle has, by quality: its plan, and every step in full."""
    planned = bundle.plan.run_schedule().variants
    full = full_schedule(len(planned)).variants
    return {STANDARD: _course(bundle, STANDARD, planned), HD: _course(bundle, HD, full)}


def _course(bundle: Bundle, name: str, variants: Sequence[int]) -> Course:
    cache = bundle.plan.cache
    rows: dict[int, list[bytes]] = {}
    kinds: list[StepKind | None] = []
    for step, variant in enumerate(variants):
        shared = [each for each in bundle.manifest.graphs[variant_name(variant)].inputs if is_shared(each)]
        if variant != FULL and cache.skips_model(variant):
            kinds.append(None)
        elif variant == FULL or not shared:
            kinds.append(StepKind(variant=variant))
        else:
            row = b"".join(bundle.row(each, step).tobytes() for each in shared)
            seen = rows.setdefault(variant, [])
            if row not in seen:
                seen.append(row)
            kinds.append(StepKind(variant=variant, index=seen.index(row)))
    return Course(name=name, variants=tuple(variants), kinds=tuple(kinds))
