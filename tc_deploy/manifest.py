"""The manifests: what an exported bundle is, and what a built target is.

A bundle (``engines/NAME``) holds the plan it was made from, the graphs in ``onnx/`` and the tables that the runtime
reads; a target (``engines/NAME/<backend>``) holds what a backend made of it. Both are known by their manifest, which
is written last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from tc_deploy.bounds import MAX_AXES, Float32, Guidance, PositiveFloat32, Size, Step
from tc_deploy.bundle import (
    MANIFEST,
    Document,
    Earlier,
    FileRecord,
    FolderKind,
    NotOursError,
    canonical_json,
    file_names,
    known_document,
    read_document,
    sha256_of_file,
)
from tc_deploy.conditions import GUIDANCE
from tc_deploy.errors import BundleError
from tc_deploy.libraries import imported
from tc_deploy.plan import PLAN, TABLES, PromptsRecord, TextsRecord
from tc_deploy.schedule import FULL
from tc_deploy.types import Cleaning, Precision

FORMAT_VERSION: Final = 2
ONNX_FOLDER = "onnx"
WEIGHTS = "weights.bin"
STEPS = "steps"
"""File of the one graph that holds all variants which run the model, where a bundle has that."""
SOLVER = "solver"
DECODER = "decoder"
"""Graph that makes pictures of the last step's latents."""
TEXT_ENCODER = "text-encoder"
"""Graph that makes conditions of token ids."""
FP32_GRAPHS = (DECODER, TEXT_ENCODER)
"""They compute in fp32, whatever the precision of the others: autoencoders and T5 overflow fp16."""
TOKENIZERS_FOLDER = "tokenizers"
ENGINE_SUFFIX = ".engine"
"""Of an engine that is built ahead of its use; its :class:`EngineRecord` lies beside it, with ``.json``."""
KERNELS_SUFFIX = ".kernels"
"""Of what TensorRT-RTX compiles for an engine when it runs; it lies beside the engine, and in no manifest."""
SIGNATURE = "signature.json"
"""Of who vouches for the bundle, where somebody signed it."""
POLYGRAPHY = "polygraphy"
"""The folder of what engines are validated by."""
RUNTIME_TABLES = "runtime.safetensors"
"""Tables: timesteps (T,), input_scale (T,), coefficients (T, 2 * (history + 1)), init_noise_sigma (1,)."""

MODEL_BATCH = "model_batch"
"""The model's batch axis: one row per sample, or two with guidance (all conditional ones, then all unconditional)."""
BATCH = "batch"
"""The samples' own batch axis."""

HIDDEN_STATES = "hidden_states"
"""What the model makes its output of, at every step anew."""
LATENTS = "latents"
IMAGES = "images"
"""The decoder's output: (B, 3, H, W), or (B, 3, F, H, W) for video, in [-1, 1] where the decoder does not overshoot."""

SAMPLE = "sample"
"""Output of every step's graph: the model's output."""
TOKEN_INDEX = "token_index"  # noqa: S105 - a tensor's name
"""Input of a cached step that prunes: (model batch, sum of M over pruned blocks) int32. Where one graph holds all
variants, one for each group of blocks (``groups.py``)."""
COMPUTED = "computed"
"""Input of such a graph for a group that keeps nothing in some variant: (model batch,) int32, 0 in that one, else 1."""
FORECAST_WEIGHTS = "forecast_weights"
"""Input of a cached step with forecast order r > 0: (model batch, r + 1) float32."""
CACHE_PREFIX = "cache."
_ROWS = ".rows"
MODULE_END = "/"
"""In a graph's node names: before it stands the module that the node came from, behind it the value that it makes."""


def history_name(name: str, age: int) -> str:
    """Name of a cached tensor ``age`` full steps before the latest: ``cache.3.mlp``, then ``cache.3.mlp.1``."""
    return name if age == 0 else f"{name}.{age}"


def rows_name(name: str) -> str:
    """Name of the rows of a cached tensor that a step computes, where one graph holds all variants: it also reads it.

    A full step's are the cached tensor itself.
    """
    return name + _ROWS


def cached_name(output: str) -> str:
    """The cached tensor that a full step's output is."""
    return output.removesuffix(_ROWS)


def history_of(name: str) -> tuple[str, int]:
    """The cached tensor and its age that :func:`history_name` made ``name`` of."""
    head, _, tail = name.rpartition(".")
    return (head, int(tail)) if tail.isdigit() else (name, 0)


def variant_name(variant: int) -> str:
    """Name of a variant's graph: ``full``, ``cached-1``, ``cached-2``."""
    return "full" if variant == FULL else f"cached-{variant}"


