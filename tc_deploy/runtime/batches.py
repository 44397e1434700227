"""One batch of a request on bound programs: what is written, run, read and checked.

In: a request, and which part of it. Out: latents, step by step or at the end. A batch that is not full repeats its last
sample. Never: holds a pipeline for somebody, or knows what runs next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import Buffer
from tc_deploy.errors import Cancelled
from tc_deploy.manifest import Role
from tc_deploy.runtime.binding import Bundle
from tc_deploy.runtime.bound import BoundProgram, BoundStep
from tc_deploy.runtime.buffers import BufferKey, condition_arrays, role_buffer
from tc_deploy.runtime.finite import first_bad_step, is_finite, latents_error
from tc_deploy.runtime.request import Request, noise_of
from tc_deploy.schedule import FULL
from tc_deploy.types import FloatArray


@dataclass(frozen=True, kw_only=True)
class Step:
    """What :meth:`tc_deploy.runtime.pipeline.Pipeline.steps` yields after each denoising step."""

    index: int
    """0 .. T-1."""
    total: int
    """T."""
    full: bool
    """Whether the step ran in full."""
    read_latents: Callable[[], FloatArray] = field(repr=False)
    """A copy of the latents (B, *latent shape) as they stand after this step; valid until the next one."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a request made."""

    latents: FloatArray
    """(n, *latent shape)."""
    images: NDArray[np.uint8] | None
    """(n, H, W) or (n, H, W, 3), of video (n, F, H, W, 3); None where the latents are not pictures and there is no
    decoder, or none was to run."""
    steps_full: int
    steps_cached: int


class Batches:
    """Runs batches on one set of buffers.

    Args:
        bundle: whose they are.
        buffers: all of a pipeline's.
        batch_size: samples that run together.
        check_finite: refuse to hand out what is not finite.
    """

    def __init__(
        self, bundle: Bundle, buffers: Mapping[BufferKey, Buffer], batch_size: int, *, check_finite: bool
    ) -> None:
        self._bundle, self._manifest, self._buffers = bundle, bundle.manifest, buffers
        self._batch_size, self._check_finite = batch_size, check_finite

    def close(self) -> None:
        """Let go of the buffers."""
        self._buffers = {}

    def run_whole(self, program: BoundProgram, request: Request, part: slice) -> FloatArray:
        """Run the part of a request that makes one batch, in one piece; the caller holds the pipeline.

        Returns:
            (n, *latent shape) the latents that it makes.

        Raises:
            NotFiniteError: they are not finite.
        """
        self._write(request, part)
        program.whole.run()
        return self._checked(program, first_samples(program.steps[-1].latents, request.count_in(part)), request, part)

    def _checked(self, program: BoundProgram, latents: FloatArray, request: Request, part: slice) -> FloatArray:
        """A run's last latents; where they are not finite, the same is run again to say from which step on.

        Raises:
            NotFiniteError: they are not.
        """
        if not self._check_finite or is_finite(latents):
            return latents
        self._write(request, part)
        step = first_bad_step(_latents_of(one, request.count_in(part)) for one in program.steps)
        raise latents_error(self._bundle.path, step, len(program.steps), request.guidance_scale)

    def _seen(self, index: int, step: BoundStep, count: int, guidance_scale: float | None) -> FloatArray:
        """The latents after a step, which somebody asks for on the way.

        Raises:
            NotFiniteError: they are not finite.
        """
        latents = first_samples(step.latents, count)
        if self._check_finite and not is_finite(latents):
            raise latents_error(self._bundle.path, index, self._bundle.plan.schedule.steps, guidance_scale)
        return latents

    def run(
        self,
        program: BoundProgram,
        request: Request,
        part: slice,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Iterator[Step]:
        """Run the part of a request that makes one batch, step by step; the caller holds the pipeline.

        Raises:
            Cancelled: ``should_cancel`` said so.
            NotFiniteError: what is read is not finite.
        """
        steps = program.steps
        self._write(request, part)
        if program.prologue is not None:
            program.prologue.run()
        count = request.count_in(part)
        for index, step in enumerate(steps):
            if should_cancel is not None and should_cancel():
                raise Cancelled(f"cancelled after {index} of {len(steps)} steps")
            step.whole.run()
            read: Callable[[], FloatArray] = functools.partial(self._seen, index, step, count, request.guidance_scale)
            if index + 1 == len(steps):
                last = self._checked(program, first_samples(step.latents, count), request, part)
                read = last.copy
            yield Step(index=index, total=len(steps), full=step.variant == FULL, read_latents=read)

    def _write(self, request: Request, part: slice) -> None:
        for key, array in self._arrays(request, part).items():
            self._buffers[key].write(array)

    def _arrays(self, request: Request, part: slice) -> dict[BufferKey, NDArray[Any]]:
        """What a batch of a request writes, by buffer; a batch that is not full repeats its last sample."""
        rows = np.arange(request.count)[part]
        noise = request.latents
        if noise is None:
            noise = noise_of(self._manifest.latent_shape, request.seed + int(rows[0]), len(rows))
        else:
            noise = noise[part]
        fill = np.minimum(np.arange(self._batch_size), len(rows) - 1)
        conditions = request.rows(rows[fill])
        start = noise[fill] * np.float32(self._manifest.solver.init_noise_sigma)
        scaled = start * self._bundle.first_scale
        halves = 2 if self._manifest.guided else 1
        arrays: dict[BufferKey, NDArray[Any]] = {
            role_buffer(Role.LATENTS, 0): start,
            role_buffer(Role.HIDDEN_STATES): np.concatenate([scaled] * halves),
        }
        for name, given in conditions.given.items():
            both = np.concatenate([given, conditions.unconditional[name]]) if self._manifest.guided else given
            arrays |= condition_arrays(self._buffers, name, both, self._bundle.plan.schedule.steps)
        if self._manifest.guided:
            arrays[role_buffer(Role.GUIDANCE_SCALE)] = np.full(self._batch_size, request.guidance_scale, np.float32)
        # The solver's history has weight 0 until it is filled, but 0 times what a failed request left may be NaN.
        for key in self._buffers:
            if key.role is Role.GUIDED_OUTPUT:
                arrays[key] = np.zeros_like(start)
        return arrays


def first_samples(buffer: Buffer, count: int) -> FloatArray:
    """What a batch holds of the request; the rest fills it up."""
    return buffer.read()[:count]


def _latents_of(step: BoundStep, count: int) -> FloatArray:
    step.whole.run()
    return first_samples(step.latents, count)
