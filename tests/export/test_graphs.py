"""Exported bundles against PyTorch, variant by variant; what is in the files; and what is refused or left alone."""

import copy
import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import MULTISTEP, Made, MadeByCommands, SaveDit, make_plan, snapshot
from elsewhere import elsewhere, moved
from tolerances import tolerance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tc_deploy
from tc_deploy.bundle import MANIFEST
from tc_deploy.errors import ExportError, ModelError, PlanError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.check import check_graph, check_solver_graph, example_inputs
from tc_deploy.export.golden import samples_of
from tc_deploy.export.graphs import _quiet
from tc_deploy.export.options import ExportOptions
from tc_deploy.export.rows import PrologueRows
from tc_deploy.export.weights import INLINE_BYTES, PAGE_BYTES
from tc_deploy.golden import POLYGRAPHY, SCRIPT, GoldenGraph, Trajectory
from tc_deploy.manifest import ONNX_FOLDER, SOLVER, WEIGHTS, Role, read_manifest, variant_name
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import Plan, load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.precisions import Precision
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.graphs import StepGraph

MODEL_INPUTS = ["hidden_states", "timestep", "class_labels"]
CACHED_INPUTS = [*MODEL_INPUTS, Role.FORECAST_WEIGHTS, Role.TOKEN_INDEX]
FULL_ONLY = {**MULTISTEP, "schedule": {"phase_start": 8, "cache_interval_early": 1, "cache_interval_late": 1}}
LARGEST_OVERHEAD = 1.2
"""Weights file to fp32 weights: tensors start at pages, and a weight that is used as it is and transposed lies there
twice."""


def graph_path(made: Made, name: str) -> Path:
    return made.bundle / ONNX_FOLDER / f"{name}.onnx"


def proto(made: Made, name: str) -> onnx.ModelProto:
    return onnx.load(graph_path(made, name), load_external_data=False)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def step_graph(model: DiffusionTransformer, plan: Plan, variant: int) -> StepGraph:
    return StepGraph(model, plan.cache, variant, plan.phases_used())


def random_inputs(made: Made, model: DiffusionTransformer, variant: int, rows: int) -> dict[str, Tensor]:
    """Inputs of a variant as they never occur together: every tensor its own, every sample other tokens and weights."""
    plan, tables = load_plan(made.plan)
    sampling = dataclasses.replace(sampling_from_plan(plan), guidance_scale=None)
    example = example_inputs(model, plan, plan.step_tables(tables), sampling, rows)[variant]
    generator = torch.Generator().manual_seed(variant)
    drawn = {}
    for name, tensor in example.items():
        noise = torch.randn(tensor.shape, generator=generator)
        drawn[name] = noise if name.startswith(("cache.", Role.FORECAST_WEIGHTS)) else tensor
    if Role.TOKEN_INDEX in example:
        keep_counts = plan.keep_counts(variant)
        blocks = [keep_counts[block] for block in pruned_blocks(keep_counts, plan.model.tokens)]
        order = [torch.randperm(plan.model.tokens, generator=generator)[:keep] for _ in range(rows) for keep in blocks]
        drawn[Role.TOKEN_INDEX] = torch.cat(order).reshape(rows, -1).int()
    return drawn


def assert_same_as_pytorch(made: Made, variant: int, rows: int) -> None:
    model = load_model(made.model)
    graph = step_graph(model, load_plan(made.plan)[0], variant)
    inputs = random_inputs(made, model, variant, rows)
    feed = {name: inputs[name].numpy() for name in graph.input_names}
    found = session(graph_path(made, variant_name(variant))).run(list(graph.output_names), feed)
    with torch.no_grad():
        expected = graph(*(inputs[name] for name in graph.input_names))
    for name, mine, theirs in zip(graph.output_names, found, expected, strict=True):
        assert mine.shape == tuple(theirs.shape)
        largest = max(1.0, float(theirs.abs().max()))
        error = float(np.abs(mine - theirs.numpy()).max()) / largest
        assert error <= tolerance("onnxruntime", "fp32", "max_abs"), name


# ------------------------------------------------------------------------------------------------- what graphs compute


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_a_variant_computes_what_pytorch_does_at_any_batch(mixed: Made, variant: int, rows: int) -> None:
    assert_same_as_pytorch(mixed, variant, rows)


