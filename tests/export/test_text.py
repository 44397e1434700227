"""The text encoders' graph of every family, against encode_prompt of the real pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import zoo
from diffusers_pipelines import tiny_t5
from text_pipelines import CASES, CLIP, PROMPTS, WIDTH, Case, geometry_of, save
from tolerances import tolerance

from tc_deploy.errors import ExportError, ModelError, UsageError
from tc_deploy.export.merge import merged_model
from tc_deploy.export.text import export_text_encoder
from tc_deploy.manifest import ONNX_FOLDER, WEIGHTS, TextRecord
from tc_deploy.models import dit
from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.encoders import text_plan
from tc_deploy.models.geometry import Geometry, ModelOptions
from tc_deploy.tokenization import Tokenizers

EQUAL = tolerance("onnxruntime", "fp32", "max_abs")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A case's pipeline, and what was exported of it."""

    case: Case
    pipe: Any
    pipeline: Path
    bundle: Path
    record: TextRecord
    error: float | None


@pytest.fixture(
    scope="module",
    params=[
        "pixart",
        "sd3-without-t5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "flux", "wan")),
    ],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pipe = case.make(zoo.model(case.model).module)
    save(pipe, folder / "pipeline")
    (folder / "bundle" / ONNX_FOLDER).mkdir(parents=True)
    pipeline = PipelineFolder(folder / "pipeline", "text encoders")
    plan = text_plan(pipeline, case.family, geometry_of(case))
    part, record = export_text_encoder(
        pipeline, plan, folder / "bundle", batch_size=case.batch_size, check=True, progress=lambda what: None
    )
    assert part.samples is not None
    return Made(
        case=case,
        pipe=pipe,
        pipeline=folder / "pipeline",
        bundle=folder / "bundle",
        record=record,
        error=part.graph.max_abs_error,
    )


def test_conditions_are_those_of_encode_prompt(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    tokenizers = Tokenizers(made.bundle, made.record)
    feed = tokenizers.arrays(PROMPTS)
    cut = [record.args[1] for record in caplog.records if "is cut after" in record.msg and record.args]
    assert set(cut) == set(made.case.limits.values())
    session = onnxruntime.InferenceSession(made.bundle / ONNX_FOLDER / "text-encoder.onnx")
    assert {tensor.name for tensor in session.get_inputs()} == feed.keys()
    names = [tensor.name for tensor in session.get_outputs()]
    found = dict(zip(names, session.run(names, feed), strict=True))
    with torch.no_grad():
        expected = made.case.encode(made.pipe, PROMPTS)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array.numpy(), rtol=0, atol=EQUAL)
    # No two prompts are one.
    states = found["encoder_hidden_states"]
    assert all(not np.allclose(states[0], other) for other in states[1:])
    assert made.error is not None
    assert 0 < made.error <= EQUAL


def test_what_is_recorded(made: Made) -> None:
    limits = {Path(item.file).stem: item.tokens for item in made.record.tokenizers}
    assert limits == made.case.limits
    assert {item.name for item in made.record.components} == {
        name.replace("tokenizer", "text_encoder") for name in limits
    }
    assert made.record.defaults == ({"guidance": 3.5} if made.case.model == "flux" else {})
    # Weights are named after their encoder; small ones stay in the graph.
    graph = ir.load(made.bundle / ONNX_FOLDER / "text-encoder.onnx").graph
    for item in made.record.components:
        assert any(name.startswith(f"{item.name}.") for name in graph.initializers)
    shared = {value.const_value.location for value in graph.initializers.values() if is_external(value)}
    # The tiny CLIPs alone have none that is large enough for the file.
    assert shared == (set() if made.case is CASES["sd3-without-t5"] else {WEIGHTS})


def is_external(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)


@pytest.fixture
def broken(made: Made, tmp_path: Path) -> Path:
    """A copy of the pipeline that a test may damage."""
    return Path(shutil.copytree(made.pipeline, tmp_path / "pipeline"))


def refused(made: Made, pipeline: Path, message: str, geometry: Geometry | None = None) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        text_plan(PipelineFolder(pipeline, "text encoders"), made.case.family, geometry or geometry_of(made.case))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("made", ["pixart"], indirect=True)
def test_what_is_missing_is_named(made: Made, broken: Path) -> None:
    shutil.rmtree(broken / "tokenizer")
    refused(made, broken, r"tokenizer/tokenizer_config.json is missing; name the diffusers pipeline folder")
    shutil.copytree(made.pipeline / "tokenizer", broken / "tokenizer")
    weights = broken / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    refused(made, broken, r"pytorch_model.bin: a pickle can run code when it is read, so it is refused")
    shutil.rmtree(broken / "text_encoder")
    refused(made, broken, r"text_encoder/config.json is missing")
    with pytest.raises(ModelError, match=r"nowhere: no such folder to take the text encoders from"):
        PipelineFolder(Path("nowhere"), "text encoders")


@pytest.mark.parametrize("made", ["pixart"], indirect=True)
def test_an_encoder_of_another_class_is_refused(made: Made, broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "Gemma2Model"]
    (broken / "model_index.json").write_text(json.dumps(index))
    refused(made, broken, r"a Gemma2Model, but this family's prompts are encoded by a T5EncoderModel")


@pytest.mark.parametrize("made", ["pixart"], indirect=True)
def test_a_tokenizer_without_a_fast_form_is_refused(made: Made, broken: Path) -> None:
    (broken / "tokenizer" / "tokenizer.json").unlink()
    (broken / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    refused(made, broken, r"ByT5Tokenizer has no fast form, .* export without --with-text-encoder")
    (broken / "tokenizer" / "spiece.model").write_bytes(b"no model")
    (broken / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    refused(made, broken, r"sentencepiece is needed, which is not installed here; .* put the model's tokenizer.json")
    (broken / "tokenizer" / "spiece.model").unlink()
    refused(made, broken, r"the tokenizer's vocabulary is missing, as tokenizer.json")


@pytest.mark.parametrize("made", ["sd3-without-t5"], indirect=True)
def test_a_prompt_that_has_no_room_is_refused(made: Made, tmp_path: Path) -> None:
    pipe = CASES["sd3"].make(None)
    pipe.save_pretrained(tmp_path / "pipeline")
    geometry = made.case.family.geometry(zoo.model("sd3").module, ModelOptions(latent_size=(8, 12), text_tokens=CLIP))
    message = r"of the plan's 6 text tokens none are left for tokenizer_3, .* --text-tokens of at least 7"
    refused(made, tmp_path / "pipeline", message, geometry)


@pytest.mark.parametrize("made", ["pixart"], indirect=True)
def test_another_model_s_pipeline_is_refused(made: Made, tmp_path: Path) -> None:
    pipeline = Path(shutil.copytree(made.pipeline, tmp_path / "pipeline"))
    tiny_t5(WIDTH - 8).save_pretrained(pipeline / "text_encoder")
    (tmp_path / "bundle" / ONNX_FOLDER).mkdir(parents=True)
    folder = PipelineFolder(pipeline, "text encoders")
    plan = text_plan(folder, made.case.family, geometry_of(made.case))
    with pytest.raises(ModelError, match=r"encoder_hidden_states of shape \(7, 16\), the transformer takes \(7, 24\)"):
        export_text_encoder(folder, plan, tmp_path / "bundle", batch_size=None, check=False, progress=lambda what: None)


@pytest.mark.parametrize("made", ["pixart"], indirect=True)
def test_a_family_without_prompts_is_refused(made: Made) -> None:
    with pytest.raises(UsageError, match=r"DiTTransformer2DModel takes no prompt, .* without --with-text-encoder"):
        text_plan(PipelineFolder(made.pipeline, "text encoders"), dit.FAMILY, zoo.model("dit").geometry)


def test_graphs_of_two_opsets_are_not_joined() -> None:
    models = {}
    for opset in (20, 22):
        graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=str(opset))
        models[str(opset)] = ir.Model(graph, ir_version=10)
    with pytest.raises(ExportError, match="20 was exported for another opset"):
        merged_model(models, "both")
