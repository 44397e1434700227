"""The graphs of every family against PyTorch: full and cached steps, any batch and a fixed one."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import zoo
from tolerances import tolerance
from torch import Tensor

from tc_deploy.errors import ExportError
from tc_deploy.export.graphs import onnx_from_graph
from tc_deploy.groups import group_inputs
from tc_deploy.manifest import MODEL_BATCH, Role
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions, Values
from tc_deploy.models.loading import load_model
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.forward import run_full
from tc_deploy.tokencache.graphs import ModelGraph, OpenStepGraph, StepGraph
from tc_deploy.types import Attention, Reuse

KEEP = {
    "uvit": (5, 0, None),
    "sd35": (0, 5, None),
    "flux": (5, 0, 0, None),
    "flux-schnell": (5,),
    "flux2": (5, 0, 0, None),
    "z-image": (5, 0, None),
    "hunyuan-dit": (5, 0, 5, None),
}
"""Image tokens that blocks keep: some, none, or all (None)."""
STATIC = ("z-image", "chroma")
"""Forwards that fix the batch."""
BATCH = 2
QUICK = [
    *(("pixart", FULL), ("pixart", 1), ("sd35", 1), ("flux", 1), ("wan", 1), ("uvit", 1)),
    *(("qwen-image", 1), ("z-image", 1)),
]
"""An export takes seconds: what these leave out runs with the slow tests."""


def settings(
    model: DiffusionTransformer, keep: Sequence[int | None], reuse: Reuse, attention: Attention, order: int
) -> CacheRecord:
    counts = tuple(model.geometry.tokens if count is None else count for count in keep)
    return CacheRecord(reuse=reuse, attention=attention, forecast_order=order, keep_counts=(counts, counts))


def draw(graph: StepGraph, batch: int) -> dict[str, Tensor]:
    """Inputs of a step, every tensor and sample its own."""
    model, cache = graph.model, graph.cache
    generator = torch.Generator().manual_seed(batch)
    inputs = zoo.inputs_of(model, batch, seed=batch)
    with torch.no_grad():
        _, noted = run_full(model, cache, inputs)
    drawn = {}
    for name in graph.input_names:
        if name in inputs:
            drawn[name] = inputs[name]
        elif name == Role.FORECAST_WEIGHTS:
            drawn[name] = torch.randn((batch, cache.forecast_order + 1), generator=generator)
        elif name == Role.TOKEN_INDEX:
            drawn[name] = draw_index(model, cache.keep_counts[0], batch, generator)
        else:
            of = noted[name if name in noted else name.rpartition(".")[0]]
            drawn[name] = torch.randn(of.shape, generator=generator)
    return drawn


def draw_index(
    model: DiffusionTransformer, keep_counts: tuple[int, ...], batch: int, generator: torch.Generator
) -> Tensor:
    tokens = model.geometry.tokens
    counts = [keep_counts[block] for block in pruned_blocks(keep_counts, tokens)]
    rows = [
        torch.cat([torch.randperm(tokens, generator=generator)[:count] for count in counts])
        for _ in range(1 if model.family.shares_index else batch)
    ]
    return (rows[0] if model.family.shares_index else torch.stack(rows)).int()


def exported(graph: StepGraph, path: Path, *, dynamic_batch: bool) -> onnxruntime.InferenceSession:
    model = onnx_from_graph(graph, draw(graph, BATCH), dynamic_batch=dynamic_batch)
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    assert not [value.name for value in graph_values(model) if value.dtype == ir.DataType.DOUBLE]
    read = {value.name for node in model.graph.all_nodes() for value in node.inputs if value is not None}
    assert set(graph.input_names) <= read
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def graph_values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]


def assert_same_as_pytorch(graph: StepGraph, session: onnxruntime.InferenceSession, batch: int) -> None:
    assert_equal(graph, session, draw(graph, batch))


def assert_equal(graph: ModelGraph, session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> None:
    feed = {name: inputs[name].numpy() for name in graph.input_names}
    found = session.run(list(graph.output_names), feed)
    with torch.no_grad():
        expected = graph(*(inputs[name] for name in graph.input_names))
    told = any(condition.values is Values.GUIDANCE for condition in graph.model.geometry.conditions)
    allowed = tolerance("onnxruntime", "fp32", "large_angle_max_abs" if told else "max_abs")
    for name, mine, theirs in zip(graph.output_names, found, expected, strict=True):
        assert mine.shape == tuple(theirs.shape)
        largest = max(1.0, float(theirs.abs().max()))
        assert np.abs(mine - theirs.numpy()).max() / largest <= allowed, name


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, marks=() if (name, variant) in QUICK else pytest.mark.slow)
        for name in zoo.NAMES
        for variant in (FULL, 1)
    ],
)
def test_a_graph_computes_what_pytorch_does_at_any_batch(name: str, variant: int, tmp_path: Path) -> None:
    model = zoo.model(name)
    cache = settings(model, KEEP.get(name, (0, 5)), Reuse.BRANCH, Attention.ALL, order=1)
    graph = StepGraph(model, cache, variant, phases=(1,))
    session = exported(graph, tmp_path / "graph.onnx", dynamic_batch=name not in STATIC)
    for batch in (BATCH,) if name in STATIC else (1, 2, 3):
        assert_same_as_pytorch(graph, session, batch)
    index = {tensor.name: tensor.shape for tensor in session.get_inputs()}.get(Role.TOKEN_INDEX)
    if variant != FULL and name not in STATIC:
        assert index == ([5] if model.family.shares_index else [MODEL_BATCH, 5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keep"), [("sd35", (5, 0, 5)), ("flux", (0, 5, 5, 0)), ("wan", (5, 0)), ("uvit", (0, 5, 5))]
)
def test_a_graph_with_residuals_computes_what_pytorch_does_at_its_fixed_batch(
    name: str, keep: tuple[int, ...], tmp_path: Path
) -> None:
    model = zoo.model(name)
    graph = StepGraph(model, settings(model, keep, Reuse.RESIDUAL, Attention.KEPT, order=0), 1, phases=(1,))
    session = exported(graph, tmp_path / "graph.onnx", dynamic_batch=False)
    assert all(isinstance(size, int) for tensor in session.get_inputs() for size in tensor.shape)
    assert_same_as_pytorch(graph, session, BATCH)


def draw_variant(graph: OpenStepGraph, variant: int, batch: int) -> dict[str, Tensor]:
    """Inputs of the graph of all variants, at which it is one of them; every tensor and sample its own."""
    model, cache = graph.model, graph.cache
    generator = torch.Generator().manual_seed(batch)
    row = None
    if variant != FULL:
        keep_counts = cache.keep_counts[variant - 1]
        row = draw_index(model, keep_counts, 1, generator).reshape(-1).numpy()
    given = group_inputs(graph.groups, cache, model.geometry.tokens, variant, row)
    drawn = zoo.inputs_of(model, batch, seed=batch)
    with torch.no_grad():
        _, noted = run_full(model, cache, drawn)
    for tensor in graph.inputs:
        name = tensor.name
        if name in given:
            values = torch.from_numpy(given[name].copy())
            drawn[name] = values if graph.is_shared(tensor) else values.expand(batch, *values.shape).contiguous()
        elif name == Role.FORECAST_WEIGHTS:
            drawn[name] = torch.randn((batch, cache.forecast_order + 1), generator=generator)
        elif tensor.cache is not None:
            drawn[name] = torch.randn(noted[tensor.cache].shape, generator=generator)
    return drawn


@pytest.mark.parametrize(
    ("name", "keep", "reuse", "attention"),
    [
        pytest.param("wan", ((5, 0), (0, 5)), Reuse.BRANCH, Attention.KEPT, marks=pytest.mark.slow),
        pytest.param("sd35", ((5, 0, 5), (0, 5, None)), Reuse.BRANCH, Attention.ALL, marks=pytest.mark.slow),
        pytest.param("flux", ((0, 5, 5, 0), (5, 0, None, 5)), Reuse.RESIDUAL, Attention.KEPT, marks=pytest.mark.slow),
        pytest.param("uvit", ((0, 5, 5), (5, 0, 0)), Reuse.RESIDUAL, Attention.ALL, marks=pytest.mark.slow),
        ("flux-schnell", ((5,), (3,)), Reuse.BRANCH, Attention.KEPT),
    ],
)
def test_the_graph_of_all_variants_computes_what_pytorch_does(
    name: str, keep: tuple[tuple[int | None, ...], ...], reuse: Reuse, attention: Attention, tmp_path: Path
) -> None:
    model = zoo.model(name)
    tokens = model.geometry.tokens
    first, second = (tuple(tokens if count is None else count for count in counts) for counts in keep)
    cache = CacheRecord(reuse=reuse, attention=attention, forecast_order=2, keep_counts=(first, second))
    graph = OpenStepGraph(model, cache, phases=(1, 2))
    path = tmp_path / "graph.onnx"
    ir.save(onnx_from_graph(graph, draw_variant(graph, FULL, BATCH), dynamic_batch=True), path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for variant, batch in product((FULL, 1, 2), (1, 3)):
        assert_equal(graph, session, draw_variant(graph, variant, batch))


@pytest.mark.parametrize(("name", "grid"), [("flux", (64, 64)), ("pixart", (80, 48))])
def test_what_follows_from_the_token_grid_is_a_constant_at_real_sizes_too(
    name: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    changes = {
        "flux": {"num_layers": 0, "num_single_layers": 1, "attention_head_dim": 128},
        "pixart": {"num_layers": 1},
    }
    if name == "flux":
        changes["flux"]["axes_dims_rope"] = (16, 56, 56)  # type: ignore[assignment]
    size = (2 * grid[0], 2 * grid[1])
    model = load_model(
        zoo.save(name, tmp_path / "model", **changes[name]), ModelOptions(latent_size=size, text_tokens=4)
    )
    cache = settings(model, (None,), Reuse.BRANCH, Attention.KEPT, order=0)
    graph = StepGraph(model, cache, FULL, phases=())
    made = onnx_from_graph(graph, zoo.inputs_of(model, 1, seed=1), dynamic_batch=False)
    assert not [value.name for value in graph_values(made) if value.dtype == ir.DataType.DOUBLE]
    for node in made.graph.all_nodes():
        varies = [value for value in node.inputs if value is not None and not value.is_initializer()]
        assert varies or not node.inputs, f"{node.op_type} of constants, at every step"


def test_a_batch_that_a_forward_fixes_is_found() -> None:
    model = zoo.model("uvit")
    call = model.family.call
    fixing = dataclasses.replace(
        model.family, call=lambda module, inputs, geometry: call(module, inputs, geometry) * len(inputs["label"])
    )
    model = dataclasses.replace(model, family=fixing)
    graph = StepGraph(model, settings(model, (None,) * 3, Reuse.BRANCH, Attention.KEPT, order=0), FULL, phases=())
    with pytest.raises(ExportError, match=r"variant 0: the batch axis of hidden_states came out fixed at 2"):
        onnx_from_graph(graph, draw(graph, BATCH), dynamic_batch=True)
