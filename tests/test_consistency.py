"""Documents whose checksums fit and that contradict each other: one line, before an engine sees anything."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from bundles import Made, edit_resealed, seal
from hypothesis import given, settings
from hypothesis import strategies as st

from tc_deploy.bundle import MANIFEST
from tc_deploy.consistency import Documents, read_documents
from tc_deploy.errors import BundleError, PlanError, TcDeployError
from tc_deploy.manifest import RUNTIME_TABLES
from tc_deploy.plan import PLAN, TABLES
from tc_deploy.runtime.layout import pipeline_programs

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def bundle(mixed: Made, tmp_path: Path) -> Path:
    return mixed.copy(tmp_path / "bundle")


def refusal(bundle: Path) -> str:
    with pytest.raises(TcDeployError) as raised:
        read_documents(bundle)
    assert isinstance(raised.value, (BundleError, PlanError))
    assert str(raised.value).isprintable()
    return str(raised.value)


def read_cache(document: Any) -> Any:
    """The first cached value that is read at age 1."""
    tensors = document["graphs"]["cached-1"]["inputs"]
    return next(tensor for tensor in tensors if tensor["role"] == "cache" and tensor.get("age") == 1)


def tensors(graph: str, side: str, index: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: document["graphs"][graph][side][index]


def test_a_bundle_as_it_was_exported_agrees_with_itself(mixed: Made, multistep: Made, pixel: Made, fp16: Made) -> None:
    for made in (mixed, multistep, pixel, fp16):
        assert read_documents(made.bundle).plan.measured is None or made is pixel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["schedule"].update(cache_interval_late=1), "exported from another plan"),
        (lambda d: d["schedule"].update(cache_interval_late=3), "table|exported from another plan"),
        (lambda d: d["cache"].update(forecast_order=2), "exported from another plan"),
        (lambda d: d["cache"]["keep_counts"][1].reverse(), "table|exported from another plan"),
        (lambda d: d["sampling"].update(guidance_scale=-7.0), "guidance_scale: must be greater than or equal to 0"),
        (lambda d: d["sampling"].update(guidance_scale=7.0), "exported from another plan"),
        (lambda d: d["sampling"]["timesteps"].__setitem__(0, 901.0), "exported from another plan"),
        (lambda d: d["sampling"]["timesteps"].__setitem__(0, 1e39), "timesteps.0: must be less than"),
        (lambda d: d["schedule"].update(steps=10**6, phase_start=10**6), "schedule.steps: must be less than or equal"),
        (lambda d: d["model"].update(blocks=10**9), "model.blocks: must be less than or equal"),
        (lambda d: d["model"].update(tokens=10**12), "model.tokens: must be less than or equal"),
        (lambda d: d["cost"].update(full_flops=10**400), "full_flops"),
    ],
)
def test_a_plan_that_was_edited(bundle: Path, change: Change, message: str) -> None:
    edit_resealed(bundle, PLAN, change)
    assert any(part in refusal(bundle) for part in message.split("|"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["solver"].update(guidance_scale=-7.0), "guidance_scale: must be greater than or equal to 0"),
        (lambda d: d["solver"].update(guidance_scale=3.0), "solver.guidance_scale: expected 2.0, as the plan has it"),
        (lambda d: d["solver"].update(guidance_scale=None), "solver.guidance_scale: expected 2.0"),
        (lambda d: d["solver"].update(guidance_scale="2.0"), "must be a valid number"),
        (lambda d: d["solver"].update(history=1), "coefficients: expected finite float32 (10, 4)"),
        (lambda d: d["solver"].update(init_noise_sigma=2.0), "init_noise_sigma: expected 2.0, as the manifest has it"),
        (lambda d: d["solver"].update(init_noise_sigma=1e39), "init_noise_sigma: must be less than"),
        (lambda d: d["graphs"].pop("cached-2"), "graphs: expected ['cached-1', 'cached-2', 'full', 'solver']"),
        (lambda d: d["graphs"].update(more=d["graphs"]["full"]), "graphs: expected"),
        (lambda d: d["graphs"].update(full=d["graphs"]["solver"]), "graphs.full"),
        (lambda d: d["graphs"]["full"].update(file="onnx/cached-1.onnx"), "cached-1.onnx"),
        (lambda d: d["graphs"]["full"]["inputs"].pop(), "graphs.full.inputs: class_labels: expected int32"),
        (lambda d: d["graphs"]["full"]["outputs"].pop(), "graphs."),
        (lambda d: tensors("full", "inputs", 0)(d).update(dtype="float16"), "hidden_states: expected float32"),
        (lambda d: tensors("full", "inputs", 0)(d).update(dtype="complex64"), "inputs.0.dtype"),
        (lambda d: tensors("full", "inputs", 0)(d).update(name="timestep"), "has the tensor timestep twice"),
        (lambda d: tensors("full", "inputs", 0)(d)["shape"].append(1), "hidden_states: expected float32"),
        (lambda d: tensors("full", "inputs", 0)(d)["shape"].__setitem__(1, 2**31), "shape.1"),
        (lambda d: tensors("full", "inputs", 0)(d)["shape"].__setitem__(1, "4"), "shape.1"),
        (
            lambda d: tensors("full", "inputs", 0)(d)["shape"].__setitem__(0, "tokens"),
            "hidden_states: expected float32",
        ),
        (lambda d: tensors("solver", "outputs", 0)(d)["shape"].__setitem__(1, 3), "graphs.solver.outputs"),
        (lambda d: d.update(latent_shape=[4, 8, 9]), "hidden_states: expected float32 (model_batch, 4, 8, 9)"),
        (lambda d: d.update(latent_shape=[2**31 - 1] * 7), "expected"),
        (lambda d: d.update(batch_size=2), "class_labels: expected int32 (4), found int32 (model_batch)"),
        (lambda d: d.update(pixels=True), "latent_shape: expected that of pictures"),
        (lambda d: d["conditions"][0].update(classes=2**40), "classes"),
        (lambda d: d["conditions"][0].update(dtype="float32"), "conditions: class_labels: expected int32"),
        (lambda d: d["conditions"][0].update(name="timestep"), "conditions: expected each name once"),
        (lambda d: d["conditions"].append(d["conditions"][0]), "conditions: expected each name once"),
        (lambda d: d["graphs"]["full"].update(file="onnx/../onnx/full.onnx"), "onnx/full.onnx"),
        (
            lambda d: tensors("full", "inputs", 1)(d).update(role="condition"),
            "timestep: expected role timestep, found role condition",
        ),
        (lambda d: tensors("full", "inputs", 1)(d).update(role="clock"), "role: must be"),
        (lambda d: tensors("full", "inputs", 1)(d).update(cache="cache.0.mlp"), "a cached value says which it is"),
        (
            lambda d: tensors("solver", "inputs", 1)(d).update(age=1),
            "latents: expected role latents, found role latents, age 1",
        ),
        (lambda d: read_cache(d).update(age=2), "found role cache, age 2"),
        (lambda d: read_cache(d).update(group=0), "group 0"),
        (lambda d: tensors("full", "outputs", 1)(d).update(cache="cache.other"), "graphs.full: "),
        (lambda d: d.update(plan_sha256="0" * 64), "exported from another plan"),
        (lambda d: d.update(made_by="\u001b[31m"), "control characters"),
    ],
)
def test_a_manifest_that_was_edited(bundle: Path, change: Change, message: str) -> None:
    edit_resealed(bundle, MANIFEST, change)
    assert message in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["coefficients"].__setitem__((3, 0), np.nan), "coefficients: expected finite float32"),
        (lambda t: t["timesteps"].__setitem__(3, np.inf), "timesteps: expected finite float32"),
        (lambda t: t.update(timesteps=t["timesteps"][:-1]), "timesteps: expected finite float32 (10,)"),
        (lambda t: t.update(timesteps=t["timesteps"].astype(np.float64)), "timesteps: expected finite float32 (10,)"),
        (
            lambda t: t["timesteps"].__setitem__(3, 1.0),
            "timesteps: expected 600 at step 3, as the plan has it, found 1 in the tables",
        ),
        (lambda t: t.update(coefficients=t["coefficients"][:, :1]), "coefficients: expected finite float32 (10, 2)"),
        (lambda t: t.pop("input_scale"), "tables: expected coefficients, init_noise_sigma, input_scale, timesteps"),
        (lambda t: t.update(more=t["input_scale"]), "tables: expected"),
        (lambda t: t.update(more=np.zeros(2**21, np.float32)), "expected at most"),
    ],
)
def test_a_runtime_table_that_was_edited(bundle: Path, change: Change, message: str) -> None:
    tables = {name: array.copy() for name, array in safetensors.numpy.load_file(bundle / RUNTIME_TABLES).items()}
    change(tables)
    (bundle / RUNTIME_TABLES).write_bytes(safetensors.numpy.save(tables))
    seal(bundle)
    assert message in refusal(bundle)


def test_weights_that_the_plan_knows_nothing_of(bundle: Path) -> None:
    tables = safetensors.numpy.load_file(bundle / TABLES)
    tables["forecast_weights"] = np.ones((10, 2), np.float32)
    (bundle / TABLES).write_bytes(safetensors.numpy.save(tables))
    seal(bundle)
    assert "says nothing under forecast, and has a table forecast_weights" in refusal(bundle)


@pytest.mark.parametrize("data", [b"", b"no tensors", (2**60).to_bytes(8, "little"), b"\xff" * 64])
def test_a_runtime_table_that_lies_about_itself(bundle: Path, data: bytes) -> None:
    (bundle / RUNTIME_TABLES).write_bytes(data)
    seal(bundle)
    assert RUNTIME_TABLES in refusal(bundle)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../weights.bin", "a tensor's data lies in '../weights.bin', expected weights.bin"),
        ("location", "/etc/passwd", "a tensor's data lies in '/etc/passwd'"),
        ("location", "solver.onnx", "a tensor's data lies in 'solver.onnx'"),
        ("offset", "999999999", "of weights.bin, which has"),
        ("length", "999999999", "of weights.bin, which has"),
        ("length", "-1", "lies at 0, -1, expected two numbers"),
    ],
)
def test_a_graph_that_asks_for_another_file(bundle: Path, key: str, value: str, message: str) -> None:
    path = bundle / "onnx" / "full.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    path.write_bytes(model.SerializeToString())
    seal(bundle)
    assert message in refusal(bundle)


def test_another_file_is_found_however_deep_it_stands(bundle: Path) -> None:
    path = bundle / "onnx" / "full.onnx"
    model = onnx.load(path, load_external_data=False)
    hidden = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="elsewhere.bin")
    inner = onnx.GraphProto(name="inner", node=[onnx.NodeProto(op_type="Constant", output=["x"])])
    inner.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(hidden)
    branch = model.graph.node.add(op_type="If", input=["c"], output=["y"])
    branch.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
    path.write_bytes(model.SerializeToString())
    seal(bundle)
    assert "a tensor's data lies in 'elsewhere.bin'" in refusal(bundle)


def test_an_operator_that_is_not_onnx_s_own(bundle: Path) -> None:
    path = bundle / "onnx" / "solver.onnx"
    model = onnx.load(path)
    model.graph.node[0].domain = "com.microsoft"
    path.write_bytes(model.SerializeToString())
    seal(bundle)
    assert "an operator of b'com.microsoft'" in refusal(bundle)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x0f"])
def test_a_file_that_is_no_graph(bundle: Path, data: bytes) -> None:
    (bundle / "onnx" / "full.onnx").write_bytes(data)
    seal(bundle)
    assert "full.onnx" in refusal(bundle)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the single values of a document stand."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def what_runs(documents: Documents) -> tuple[Any, ...]:
    """All of the documents that a picture depends on, but for values that one document alone has."""
    manifest, plan = documents.manifest, documents.plan
    graphs = {name: (graph.file, graph.inputs, graph.outputs) for name, graph in manifest.graphs.items()}
    steps = documents.step_tables
    tables = [array.tobytes() for array in (steps.forecast_weights, *steps.token_index.values())]
    tables += [documents.runtime_tables[name].tobytes() for name in sorted(documents.runtime_tables)]
    return (
        pipeline_programs(manifest, plan),
        manifest.solver,
        manifest.latent_shape,
        manifest.batch_size,
        graphs,
        tables,
    )


def outcome(bundle: Path) -> Any:
    """What would run, or that nothing does."""
    try:
        return what_runs(read_documents(bundle))
    except TcDeployError:
        return "refused"


@pytest.mark.parametrize("name", [MANIFEST, PLAN])
def test_an_edit_anywhere_is_refused_or_changes_nothing_that_runs(mixed: Made, tmp_path: Path, name: str) -> None:
    folder = mixed.copy(tmp_path / "bundle")
    sound = (folder / name).read_text(encoding="utf-8")
    before = what_runs(read_documents(folder))
    places = list(leaves(json.loads(sound)))
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=5),
        st.just([]),
        st.just({}),
    )

    @settings(max_examples=60)
    @given(st.sampled_from(places), values)
    def edited(place: tuple[Any, ...], value: Any) -> None:
        document = copy.deepcopy(json.loads(sound))
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
        # JSON may have no place for what was put there; read_documents says so.
        with contextlib.suppress(KeyError, AttributeError, TypeError, ValueError):
            seal(folder)
        assert outcome(folder) in ("refused", before)

    try:
        edited()
    finally:
        (folder / name).write_text(sound, encoding="utf-8")