@pytest.mark.parametrize("variant", [0, 1])
def test_a_variant_computes_what_pytorch_does_at_its_fixed_batch(pixel: MadeByCommands, variant: int) -> None:
    assert_same_as_pytorch(pixel, variant, read_manifest(pixel.bundle).batch_size or 0)


@pytest.mark.parametrize("variant", [0, 1])
def test_a_variant_without_forecast_computes_what_pytorch_does(multistep: Made, variant: int) -> None:
    assert_same_as_pytorch(multistep, variant, rows=2)


def test_a_model_on_another_device_is_sampled_and_compared_as_on_the_cpu(mixed: Made) -> None:
    model, (plan, tables) = load_model(mixed.model), load_plan(mixed.plan)
    steps, sampling = plan.step_tables(tables), sampling_from_plan(plan)
    solver = read_solver(sampling.scheduler, plan.schedule.steps, sampling.set_timesteps_kwargs)
    records = read_manifest(mixed.bundle).graphs

    def made(model: DiffusionTransformer) -> tuple[dict[str, GoldenGraph], Trajectory]:
        graphs = {variant: step_graph(model, plan, variant) for variant in (FULL, 1, 2)}
        prologue = PrologueRows(mixed.bundle, records, Precision.FP32)
        return samples_of(graphs, records, prologue, plan, steps, sampling, solver, 2)

    # One kernel for both: which one attention takes depends on the device.
    with sdpa_kernel(SDPBackend.MATH):
        samples, trajectory = made(model)
        with elsewhere():
            there = moved(model)
            found, run = made(there)
            example = example_inputs(there, plan, steps, sampling, 2)[1]
            check_graph(step_graph(there, plan, 1), example, graph_path(mixed, variant_name(1)))
    np.testing.assert_array_equal(run.full, trajectory.full)
    np.testing.assert_array_equal(run.cached, trajectory.cached)
    for name, expected in samples.items():
        for mine, theirs in zip(found[name].outputs, expected.outputs, strict=True):
            for output in theirs:
                np.testing.assert_array_equal(mine[output], theirs[output], err_msg=f"{name} {output}")


def test_a_fixed_batch_is_fixed(pixel: MadeByCommands) -> None:
    for record in read_manifest(pixel.bundle).graphs.values():
        assert all(isinstance(size, int) for tensor in (*record.inputs, *record.outputs) for size in tensor.shape)


def test_the_order_of_the_tokens_does_not_matter_to_a_graph(mixed: Made) -> None:
    plan = load_plan(mixed.plan)[0]
    model = load_model(mixed.model)
    inputs = random_inputs(mixed, model, 2, rows=2)
    names = step_graph(model, plan, 2).input_names
    run = session(graph_path(mixed, "cached-2")).run
    counts = [keep for keep in plan.keep_counts(2) if 0 < keep < plan.model.tokens]
    parts = torch.split(inputs[Role.TOKEN_INDEX], counts, dim=1)
    turned = inputs | {Role.TOKEN_INDEX: torch.cat([part.flip(1) for part in parts], dim=1)}
    one, other = (run([Role.SAMPLE], {name: given[name].numpy() for name in names})[0] for given in (inputs, turned))
    assert np.abs(one - other).max() <= tolerance("onnxruntime", "fp32", "max_abs") * np.abs(one).max()


# ------------------------------------------------------------------------------------------------- names and interfaces


def caches(*names: str, ages: int = 1) -> list[str]:
    return [f"cache.{name}" + (f".{age}" if age else "") for age in range(ages) for name in names]


BOTH = ("attention", "mlp")
ALL_FOUR = (*BOTH, "key", "value")


