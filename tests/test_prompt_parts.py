"""How a decoder and text encoders stand in a bundle: memory, precision, what loads them, and what is refused."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir
import openvino
import pytest
from bundles import edit_manifest, reseal, run_cli, snapshot
from prompted import BATCH, PROMPTS, Prompted, images, noise_of
from tolerances import tolerance

import tc_deploy
from tc_deploy import Pipeline
from tc_deploy.backends.base import BufferSpec
from tc_deploy.backends.build import build_target
from tc_deploy.backends.load import load_target
from tc_deploy.backends.onnxruntime.run import OrtDevice
from tc_deploy.backends.openvino.run import OpenVinoDevice, precisions_of
from tc_deploy.backends.registry import BACKENDS
from tc_deploy.bench.measure import bench_bundles
from tc_deploy.consistency import read_documents
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import DECODER, FP32_GRAPHS, TEXT_ENCODER, read_manifest
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.stepper import Engines
from tc_deploy.validate.validation import validate_bundle

WIDE = 16
ONE = pytest.mark.parametrize("prompted", ["pixart"], indirect=True)


@pytest.mark.slow
@ONE
def test_the_plan_s_transformer_is_free_before_a_text_encoder_is_loaded(prompted: Prompted, tmp_path: Path) -> None:
    alive: dict[str, tuple[int, int]] = {}

    def count(what: str) -> None:
        gc.collect()
        # Not isinstance, which wakes up whatever looks at its attributes.
        kinds = [type(item) for item in gc.get_objects()]
        alive[what] = kinds.count(diffusers.PixArtTransformer2DModel), kinds.count(diffusers.AutoencoderKL)

    count("before")
    transformers_before, autoencoders_before = alive["before"]
    settings: dict[str, Any] = {"with_decoder": True, "with_text_encoder": True, "graphs_from": (prompted.bundle,)}
    manifest = export_bundle(prompted.plan, tmp_path / "bundle", ExportOptions(**settings), progress=count)
    assert alive["comparing solver with the scheduler"] == (transformers_before + 1, autoencoders_before)
    assert alive["exporting decoder"] == (transformers_before, autoencoders_before)
    assert alive["exporting text_encoder"] == (transformers_before, autoencoders_before)
    # The taken bundle's own decoder and text encoder are not taken for this one's.
    assert {*manifest.graphs} == {*read_manifest(prompted.bundle).graphs}
    build_target(tmp_path / "bundle", options={"threads": 1})
    noise = noise_of(prompted)
    with tc_deploy.load(tmp_path / "bundle", batch_size=BATCH) as pipeline:
        found = pipeline(prompt=PROMPTS, **prompted.case.given, latents=noise, full=False).images
    assert np.array_equal(found, images(prompted, "onnxruntime", full=False, noise=noise).images)


@pytest.mark.slow
@ONE
def test_half_precision_leaves_them_in_fp32(prompted: Prompted, tmp_path: Path) -> None:
    words = ("--precision", "fp16", "--with-decoder", "--with-text-encoder", "--static-batch", BATCH)
    answer = run_cli("export", prompted.plan, "-o", tmp_path / "bundle", *words)
    assert answer.code == 0, answer.err
    for name in (DECODER, TEXT_ENCODER):
        graph = onnx_ir.load(tmp_path / "bundle" / "onnx" / f"{name}.onnx").graph
        assert onnx_ir.DataType.FLOAT16 not in {value.dtype for value in graph.initializers.values()}
    build_target(tmp_path / "bundle", options={"threads": 1})
    record = validate_bundle(tmp_path / "bundle", "onnxruntime")
    assert record.passed, record.remarks()
    noise = noise_of(prompted)
    with tc_deploy.load(tmp_path / "bundle") as pipeline:
        # One more than a batch holds: what fills it up is cut off.
        found = pipeline(prompt=[*PROMPTS, PROMPTS[0]], **prompted.case.given, seed=3).images
        assert found.shape == (BATCH + 1, *prompted.shape)
        half = pipeline(prompt=PROMPTS, **prompted.case.given, latents=noise, full=True).latents
    exact = images(prompted, "onnxruntime", full=True, noise=noise).latents
    assert np.abs(half - exact).max() / np.abs(exact).max() <= tolerance("onnxruntime", "fp16", "trajectory_max_rel")
    words = ("build", tmp_path / "bundle", "--backend", "tensorrt-rtx", "--compute-capability", "7.5")
    assert "this bundle's decoder is in fp32; leave 7.5 out, or export without" in run_cli(*words).error


class NotedCore:
    """OpenVINO's core, with an eye on what is asked of it."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.hints: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
        self.hints.append(settings["INFERENCE_PRECISION_HINT"])
        return self._core.compile_model(model, device, settings)


