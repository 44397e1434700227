"""Half precision: what of a model is half and what is not, in PyTorch and in the graphs; and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from bundles import HALF, Made, SaveDit, make_plan, run_cli, snapshot
from tolerances import tolerance
from torch import Tensor

import tc_deploy
from tc_deploy.errors import BackendError, BundleError, ExportError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.check import check_graph, example_inputs
from tc_deploy.export.options import ExportOptions
from tc_deploy.golden import read_golden
from tc_deploy.manifest import ONNX_FOLDER, SOLVER, WEIGHTS, Role, TensorRecord, read_manifest, variant_name
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.plan import CacheRecord, load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.schedule import full_schedule
from tc_deploy.tokencache.forward import run_full
from tc_deploy.tokencache.graphs import StepGraph
from tc_deploy.tokencache.precision import half_products
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise
from tc_deploy.types import Attention, Precision, Reuse, Skip

HALVES = (Precision.FP16, Precision.BF16)
TORCH_TYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
ENGINES = {Precision.FP16: "onnxruntime", Precision.BF16: "openvino"}
LARGEST_WEIGHTS = 0.6
"""Of the fp32 bundle's: half, and tensors that start at pages."""
FP16_LARGEST = 65504.0
PLANTED = 3e4
"""A gate that a product in fp16 holds, but its multiple does not."""


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> tuple[Precision, Made]:
    return request.param, request.getfixturevalue(request.param.value)


def inputs_of(model: DiffusionTransformer, rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn((rows, *model.geometry.latent_shape), generator=generator),
        "timestep": torch.rand(rows, generator=generator) * 999,
        **model.random_conditions(rows, generator),
    }


def snr_db(found: Tensor, expected: Tensor) -> float:
    return float(10 * torch.log10(expected.square().mean() / (found - expected).square().mean()))


# ------------------------------------------------------------------------------------------------------- in PyTorch


@pytest.mark.parametrize("precision", HALVES)
@torch.no_grad()
def test_the_model_is_left_as_it_was(tiny_dit: DiffusionTransformer, precision: Precision) -> None:
    given = inputs_of(tiny_dit, 2)
    before, state = tiny_dit.forward(given), dict(tiny_dit.module.named_parameters())
    with half_products(tiny_dit, precision):
        inside = dict(tiny_dit.module.named_parameters())
        assert list(inside) == list(state)
        assert snr_db(tiny_dit.forward(given), before) > tolerance(ENGINES[precision], precision, "least_snr_db")
    with pytest.raises(IndexError), half_products(tiny_dit, precision):
        tiny_dit.forward({**given, "hidden_states": torch.zeros(1)})
    after = dict(tiny_dit.module.named_parameters())
    assert all(after[name] is state[name] for name in state)
    assert not [module for module in tiny_dit.module.modules() if "forward" in vars(module)]
    assert torch.equal(tiny_dit.forward(given), before)


@pytest.mark.parametrize("precision", HALVES)
@torch.no_grad()
def test_rounded_weights_compute_the_same_numbers(tiny_dit: DiffusionTransformer, precision: Precision) -> None:
    given = inputs_of(tiny_dit, 2)
    cache = CacheRecord(
        keep_counts=((0, 8, 16), (0, 0, 0)),
        attention=Attention.ALL,
        reuse=Reuse.BRANCH,
        forecast_order=1,
        skip=Skip.MODEL,
    )
    before = dict(tiny_dit.module.named_parameters())
    with half_products(tiny_dit, precision):
        expected, noted = run_full(tiny_dit, cache, given)
    with half_products(tiny_dit, precision, stored=False):
        assert {parameter.dtype for parameter in tiny_dit.module.parameters()} == {torch.float32}
        found, cached = run_full(tiny_dit, cache, given)
    assert all(before[name] is after for name, after in tiny_dit.module.named_parameters())
    allowed = tolerance(ENGINES[precision], precision, "max_abs")
    assert float((found - expected).abs().max()) <= allowed
    assert {name: tensor.dtype for name, tensor in cached.items()} == {
        name: tensor.dtype for name, tensor in noted.items()
    }
    assert not torch.equal(found, tiny_dit.forward(given))