ElementType: TypeAlias = Annotated[str, Field(pattern="^(float32|float16|bfloat16|int32|int64|bool)$")]
"""As numpy calls it."""
Axis: TypeAlias = Size | Annotated[str, Field(pattern="^[a-z][a-z_]*[0-9]*$")]
"""A size, or the name of an open axis."""


class TensorRecord(Document):
    """A graph's input or output, as stored."""

    name: str
    dtype: ElementType
    shape: Annotated[tuple[Axis, ...], Field(max_length=MAX_AXES)]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type of an array that holds it.

        Raises:
            BackendError: it is bfloat16, which numpy has from ml_dtypes, and that is not installed.
        """
        if self.dtype == "bfloat16":
            ml_dtypes = imported("ml_dtypes", purpose=f"{self.name} is bfloat16, which numpy has from a library: ")
            found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return found
        return np.dtype(self.dtype)

    def sized(self, axes: Mapping[str, int]) -> TensorRecord:
        """The tensor with some of its open axes closed."""
        shape = tuple(axes.get(size, size) if isinstance(size, str) else size for size in self.shape)
        return self.model_copy(update={"shape": shape})

    def shape_at(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape, with every open axis closed."""
        return tuple(axes[size] if isinstance(size, str) else size for size in self.shape)


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
        return any(tensor.name == HIDDEN_STATES for tensor in self.inputs)

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
    true_cfg: bool = False
    """Whether the family's pipeline calls that ``true_cfg_scale``: its ``guidance_scale`` is then the strength of a
    guidance that was distilled into the model, one of its conditions where it was."""
    embedded_guidance: Guidance | None = None
    """That strength where a request gives none."""


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
    format_version: Literal[2]
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
    sampled_on: PromptsRecord | TextsRecord | Literal["random", "labels"] | None = None
    """What the export sampled on, to compare its graphs with PyTorch and to leave samples to validate engines by. A
    file's path is relative to the bundle, or absolute."""
    solver: SolverRecord
    graphs: dict[str, GraphRecord]
    decoder: ComponentRecord | None = None
    """The autoencoder that the graph ``decoder`` is of; None where there is no such graph."""
    text: TextRecord | None = None
    """What the graph ``text-encoder`` reads and is of; None where there is no such graph."""
    files: dict[str, FileRecord]

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

    def graphs_by_file(self) -> dict[str, dict[str, GraphRecord]]:
        """Of each ONNX file the graphs that it holds, by name."""
        by_file: dict[str, dict[str, GraphRecord]] = {}
        for name, graph in self.graphs.items():
            by_file.setdefault(graph.file, {})[name] = graph
        return by_file

    def batch_axes(self, batch_size: int) -> dict[str, int]:
        """The sizes of the batch axes for so many samples."""
        return {BATCH: batch_size, MODEL_BATCH: batch_size * (2 if self.guided else 1)}

    @property
    def one_graph(self) -> bool:
        """Whether the variants that run the model are one file."""
        return f"{ONNX_FOLDER}/{STEPS}.onnx" in self.files


class GpuRecord(Document):
    """The GPU that engines were built on, and for."""

    name: str
    compute_capability: str
    driver: str


class ProfileRecord(Document):
    """What an engine reads and writes under one of its optimization profiles."""

    graphs: tuple[str, ...] = Field(min_length=1)
    """The graphs that it runs then, by name: variants of equal sizes."""
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        """All of them."""
        return (*self.inputs, *self.outputs)


class EngineIdentity(Document):
    """What an engine that is built ahead of its use is made from: equal identities, interchangeable engines."""

    backend: str
    backend_version: str
    options: dict[str, Any]
    onnx_sha256: str
    weights_sha256: str
    profiles: tuple[ProfileRecord, ...] = Field(min_length=1)
    """In the engine's order."""
    axes: dict[str, tuple[PositiveInt, PositiveInt, PositiveInt]]
    """Least, best and largest size of each batch axis that is left open."""


class EngineRecord(EngineIdentity):
    """What the build of an engine found, kept beside it: without its GPU an engine cannot be looked into."""

    layers: PositiveInt
    build_s: float
    peak_memory_mib: PositiveInt
    """Largest resident memory of the process that built it."""
    warnings: tuple[str, ...]
    """What the builder warned of; its log holds the rest."""