@ONE
@pytest.mark.parametrize(("name", "hint"), [("full", "bf16"), (DECODER, "f32"), (TEXT_ENCODER, "f32")])
def test_openvino_is_asked_for_fp32(prompted: Prompted, name: str, hint: str) -> None:
    device = OpenVinoDevice(threads=1, precision="f32", weights=None)
    # On a CPU without bf16 it is no more than a hint, which the device itself would refuse.
    device.settings["INFERENCE_PRECISION_HINT"] = "bf16"
    noted = NotedCore(device.core)
    device.core = noted
    record = read_manifest(prompted.bundle).graphs[name]
    inputs, outputs = (
        {it.name: device_buffer(device, it) for it in tensors} for tensors in (record.inputs, record.outputs)
    )
    device.load(prompted.bundle / record.file).bind(inputs, outputs)
    assert noted.hints == [hint]


def device_buffer(device: OpenVinoDevice, tensor: Any) -> Any:
    """For one row."""
    shape = tuple(1 if isinstance(size, str) else size for size in tensor.shape)
    return device.buffers([BufferSpec(dtype=tensor.numpy_dtype, shape=shape)])[0]


@ONE
def test_openvino_in_half_precision_leaves_them_in_fp32(prompted: Prompted, tmp_path: Path) -> None:
    if "bf16" not in precisions_of(openvino.Core()):
        pytest.skip("needs a CPU that computes in bf16")
    bundle = shutil.copytree(prompted.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("onnxruntime"))
    build_target(bundle, "openvino", {"threads": 1, "precision": "bf16"})
    record = validate_bundle(bundle, "openvino")
    errors = {variant.name: variant.worst.metrics.to_deviation or 0.0 for variant in record.variants}
    fp32 = tolerance("openvino", "fp32", "output_max_rel")
    assert errors["full"] > fp32
    assert max(errors[name] for name in FP32_GRAPHS) <= fp32


@ONE
@pytest.mark.parametrize("name", FP32_GRAPHS)
def test_a_wrong_graph_is_found_out(prompted: Prompted, tmp_path: Path, name: str) -> None:
    bundle = shutil.copytree(prompted.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("openvino"))
    path = bundle / "onnx" / f"{name}.onnx"
    model = onnx_ir.load(path)
    weights = [value.const_value for value in model.graph.initializers.values()]
    wrong = next(it for it in weights if it is not None and it.dtype is onnx_ir.DataType.FLOAT and it.size >= WIDE)
    model.graph.initializers[str(wrong.name)].const_value = onnx_ir.tensor(wrong.numpy() * 1.5, name=wrong.name)
    onnx_ir.save(model, path)
    reseal(bundle)
    build_target(bundle, options={"threads": 1})
    record = validate_bundle(bundle, "onnxruntime")
    assert [variant.name for variant in record.variants if not variant.passed] == [name]
    assert [(blamed.graph, blamed.origin) for blamed in record.blame] == [(name, "export")]
    assert not record.passed


@ONE
def test_each_text_is_encoded_once(prompted: Prompted) -> None:
    runs: list[str] = []

    device, graphs = load_target(prompted.bundle, read_manifest(prompted.bundle), "onnxruntime")
    text = graphs[TEXT_ENCODER]

    class Counted:
        def bind(self, inputs: Any, outputs: Any) -> Any:
            bound = text.bind(inputs, outputs)
            original = bound.run

            def run() -> None:
                runs.append(TEXT_ENCODER)
                original()

            bound.run = run
            return bound

    engines = (device, {**graphs, TEXT_ENCODER: Counted()})
    with Pipeline(prompted.bundle, "onnxruntime", batch_size=1, engines=engines) as pipeline:
        pipeline(prompt=["a cat", "a dog", "a cat", "a cat"], negative_prompt="a dog")
        assert len(runs) == 2
        stepped = [step.read_latents() for step in pipeline.steps(prompt=["a cat"], negative_prompt="a dog", seed=2)]
        whole = pipeline(prompt=["a cat"], negative_prompt="a dog", seed=2).latents
    assert np.array_equal(stepped[-1], whole)