def test_fp32_changes_nothing(tiny_dit: DiffusionTransformer) -> None:
    before = dict(tiny_dit.module.named_parameters())
    with half_products(tiny_dit, Precision.FP32):
        inside = dict(tiny_dit.module.named_parameters())
        assert all(inside[name] is before[name] for name in before)
        assert not [module for module in tiny_dit.module.modules() if "forward" in vars(module)]


def test_which_weights_are_half(tiny_dit: DiffusionTransformer) -> None:
    ends = ("pos_embed.proj.weight", "proj_out_1.weight", "proj_out_2.bias")
    inside = ("transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.2.norm1.linear.bias")
    for precision, type_of_ends in ((Precision.FP16, torch.float16), (Precision.BF16, torch.float32)):
        with half_products(tiny_dit, precision):
            found = {name: parameter.dtype for name, parameter in tiny_dit.module.named_parameters()}
        assert {found[name] for name in ends} == {type_of_ends}
        assert {found[name] for name in inside} == {TORCH_TYPES[precision]}


@torch.no_grad()
def test_what_overflows_in_fp16_is_kept_in_fp32(tiny_dit: DiffusionTransformer) -> None:
    model = dataclasses.replace(tiny_dit, module=copy.deepcopy(tiny_dit.module))
    width = model.geometry.width
    gate = model.module.get_submodule("transformer_blocks.0.norm1.linear").get_parameter("bias")
    gate[2 * width : 3 * width] = PLANTED
    given = inputs_of(model, 2)
    residual: list[Tensor] = []
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: residual.append(args[0]))
    expected = model.forward(given)
    with half_products(model, Precision.FP16):
        found = model.forward(given)
    hook.remove()
    for stream in residual:
        assert stream.dtype == torch.float32
        assert float(stream.abs().max()) > FP16_LARGEST
    assert snr_db(found, expected) > tolerance("onnxruntime", "fp16", "least_snr_db")
    everything = model.module.half()
    given = {name: value.half() if value.is_floating_point() else value.long() for name, value in given.items()}
    assert not everything(**given, return_dict=False)[0].isfinite().all()


@torch.no_grad()
def test_a_block_can_stay_in_fp32(tiny_dit: DiffusionTransformer) -> None:
    given = inputs_of(tiny_dit, 2)
    cache = CacheRecord(
        keep_counts=((8, 8, 8), (8, 8, 8)),
        attention=Attention.ALL,
        reuse=Reuse.BRANCH,
        forecast_order=0,
        skip=Skip.BLOCKS,
    )
    exact, _ = run_full(tiny_dit, cache, given)
    errors = {}
    for kept in ((), ("transformer_blocks.1",), tiny_dit.block_names):
        for stored in (True, False):
            with half_products(tiny_dit, Precision.FP16, kept, stored=stored):
                found, noted = run_full(tiny_dit, cache, given)
                weights = dict(tiny_dit.module.named_parameters())
            for number, block in enumerate(tiny_dit.block_names):
                kind = torch.float32 if block in kept else torch.float16
                mine = {tensor.dtype for name, tensor in noted.items() if name.startswith(f"cache.{number}.")}
                assert mine == {kind}
                assert weights[f"{block}.attn1.to_q.weight"].dtype == (kind if stored else torch.float32)
            errors[len(kept), stored] = float((found - exact).abs().mean())
    for stored in (True, False):
        assert 0 < errors[3, stored] < errors[1, stored] < errors[0, stored]


# ------------------------------------------------------------------------------------------------------- the graphs


