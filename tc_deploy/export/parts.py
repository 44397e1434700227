"""What becomes part of a bundle beside the steps: a decoder, text encoders, tokenizers.

In: a pipeline folder and what is wanted of it. Out: their graphs in the bundle, and how the manifest names them. What
is missing is found before anything heavy runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tc_deploy.errors import UsageError
from tc_deploy.export.decoder import check_decoder, export_decoder
from tc_deploy.export.saving import ExportedPart
from tc_deploy.export.text import export_text_encoder
from tc_deploy.golden import Trajectory
from tc_deploy.manifest import DECODER, TEXT_ENCODER, ComponentRecord, TextRecord
from tc_deploy.models.components import AUTOENCODERS, PipelineFolder
from tc_deploy.models.encoders import text_plan
from tc_deploy.models.family import Family
from tc_deploy.models.geometry import Geometry
from tc_deploy.models.hub import local_folder
from tc_deploy.models.loading import family_of_class, model_folder, pipeline_of
from tc_deploy.models.pipeline_index import AUTOENCODER
from tc_deploy.plan import Plan


@dataclass(kw_only=True)
class ExportedParts:
    """What was exported."""

    graphs: dict[str, ExportedPart] = field(default_factory=dict)
    decoder: ComponentRecord | None = None
    text: TextRecord | None = None


def parts_beside(plan: Plan) -> tuple[bool, bool]:
    """Whether there is a decoder, and whether there are text encoders, that can be exported with a plan's checkpoint.

    Raises:
        ModelError: the pipeline's index is no JSON object.
    """
    model = plan.model
    index = pipeline_of(model_folder(local_folder(Path(model.source), model.variant)))
    family = family_of_class(model.model_class, index.class_name)
    text = None if family is None else family.text
    encoders = () if text is None else (part.encoder for part in text.parts if not part.optional)
    present = [index.has(encoder) for encoder in encoders]
    return index.has(AUTOENCODER) and index.class_of(AUTOENCODER) in (None, *AUTOENCODERS), bool(present) and all(
        present
    )


class PipelineParts:
    """The parts of a pipeline that are wanted, checked but not loaded.

    Args:
        path: the pipeline's folder.
        family: the transformer's.
        geometry: its sizes.
        decoder: whether the decoder is wanted.
        text_encoder: whether the text encoders are.
        variant: which copy of their weights, where a part has it.
        progress: told where one has not.

    Raises:
        UsageError: the model has no use for one.
        ModelError: one is missing, damaged, a pickle, or of a class that is not known.
    """

    def __init__(
        self,
        path: Path,
        family: Family,
        geometry: Geometry,
        *,
        decoder: bool,
        text_encoder: bool,
        variant: str | None = None,
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._family, self._geometry, self._decoder = family, geometry, decoder
        self._text = None
        if decoder and geometry.pixels:
            raise UsageError(
                "the model's latents are pictures already; export without --with-decoder, or where they are not,"
                " calibrate with the pipeline's folder, whose vae/ says so"
            )
        if not (decoder or text_encoder):
            return
        self._pipeline = PipelineFolder(path, "decoder" if decoder else "text encoders", variant, progress)
        if decoder:
            check_decoder(self._pipeline, family, geometry)
        if text_encoder:
            self._text = text_plan(self._pipeline, family, geometry)

    def export(
        self,
        folder: Path,
        *,
        batch_size: int | None,
        trajectory: Trajectory | None,
        check: bool,
        progress: Callable[[str], None],
    ) -> ExportedParts:
        """Export them, one after another, into a bundle that is being made.

        Args:
            folder: the bundle.
            batch_size: samples per batch to fix; None leaves it open.
            trajectory: a sampling run, to check and validate the decoder with.
            check: compare every graph with PyTorch.
            progress: told what is being done.

        Raises:
            ModelError: a part cannot be loaded, or is not for this model.
            ExportError: a graph cannot be exported, or departs from PyTorch.
            BackendError: the engine that the check runs in is not installed.
        """
        made = ExportedParts()
        if self._decoder:
            made.graphs[DECODER], made.decoder = export_decoder(
                self._pipeline,
                self._family,
                self._geometry,
                folder,
                batch_size=batch_size,
                trajectory=trajectory,
                check=check,
                progress=progress,
            )
        if self._text is not None:
            made.graphs[TEXT_ENCODER], made.text = export_text_encoder(
                self._pipeline, self._text, folder, batch_size=batch_size, check=check, progress=progress
            )
        return made