@ONE
def test_who_needs_steps_alone_loads_them_alone(prompted: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = OrtDevice.load

    def load(self: OrtDevice, path: Path) -> Any:
        loaded.append(path.stem)
        return original(self, path)

    monkeypatch.setattr(OrtDevice, "load", load)
    Engines(read_bundle(prompted.bundle, "onnxruntime"))
    assert sorted(loaded) == ["cached-1", "full"]


@ONE
def test_bench_times_the_sampling_run_and_no_decoder(prompted: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object) -> None:
        pytest.fail("the decoder ran")

    monkeypatch.setattr("tc_deploy.runtime.pipeline.images_from_pixels", decoded)
    facts = bench_bundles(prompted.bundle, "onnxruntime", rounds=1)
    assert {*facts["contenders"][0]["variants"]} >= {"full", "cached-1"}


@ONE
def test_torch_runs_steps_only(prompted: Prompted, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"torch runs the steps' graphs only, and this bundle has a decoder"):
        build_target(prompted.bundle, "torch")

    def strip(manifest: dict[str, Any]) -> None:
        manifest.update(decoder=None, text=None)
        manifest["graphs"] = {name: it for name, it in manifest["graphs"].items() if name not in FP32_GRAPHS}

    bundle = shutil.copytree(prompted.bundle, tmp_path / "bundle")
    edit_manifest(bundle, strip)
    found = {}
    for backend in ("torch", "onnxruntime"):
        build_target(bundle, backend)
        with tc_deploy.load(bundle, backend) as pipeline:
            found[backend] = pipeline(**pipeline.placeholders(1)).latents
    error = np.abs(found["torch"] - found["onnxruntime"]).max() / np.abs(found["onnxruntime"]).max()
    assert error <= tolerance("torch", "fp32", "trajectory_max_rel")


@ONE
def test_prompts_without_their_library(prompted: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with tc_deploy.load(prompted.bundle, "onnxruntime") as pipeline:
        with pytest.raises(BackendError, match=r"tokenizers is not installed: pip install 'tokenizers>="):
            pipeline(prompt=["a cat"])
        # Who gives arrays needs none, and the failed request holds nothing.
        assert pipeline(**pipeline.placeholders(1)).images.shape == (1, *prompted.shape)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda it: it.update(decoder=None), "the graph decoder and what is said of it go together"),
    (lambda it: it.update(text=None), "the graph text-encoder and what is said of it go together"),
    (lambda it: it["text"].update(tokenizers=[]), "text.tokenizers"),
    (lambda it: it["text"].update(cleaning="html"), "text.cleaning"),
    (lambda it: it["text"].update(more=1), "text.more: unknown key"),
    (lambda it: it["text"]["tokenizers"][0].update(tokens=9), r"graphs.text-encoder.inputs: \w+: expected int32"),
    (lambda it: it["text"]["tokenizers"][0].update(ids="ids"), r"graphs.text-encoder.inputs: ids: expected int32"),
    (lambda it: it["text"]["tokenizers"][0].update(file="tokenizers/x.json"), "no checksum for tokenizers/x.json"),
    (
        lambda it: it["text"].update(defaults={"encoder_attention_mask": 1.0}),
        r"graphs.text-encoder.outputs: encoder_attention_mask: expected nothing",
    ),
    (
        lambda it: it["graphs"]["decoder"]["inputs"][0].update(name="z"),
        r"graphs.decoder.inputs: latents: expected float32",
    ),
    (
        lambda it: it["graphs"]["decoder"]["inputs"][0]["shape"].__setitem__(1, 3),
        r"graphs.decoder.inputs: latents: expected float32",
    ),
    (lambda it: it.update(latent_shape=[4, 8, 8]), r"graphs.full.inputs: hidden_states: expected float32"),
]


@ONE
@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_manifest_that_does_not_fit_its_graphs_is_refused(
    prompted: Prompted, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    bundle = shutil.copytree(prompted.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(*BACKENDS))
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=message) as raised:
        read_documents(bundle)
    assert "\n" not in str(raised.value)


@ONE
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "takes --prompt or --conditions FILE; give one of them"),
        (("--prompt", "a cat", "--class-label", 1), "takes --prompt or --conditions FILE; give one of them"),
        (("--prompt", "a cat", "-n", 0), "'-n' / '--count': 0 is not in the range"),
        (
            ("--prompt", "a cat", "--true-cfg-scale", 2.0),
            "true_cfg_scale: the pipeline of this model has none; its guidance is guidance_scale",
        ),
        (("--class-label", 1, "--negative-prompt", "a dog"), "goes with --prompt; a file of conditions holds its own"),
        (("--class-label", 1), "class_labels: this model takes no labels; give conditions"),
    ],
)
def test_a_command_line_that_does_not_fit_is_refused(
    prompted: Prompted, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    answer = run_cli("generate", prompted.bundle, "--backend", "onnxruntime", *words, "-o", tmp_path / "out.png")
    assert answer.code == UsageError.exit_code
    assert message in answer.error
    assert not (tmp_path / "out.png").exists()


@ONE
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--pipeline", "x"), 2, "give --with-decoder or --with-text-encoder with it"),
        (("--with-decoder", "--pipeline", "x"), 3, "x: no such folder to take the decoder from"),
        (("--with-text-encoder", "--pipeline", "."), 3, "is missing; name the diffusers pipeline folder that holds it"),
    ],
)
def test_an_export_of_parts_that_are_not_there_is_refused_at_once(
    prompted: Prompted, tmp_path: Path, words: tuple[object, ...], code: int, message: str
) -> None:
    answer = run_cli("export", prompted.plan, "-o", tmp_path / "bundle", *words)
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.error
    assert "exporting" not in answer.err
    assert snapshot(tmp_path) == {}
