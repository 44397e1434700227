"""The runtime: a built bundle to pictures, without torch.

Everything is allocated and every graph bound when a pipeline is made; a request writes noise and conditions into fixed
buffers, runs a fixed list of calls and reads the latents. A pipeline owns its buffers: two pipelines in two threads
are independent, one pipeline serves one request at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Device, Graph
from tc_deploy.backends.load import load_target
from tc_deploy.backends.process import check_process
from tc_deploy.bundle import reading
from tc_deploy.conditions import Arrays, placeholder_conditions
from tc_deploy.consistency import Documents
from tc_deploy.errors import UsageError
from tc_deploy.manifest import BUNDLE_FOLDER, DECODER, SOLVER, Role, variant_name
from tc_deploy.remarks import warn_of_plan
from tc_deploy.runtime.batches import Batches, Result, Step, first_samples
from tc_deploy.runtime.binding import Binder, bundle_of, read_bundle
from tc_deploy.runtime.bound import BoundProgram, Watch, bound_program
from tc_deploy.runtime.buffers import role_buffer
from tc_deploy.runtime.finite import is_finite, pixels_error
from tc_deploy.runtime.layout import checked_batch_size, pipeline_layout, pipeline_programs
from tc_deploy.runtime.pixels import images_from_pixels
from tc_deploy.runtime.program import decoder_call, prologue_calls
from tc_deploy.runtime.request import Request, checked_request, checked_seed, noise_of
from tc_deploy.runtime.text import PromptEncoder
from tc_deploy.schedule import FULL
from tc_deploy.types import FloatArray

__all__ = ["Pipeline", "Result", "Step", "load"]


def load(
    path: str | Path,
    backend: str | None = None,
    *,
    batch_size: int | None = None,
    require_signature: str | Path | None = None,
) -> Pipeline:
    """Load a built bundle.

    Args:
        path: ``engines/NAME``.
        backend: which of the bundle's targets; None takes the only one.
        batch_size: samples that run together. Requests of more run in turns, a turn of fewer is filled up. None
            takes the bundle's own, or 1.
        require_signature: a public key in PEM, whose holder must have signed the bundle and the target
            (``tc-deploy sign``); None asks for no signature.

    Raises:
        BundleError: nothing exported or built there, a file is missing, truncated or altered, or the signature that
            is required is missing or does not fit.
        BackendError: the engine is not installed or refuses the graphs.
        UsageError: the batch size does not fit the bundle, or it has several targets and none is named.
    """
    key = None if require_signature is None else Path(require_signature)
    return Pipeline(Path(path), backend, batch_size=batch_size, require_signature=key)


class Pipeline:
    """A loaded bundle; see :func:`load` for the arguments and errors.

    ``watch`` sees every graph as it is bound; what it makes of them runs when a run is taken step by step. A call that
    neither looks at a step nor may cancel is one piece to the device, and nobody watches its graphs.
    ``engines`` are run in place of the target's: a device and the bundle's graphs on it.
    ``documents`` stand in place of the bundle's own, and were checked: another plan's that needs the same graphs.
    Without ``check_finite`` whatever comes out is handed out, to those who look into it or only time it.
    """

    def __init__(
        self,
        path: Path,
        backend: str | None = None,
        *,
        batch_size: int | None = None,
        require_signature: Path | None = None,
        watch: Watch | None = None,
        engines: tuple[Device, Mapping[str, Graph]] | None = None,
        documents: Documents | None = None,
        check_finite: bool = True,
    ) -> None:
        with reading(path, BUNDLE_FOLDER):
            bundle = read_bundle(path, backend, require_signature)
            if documents is not None:
                bundle = bundle_of(path, bundle.backend, documents)
            self.path = path
            self.backend, self.manifest, self.plan = bundle.backend, bundle.manifest, bundle.plan
            self.batch_size = checked_batch_size(self.manifest, batch_size)
            self._check_finite = check_finite
            warn_of_plan(bundle.plan, path)
            self._lock = threading.Lock()
            device, graphs = engines or load_target(path, self.manifest, self.backend)
        planned, full = pipeline_programs(self.manifest, self.plan)
        layout = pipeline_layout(self.manifest, (planned, full), self.batch_size)
        binder = Binder(bundle, device, graphs, layout)
        self._buffers = binder.buffers
        self._batches = Batches(bundle, self._buffers, self.batch_size, check_finite=check_finite)
        before = prologue_calls(self.manifest.graphs, len(planned))
        self._cached_program: BoundProgram | None = bound_program(before, planned, binder, device, watch)
        self._full_program: BoundProgram | None = bound_program(before, full, binder, device, watch)
        self._decoder: BoundGraph | None = None
        if self.manifest.decoder is not None:
            # The last step leaves its latents in the same place whichever steps are full.
            self._decoder = device.capture([binder.bind(decoder_call(self.manifest.graphs[DECODER], planned))])
        self._encoder: PromptEncoder | None = None
        if self.manifest.text is not None:
            self._encoder = PromptEncoder(bundle, self.manifest.text, binder, self.batch_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free buffers and engines as soon as no run holds them; the pipeline cannot be used afterwards."""
        self._cached_program = self._full_program = None
        self._decoder = self._encoder = None
        self._buffers = {}
        self._batches.close()

    def warmup(self) -> None:
        """Run every graph once and capture the plan's run where the device can: the first request pays for nothing.

        Raises:
            UsageError: the pipeline is closed, or is running a request.
            BackendError: an engine fails, or the device cannot capture the run.
        """
        with self._claimed():
            if (before := self._opened(full=False).prologue) is not None:
                before.run()
            for graph in self.variants().values():
                graph.run()
            if self._encoder is not None:
                self._encoder.warmup()
            if self._decoder is not None:
                self._decoder.run()
            self._opened(full=False).whole.prepare()

    def variants(self) -> dict[str, BoundGraph]:
        """Every graph of the schedule once, by name, bound as at its first step; for timing, on whatever lies there.

        Raises:
            UsageError: the pipeline is closed.
        """
        steps = self._opened(full=False).steps
        bound = {variant_name(step.variant): step.model for step in reversed(steps)}
        return {name: bound[name] for name in sorted(bound, reverse=True)} | {SOLVER: steps[0].solver}

    def __call__(
        self,
        *,
        class_labels: Sequence[int] | None = None,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: Sequence[str] | str | None = None,
        conditions: Arrays | None = None,
        unconditional: Arrays | None = None,
        count: int | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        latents: FloatArray | None = None,
        full: bool = False,
        decode: bool = True,
        on_step: Callable[[int, Step], None] | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Result:
        """Make one picture per label, prompt or row of the conditions. All arguments are checked before anything runs.

        Without ``on_step`` and ``should_cancel`` the steps of a batch are queued at once and waited for at its end.

        Args:
            class_labels: n labels, for a model that takes labels. Give these, ``prompt`` or ``conditions``.
            prompt: a text, or n, for a bundle with a text encoder. One that is longer than a tokenizer's limit is cut,
                with a warning in the log, as diffusers does.
            negative_prompt: what guidance goes away from: one text for all pictures, or n; "" if not given.
            conditions: by the name that the manifest has, (n, ...), such as prompt embeddings and their masks; beside
                ``prompt`` those that no text makes, such as the distilled ``guidance`` of FLUX.
            unconditional: the same for the unconditional half of a guided batch, (n, ...) or (1, ...) for all pictures
                alike; labels may be left out, which means "no class".
            count: pictures to make with a model that takes no condition, 1 if not given.
            seed: picture i has seed ``seed + i``; a seed gives the same picture whatever else is in the batch.
            guidance_scale: instead of the plan's, as the family's pipeline of diffusers means it: classifier-free
                guidance, where 1 and less are none; for FLUX the strength of the distilled guidance.
            true_cfg_scale: for FLUX, classifier-free guidance instead of the plan's; 1 and less are none.
            latents: (n, *latent shape) standard normal noise to start from, instead of the seeds'.
            full: run every step in full, for comparison.
            decode: make pictures of the latents, where the bundle has a decoder.
            on_step: called with the number of the first picture in the batch and the step.
            should_cancel: asked before every step.

        Raises:
            UsageError: an argument is out of range or does not fit the bundle, the pipeline is closed, or it is
                running another request.
            Cancelled: ``should_cancel`` said so.
            BackendError: an engine fails, or the device cannot capture the run.
            NotFiniteError: what the engines make is not finite; names the step at which it began.
        """
        request = checked_request(
            self.manifest,
            class_labels=class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            conditions=conditions,
            unconditional=unconditional,
            count=count,
            seed=seed,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            latents=latents,
        )
        variants = [step.variant for step in self._opened(full=full).steps]
        in_steps = on_step is not None or should_cancel is not None
        made = []
        images = []
        with self._claimed():
            request = self._encoded(request)
            for start in range(0, request.count, self.batch_size):
                part = slice(start, start + self.batch_size)
                if in_steps:
                    for step in self._batches.run(self._opened(full=full), request, part, should_cancel):
                        if on_step is not None:
                            on_step(start, step)
                        if step.index + 1 == step.total:
                            made.append(step.read_latents())
                else:
                    made.append(self._batches.run_whole(self._opened(full=full), request, part))
                if decode and self.manifest.decoder is not None:
                    self._opened(full=full)
                    images.append(self._decoded(len(made[-1])))
                elif decode and self.manifest.pixels:
                    images.append(images_from_pixels(made[-1]))
        return Result(
            latents=np.concatenate(made),
            images=np.concatenate(images) if images else None,
            steps_full=variants.count(FULL),
            steps_cached=len(variants) - variants.count(FULL),
        )

    def steps(
        self,
        *,
        class_labels: Sequence[int] | None = None,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: Sequence[str] | str | None = None,
        conditions: Arrays | None = None,
        unconditional: Arrays | None = None,
        count: int | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        latents: FloatArray | None = None,
        full: bool = False,
    ) -> Iterator[Step]:
        """Run one batch step by step; leave the iterator to cancel.

        Args:
            class_labels: at most ``batch_size`` labels.
            prompt: as for a call, at most ``batch_size``.
            negative_prompt: as for a call.
            conditions: as for a call, for at most ``batch_size`` pictures.
            unconditional: as for a call.
            count: as for a call.
            seed: as for a call.
            guidance_scale: as for a call.
            true_cfg_scale: as for a call.
            latents: as for a call.
            full: as for a call.

        Returns:
            An iterator over one :class:`Step` after each denoising step.

        Raises:
            UsageError: an argument is out of range, does not fit the bundle, or the pipeline is closed (at once); it
                is running another request (at the first step).
        """
        request = checked_request(
            self.manifest,
            class_labels=class_labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            conditions=conditions,
            unconditional=unconditional,
            count=count,
            seed=seed,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            latents=latents,
        )
        if request.count > self.batch_size:
            raise UsageError(
                f"steps makes at most {self.batch_size} pictures at a time, the batch size, found"
                f" {request.count}; load with a larger batch size"
            )
        self._opened(full=full)
        return self._claimed_steps(request, full=full)

    def _claimed_steps(self, request: Request, *, full: bool) -> Iterator[Step]:
        with self._claimed():
            program = self._opened(full=full)  # it may have been closed since
            yield from self._batches.run(program, self._encoded(request), slice(self.batch_size))

    def _encoded(self, request: Request) -> Request:
        """A request with the conditions of its prompts; the caller holds the pipeline."""
        if request.prompts is None:
            return request
        assert self._encoder is not None, "a bundle without a text encoder takes no prompts"
        return request.encoded(self.manifest, self._encoder.encode((*request.prompts.given, *request.prompts.negative)))

    def _decoded(self, count: int) -> NDArray[np.uint8]:
        """Pictures of the latents that the last step left; the caller holds the pipeline, which is open."""
        assert self._decoder is not None, "an open pipeline of a bundle with a decoder has it"
        self._decoder.run()
        pixels = first_samples(self._buffers[role_buffer(Role.IMAGES)], count)
        if self._check_finite and not is_finite(pixels):
            raise pixels_error(self.path)
        return images_from_pixels(pixels)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Hold the pipeline for one request."""
        check_process()
        if not self._lock.acquire(blocking=False):
            raise UsageError("the pipeline is running another request; a pipeline serves one at a time, load another")
        try:
            yield
        finally:
            self._lock.release()

    def _opened(self, *, full: bool) -> BoundProgram:
        program = self._full_program if full else self._cached_program
        if program is None:
            raise UsageError("the pipeline is closed; load the bundle again")
        return program

    def placeholders(self, count: int) -> dict[str, Any]:
        """Arguments for ``count`` pictures whose looks do not matter, for runs that are timed."""
        values = placeholder_conditions(self.manifest.conditions, count)
        if not self.manifest.conditions:
            return {"count": count}
        asked: dict[str, Any] = {"conditions": values.given, "unconditional": values.unconditional}
        return asked if self.manifest.guided else {"conditions": values.given}

    def noise(self, seed: int, count: int) -> FloatArray:
        """The noise that seeds ``seed`` .. ``seed + count - 1`` stand for: (count, *latent shape), normal.

        A picture's noise depends on its seed alone. numpy reserves the right to draw normals in another way in a later
        version; a test pins the values.

        Raises:
            UsageError: ``seed`` is out of range.
        """
        return noise_of(self.manifest.latent_shape, checked_seed(seed), count)
