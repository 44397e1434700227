"""What a user asks an export for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tc_deploy.errors import UsageError
from tc_deploy.models.lora import Lora
from tc_deploy.precisions import PRECISIONS
from tc_deploy.types import Precision


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a plan's graphs are to be exported.

    Raises:
        UsageError: a value is out of range, or does nothing without another one.
    """

    model_path: Path | None = None
    """The checkpoint, where it is not where the plan says."""
    batch_size: int | None = None
    """Samples per batch to fix in the graphs; None leaves the batch axis dynamic."""
    precision: Precision = Precision.FP32
    """What matrix products, their weights and the caches are in (``tokencache/precision.py``); inputs and outputs of
    the model stay fp32, and so do decoder and text encoders."""
    fp32_blocks: Collection[str] = ()
    """Names of blocks that stay in fp32 altogether, where ``precision`` is half."""
    check: bool = True
    """Compare every graph with PyTorch, under the same precision."""
    graphs_from: tuple[Path, ...] = ()
    """Bundles of the same model, whose full and cached graphs are taken where they are the very ones: of two plans that
    differ in schedule or sampler, the second costs no export."""
    samples: bool = True
    """Also write what engines are validated by, unless ``graphs_from`` is given, ``check`` is off, or the graphs are in
    bf16."""
    one_graph: bool = False
    """Make one graph of the variants that run the model, its token counts open, so that an engine holds the weights
    once; each variant is a profile of it."""
    prologue: bool = False
    """Let what follows from the request and the timesteps alone leave the steps' graphs; it runs once for a request."""
    with_decoder: bool = False
    """Also export the decoder of the pipeline's autoencoder."""
    with_text_encoder: bool = False
    """Also export the pipeline's text encoders, and its tokenizers."""
    pipeline_path: Path | None = None
    """The folder that holds these; None looks where the checkpoint is."""
    variant: str | None = None
    """Which copy of the checkpoint's, the decoder's and the text encoders' weights; None takes the plan's."""
    loras: tuple[Lora, ...] = ()
    """Made part of the exported weights."""
    conditions: str | None = None
    """A file of prompt embeddings to compare graphs on, and to leave samples by, in place of the plan's prompts; or
    ``random``."""

    def __post_init__(self) -> None:
        """Check what can be checked without a plan."""
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"static batch must be at least 1, found {self.batch_size}")
        if self.fp32_blocks and self.precision is Precision.FP32:
            raise UsageError("in fp32 every block is; --fp32-block goes with --precision fp16 or bf16")
        if self.prologue and self.graphs_from:
            raise UsageError("graphs of another bundle compute everything themselves; export anew to have a prologue")
        if self.loras and self.graphs_from:
            raise UsageError("a LoRA changes the weights, so graphs cannot be taken from another bundle; export anew")
        if self.pipeline_path is not None and not (self.with_decoder or self.with_text_encoder):
            raise UsageError(
                "--pipeline names where decoder and text encoders are; give --with-decoder or --with-text-encoder with"
                " it"
            )

    @property
    def wants_samples(self) -> bool:
        """Whether the graphs are to leave what engines are validated by."""
        return self.samples and self.check and not self.graphs_from and PRECISIONS[self.precision].leaves_samples