class TargetManifest(Document):
    """What a backend made of a bundle."""

    kind: Literal["target"]
    format_version: Literal[2]
    made_by: str
    backend: str
    backend_version: str
    options: dict[str, Any]
    precision: str
    gpu: GpuRecord | None
    """None where the build used none."""
    plan_sha256: str
    manifest_sha256: str
    """Of the bundle's manifest, which names every graph and table: a target of another bundle is found out by it."""
    files: dict[str, FileRecord]

    @property
    def computes_in(self) -> str:
        """The precision of matrix products, by the name that graphs have for theirs."""
        chosen = str(self.options.get("precision", self.precision))
        return {"f32": "fp32", "f16": "fp16"}.get(chosen, chosen)

    @property
    def options_in_words(self) -> str:
        """What it was built with, asked for or not, less the precision, which is always said."""
        said = {name: value for name, value in self.options.items() if name != "precision"}
        if said.get("threads") == 0:
            said["threads"] = "all"
        words = [
            f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            for name, value in sorted(said.items())
        ]
        return ", ".join(words) or "no options"


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
    read = {
        PLAN,
        TABLES,
        RUNTIME_TABLES,
        f"{ONNX_FOLDER}/{WEIGHTS}",
        *(graph.file for graph in manifest.graphs.values()),
        *(item.file for item in (manifest.text.tokenizers if manifest.text else ())),
    }
    unknown = sorted(read - manifest.files.keys())
    if unknown:
        raise BundleError(f"{folder / MANIFEST}: no checksum for {unknown[0]}, so it is not read; export again")
    return manifest


def read_target(bundle: Path, backend: str) -> TargetManifest:
    """Read a target's manifest and check that it was built from this very bundle.

    Raises:
        BundleError: there is none, or it was built from another plan or export.
    """
    rebuild = f"tc-deploy build {bundle} --backend {backend}"
    target = read_document(TargetManifest, bundle / backend / MANIFEST, "engine", rebuild)
    if target.backend != backend:
        raise BundleError(f"{bundle / backend}: holds engines of {target.backend}; build again with: {rebuild}")
    same_plan = target.plan_sha256 == read_manifest(bundle).files[PLAN].sha256
    if not same_plan or target.manifest_sha256 != sha256_of_file(bundle / MANIFEST):
        what = "another export of this bundle" if same_plan else "another plan"
        raise BundleError(f"{bundle / backend}: built from {what}; build again with: {rebuild}")
    return target


def read_engine_record(engine: Path) -> EngineRecord:
    """Read what was written down about an engine when it was built.

    Raises:
        BundleError: nothing readable lies beside it.
    """
    return read_document(EngineRecord, engine.with_suffix(".json"), "engine record", "tc-deploy build")


_FILES = frozenset({"kind", "format_version", "made_by", "files"})
_EARLIER = {
    1: Earlier(
        required=_FILES | {"precision", "batch_size", "latent_shape", "pixels", "conditions", "solver", "graphs"},
        optional=frozenset({"fp32_blocks", "decoder", "text"}),
    )
}
_EARLIER_TARGETS = {
    1: Earlier(
        required=_FILES
        | {"backend", "backend_version", "options", "precision", "gpu", "plan_sha256", "manifest_sha256"}
    )
}
_SIGNATURES = {1: Earlier(required=frozenset({"kind", "format_version", "made_by", "signs", "signature"}))}


def _target_names(folder: Path) -> Iterator[str]:
    """The files of a target.

    Raises:
        NotOursError: it is none.
    """
    names = file_names(known_document(folder / MANIFEST, "target", TargetManifest, _EARLIER_TARGETS)["files"])
    yield from names
    yield from (name.removesuffix(ENGINE_SUFFIX) + KERNELS_SUFFIX for name in names if name.endswith(ENGINE_SUFFIX))
    yield MANIFEST


def _bundle_names(folder: Path) -> Iterator[str]:
    """The files of a bundle and of the targets in it; Python leaves a compiled script where polygraphy ran one.

    Raises:
        NotOursError: it is none.
    """
    names = file_names(known_document(folder / MANIFEST, "bundle", Manifest, _EARLIER)["files"])
    for target in sorted(folder.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(NotOursError):
            if not target.parent.is_symlink():
                yield from (f"{target.parent.name}/{name}" for name in _target_names(target.parent))
    with contextlib.suppress(NotOursError):
        known_document(folder / SIGNATURE, "signature", None, _SIGNATURES)
        yield SIGNATURE
    yield from names
    yield from (f"{POLYGRAPHY}/__pycache__/{path.name}" for path in (folder / POLYGRAPHY).glob("__pycache__/*.pyc"))
    yield MANIFEST


TARGET_FOLDER: Final = FolderKind(name="a target", marker=MANIFEST, names=_target_names, is_inner=True)
BUNDLE_FOLDER: Final = FolderKind(name="a bundle", marker=MANIFEST, names=_bundle_names, inner=TARGET_FOLDER)


def write_manifest(manifest: Manifest | TargetManifest, folder: Path) -> None:
    """Write a manifest into a folder that is being made; call it last."""
    (folder / MANIFEST).write_text(canonical_json(manifest.model_dump(mode="json")), encoding="utf-8")
