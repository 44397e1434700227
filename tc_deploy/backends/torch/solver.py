"""The solver's graph in PyTorch, which no checkpoint has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from tc_deploy.libraries import imported
from tc_deploy.manifest import MODEL_OUTPUT, NEXT_LATENTS, Manifest, Role, guided_output_tensor, latents_tensor

if TYPE_CHECKING:
    from torch import Tensor

Step: TypeAlias = "Callable[..., Sequence[Tensor]]"
"""Positional tensors in, tensors out, as a graph's record orders them."""


def solver_step(manifest: Manifest, input_names: tuple[str, ...], output_names: tuple[str, ...]) -> Step:
    """The solver's graph in PyTorch; ``export/solver_graph.py`` says what it computes."""
    from tc_deploy.tokencache.guidance import guided_output

    torch, history, latent_shape = imported("torch"), manifest.solver.history, manifest.latent_shape

    def step(*tensors: Tensor) -> Sequence[Tensor]:
        given = dict(zip(input_names, tensors, strict=True))
        per_sample = (-1, *[1] * len(latent_shape))
        output = given[MODEL_OUTPUT.name][:, : latent_shape[0]]
        if manifest.guided:
            conditional, unconditional = output.chunk(2)
            scale = given[Role.GUIDANCE_SCALE].reshape(per_sample)
            output = guided_output(conditional, unconditional, scale, manifest.solver.guidance_rule)
        values = [
            *(given[latents_tensor(age).name] for age in range(history + 1)),
            output,
            *(given[guided_output_tensor(age).name] for age in range(1, history + 1)),
        ]
        columns = given[Role.COEFFICIENTS].unbind(1)
        terms = [column.reshape(per_sample) * value for column, value in zip(columns, values, strict=True)]
        latents = functools.reduce(torch.add, terms)
        scaled = latents * given[Role.INPUT_SCALE].reshape(per_sample)
        states = torch.cat([scaled, scaled]) if manifest.guided else scaled
        made = {NEXT_LATENTS.name: latents, Role.HIDDEN_STATES: states, Role.GUIDED_OUTPUT: output}
        return [made[name] for name in output_names]

    return step