def overflowing(module: Any) -> None:
    """Scale what the second block's MLP makes beyond fp16, and its gate down, so that fp32 sees no difference."""
    block = module.transformer_blocks[1]
    gates = block.norm1.linear
    with torch.no_grad():
        for layer, rows, scale in (
            (block.ff.net[2], slice(None), 1e6),
            (gates, slice(-gates.out_features // 6, None), 1e-6),
        ):
            layer.weight[rows] *= scale
            layer.bias[rows] *= scale


def test_a_block_that_overflows_is_named_and_can_stay_in_fp32(save_dit: SaveDit, tmp_path: Path) -> None:
    settings = HALF | {"cache": HALF["cache"] | {"keep_counts": ((0, 8), (0,))}}
    plan = make_plan(save_dit(tmp_path / "model", edit=overflowing, num_layers=2), tmp_path / "plan", **settings)
    command = ("export", plan, "-o", tmp_path / "bundle", "--precision", "fp16")
    answer = run_cli(*command)
    assert answer.code == ExportError.exit_code
    assert "transformer_blocks.1.ff.net.2 overflows fp16 in a sampling run; keep its block" in answer.error
    assert "--fp32-block transformer_blocks.1, or" in answer.error
    assert not (tmp_path / "bundle").exists()
    assert run_cli(*command, "--fp32-block", "transformer_blocks.1").code == 0
    manifest = read_manifest(tmp_path / "bundle")
    types = {tensor.name: tensor.dtype for tensor in manifest.graphs["full"].outputs}
    assert types["cache.1.mlp"] == "float32"
    assert {types[name] for name in types if name.startswith("cache.0")} == {"float16"}
    assert (manifest.graphs["full"].snr_to_fp32_db or 0) > tolerance("onnxruntime", "fp16", "least_snr_db")
    assert "fp16 with transformer_blocks.1 in fp32, batch any" in run_cli("inspect", tmp_path / "bundle").out
    assert run_cli("build", tmp_path / "bundle", "--threads", 1).code == 0
    assert run_cli("validate", tmp_path / "bundle").code == 0


def test_a_block_that_is_not_there_is_refused(fp16: Made, tmp_path: Path) -> None:
    command = ("export", fp16.plan, "-o", tmp_path / "bundle", "--fp32-block", "transformer_blocks.3")
    answer = run_cli(*command, "--precision", "fp16")
    assert answer.code == UsageError.exit_code
    assert "no block transformer_blocks.3; its blocks are transformer_blocks.0 to transformer_blocks.2" in answer.error
    answer = run_cli(*command)
    assert answer.code == UsageError.exit_code
    assert "in fp32 every block is" in answer.error
    assert not (tmp_path / "bundle").exists()


def step_graphs(made: Made, edit: Any = None) -> tuple[DiffusionTransformer, dict[int, StepGraph]]:
    model, plan = load_model(made.model), load_plan(made.plan)[0]
    if edit is not None:
        with torch.no_grad():
            edit(model.module)
    return model, {variant: StepGraph(model, plan.cache, variant, plan.phases_used()) for variant in (0, 1)}


def examples_of(made: Made, model: DiffusionTransformer, rows: int) -> dict[int, dict[str, Tensor]]:
    plan, tables = load_plan(made.plan)
    return example_inputs(model, plan, plan.step_tables(tables), sampling_from_plan(plan), rows)


def test_a_graph_computes_what_pytorch_does_in_the_same_precision(half: tuple[Precision, Made]) -> None:
    precision, made = half
    model, graphs = step_graphs(made)
    allowed = tolerance(ENGINES[precision], precision, "max_abs")
    with half_products(model, precision):
        examples = examples_of(made, model, rows=3)
        for variant, graph in graphs.items():
            path = made.bundle / ONNX_FOLDER / f"{variant_name(variant)}.onnx"
            error, sample = check_graph(graph, examples[variant], path, precision)
            assert 0 < error <= allowed
            assert sample.dtype == torch.float32


def test_the_check_finds_a_wrong_graph(half: tuple[Precision, Made]) -> None:
    precision, made = half

    def swap_gates(module: Any) -> None:
        bias, width = module.transformer_blocks[1].norm1.linear.bias, module.inner_dim
        bias[2 * width : 3 * width] += 1.0

    model, graphs = step_graphs(made, swap_gates)
    with half_products(model, precision):
        examples = examples_of(made, model, rows=2)
        for variant, graph in graphs.items():
            path = made.bundle / ONNX_FOLDER / f"{variant_name(variant)}.onnx"
            with pytest.raises(ExportError, match=rf"{path.name}: output \S+ departs from PyTorch"):
                check_graph(graph, examples[variant], path, precision)


def test_inputs_and_outputs_are_fp32_and_caches_half(half: tuple[Precision, Made]) -> None:
    precision, made = half
    manifest = read_manifest(made.bundle)
    assert manifest.precision is precision
    kind = {Precision.FP16: "float16", Precision.BF16: "bfloat16"}[precision]
    for graph in manifest.graphs.values():
        for tensor in (*graph.inputs, *graph.outputs):
            integers = ("class_labels", "token_index")
            other = "int32" if tensor.name in integers else "float32"
            assert tensor.dtype == (kind if tensor.name.startswith("cache.") else other), tensor.name
            assert tensor.numpy_dtype.itemsize == (2 if tensor.name.startswith("cache.") else 4)
    assert len([tensor for tensor in manifest.graphs["full"].outputs if tensor.dtype == kind]) == 6


def test_norms_and_the_residual_stream_are_fp32_in_the_graph(half: tuple[Precision, Made]) -> None:
    precision, made = half
    model = onnx.load(made.bundle / ONNX_FOLDER / "full.onnx")
    model = onnx.shape_inference.infer_shapes(model)
    assert model.opset_import[0].version == {Precision.FP16: 20, Precision.BF16: 22}[precision]
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    half_type = {Precision.FP16: onnx.TensorProto.FLOAT16, Precision.BF16: onnx.TensorProto.BFLOAT16}[precision]
    seen = {(node.op_type, types[node.input[0]]) for node in graph.node}
    assert ("MatMul", half_type) in seen
    assert ("Softmax", half_type) in seen
    fp32_only = {"LayerNormalization", "Gelu", "Tanh", "Sigmoid", "Sin", "Cos"}
    assert not [operator for operator, kind in seen if operator in fp32_only and kind == half_type]
    products = {kind for operator, kind in seen if operator in ("MatMul", "Gemm", "Conv")}
    ends_in_fp32 = {onnx.TensorProto.FLOAT} if precision is Precision.BF16 else set()
    assert products == {half_type} | ends_in_fp32


def test_weights_take_half_the_room(half: tuple[Precision, Made], mixed: Made) -> None:
    assert mixed.model == half[1].model
    sizes = [(made.bundle / ONNX_FOLDER / WEIGHTS).stat().st_size for made in (half[1], mixed)]
    assert sizes[0] <= LARGEST_WEIGHTS * sizes[1]


def test_the_error_to_fp32_is_written_down_and_shown(half: tuple[Precision, Made], mixed: Made) -> None:
    precision, made = half
    graphs = read_manifest(made.bundle).graphs
    least = tolerance(ENGINES[precision], precision, "least_snr_db")
    for name in ("full", "cached-1"):
        assert least < (graphs[name].snr_to_fp32_db or 0) < least + 40
    assert graphs[SOLVER].snr_to_fp32_db is None
    assert {record.snr_to_fp32_db for record in read_manifest(mixed.bundle).graphs.values()} == {None}
    out = run_cli("inspect", made.bundle).out
    assert f", {precision}, batch any, " in out
    assert f"{graphs['full'].snr_to_fp32_db:.1f} dB above its error to fp32" in out
    facts = json.loads(run_cli("inspect", made.bundle, "--json").out)
    assert facts["graphs"]["full"]["snr_to_fp32_db"] == graphs["full"].snr_to_fp32_db


def test_fp16_samples_are_as_the_graphs_read_them_and_bf16_has_none(fp16: Made, bf16: Made) -> None:
    manifest = read_manifest(fp16.bundle)
    samples, _ = read_golden(fp16.bundle, manifest)
    for name in ("full", "cached-1"):
        record = manifest.graphs[name]
        for feeds, tensors in ((samples[name].inputs, record.inputs), (samples[name].outputs, record.outputs)):
            for feed in feeds:
                assert {tensor.name: feed[tensor.name].dtype for tensor in tensors} == {
                    tensor.name: tensor.numpy_dtype for tensor in tensors
                }
    with pytest.raises(BundleError, match="an export in bf16 leaves no samples to validate by"):
        read_golden(bf16.bundle, read_manifest(bf16.bundle))


# --------------------------------------------------------------------------------------------------- whole trajectories


@pytest.mark.parametrize("full", [True, False])
def test_an_fp16_run_equals_pytorch_in_the_same_precision(fp16: Made, tmp_path: Path, full: bool) -> None:
    bundle = fp16.copy(tmp_path / "bundle")
    assert run_cli("build", bundle, "--threads", 1).code == 0
    labels = [3, 8]
    with tc_deploy.load(bundle, batch_size=2) as pipeline:
        noise = torch.from_numpy(pipeline.noise(40, 2))
        found = torch.from_numpy(pipeline(class_labels=labels, seed=40, full=full).latents)
    model, (plan, tables) = load_model(fp16.model), load_plan(fp16.plan)
    conditions = {"class_labels": torch.tensor(labels, dtype=torch.int32)}
    schedule = full_schedule(plan.schedule.steps) if full else plan.run_schedule()
    with half_products(model, Precision.FP16):
        steps = TokenCachedSteps(model, plan.cache, schedule, plan.step_tables(tables))
        expected = denoise(model, sampling_from_plan(plan), noise, conditions, steps)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance("onnxruntime", "fp16", "trajectory_max_rel")


# ------------------------------------------------------------------------------------------------------ what is refused


def test_an_unknown_precision_is_refused(mixed: Made, tmp_path: Path) -> None:
    answer = run_cli("export", mixed.plan, "-o", tmp_path / "bundle", "--precision", "fp8")
    assert answer.code == UsageError.exit_code
    assert "'fp8' is not one of 'fp32', 'fp16', 'bf16'" in answer.error
    assert not (tmp_path / "bundle").exists()


def test_graphs_of_another_precision_are_not_taken(fp16: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another batch or precision, or one graph where there should be several"):
        export_bundle(fp16.plan, tmp_path / "bundle", ExportOptions(graphs_from=(fp16.bundle,)))
    assert snapshot(tmp_path) == {}


def test_onnxruntime_has_no_bf16_and_says_what_has(bf16: Made) -> None:
    before = snapshot(bf16.bundle)
    answer = run_cli("build", bf16.bundle)
    assert answer.code == BackendError.exit_code
    assert "does not compute on a CPU; build with --backend openvino or tensorrt-rtx, or export with" in answer.error
    assert snapshot(bf16.bundle) == before


def test_what_bf16_needs_is_named(bf16: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = step_graphs(bf16)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(BackendError, match=r"^cache is bfloat16, .*: ml_dtypes is not installed: pip install"):
        _ = TensorRecord(name="cache", role=Role.VALUE, dtype="bfloat16", shape=()).numpy_dtype
    monkeypatch.setitem(sys.modules, "openvino", None)
    example = {name: torch.zeros(1) for name in graphs[0].input_names}
    with pytest.raises(BackendError, match=r"bf16 export needs OpenVINO \(--no-check .*: openvino is not inst"):
        check_graph(graphs[0], example, bf16.bundle / ONNX_FOLDER / "full.onnx", Precision.BF16)
    assert Role.SAMPLE in graphs[0].output_names
    assert model.module is graphs[0].module
