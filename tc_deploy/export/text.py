"""The text encoders of a pipeline as one graph: token ids to the transformer's conditions.

In: a pipeline folder. Out: ``onnx/text-encoder.onnx``, its weights in the shared file, ``tokenizers/NAME.json``, and
its record. Encoders are loaded, exported and freed one after another, so no two of them are in memory at once; what
joins their results is a last small graph, and then all of them are made one. In fp32 whatever the other graphs are in:
T5 overflows fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tc_deploy.errors import ExportError
from tc_deploy.export.check import check_outputs
from tc_deploy.export.graphs import EXAMPLE_BATCH, onnx_from_graph
from tc_deploy.export.merge import merged_model
from tc_deploy.export.saving import ExportedPart, saved_graph
from tc_deploy.export.weights import WeightsFile
from tc_deploy.golden import GoldenGraph
from tc_deploy.manifest import (
    BATCH,
    ONNX_FOLDER,
    TEXT_ENCODER,
    TOKENIZERS_FOLDER,
    WEIGHTS,
    ComponentRecord,
    Role,
    TensorName,
    TextRecord,
    TokenizerRecord,
    condition_tensor,
    token_inputs,
)
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.encoders import TextPlan, check_conditions, fitting
from tc_deploy.models.text import TextPart
from tc_deploy.tokencache.graphs import NamedGraph
from tc_deploy.tokenization import Tokenizers, clean

PROBES = (
    "a cat on a mat",
    "",
    "A Red  bridge, in fog &amp; rain; 35mm photograph (detailed)",
    "ein Bär, наука, 東京 ☂",
    "one two three four five six seven eight nine ten " * 60,
)
"""Prompts that tokenizers are compared on, and examples are made of: short, empty, odd, and longer than any limit."""
FOLDED_ELEMENTS = 2**18
"""T5's position biases follow from its length alone, and UMT5 has one per layer: folded they would weigh more than they
cost."""


class EncoderGraph(NamedGraph):
    """One encoder: ids, and a mask where it takes one, to what it makes of them.

    Args:
        part: its description.
        encoder: of transformers.
    """

    batch_axis = BATCH
    folded_elements = FOLDED_ELEMENTS

    def __init__(self, part: TextPart, encoder: Any) -> None:
        super().__init__()
        self.module, self._part = encoder, part
        self.inputs, self.outputs = token_inputs(part.ids, part.mask), _values(part.output_names)
        self.title = part.encoder

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Encode ids (B, T) int32."""
        ids, *mask = (tensor.long() for tensor in self.named(tensors).values())
        return self._part.encode(self.module, ids, mask[0] if mask else None)