def of_block(block: int, parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{part}" for part in parts)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        (
            "full",
            MODEL_INPUTS,
            [Role.SAMPLE, *caches(*of_block(0, ALL_FOUR), *of_block(1, BOTH), *of_block(2, ALL_FOUR))],
        ),
        ("cached-1", [*CACHED_INPUTS, *caches(*of_block(0, BOTH), *of_block(2, ALL_FOUR), ages=2)], [Role.SAMPLE]),
        (
            "cached-2",
            [*CACHED_INPUTS, *caches(*of_block(0, ALL_FOUR), *of_block(1, BOTH), *of_block(2, ALL_FOUR), ages=2)],
            [Role.SAMPLE],
        ),
        (
            "solver",
            ["model_output", "latents", "coefficients", "input_scale", "guidance_scale"],
            ["next_latents", "hidden_states"],
        ),
    ],
)
def test_inputs_and_outputs_are_named_and_in_order(
    mixed: Made, name: str, inputs: list[str], outputs: list[str]
) -> None:
    graph = proto(mixed, name).graph
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == outputs
    record = read_manifest(mixed.bundle).graphs[name]
    assert record.file == f"{ONNX_FOLDER}/{name}.onnx"
    for recorded, values in ((record.inputs, graph.input), (record.outputs, graph.output)):
        assert [tensor.name for tensor in recorded] == [value.name for value in values]
        for tensor, value in zip(recorded, values, strict=True):
            kind = value.type.tensor_type
            assert tensor.shape == tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
            assert np.dtype(tensor.dtype) == onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)  # noqa: TID251


def test_residual_reuse_caches_one_tensor_a_block(pixel: MadeByCommands) -> None:
    graphs = read_manifest(pixel.bundle).graphs
    assert [tensor.name for tensor in graphs["full"].outputs] == [Role.SAMPLE, *caches("0.block", "1.block")]
    cached = [*CACHED_INPUTS, *caches("0.block", "1.block", ages=3)]
    assert [tensor.name for tensor in graphs["cached-1"].inputs] == cached
    assert "cached-2" not in graphs


def test_reuse_needs_no_forecast_weights_and_a_multistep_solver_looks_back(multistep: Made) -> None:
    graphs = read_manifest(multistep.bundle).graphs
    assert [tensor.name for tensor in graphs["cached-1"].inputs] == [
        *MODEL_INPUTS,
        Role.TOKEN_INDEX,
        *caches(*of_block(0, ALL_FOUR)),
    ]
    assert {"latents.1", "guided_output.1"} <= {tensor.name for tensor in graphs[SOLVER].inputs}
    assert "guided_output" in {tensor.name for tensor in graphs[SOLVER].outputs}


@pytest.mark.parametrize(("name", "tokens"), [("cached-1", 8), ("cached-2", 8 + 4)])
def test_the_token_index_is_int32_with_a_fixed_count(mixed: Made, name: str, tokens: int) -> None:
    index = {tensor.name: tensor for tensor in read_manifest(mixed.bundle).graphs[name].inputs}[Role.TOKEN_INDEX]
    assert (index.dtype, index.shape) == ("int32", ("model_batch", tokens))


