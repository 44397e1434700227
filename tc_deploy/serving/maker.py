"""A loaded bundle as a server uses it: requests to samples, ticks, latents to pictures.

In: ``engines/NAME`` and a number of slots. Out: what one thread calls, one call after another. Never: decides what
runs, or knows of clients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer
from tc_deploy.backends.load import load_target
from tc_deploy.bundle import MANIFEST, reading, sha256_of_file
from tc_deploy.conditions import Arrays, placeholder_conditions
from tc_deploy.errors import UsageError
from tc_deploy.manifest import BUNDLE_FOLDER, DECODER, TEXT_ENCODER, Manifest
from tc_deploy.remarks import warn_of_plan
from tc_deploy.runtime.binding import Binder, read_bundle
from tc_deploy.runtime.buffers import own_buffer
from tc_deploy.runtime.course import STANDARD, Place, Tick
from tc_deploy.runtime.finite import is_finite, latents_error, pixels_error
from tc_deploy.runtime.layout import layout_of
from tc_deploy.runtime.pixels import images_from_pixels
from tc_deploy.runtime.program import Call, text_call
from tc_deploy.runtime.request import Request, noise_of
from tc_deploy.runtime.slots import Sample, Slots
from tc_deploy.runtime.text import PromptEncoder
from tc_deploy.types import FloatArray

_COLOUR_AXES = 3
"""Of one picture's latents or pixels: channels, height, width; video has one more."""


