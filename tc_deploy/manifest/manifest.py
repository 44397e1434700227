"""What an exported bundle says of itself: ``engines/NAME``.

It holds the plan it was made from, the graphs in ``onnx/`` and the tables that the runtime reads, and is known by its
manifest, which is written last. In: its folder. Out: its manifest. Never: reads another file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from tc_deploy.bounds import MAX_AXES, Float32, Guidance, PositiveFloat32, Size, Step
from tc_deploy.bundle import MANIFEST, Document, Files, read_document
from tc_deploy.conditions import GUIDANCE
from tc_deploy.errors import BundleError
from tc_deploy.manifest.tensors import BATCH, GIVEN_ROLES, MODEL_BATCH, RUN_BATCH, ElementType, Role, TensorRecord
from tc_deploy.plan import PLAN, TABLES, PromptsRecord, TextsRecord
from tc_deploy.schedule import FULL
from tc_deploy.types import Cleaning, GuidanceRule, Precision

FORMAT_VERSION: Final = 3
ONNX_FOLDER = "onnx"
WEIGHTS = "weights.bin"
STEPS = "steps"
"""File of the one graph that holds all variants which run the model, where a bundle has that."""
SOLVER = "solver"
PROLOGUE = "prologue"
"""Graph of what follows from a request's conditions alone, where that has left the steps' graphs."""
SCHEDULE = "schedule"
"""Graph of what follows from the timestep, and maybe conditions, likewise; one call of it is for many steps."""
DECODER = "decoder"
"""Graph that makes pictures of the last step's latents."""
TEXT_ENCODER = "text-encoder"
"""Graph that makes conditions of token ids."""
PROLOGUE_GRAPHS = (PROLOGUE, SCHEDULE)
"""What runs before a request's first step, in this order."""
FP32_GRAPHS = (DECODER, TEXT_ENCODER)
"""They compute in fp32, whatever the precision of the others: autoencoders and T5 overflow fp16."""
TOKENIZERS_FOLDER = "tokenizers"
SIGNATURE = "signature.json"
"""Of who vouches for the bundle, where somebody signed it."""
POLYGRAPHY = "polygraphy"
"""The folder of what engines are validated by."""
RUNTIME_TABLES = "runtime.safetensors"
"""Tables: timesteps (T,), input_scale (T,), coefficients (T, 2 * (history + 1)), init_noise_sigma (1,)."""

MODULE_END = "/"
"""In a graph's node names: before it stands the module that the node came from, behind it the value that it makes."""


def model_axes(model_batch: int, steps: int) -> dict[str, int]:
    """The sizes of the axes of the model's graphs, for so many rows of a batch in a run of so many steps."""
    return {MODEL_BATCH: model_batch, RUN_BATCH: model_batch * steps}


def variant_name(variant: int) -> str:
    """Name of a variant's graph: ``full``, ``cached-1``, ``cached-2``."""
    return "full" if variant == FULL else f"cached-{variant}"


class GraphRecord(Document):
    """One graph of a bundle."""

    file: str
    """Its ONNX file. Variants may be one file, in which the axes are open in whose sizes they differ."""
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    max_abs_error: float | None
    """Largest departure from PyTorch found right after export; None where the check was turned off."""
    snr_to_fp32_db: float | None = None
    """The fp32 output's power over that of the error that half precision makes in one pass; None where nothing is half
    or the check was turned off."""

    @property
    def runs_model(self) -> bool:
        """Whether it is a variant that runs the model."""
        return any(tensor.role is Role.HIDDEN_STATES for tensor in self.inputs)

    def sized(self, axes: Mapping[str, int]) -> GraphRecord:
        """The graph with some of its open axes closed."""
        inputs, outputs = (tuple(tensor.sized(axes) for tensor in tensors) for tensors in (self.inputs, self.outputs))
        return self.model_copy(update={"inputs": inputs, "outputs": outputs})


class ConditionRecord(Document):
    """One input that conditions the model."""

    name: str
    dtype: ElementType
    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_AXES)]
    classes: Size | None
    """Labels run from 0 to classes - 1; ``classes`` itself means "no class"."""


class SolverRecord(Document):
    """What the runtime must know of the sampler beside its tables."""

    history: Step
    """Earlier latents and guided outputs that one update reads."""
    init_noise_sigma: PositiveFloat32
    guidance_scale: Guidance | None
    """Classifier-free guidance by default; None where the model's batch has no unconditional half."""
    guidance_rule: GuidanceRule = GuidanceRule.PLAIN
    """How the family's pipeline combines the two halves."""
    true_cfg: bool = False
    """Whether the family's pipeline calls that ``true_cfg_scale``: its ``guidance_scale`` is then the strength of a
    guidance that was distilled into the model, one of its conditions where it was."""
    embedded_guidance: Guidance | None = None
    """That strength where a request gives none."""


class LoraRecord(Document):
    """A LoRA that was made part of the exported weights."""

    file: str
    """Its name. A hint, not identity."""
    sha256: str
    scale: Float32


class ComponentRecord(Document):
    """A part of a pipeline that a graph was exported from."""

    name: str
    """Its folder: ``vae``, ``text_encoder_2``."""
    model_class: str
    weights_sha256: str


class TokenizerRecord(Document):
    """A tokenizer, as the ``tokenizers`` library reads it, and the text encoder's inputs that it makes."""

    file: str
    """``tokenizers/NAME.json``."""
    ids: str
    """Input of token ids, (B, tokens) int32."""
    mask: str | None
    """Input that tells the prompt, 1, from padding, 0: (B, tokens) int32."""
    tokens: Size
    """What every prompt is padded or cut to."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs by name."""
        return (self.ids,) if self.mask is None else (self.ids, self.mask)