@pytest.mark.parametrize("bundle", ["mixed", "multistep", "pixel"])
def test_a_graph_reads_every_input_that_it_names(bundle: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(bundle)
    for name in read_manifest(made.bundle).graphs:
        graph = proto(made, name).graph
        read = {name for node in graph.node for name in node.input}
        assert [value.name for value in graph.input if value.name not in read] == []


@pytest.mark.parametrize("bundle", ["mixed", "pixel"])
def test_the_graphs_are_valid_onnx(bundle: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(bundle)
    for name in read_manifest(made.bundle).graphs:
        onnx.checker.check_model(graph_path(made, name), full_check=True)


def test_the_files_name_nothing_of_the_machine(mixed: Made, pixel: MadeByCommands) -> None:
    package = Path(tc_deploy.__file__).parent
    told = {str(package.parent), str(Path.home()), str(mixed.bundle), str(pixel.bundle), str(mixed.model)}
    told |= {"site-packages", ".py", "Traceback", "stack_trace", "File ", ".tc-deploy-new"}
    for made in (mixed, pixel):
        for path in [made.bundle / MANIFEST, *(made.bundle / ONNX_FOLDER).glob("*.onnx")]:
            data = path.read_bytes().replace(SCRIPT.encode(), b"")  # the manifest names it
            assert [text for text in sorted(told) if len(text) > 1 and text.encode() in data] == [], path.name


# ---------------------------------------------------------------------------------------------------- one weights file


def stored_tensors(made: Made) -> list[tuple[str, int, bytes]]:
    """Graph and name, offset and content of every initializer that lies in the weights file."""
    weights = (made.bundle / ONNX_FOLDER / WEIGHTS).read_bytes()
    found = []
    for name in read_manifest(made.bundle).graphs:
        for tensor in proto(made, name).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if not where:
                assert len(tensor.raw_data) < INLINE_BYTES, tensor.name
                continue
            assert where["location"] == WEIGHTS
            offset, length = int(where["offset"]), int(where["length"])
            found.append((tensor.name, offset, weights[offset : offset + length]))
            assert len(found[-1][2]) == length == int(np.prod(tensor.dims)) * 4
    return found


@pytest.mark.parametrize("bundle", ["mixed", "multistep", "pixel"])
def test_every_tensor_is_stored_once(bundle: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(bundle)
    tensors = stored_tensors(made)
    places = {(offset, data) for _, offset, data in tensors}
    contents = {data for _, data in places}
    assert len(contents) == len(places) < len(tensors)
    assert all(offset % PAGE_BYTES == 0 for offset, _ in places)
    ends = 0
    for offset, data in sorted(places):
        assert ends <= offset < ends + PAGE_BYTES
        ends = offset + len(data)
    size = (made.bundle / ONNX_FOLDER / WEIGHTS).stat().st_size
    assert size == ends
    parameters = sum(parameter.numel() for parameter in load_model(made.model).module.parameters())
    assert size <= LARGEST_OVERHEAD * 4 * parameters
    assert sorted(path.name for path in (made.bundle / ONNX_FOLDER).iterdir()) == sorted(
        [WEIGHTS, *(f"{name}.onnx" for name in read_manifest(made.bundle).graphs)]
    )


@pytest.mark.parametrize("bundle", ["mixed", "pixel"])
def test_an_initializer_bears_its_parameter_s_name(bundle: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(bundle)
    module = load_model(made.model).module
    tensors: Mapping[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    seen = set()
    for name, _, data in stored_tensors(made):
        parameter = tensors[name.removesuffix(".T")]
        expected = parameter.t() if name.endswith(".T") else parameter
        assert data == expected.contiguous().numpy().tobytes(), name
        seen.add(name.removesuffix(".T"))
    inline = {tensor.name for tensor in proto(made, "full").graph.initializer}
    assert not any(name.startswith("module.") for name in inline)
    # The exporter may make one of two equal tensors.
    known = [tensors[name] for name in sorted((seen | inline) & tensors.keys())]
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and name not in seen:
            assert any(torch.equal(parameter, other) for other in known), name


# ------------------------------------------------------------------------------------------------------ the same bytes


def test_an_export_of_the_same_model_elsewhere_unchecked_gives_the_same_graphs(multistep: Made, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(multistep.model, moved)
    plan = tmp_path / "plan"
    shutil.copytree(multistep.plan, plan)
    manifest = export_bundle(plan, tmp_path / "bundle", ExportOptions(model_path=moved, check=False))
    assert {record.max_abs_error for record in manifest.graphs.values()} == {None}
    assert snapshot(tmp_path / "bundle" / ONNX_FOLDER) == snapshot(multistep.bundle / ONNX_FOLDER)
    checked = read_manifest(multistep.bundle)
    assert all(record.max_abs_error is not None for record in checked.graphs.values())
    # Unchecked, it leaves no samples to validate by either.
    assert manifest.files == {
        name: record for name, record in checked.files.items() if not name.startswith(f"{POLYGRAPHY}/")
    }


@pytest.mark.slow
def test_another_process_gives_the_same_graphs(multistep: Made, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tc_deploy", "export", str(multistep.plan), "-o", str(tmp_path / "bundle")]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": "1"})
    assert snapshot(tmp_path / "bundle" / ONNX_FOLDER) == snapshot(multistep.bundle / ONNX_FOLDER)


# ------------------------------------------------------------------------------------------------------ planted faults


@pytest.fixture(scope="module")
def example(mixed: Made, tiny_dit: DiffusionTransformer) -> dict[int, dict[str, Tensor]]:
    """Inputs of every variant as the check after export draws them."""
    plan, tables = load_plan(mixed.plan)
    return example_inputs(tiny_dit, plan, plan.step_tables(tables), sampling_from_plan(plan), 2)


def altered(model: DiffusionTransformer, change: Callable[[Any], None]) -> DiffusionTransformer:
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        change(module)
    return dataclasses.replace(model, module=module)


def _flip_a_gate(module: Any) -> None:
    module.transformer_blocks[2].norm1.linear.weight[2 * 64].neg_()


def _shift_a_key(module: Any) -> None:
    module.transformer_blocks[0].attn1.to_k.bias.add_(0.01)


@pytest.mark.parametrize(
    ("change", "variant", "output"),
    [(_flip_a_gate, FULL, "output sample"), (_flip_a_gate, 1, "output sample"), (_shift_a_key, FULL, "output")],
)
def test_the_check_finds_a_fault(
    mixed: Made,
    tiny_dit: DiffusionTransformer,
    example: dict[int, dict[str, Tensor]],
    change: Callable[[Any], None],
    variant: int,
    output: str,
) -> None:
    plan, path = load_plan(mixed.plan)[0], graph_path(mixed, variant_name(variant))
    assert check_graph(step_graph(tiny_dit, plan, variant), example[variant], path)[0] >= 0
    graph = step_graph(altered(tiny_dit, change), plan, variant)
    with pytest.raises(ExportError, match=rf"^{variant_name(variant)}.onnx: {output}.* departs from PyTorch by"):
        check_graph(graph, example[variant], path)


def test_the_check_finds_swapped_caches(
    mixed: Made, tiny_dit: DiffusionTransformer, example: dict[int, dict[str, Tensor]]
) -> None:
    class Swapped(StepGraph):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            sample, first, second, *rest = super().forward(*tensors)
            return (sample, second, first, *rest)

    graph = Swapped(tiny_dit, load_plan(mixed.plan)[0].cache, FULL, (1, 2))
    with pytest.raises(ExportError, match=r"full.onnx: output cache\.0\.attention departs"):
        check_graph(graph, example[FULL], graph_path(mixed, "full"))


@pytest.mark.parametrize("bundle", ["mixed", "multistep", "pixel"])
def test_the_check_finds_a_wrong_coefficient(bundle: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(bundle)
    plan = load_plan(made.plan)[0]
    sampling = sampling_from_plan(plan)
    table = read_solver(sampling.scheduler, sampling.steps)
    batch, channels = read_manifest(made.bundle).batch_size or 2, read_manifest(made.bundle).latent_shape[0]
    shape = (batch, 2 * channels, 8, 8)
    path = graph_path(made, SOLVER)
    assert check_solver_graph(table, sampling, shape, path) >= 0
    coefficients = table.coefficients.copy()
    coefficients[4, -1] *= 1.01
    if not table.coefficients[4, -1]:
        coefficients[4, -1] = 0.01
    wrong = dataclasses.replace(table, coefficients=coefficients)
    with pytest.raises(ExportError, match=r"solver.onnx: latents after step 4 departs? from"):
        check_solver_graph(wrong, sampling, shape, path)


def test_a_graph_that_the_engine_refuses_is_an_export_error(
    mixed: Made, tiny_dit: DiffusionTransformer, example: dict[int, dict[str, Tensor]], tmp_path: Path
) -> None:
    broken = tmp_path / "full.onnx"
    broken.write_bytes(graph_path(mixed, "full").read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"full\.onnx: ONNX Runtime refuses the graph"):
        check_graph(step_graph(tiny_dit, load_plan(mixed.plan)[0], FULL), example[FULL], broken)


def test_a_fault_between_export_and_check_leaves_the_old_bundle(multistep: Made, tmp_path: Path) -> None:
    plan = make_plan(multistep.model, tmp_path / "plan", **FULL_ONLY)
    destination = multistep.copy(tmp_path / "bundle")
    before = snapshot(tmp_path)

    def plant(message: str) -> None:
        if message == "comparing full with PyTorch":
            (weights,) = tmp_path.glob(f".*/*/{ONNX_FOLDER}/{WEIGHTS}")
            values = np.fromfile(weights, np.float32)
            values[-100:] *= -1
            values.tofile(weights)

    with pytest.raises(ExportError, match=r"full\.onnx: output sample departs from PyTorch"):
        export_bundle(plan, destination, progress=plant)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("moment", ["loading the checkpoint", "exporting full"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_failure_half_way_leaves_the_old_bundle(
    multistep: Made, tmp_path: Path, moment: str, failure: BaseException
) -> None:
    destination = multistep.copy(tmp_path / "bundle")
    before = snapshot(tmp_path)

    def fail(message: str) -> None:
        if message == moment:
            raise failure

    with pytest.raises(BaseException) as raised:  # noqa: PT011 - a full disk has a message of its own
        export_bundle(multistep.plan, destination, progress=fail)
    assert raised.value is failure or "No space left" in str(raised.value)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


# ------------------------------------------------------------------------------------------------------ what is refused


def refuse(plan: Path, destination: Path, **arguments: Any) -> pytest.ExceptionInfo[BaseException]:
    """Export in vain; nothing may be left."""
    with pytest.raises(tc_deploy.errors.TcDeployError) as raised:
        export_bundle(plan, destination, ExportOptions(**arguments))
    assert not list(destination.parent.glob("*bundle*"))
    assert "\n" not in str(raised.value)
    return raised


def test_a_plan_of_other_weights_is_refused(mixed: Made, save_dit: SaveDit, tmp_path: Path) -> None:
    other = save_dit(tmp_path / "other", seed=1)
    raised = refuse(mixed.plan, tmp_path / "bundle", model_path=other)
    assert raised.type is PlanError
    assert "made for another model: weights_sha256" in str(raised.value)
    assert "--model" in str(raised.value)


@pytest.mark.parametrize(("key", "value"), [("activation_fn", "gelu"), ("norm_eps", 1e-2)])
def test_a_plan_of_another_configuration_is_refused(mixed: Made, tmp_path: Path, key: str, value: object) -> None:
    other = tmp_path / "other"
    shutil.copytree(mixed.model, other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {key: value}))
    raised = refuse(mixed.plan, tmp_path / "bundle", model_path=other)
    assert raised.type is PlanError
    assert f"config.{key} expected" in str(raised.value)


def test_a_model_that_has_moved_is_named(save_dit: SaveDit, tmp_path: Path) -> None:
    model = save_dit(tmp_path / "model", num_layers=1)
    plan = make_plan(model, tmp_path / "plan", **MULTISTEP)
    model.rename(tmp_path / "moved")
    raised = refuse(plan, tmp_path / "bundle")
    assert raised.type is ModelError
    assert str(model) in str(raised.value)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (diffusers.DDIMScheduler(clip_sample=True), "set clip_sample=False"),
        (diffusers.HeunDiscreteScheduler(), "one model call per step"),
    ],
)
def test_a_scheduler_that_has_no_table_is_refused(
    save_dit: SaveDit, tmp_path: Path, scheduler: Any, reason: str
) -> None:
    model = save_dit(tmp_path / "model", num_layers=1)
    plan = make_plan(model, tmp_path / "plan", **MULTISTEP)
    document = json.loads((plan / "plan.json").read_text())
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    document["sampling"] |= {"scheduler_class": type(scheduler).__name__, "scheduler_config": config}
    (plan / "plan.json").write_text(json.dumps(document))
    raised = refuse(plan, tmp_path / "bundle")
    assert raised.type is ExportError
    assert type(scheduler).__name__ in str(raised.value)
    assert reason in str(raised.value)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(mixed: Made, tmp_path: Path, batch_size: int) -> None:
    assert refuse(mixed.plan, tmp_path / "bundle", batch_size=batch_size).type is UsageError


def test_a_folder_of_another_kind_is_not_replaced(multistep: Made, tmp_path: Path) -> None:
    photographs = tmp_path / "holiday"
    photographs.mkdir()
    (photographs / "beach.jpg").write_text("sun")
    with pytest.raises(tc_deploy.errors.StorageError, match=r"not a bundle that .* it holds beach\.jpg"):
        export_bundle(multistep.plan, photographs)
    assert snapshot(tmp_path) == {"holiday/beach.jpg": b"sun"}


def test_the_exporter_s_own_tracebacks_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    with _quiet():
        exporter.exception("Failed to register", exc_info=MemoryError())
    assert caplog.text == ""
    exporter.error("afterwards as before")
    assert "afterwards as before" in caplog.text
