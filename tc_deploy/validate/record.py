"""What a validation found, as one document: printed with ``--json``, written with ``-o``, drawn by the report.

In: a JSON file. Out: a checked :class:`ValidationRecord`. Never: imports an engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from tc_deploy.bundle import (
    Document,
    FileKind,
    NotOursError,
    canonical_json,
    known_document,
    read_document,
    write_output,
)

FORMAT_VERSION: Final = 2


class Metrics(Document):
    """How far one tensor lies from its reference; None where a figure is not finite."""

    max_abs: float | None
    median_abs: float | None
    max_rel: float | None
    """Of each element to its reference; elements below a thousandth of the largest are left out."""
    median_rel: float | None
    to_deviation: float | None
    """``max_abs`` in units of the reference's standard deviation."""
    cosine: float | None
    sqnr_db: float | None
    """Of the reference's power to the error's; None where the two are equal, too."""


class OutputRecord(Document):
    """One output of a graph, the worst over its samples."""

    name: str
    step: int
    """The step of the worst sample."""
    metrics: Metrics
    failures: tuple[str, ...]
    """What lies outside its tolerance, in words; empty where the output passes."""


class VariantRecord(Document):
    """One graph of the bundle."""

    name: str
    steps: tuple[int, ...]
    """The steps whose inputs were used."""
    outputs: tuple[OutputRecord, ...]

    @property
    def passed(self) -> bool:
        """Whether every output does."""
        return not any(output.failures for output in self.outputs)

    @property
    def worst(self) -> OutputRecord:
        """The output furthest from its reference."""
        return max(self.outputs, key=badness)


def badness(output: OutputRecord) -> tuple[bool, bool, float]:
    """Orders outputs: what fails, then what is not finite, then by the largest error."""
    metrics = output.metrics
    return bool(output.failures), metrics.max_abs is None, metrics.to_deviation or 0.0


class WiringFault(Document):
    """A step that read something else than its schedule says."""

    step: int
    graph: str
    tensor: str
    """Also a table's name."""
    text: str


class DriftRecord(Document):
    """The same sampling run several ways: relative L2 of the latents after each step, one column per cause.

    A column is None where nothing could be run to tell it from its neighbour, a number where latents are not finite.
    """

    algorithm: tuple[float | None, ...]
    """Cached against full, both in PyTorch."""
    export: tuple[float | None, ...] | None
    """ONNX Runtime against PyTorch, both cached."""
    engine: tuple[float | None, ...] | None
    """The target's engine kind, at the graphs' own precision, against ONNX Runtime."""
    precision: tuple[float | None, ...] | None
    """The target against its engine kind at the graphs' own precision; or, of half graphs, PyTorch in their precision
    against PyTorch in fp32."""
    total: tuple[float | None, ...]
    """The target against PyTorch in fp32, both cached."""
    image_psnr_db: float | None
    """Of the target's final latents to PyTorch's, both cached."""
    image_psnr_to_full_db: float | None
    """Of the target's final latents to the full run's in PyTorch: what a viewer gets."""
    exceeded: tuple[str, ...]
    """In words, where a column first exceeds its share, and by which block; and a picture that is too far off."""


class BlameRecord(Document):
    """Where a failing graph first departs from its reference."""

    graph: str
    step: int
    origin: Literal["export", "engine", "unknown"]
    """``export``: the ONNX graph itself is wrong, in any engine. ``engine``: a right graph is computed wrongly."""
    block: str | None
    """The transformer block; None where it is none or could not be found."""
    module: str | None
    operators: tuple[str, ...]
    """The nodes that can be to blame: they feed what departs, and nothing that is right."""
    weights: tuple[str, ...]
    """Initializers of theirs that are not the checkpoint's."""
    runs: int
    """Engine runs that it took."""
    text: str


class RepeatRecord(Document):
    """The same done twice."""

    what: str
    promised: bool
    """Whether the engine promises the same bits."""
    equal: bool
    max_abs: float | None
    """None where the results are equal, or are files."""

    @property
    def passed(self) -> bool:
        """Whether a promise is kept."""
        return self.equal or not self.promised


class ValidationRecord(Document):
    """A validation."""

    kind: Literal["validation"]
    format_version: Literal[2]
    made_by: str
    date: str
    hardware: str
    bundle: str
    manifest_sha256: str
    backend: str
    backend_version: str
    precision: str
    against: str
    sampled_on: str
    """What the saved samples are conditioned on, in words."""
    passed: bool
    variants: tuple[VariantRecord, ...]
    wiring: tuple[WiringFault, ...]
    drift: DriftRecord
    blame: tuple[BlameRecord, ...]
    repeats: tuple[RepeatRecord, ...]

    def remarks(self) -> tuple[str, ...]:
        """In words, everything that is outside its tolerance, and who is to blame."""
        lines = [
            f"{variant.name}: {failure} ({output.name}, step {output.step})"
            for variant in self.variants
            for output in variant.outputs
            for failure in output.failures
        ]
        lines += [f"step {fault.step}, {fault.graph}: {fault.text}" for fault in self.wiring]
        lines += self.drift.exceeded
        lines += [f"{blame.graph}, step {blame.step} ({blame.origin}): {blame.text}" for blame in self.blame]
        return (*lines, *(f"{repeat.what}: not the same bits" for repeat in self.repeats if not repeat.passed))


def read_validation(path: Path) -> ValidationRecord:
    """Read what a validation wrote.

    Raises:
        BundleError: there is no such file, or it is none of this version.
    """
    return read_document(ValidationRecord, path, "validation", "tc-deploy validate engines/NAME -o FILE")


def _is_validation(path: Path) -> bool:
    try:
        known_document(path, "validation", ValidationRecord, {})
    except NotOursError:
        return False
    return True


VALIDATION_FILE: Final = FileKind(name="a validation", is_ours=_is_validation)


def write_validation(record: ValidationRecord, path: Path) -> None:
    """Write it; ``check_output`` has looked at what is there.

    Raises:
        StorageError: the place cannot be written.
    """
    write_output(path, canonical_json(record.model_dump(mode="json")).encode("utf-8"))
