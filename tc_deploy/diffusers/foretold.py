"""Whether latents are what a run's own solver makes of the outputs that it was given.

For a loop that is no pipeline's, which cannot be told from another by who calls. A solver's update is linear, and
guidance combines the outputs of its halves, so the next latents of every sample are known but for the few factors of
that combination: they are fitted, and what they leave over must be rounding. In: latents and outputs step by step.
Out: yes or no. Never: computes what anybody samples with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.manifest import Role

TOLERANCE: Final = 1e-3
"""Of the largest latent of a sample. Rounding in single precision leaves 1e-6, latents of another run about 1."""

_Rows: TypeAlias = NDArray[np.float64]
"""(B, values of a sample)."""


class Foretelling:
    """A bundle's solver, by which latents are foretold.

    Args:
        tables: ``coefficients`` (T, 2(h+1)) and ``input_scale`` (T,), of the step that follows, as
            :class:`tc_deploy.runtime.binding.Bundle` holds them.
        first_scale: the scale of the first step's input.
    """

    def __init__(self, tables: Mapping[Role, NDArray[Any]], first_scale: np.float32) -> None:
        coefficients = tables[Role.COEFFICIENTS].astype(np.float64)
        self.coefficients = coefficients.reshape(len(coefficients), 2, -1)
        self.input_scale = np.append(first_scale, tables[Role.INPUT_SCALE][:-1]).astype(np.float64)


class Seen:
    """What all halves of one run were asked and answered, as far back as a solver looks."""

    def __init__(self) -> None:
        self._calls: dict[int, list[tuple[_Rows, _Rows]]] = {}

    def note(self, step: int, latents: NDArray[Any], output: NDArray[Any]) -> None:
        """Remember a call and its answer."""
        # Some models predict a variance beside the noise, which no deterministic solver reads.
        used = output[tuple(slice(size) for size in latents.shape)]
        self._calls.setdefault(step, []).append((_rows(latents), _rows(used)))
        # A half may be one step behind the other.
        self._calls.pop(step - 2, None)

    def answers(self, step: int, latents: _Rows) -> _Rows:
        """(n, values) every answer to these latents of one sample, at a step."""
        found = [answers[(asked == latents).all(axis=1)] for asked, answers in self._calls.get(step, [])]
        return np.concatenate([np.empty((0, latents.size)), *found])


class Past:
    """The latents and guided outputs of one half of a run, newest first."""

    def __init__(self, foretelling: Foretelling, latents: NDArray[Any]) -> None:
        self._foretelling = foretelling
        self._asked = _rows(latents)
        self._latents = [self._asked / foretelling.input_scale[0]]
        self._guided: list[_Rows] = []

    def leads_to(self, step: int, latents: NDArray[Any], seen: Seen) -> bool:
        """Whether ``latents`` are what comes at ``step``, the next; if so they are the newest."""
        factors = self._foretelling.coefficients[step - 1]
        asked = _rows(latents)
        found = asked / self._foretelling.input_scale[step]
        known = sum(
            (factor * values for factor, values in zip(factors[0], self._latents, strict=False)), np.zeros_like(found)
        )
        known = sum((factor * values for factor, values in zip(factors[1, 1:], self._guided, strict=False)), known)
        answers = [seen.answers(step - 1, before) for before in self._asked]
        if not all(map(len, answers)):
            return False  # the run's other half has gone on so far that they are forgotten
        guided = np.stack([_nearest(row, given) for row, given in zip(found - known, answers, strict=True)])
        left = np.abs(found - known - guided).max(axis=1)
        if not (left <= TOLERANCE * np.abs(found).max(axis=1)).all():
            return False
        history = factors.shape[1]
        self._asked = asked
        self._latents = [found, *self._latents][:history]
        self._guided = [guided / factors[1, 0], *self._guided][:history]
        return True


def _nearest(row: NDArray[np.float64], answers: _Rows) -> NDArray[np.float64]:
    """The combination of the answers that is nearest to a row."""
    factors = np.linalg.lstsq(answers.T, row, rcond=None)[0]
    return np.asarray(factors @ answers)


def _rows(values: NDArray[Any]) -> _Rows:
    return np.asarray(values, np.float64).reshape(len(values), -1)
