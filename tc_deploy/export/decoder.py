"""The decoder of a pipeline's autoencoder as a graph: the last step's latents to pictures.

In: a pipeline folder. Out: ``onnx/decoder.onnx``, its weights in the shared file, its record. The latents' packing and
scaling are undone inside the graph. It is in fp32 whatever the other graphs are in: autoencoders overflow fp16
(diffusers marks such with ``force_upcast``), and it runs once where a step runs fifty times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_deploy.errors import ModelError
from tc_deploy.export.check import check_outputs
from tc_deploy.export.graphs import EXAMPLE_BATCH, onnx_from_graph
from tc_deploy.export.saving import ExportedPart, saved_graph
from tc_deploy.export.weights import WeightsFile
from tc_deploy.golden import Feed, GoldenGraph, Trajectory
from tc_deploy.manifest import (
    BATCH,
    DECODER,
    ONNX_FOLDER,
    WEIGHTS,
    ComponentRecord,
    Role,
    latents_tensor,
    only_tensor,
)
from tc_deploy.models.components import AUTOENCODERS, PipelineFolder
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry
from tc_deploy.models.pipeline_index import AUTOENCODER
from tc_deploy.tokencache.graphs import NamedGraph


class DecoderGraph(NamedGraph):
    """Latents (B, latent shape) to ``images`` (B, 3, H, W), or (B, 3, F, H, W).

    Args:
        autoencoder: of one of diffusers' classes.
        family: knows how latents are packed.
        geometry: the latents' sizes.
    """

    inputs = (latents_tensor(),)
    outputs = (only_tensor(Role.IMAGES),)
    title = "the decoder"
    batch_axis = BATCH

    def __init__(self, autoencoder: Any, family: Family, geometry: Geometry) -> None:
        super().__init__()
        self.module, self._family, self._geometry = autoencoder, family, geometry

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Decode, as the pipelines do after the last step."""
        (latents,) = tensors
        unpacked = self._family.unpacked(latents, self._geometry)
        return (self.module.decode(self._family.unscaled(unpacked, self.module.config), return_dict=False)[0],)


def export_decoder(
    pipeline: PipelineFolder,
    family: Family,
    geometry: Geometry,
    folder: Path,
    *,
    batch_size: int | None,
    trajectory: Trajectory | None,
    check: bool,
    progress: Callable[[str], None],
) -> tuple[ExportedPart, ComponentRecord]:
    """Export the decoder into a bundle that is being made.

    Args:
        pipeline: holds the autoencoder.
        family: the transformer's.
        geometry: its sizes.
        folder: the bundle; its weights file grows.
        batch_size: samples per batch to fix; None leaves the axis open.
        trajectory: a sampling run, whose last latents the graph is checked with and validated by; None takes noise,
            and leaves no samples.
        check: compare the graph with PyTorch.
        progress: told what is being done.

    Raises:
        ModelError: the autoencoder cannot be loaded, or is not for these latents.
        ExportError: it cannot be exported, or departs from PyTorch.
        BackendError: the engine that the check runs in is not installed.
    """
    progress(f"exporting {DECODER}")
    loaded = pipeline.autoencoder()
    graph = DecoderGraph(loaded.module, family, geometry).eval()
    rows = batch_size or EXAMPLE_BATCH
    drawn = torch.randn((rows, *geometry.latent_shape), generator=torch.Generator().manual_seed(0))
    real = drawn[:0] if trajectory is None else torch.from_numpy(trajectory.cached[-1])
    example = torch.cat([real, drawn])[:rows]
    path = folder / ONNX_FOLDER / f"{DECODER}.onnx"
    with torch.no_grad():
        model = onnx_from_graph(graph, {Role.LATENTS: example}, dynamic_batch=batch_size is None)
        with WeightsFile(folder / ONNX_FOLDER / WEIGHTS, dict(loaded.module.named_parameters())) as weights:
            weights.pack(model)
        record = saved_graph(model, path, (*graph.inputs, *graph.outputs))
        component = ComponentRecord(
            name=AUTOENCODER, model_class=loaded.model_class, weights_sha256=loaded.weights_sha256
        )
        if not check:
            return ExportedPart(graph=record, samples=None), component
        progress(f"comparing {DECODER} with PyTorch")
        (images,) = graph(example)
    error = check_outputs(path, {Role.LATENTS: example}, {Role.IMAGES: images})
    samples = None
    if trajectory is not None:
        read: Feed = {Role.LATENTS: real.numpy()}
        made: Feed = {Role.IMAGES: images[: len(real)].numpy()}
        samples = GoldenGraph(steps=(len(trajectory.cached) - 1,), inputs=(read,), outputs=(made,))
    return ExportedPart(graph=record.model_copy(update={"max_abs_error": error}), samples=samples), component


def check_decoder(pipeline: PipelineFolder, family: Family, geometry: Geometry) -> None:
    """See that a pipeline's autoencoder decodes a model's latents, before it is loaded.

    Raises:
        ModelError: it is missing, damaged, a pickle or of a class that is not known; it takes other latents, or does
            not say how they are scaled.
    """
    config = pipeline.check_autoencoder()
    where, name = pipeline.path / AUTOENCODER, config["_class_name"]
    latents = family.unpacked(torch.zeros((1, *geometry.latent_shape)), geometry)
    kind = AUTOENCODERS[name]
    channels = config.get(kind.channels)
    if (latents.ndim, latents.shape[1]) != (kind.axes, channels):
        raise ModelError(
            f"{where}: a {name} of {channels} channels does not decode latents of shape {tuple(latents.shape[1:])};"
            " name the model's own pipeline with --pipeline"
        )
    try:
        family.unscaled(latents, config)
    except ModelError as error:
        raise ModelError(f"{where}/config.json: {error}; take the configuration that came with the weights") from None
