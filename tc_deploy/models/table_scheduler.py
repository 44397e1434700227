"""A solver's table with the face of a diffusers scheduler: a sampling loop need not know which of the two it has.

In: a :class:`tc_deploy.models.solver.SolverTable`, of whatever numbers. Out: what the loop of a pipeline asks a
scheduler for. Never: decides a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tc_deploy.models.solver import SolverTable


class TableScheduler:
    """One sampling run by a table; it carries state from step to step.

    Args:
        table: the run.
    """

    def __init__(self, table: SolverTable) -> None:
        self.table, self.timesteps = table, torch.from_numpy(table.timesteps)
        self.init_noise_sigma = table.init_noise_sigma
        self._latents: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._step = 0

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:  # noqa: ARG002 - steps come in order
        """What the model sees of the latents."""
        return latents * float(self.table.input_scale[self._step])

    def step(
        self,
        output: Tensor,
        timestep: Tensor,  # noqa: ARG002 - steps come in order
        latents: Tensor,
        *,
        return_dict: bool = False,  # noqa: ARG002 - a tuple, as those who ask want it
    ) -> tuple[Tensor]:
        """The next latents, as the engines' solver adds them up."""
        kept = self.table.history + 1
        self._latents, self._outputs = (latents, *self._latents)[:kept], (output, *self._outputs)[:kept]
        of_latents, of_outputs = self.table.coefficients[self._step].reshape(2, -1).tolist()
        pairs = [*zip(of_latents, self._latents, strict=False), *zip(of_outputs, self._outputs, strict=False)]
        following = torch.zeros_like(latents)
        for factor, value in pairs:
            following = following + factor * value
        self._step += 1
        return (following,)