class JoinGraph(NamedGraph):
    """What the encoders made to the transformer's conditions.

    Args:
        plan: names both.
    """

    batch_axis = BATCH
    title = "the conditions"

    def __init__(self, plan: TextPlan) -> None:
        super().__init__()
        self._plan = plan
        masks = (part.mask for part in plan.parts if part.mask is not None)
        self.inputs = _values((*(name for part in plan.parts for name in part.output_names), *masks))
        defaults = plan.encoding.defaults
        made = (item.name for item in plan.geometry.conditions if item.name not in defaults)
        self.outputs = tuple(map(condition_tensor, made))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Join them."""
        conditions = self._plan.encoding.join(self.named(tensors), self._plan.geometry)
        # A copy: of an input that is an output too the exporter would make one value.
        return tuple(conditions[name].clone() for name in self.output_names)


def _values(names: Iterable[str]) -> tuple[TensorName, ...]:
    """What only passes from one part to the next."""
    return tuple(TensorName(name=name, role=Role.VALUE) for name in names)


def export_text_encoder(
    pipeline: PipelineFolder,
    plan: TextPlan,
    folder: Path,
    *,
    batch_size: int | None,
    check: bool,
    progress: Callable[[str], None],
) -> tuple[ExportedPart, TextRecord]:
    """Export the text encoders into a bundle that is being made.

    Args:
        pipeline: holds them.
        plan: what of it is exported.
        folder: the bundle; its weights file grows.
        batch_size: prompts per batch to fix; None leaves the axis open.
        check: compare the whole graph with PyTorch.
        progress: told what is being done.

    Raises:
        ModelError: an encoder cannot be loaded, or does not make what the transformer takes.
        ExportError: a graph cannot be exported, or departs from PyTorch; or a saved tokenizer departs from its own.
        BackendError: the engine that the check runs in is not installed, or tokenizers is not.
    """
    (folder / TOKENIZERS_FOLDER).mkdir()
    files = tuple(_saved_tokenizer(plan, part, folder) for part in plan.parts)
    encoding = plan.encoding
    record = TextRecord(cleaning=encoding.cleaning, tokenizers=files, defaults=_defaults(plan), components=())
    tokenizers = Tokenizers(folder, record)
    _check_tokenizers(pipeline, plan, tokenizers)
    rows = batch_size or EXAMPLE_BATCH
    prompts = [PROBES[number % len(PROBES)] for number in range(rows)]
    feed = {name: torch.from_numpy(array) for name, array in tokenizers.arrays(prompts, warn=False).items()}
    dynamic = batch_size is None
    models: dict[str, ir.Model] = {}
    made: dict[str, Tensor] = {}
    components = []
    for part in plan.parts:
        progress(f"exporting {part.encoder}")
        model, outputs, component = _exported_encoder(pipeline, part, feed, folder, dynamic=dynamic)
        models[part.encoder] = model
        made |= outputs
        components.append(component)
    join = JoinGraph(plan).eval()
    joined = {name: tensor for name, tensor in {**feed, **made}.items() if name in join.input_names}
    with torch.no_grad(), fitting(pipeline, "its text encoders"):
        conditions = dict(zip(join.output_names, join(*(joined[name] for name in join.input_names)), strict=True))
    check_conditions(pipeline, plan.geometry, conditions)
    models["conditions"] = onnx_from_graph(join, joined, dynamic_batch=dynamic)
    _pack(models["conditions"], {}, folder)
    path = folder / ONNX_FOLDER / f"{TEXT_ENCODER}.onnx"
    tokens = (tensor for part in plan.parts for tensor in token_inputs(part.ids, part.mask))
    graph = saved_graph(merged_model(models, TEXT_ENCODER), path, (*tokens, *join.outputs))
    samples = None
    if check:
        progress(f"comparing {TEXT_ENCODER} with PyTorch")
        error = check_outputs(path, feed, conditions)
        graph = graph.model_copy(update={"max_abs_error": error})
        samples = GoldenGraph(steps=(0,), inputs=(_arrays(feed),), outputs=(_arrays(conditions),))
    return ExportedPart(graph=graph, samples=samples), record.model_copy(update={"components": tuple(components)})


def _exported_encoder(
    pipeline: PipelineFolder, part: TextPart, feed: Mapping[str, Tensor], folder: Path, *, dynamic: bool
) -> tuple[ir.Model, dict[str, Tensor], ComponentRecord]:
    """One encoder's graph, its weights in the file, and what it makes in PyTorch; the encoder is freed on return."""
    loaded = pipeline.text_encoder(part)
    graph = EncoderGraph(part, loaded.module).eval()
    example = {name: feed[name] for name in part.input_names}
    with torch.no_grad(), fitting(pipeline, part.encoder):
        made = dict(zip(part.output_names, graph(*example.values()), strict=True))
    model = onnx_from_graph(graph, example, dynamic_batch=dynamic)
    _pack(model, dict(loaded.module.named_parameters()), folder)
    component = ComponentRecord(name=part.encoder, model_class=loaded.model_class, weights_sha256=loaded.weights_sha256)
    return model, made, component


def _pack(model: ir.Model, parameters: Mapping[str, Tensor], folder: Path) -> None:
    with WeightsFile(folder / ONNX_FOLDER / WEIGHTS, parameters) as weights:
        weights.pack(model)


def _defaults(plan: TextPlan) -> dict[str, float]:
    taken = {item.name for item in plan.geometry.conditions}
    return {name: value for name, value in plan.encoding.defaults.items() if name in taken}


def _saved_tokenizer(plan: TextPlan, part: TextPart, folder: Path) -> TokenizerRecord:
    """Write a tokenizer's own JSON, with padding and cutting set as the pipeline asks for them at each call."""
    from tokenizers import Tokenizer

    tokenizer, tokens = plan.tokenizers[part.encoder], plan.tokens[part.encoder]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(tokens, direction=tokenizer.truncation_side)
    backend.enable_padding(
        length=tokens,
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    file = f"{TOKENIZERS_FOLDER}/{part.tokenizer}.json"
    backend.save(str(folder / file))
    return TokenizerRecord(file=file, ids=part.ids, mask=part.mask, tokens=tokens)


def _check_tokenizers(pipeline: PipelineFolder, plan: TextPlan, tokenizers: Tokenizers) -> None:
    """See that the saved tokenizers make of the probes what transformers makes of them."""
    found = tokenizers.arrays(PROBES, warn=False)
    cleaned = [clean(probe, plan.encoding.cleaning) for probe in PROBES]
    for part in plan.parts:
        expected = plan.tokenizers[part.encoder](
            cleaned, padding="max_length", max_length=plan.tokens[part.encoder], truncation=True
        )
        same = np.array_equal(found[part.ids], expected["input_ids"])
        if part.mask is not None:
            same = same and np.array_equal(found[part.mask], expected["attention_mask"])
        if not same:
            raise ExportError(
                f"{pipeline.path / part.tokenizer}: the tokenizers library makes other ids of it than transformers; the"
                " bundle was not written; export without --with-text-encoder, and give embeddings with --conditions"
            )


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}
