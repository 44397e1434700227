"""Latents of a loop of one's own against what the solver makes of the outputs."""

import numpy as np

from tc_deploy.diffusers.foretold import Foretelling, Past, Seen
from tc_deploy.manifest import Role

# Latents plus half of the output, at each of six steps.
SOLVER = Foretelling(
    {Role.COEFFICIENTS: np.tile(np.array([[1.0, 0.5]], np.float32), (6, 1)), Role.INPUT_SCALE: np.ones(6, np.float32)},
    np.float32(1),
)


def test_only_what_the_solver_makes_of_the_outputs_comes_next() -> None:
    random = np.random.default_rng(0)
    latents, output = random.normal(size=(2, 2, 4, 4))
    seen, past = Seen(), Past(SOLVER, latents)
    seen.note(0, latents, output)
    assert not past.leads_to(1, random.normal(size=latents.shape), seen)
    assert past.leads_to(1, latents + 0.5 * output, seen)


def test_a_half_that_the_other_has_left_far_behind_does_not_go_on() -> None:
    random = np.random.default_rng(0)
    latents = random.normal(size=(2, 4, 4))
    seen, ahead, behind = Seen(), Past(SOLVER, latents), Past(SOLVER, latents)
    for step in range(4):
        output = random.normal(size=latents.shape)
        seen.note(step, latents, output)
        if step == 0:
            first = latents + 0.5 * output
        latents = latents + 0.5 * output
        assert ahead.leads_to(step + 1, latents, seen)
    assert not behind.leads_to(1, first, seen)