class Maker:
    """See the module.

    Args:
        path: ``engines/NAME``.
        backend: which of the bundle's targets; None takes the only one.
        slots: samples that run at a time.
        require_signature: a public key in PEM, whose holder must have signed the bundle.

    Raises:
        BundleError: nothing exported or built there, a file is missing, truncated or altered, or the signature that is
            required does not fit.
        BackendError: the engine is not installed, refuses the graphs, or its device lacks memory.
        UsageError: the bundle makes no pictures, or needs more slots.
        OutOfMemoryError: the machine lacks memory.
    """

    def __init__(self, path: Path, backend: str | None, *, slots: int, require_signature: Path | None = None) -> None:
        with reading(path, BUNDLE_FOLDER):
            bundle = read_bundle(path, backend, require_signature)
            self.path, self._bundle, self.manifest = path, bundle, bundle.manifest
            self.size = picture_size(path, bundle.manifest)
            self.bundle_id = sha256_of_file(path / MANIFEST)[:16]
            warn_of_plan(bundle.plan, path)
            device, graphs = load_target(path, bundle.manifest, bundle.backend)
        self.slots = Slots(bundle, device, graphs, slots)
        self._encoder: PromptEncoder | None = None
        self._decoder: BoundGraph | None = None
        self._latents: Buffer
        self._pixels: Buffer
        batch = bundle.manifest.batch_size or 1
        axes = bundle.manifest.batch_axes(batch)
        if bundle.manifest.text is not None:
            call = text_call(bundle.manifest.graphs[TEXT_ENCODER])
            binder = Binder(bundle, device, graphs, layout_of(bundle.manifest.graphs, [call], axes))
            self._encoder = PromptEncoder(bundle, bundle.manifest.text, binder, batch)
        if bundle.manifest.decoder is not None:
            graph = bundle.manifest.graphs[DECODER]
            inputs, outputs = (
                {each.name: own_buffer(each) for each in tensors} for tensors in (graph.inputs, graph.outputs)
            )
            call = Call(graph=DECODER, inputs=inputs, outputs=outputs)
            binder = Binder(bundle, device, graphs, layout_of(bundle.manifest.graphs, [call], axes))
            self._decoder = device.capture([binder.bind(call)])
            [self._latents], [self._pixels] = (
                [binder.buffers[key] for key in keys.values()] for keys in (inputs, outputs)
            )

    def warm_up(self) -> dict[tuple[int, int], float]:
        """Run everything once, and one whole sample that must come out finite.

        Returns:
            What a call costs, in seconds by variant and number of slots.

        Raises:
            BackendError: an engine fails.
            NotFiniteError: the sample does not come out.
        """
        if self._encoder is not None:
            self._encoder.encode([""])
        seconds = self.slots.measured()
        self.self_test()
        return seconds

    def self_test(self) -> None:
        """Make a picture in the first slot, which must be free, and look whether it is finite.

        Raises:
            BackendError: an engine fails.
            NotFiniteError: the picture does not come out.
        """
        values = placeholder_conditions(self.manifest.conditions, 1)
        sample = Sample(
            course=self.slots.courses[STANDARD],
            noise=noise_of(self.manifest.latent_shape, 0, 1)[0],
            given=_one(values.given),
            unconditional=_one(values.unconditional) if self.manifest.guided else {},
            guidance_scale=self.manifest.solver.guidance_scale,
        )
        self.slots.start(0, sample)
        step, size = 0, self.slots.sizes[0]
        while step < sample.course.steps:
            kind = sample.course.kinds[step]
            assert kind is not None, "a sample stands at steps that run the model"
            self.slots.run(Tick(kind=kind, size=size, places=(Place(slot=0, step=step),)))
            step = sample.course.following(step)
        self.pictures(self.slots.latents(0, step))

    def samples(self, request: Request, course: str) -> list[Sample]:
        """A request's pictures, one by one; its prompts are encoded here.

        Raises:
            UsageError: the prompts do not fit, as where an encoding is not finite.
            BackendError: the text encoder fails.
            NotFiniteError: the text encoder makes values that are not finite.
        """
        if request.prompts is not None:
            assert self._encoder is not None, "a bundle without a text encoder takes no prompts"
            texts = (*request.prompts.given, *request.prompts.negative)
            request = request.encoded(self.manifest, self._encoder.encode(texts))
        samples = []
        for number in range(request.count):
            rows = request.rows([number])
            noise = noise_of(self.manifest.latent_shape, request.seed + number, 1)[0]
            samples.append(
                Sample(
                    course=self.slots.courses[course],
                    noise=noise if request.latents is None else request.latents[number],
                    given=_one(rows.given),
                    unconditional=_one(rows.unconditional),
                    guidance_scale=request.guidance_scale,
                )
            )
        return samples

    def pictures(self, latents: FloatArray) -> NDArray[np.uint8]:
        """One sample's last latents as a picture: (H, W) or (H, W, 3).

        Raises:
            NotFiniteError: the latents are not finite, or what the decoder makes of them is not.
            BackendError: the decoder fails.
        """
        if not is_finite(latents):
            raise latents_error(self.path, None, self._bundle.plan.schedule.steps, None)
        if self._decoder is None:
            return _first(images_from_pixels(latents[None]))
        self._latents.write(np.repeat(latents[None], self.manifest.batch_size or 1, axis=0))
        self._decoder.run()
        pixels: Any = self._pixels.read()[:1]
        if not is_finite(pixels):
            raise pixels_error(self.path)
        return _first(images_from_pixels(pixels))


def _one(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The only row of conditions."""
    return {name: array[0] for name, array in arrays.items()}


def _first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture: NDArray[np.uint8] = images[0]
    return picture


def picture_size(path: Path, manifest: Manifest) -> tuple[int, int]:
    """Height and width of the pictures that a bundle makes.

    Raises:
        UsageError: it makes latents only, or video.
    """
    shape: tuple[Any, ...] = manifest.latent_shape
    if manifest.decoder is not None:
        shape = manifest.graphs[DECODER].outputs[0].shape[1:]
    elif not manifest.pixels:
        raise UsageError(
            f"{path}: makes latents, no pictures, so there is nothing to serve; export again with --with-decoder"
        )
    if len(shape) != _COLOUR_AXES:
        raise UsageError(f"{path}: makes video, which the server does not send; use: tc-deploy generate {path}")
    return int(shape[-2]), int(shape[-1])