class TextRecord(Document):
    """How a prompt becomes conditions."""

    cleaning: Cleaning
    tokenizers: tuple[TokenizerRecord, ...] = Field(min_length=1)
    defaults: dict[str, Float32]
    """Conditions that no text makes, with what stands for them where a request gives none."""
    components: tuple[ComponentRecord, ...]


class Manifest(Document):
    """An exported bundle."""

    kind: Literal["bundle"]
    format_version: Literal[3]
    made_by: str
    plan_sha256: str
    """Of the plan that it was exported from (:func:`tc_deploy.plan.content_sha256`)."""
    precision: Precision
    fp32_blocks: tuple[str, ...] = ()
    """Blocks that are in fp32 all the same."""
    batch_size: Size | None
    """Samples per batch where the graphs fix it; None where they take any."""
    latent_shape: Annotated[tuple[Size, ...], Field(min_length=2, max_length=MAX_AXES - 1)]
    """One sample's latents: (C, H, W), (C, F, H, W) for video, (tokens, channels) where they come packed."""
    pixels: bool
    """The latents are pictures in [-1, 1]; otherwise a decoder is needed to see them."""
    conditions: tuple[ConditionRecord, ...]
    loras: tuple[LoraRecord, ...] = ()
    """What the graphs' weights hold beside the plan's checkpoint."""
    sampled_on: PromptsRecord | TextsRecord | Literal["random", "labels"] | None = None
    """What the export sampled on, to compare its graphs with PyTorch and to leave samples to validate engines by. A
    file's path is relative to the bundle, or absolute."""
    solver: SolverRecord
    graphs: dict[str, GraphRecord]
    decoder: ComponentRecord | None = None
    """The autoencoder that the graph ``decoder`` is of; None where there is no such graph."""
    text: TextRecord | None = None
    """What the graph ``text-encoder`` reads and is of; None where there is no such graph."""
    files: Files

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        for name, record in ((DECODER, self.decoder), (TEXT_ENCODER, self.text)):
            if (name in self.graphs) != (record is not None):
                raise ValueError(f"the graph {name} and what is said of it go together, found one without the other")
        return self

    @property
    def guided(self) -> bool:
        """Whether the model batch holds an unconditional half."""
        return self.solver.guidance_scale is not None

    @property
    def embeds_guidance(self) -> bool:
        """Whether the model is told the strength of a guidance that was distilled into it."""
        return any(item.name == GUIDANCE for item in self.conditions)

    @property
    def takes_labels(self) -> bool:
        """Whether class labels condition the model."""
        return any(item.classes is not None for item in self.conditions)

    @property
    def documents(self) -> set[str]:
        """The files that say what is run; graphs and weights are whose engines read them."""
        tokenizers = self.text.tokenizers if self.text else ()
        return {PLAN, TABLES, RUNTIME_TABLES, *(item.file for item in tokenizers)}

    def graphs_by_file(self) -> dict[str, dict[str, GraphRecord]]:
        """Of each ONNX file the graphs that it holds, by name."""
        by_file: dict[str, dict[str, GraphRecord]] = {}
        for name, graph in self.graphs.items():
            by_file.setdefault(graph.file, {})[name] = graph
        return by_file

    def batch_axes(self, batch_size: int, steps: int = 1) -> dict[str, int]:
        """The sizes of the batch axes for so many samples, in a run of so many steps."""
        return model_axes(batch_size * (2 if self.guided else 1), steps) | {BATCH: batch_size}

    @property
    def has_prologue(self) -> bool:
        """Whether steps read what is made before the first of them."""
        return any(name in self.graphs for name in PROLOGUE_GRAPHS)

    @property
    def given(self) -> tuple[TensorRecord, ...]:
        """What whoever drives the model gives: latents and conditions, each a row of the model's batch."""
        found: dict[str, TensorRecord] = {}
        for name in (variant_name(FULL), *PROLOGUE_GRAPHS):
            for tensor in self.graphs[name].inputs if name in self.graphs else ():
                if tensor.role in GIVEN_ROLES:
                    shape = tuple(MODEL_BATCH if size == RUN_BATCH else size for size in tensor.shape)
                    found.setdefault(tensor.name, tensor.model_copy(update={"shape": shape}))
        return tuple(found.values())

    @property
    def one_graph(self) -> bool:
        """Whether the variants that run the model are one file."""
        return f"{ONNX_FOLDER}/{STEPS}.onnx" in self.files


def check_is_whole(folder: Path) -> None:
    """Check that a folder is not what is left of a bundle: graphs, and no manifest, which is written last.

    Raises:
        BundleError: it is.
    """
    if (folder / ONNX_FOLDER).is_dir() and not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{folder}: a half-written or damaged bundle ({ONNX_FOLDER}/ is there, {MANIFEST} is not); remove"
            " the folder and export again"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest; its files are not checked yet (``check_files``).

    Raises:
        BundleError: there is none, it is not of this version, or it leaves out the checksum of a file that is read.
    """
    check_is_whole(folder)
    if not (folder / MANIFEST).exists() and (folder / PLAN).is_file():
        raise BundleError(
            f"{folder} is a plan, not a bundle; export it with: tc-deploy export {folder} -o engines/NAME"
        )
    manifest = read_document(Manifest, folder / MANIFEST, "bundle", f"tc-deploy export calibration/NAME -o {folder}")
    read = {*manifest.documents, f"{ONNX_FOLDER}/{WEIGHTS}", *(graph.file for graph in manifest.graphs.values())}
    unknown = sorted(read - manifest.files.keys())
    if unknown:
        raise BundleError(f"{folder / MANIFEST}: no checksum for {unknown[0]}, so it is not read; export again")
    return manifest
