"""From a prompt to a picture: bundles with text encoders and a decoder, against the pipelines they were made of."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir
import openvino
import pytest
import torch
import transformers
import zoo
from bundles import SaveDit, edit_manifest, make_plan, reseal, run_cli, snapshot
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers_pipelines import tiny_autoencoder, tiny_clip, tiny_t5, tiny_tokenizer, tiny_umt5
from numpy.typing import NDArray
from PIL import Image
from tolerances import tolerance

import tc_deploy
from tc_deploy import Pipeline
from tc_deploy.backends.base import BufferSpec
from tc_deploy.backends.build import build_target
from tc_deploy.backends.load import load_target
from tc_deploy.backends.onnxruntime import OrtDevice
from tc_deploy.backends.openvino import OpenVinoDevice, precisions_of
from tc_deploy.bench.measure import bench_bundles
from tc_deploy.bundle import MANIFEST
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.export.stage import export_bundle
from tc_deploy.manifest import DECODER, FP32_GRAPHS, TEXT_ENCODER, read_manifest
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.request import checked_request
from tc_deploy.runtime.stepper import Engines
from tc_deploy.sheet import GAP
from tc_deploy.validate.stage import validate_bundle

STEPS, TEXT, CLIP = 4, 5, 6
WIDE = 16
PROMPTS = ["a cat on a mat", "a red bridge"]
BATCH = len(PROMPTS)
# F c F c, and no phase 2.
SCHEDULE = {"boundary": STEPS, "k1": 2, "k2": 1}
FLUX_SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _pixart(transformer: Any) -> Any:
    parts = (tiny_tokenizer(300), tiny_t5(24), tiny_autoencoder(4, 2), transformer)
    return diffusers.PixArtSigmaPipeline(*parts, diffusers.DPMSolverMultistepScheduler())


def _flux(transformer: Any) -> Any:
    clip = tiny_clip(transformers.CLIPTextModel, 20)
    text = (clip, tiny_tokenizer(CLIP), tiny_t5(24), tiny_tokenizer(512))
    autoencoder = tiny_autoencoder(4)
    autoencoder.register_to_config(shift_factor=0.25)
    return diffusers.FluxPipeline(FLUX_SCHEDULER, autoencoder, *text, transformer)


def _sd3(transformer: Any) -> Any:
    kind = transformers.CLIPTextModelWithProjection
    first, second = (tiny_clip(kind, 8, projection, seed) for projection, seed in ((8, 1), (12, 2)))
    clips = (first, tiny_tokenizer(CLIP), second, tiny_tokenizer(CLIP))
    autoencoder = tiny_autoencoder(4, 2)
    autoencoder.register_to_config(scaling_factor=1.5, shift_factor=0.25)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, autoencoder, *clips, tiny_t5(24), tiny_tokenizer(256)
    )


def _wan(transformer: Any) -> Any:
    torch.manual_seed(5)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.5, -1.0, 0.0, 2.0],
        latents_std=[2.0, 0.5, 1.0, 3.0],
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(tiny_tokenizer(512), tiny_umt5(24), autoencoder.eval(), scheduler, transformer)


def _flux_sampling() -> dict[str, Any]:
    """As FluxPipeline sets its scheduler up: a shift that depends on the tokens."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(24, *(FLUX_SCHEDULER.config[name] for name in names))
    return {"steps": STEPS, "set_timesteps_kwargs": {"mu": shift, "sigmas": np.linspace(1, 1 / STEPS, STEPS).tolist()}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family in its pipeline."""

    changes: Mapping[str, Any]
    """To the zoo's model."""
    make: Callable[[Any], Any]
    keep: tuple[int, ...]
    sampling: Mapping[str, Any]
    arguments: Mapping[str, Any]
    """Of the pipeline."""
    size: tuple[int, int]
    """That the pipeline is asked for, in pixels."""
    shape: tuple[int, ...] = ()
    """Of one picture or video; ``size`` in RGB where nothing is said."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the engines are given beside prompts and noise."""


CASES = {
    "pixart": Case(
        changes={"num_layers": 1, "use_additional_conditions": False},
        make=_pixart,
        keep=(8,),
        sampling={"steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": "a dog", "guidance_scale": 3.0, "use_resolution_binning": False},
        size=(16, 24),
        given={"negative_prompts": "a dog"},
    ),
    "flux": Case(
        changes={"num_layers": 1, "num_single_layers": 1},
        make=_flux,
        keep=(8, 5),
        sampling=_flux_sampling(),
        arguments={"guidance_scale": 2.0},
        size=(8, 12),
        given={"conditions": {"guidance": np.full(BATCH, 2.0, np.float32)}},
    ),
    "sd3": Case(
        changes={"num_layers": 1},
        make=_sd3,
        keep=(8,),
        sampling={"steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": ["a dog"] * BATCH, "guidance_scale": 3.0},
        size=(16, 24),
        given={"negative_prompts": ["a dog"] * BATCH},
        plan={"text_tokens": CLIP + TEXT},
    ),
    "wan": Case(
        changes={"num_layers": 1},
        make=_wan,
        keep=(8,),
        sampling={"steps": STEPS, "guidance_scale": 3.0},
        arguments={"negative_prompt": ["a dog"] * BATCH, "guidance_scale": 3.0, "num_frames": 9},
        size=(32, 64),
        # The tiny autoencoder enlarges less than the real one.
        shape=(5, 8, 16, 3),
        given={"negative_prompts": "a dog"},
        plan={"latent_size": (3, 4, 8)},
    ),
}
SLOW = ("flux", "sd3", "wan")
"""Half a minute each to export."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A case on disk, and its pipeline."""

    case: Case
    pipe: Any
    plan: Path
    bundle: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture or video."""
        return self.case.shape or (*self.case.size, 3)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    zoo.save(request.param, folder / "model", **case.changes)
    transformer = getattr(diffusers, zoo.MODELS[request.param][0]).from_pretrained(folder / "model").eval()
    pipe = case.make(transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    plan = make_plan(
        folder / "pipeline",
        folder / "plan",
        **{
            "conditions": "random",
            "latent_size": (8, 12),
            "text_tokens": TEXT,
            "sampling": case.sampling,
            "schedule": SCHEDULE,
            "cache": {"attention": "all", "forecast_order": 1, "keep_counts": (case.keep, (0,) * len(case.keep))},
            **case.plan,
        },
    )
    answer = run_cli("export", plan, "-o", folder / "bundle", "--with-decoder", "--with-text-encoder")
    assert answer.code == 0, answer.err
    build_target(folder / "bundle", options={"threads": 1})
    return Made(case=case, pipe=pipe, plan=plan, bundle=folder / "bundle")


def pictures(made: Made, backend: str | None = None, *, full: bool, noise: NDArray[np.float32]) -> Any:
    with tc_deploy.load(made.bundle, backend, batch_size=BATCH) as pipeline:
        return pipeline(prompts=PROMPTS, **made.case.given, latents=noise, full=full)


def noise_of(made: Made) -> NDArray[np.float32]:
    with tc_deploy.load(made.bundle, batch_size=BATCH) as pipeline:
        return pipeline.noise(3, BATCH)


def test_prompts_become_the_pipeline_s_pictures(made: Made) -> None:
    noise = noise_of(made)
    height, width = made.case.size
    made_by_it = made.pipe(
        prompt=PROMPTS,
        **made.case.arguments,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        max_sequence_length=TEXT,
        latents=torch.from_numpy(noise),
        output_type="np",
        return_dict=False,
    )[0]
    full = pictures(made, full=True, noise=noise)
    assert (full.images.dtype, full.images.shape) == (np.uint8, (BATCH, *made.shape))
    assert (full.steps_full, full.steps_cached) == (STEPS, 0)
    # Rounding to bytes moves a value by half a step, and one between two bytes to either.
    assert np.abs(full.images / 255 - made_by_it).max() <= 1.5 / 255
    cached = pictures(made, full=False, noise=noise)
    assert (cached.steps_full, cached.steps_cached) == (2, 2)
    assert np.abs(cached.latents - full.latents).max() > 100 * tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_prompts_alone_are_told_apart(made: Made) -> None:
    noise = np.repeat(noise_of(made)[:1], BATCH, axis=0)
    first, second = pictures(made, full=False, noise=noise).latents
    assert np.abs(first - second).max() > tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_openvino_makes_the_same(made: Made) -> None:
    noise = noise_of(made)
    build_target(made.bundle, "openvino", {"threads": 1, "precision": "f32"})
    expected, found = (pictures(made, name, full=False, noise=noise) for name in ("onnxruntime", "openvino"))
    error = np.abs(found.latents - expected.latents).max() / np.abs(expected.latents).max()
    assert error <= tolerance("openvino", "fp32", "trajectory_max_rel")
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


def test_tensorrt_rtx_builds_every_graph(made: Made, tmp_path: Path) -> None:
    """Real engines; running them needs a GPU."""
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    target = build_target(bundle, "tensorrt-rtx", {"batch_profile": (1, BATCH, BATCH)})
    assert {f"{name}.engine" for name in read_manifest(bundle).graphs} <= {*target.files}
    assert {DECODER, TEXT_ENCODER} <= {*read_manifest(bundle).graphs}


def test_validation_covers_decoder_and_text_encoder(made: Made) -> None:
    record = validate_bundle(made.bundle, "onnxruntime")
    assert {DECODER, TEXT_ENCODER} <= {variant.name for variant in record.variants if variant.passed}
    assert record.passed


def test_no_torch_is_needed(made: Made) -> None:
    program = """
import json, sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None
import tc_deploy
with tc_deploy.load(sys.argv[1], "onnxruntime") as pipeline:
    result = pipeline(prompts=["a cat"], seed=1)
print(json.dumps([list(result.images.shape), result.steps_cached]))
"""
    words = [sys.executable, "-c", program, str(made.bundle)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == [[1, *made.shape], 2]


def test_the_command_line_takes_prompts(made: Made, tmp_path: Path) -> None:
    words = ("generate", made.bundle, "--backend", "onnxruntime", "--prompt", "a cat", "--prompt", "a red dog")
    answer = run_cli(*words, "-o", tmp_path / "out.png")
    assert answer.code == 0, answer.err
    assert "2 pictures, 2 full + 2 cached steps" in answer.out
    *frames, height, width, _ = made.shape
    with Image.open(tmp_path / "out.png") as sheet:
        # Two pictures stand side by side; of video each has a row of frames.
        columns, rows = (frames[0], 2) if frames else (2, 1)
        assert sheet.size == (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    shown = run_cli("inspect", made.bundle).out
    assert DECODER in shown
    assert TEXT_ENCODER in shown
    manifest = read_manifest(made.bundle)
    assert manifest.decoder is not None
    assert manifest.text is not None
    for part in (manifest.decoder, *manifest.text.components):
        assert f"part      {part.name}, {part.model_class}, sha256 {part.weights_sha256[:16]}" in shown
    for item in manifest.text.tokenizers:
        assert f"prompts   {item.file}, padded or cut to {item.tokens} tokens" in shown


def test_what_does_not_go_with_prompts_is_refused(made: Made) -> None:
    with tc_deploy.load(made.bundle, "onnxruntime") as pipeline:
        for given, message in (
            ({"prompts": "a cat"}, "prompts must be a list"),
            ({"prompts": []}, "no text in prompts"),
            ({"prompts": [3]}, "prompts must hold text"),
            ({"prompts": ["a cat"], "class_labels": [1]}, "one of them"),
            ({"prompts": ["a cat"], "conditions": {"encoder_hidden_states": np.zeros(1)}}, "not for a request to give"),
        ):
            with pytest.raises(UsageError, match=message):
                pipeline(**given)


def test_labels_become_the_pipeline_s_pictures(save_dit: SaveDit, tmp_path: Path) -> None:
    # DiTPipeline's "no class" is 1000, whatever the model's classes.
    folder = save_dit(tmp_path / "pipeline", num_layers=1, num_embeds_ada_norm=1000)
    autoencoder = tiny_autoencoder(4, 2)
    autoencoder.save_pretrained(folder / "vae")
    plan = make_plan(
        folder,
        tmp_path / "plan",
        sampling={"steps": STEPS, "guidance_scale": 2.0},
        schedule=SCHEDULE,
        cache={"keep_counts": ((0,), (0,))},
    )
    assert run_cli("export", plan, "-o", tmp_path / "bundle", "--with-decoder").code == 0
    build_target(tmp_path / "bundle", options={"threads": 1})
    with tc_deploy.load(tmp_path / "bundle") as pipeline:
        noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
        result = pipeline(class_labels=[3, 1], latents=noise.numpy(), full=True)
        assert pipeline(class_labels=[3], seed=5, decode=False).images is None
        with pytest.raises(UsageError, match="this bundle takes class labels, no prompts"):
            pipeline(prompts=["a cat"])
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    pipe = diffusers.DiTPipeline(transformer.eval(), autoencoder, scheduler)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "np"}
    # It draws its noise itself.
    expected = pipe([3, 1], generator=torch.Generator().manual_seed(1), **settings).images
    assert np.abs(result.images / 255 - expected).max() <= 1.5 / 255


def test_a_bundle_without_a_text_encoder_says_how_to_have_one(made: Made) -> None:
    manifest = read_manifest(made.bundle).model_copy(update={"text": None})
    nothing = dict.fromkeys(("class_labels", "negative_prompts", "conditions", "unconditional", "latents"))
    with pytest.raises(UsageError, match=r"no text encoder.*--with-text-encoder"):
        checked_request(manifest, prompts=PROMPTS, **nothing, seed=0, guidance_scale=None)


# ------------------------------------------------------------------------------------- how the parts stand in a bundle

ONE = pytest.mark.parametrize("made", ["pixart"], indirect=True)


@pytest.mark.slow
@ONE
def test_the_plan_s_transformer_is_free_before_a_text_encoder_is_loaded(made: Made, tmp_path: Path) -> None:
    alive: dict[str, tuple[int, int]] = {}

    def count(what: str) -> None:
        gc.collect()
        # Not isinstance, which wakes up whatever looks at its attributes.
        kinds = [type(item) for item in gc.get_objects()]
        alive[what] = kinds.count(diffusers.PixArtTransformer2DModel), kinds.count(diffusers.AutoencoderKL)

    count("before")
    transformers_before, autoencoders_before = alive["before"]
    settings: dict[str, Any] = {"with_decoder": True, "with_text_encoder": True, "graphs_from": made.bundle}
    manifest = export_bundle(made.plan, tmp_path / "bundle", **settings, progress=count)
    assert alive["comparing solver with the scheduler"] == (transformers_before + 1, autoencoders_before)
    assert alive["exporting decoder"] == (transformers_before, autoencoders_before)
    assert alive["exporting text_encoder"] == (transformers_before, autoencoders_before)
    # The taken bundle's own decoder and text encoder are not taken for this one's.
    assert {*manifest.graphs} == {*read_manifest(made.bundle).graphs}
    build_target(tmp_path / "bundle", options={"threads": 1})
    noise = noise_of(made)
    with tc_deploy.load(tmp_path / "bundle", batch_size=BATCH) as pipeline:
        found = pipeline(prompts=PROMPTS, **made.case.given, latents=noise, full=False).images
    assert np.array_equal(found, pictures(made, "onnxruntime", full=False, noise=noise).images)


@pytest.mark.slow
@ONE
def test_half_precision_leaves_them_in_fp32(made: Made, tmp_path: Path) -> None:
    words = ("--precision", "fp16", "--with-decoder", "--with-text-encoder", "--static-batch", BATCH)
    answer = run_cli("export", made.plan, "-o", tmp_path / "bundle", *words)
    assert answer.code == 0, answer.err
    for name in (DECODER, TEXT_ENCODER):
        graph = onnx_ir.load(tmp_path / "bundle" / "onnx" / f"{name}.onnx").graph
        assert onnx_ir.DataType.FLOAT16 not in {value.dtype for value in graph.initializers.values()}
    build_target(tmp_path / "bundle", options={"threads": 1})
    record = validate_bundle(tmp_path / "bundle", "onnxruntime")
    assert record.passed, record.remarks()
    noise = noise_of(made)
    with tc_deploy.load(tmp_path / "bundle") as pipeline:
        # One more than a batch holds: what fills it up is cut off.
        found = pipeline(prompts=[*PROMPTS, PROMPTS[0]], **made.case.given, seed=3).images
        assert found.shape == (BATCH + 1, *made.shape)
        half = pipeline(prompts=PROMPTS, **made.case.given, latents=noise, full=True).latents
    exact = pictures(made, "onnxruntime", full=True, noise=noise).latents
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
def test_openvino_is_asked_for_fp32(made: Made, name: str, hint: str) -> None:
    device = OpenVinoDevice(threads=1, precision="f32", weights=None)
    # On a CPU without bf16 it is no more than a hint, which the device itself would refuse.
    device.settings["INFERENCE_PRECISION_HINT"] = "bf16"
    noted = NotedCore(device.core)
    device.core = noted
    record = read_manifest(made.bundle).graphs[name]
    inputs, outputs = (
        {it.name: device_buffer(device, it) for it in tensors} for tensors in (record.inputs, record.outputs)
    )
    device.load(made.bundle / record.file).bind(inputs, outputs)
    assert noted.hints == [hint]


def device_buffer(device: OpenVinoDevice, tensor: Any) -> Any:
    """For one row."""
    shape = tuple(1 if isinstance(size, str) else size for size in tensor.shape)
    return device.buffers([BufferSpec(dtype=tensor.numpy_dtype, shape=shape)])[0]


@ONE
def test_openvino_in_half_precision_leaves_them_in_fp32(made: Made, tmp_path: Path) -> None:
    if "bf16" not in precisions_of(openvino.Core()):
        pytest.skip("needs a CPU that computes in bf16")
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("onnxruntime"))
    build_target(bundle, "openvino", {"threads": 1, "precision": "bf16"})
    record = validate_bundle(bundle, "openvino")
    errors = {variant.name: variant.worst.metrics.to_deviation or 0.0 for variant in record.variants}
    fp32 = tolerance("openvino", "fp32", "output_max_rel")
    assert errors["full"] > fp32
    assert max(errors[name] for name in FP32_GRAPHS) <= fp32


@ONE
@pytest.mark.parametrize("name", FP32_GRAPHS)
def test_a_wrong_graph_is_found_out(made: Made, tmp_path: Path, name: str) -> None:
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("openvino"))
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
def test_each_text_is_encoded_once(made: Made) -> None:
    runs: list[str] = []

    device, graphs = load_target(made.bundle, read_manifest(made.bundle), "onnxruntime")
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
    with Pipeline(made.bundle, "onnxruntime", batch_size=1, engines=engines) as pipeline:
        pipeline(prompts=["a cat", "a dog", "a cat", "a cat"], negative_prompts="a dog")
        assert len(runs) == 2
        stepped = [step.read_latents() for step in pipeline.steps(prompts=["a cat"], negative_prompts="a dog", seed=2)]
        whole = pipeline(prompts=["a cat"], negative_prompts="a dog", seed=2).latents
    assert np.array_equal(stepped[-1], whole)


@ONE
def test_who_needs_steps_alone_loads_them_alone(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = OrtDevice.load

    def load(self: OrtDevice, path: Path) -> Any:
        loaded.append(path.stem)
        return original(self, path)

    monkeypatch.setattr(OrtDevice, "load", load)
    Engines(read_bundle(made.bundle, "onnxruntime"))
    assert sorted(loaded) == ["cached-1", "full"]


@ONE
def test_bench_times_the_sampling_run(made: Made) -> None:
    facts = bench_bundles(made.bundle, "onnxruntime", rounds=1)
    assert {*facts["contenders"][0]["variants"]} >= {"full", "cached-1"}


@ONE
def test_torch_runs_steps_only(made: Made, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"torch runs the steps' graphs only, and this bundle has a decoder"):
        build_target(made.bundle, "torch")

    def strip(manifest: dict[str, Any]) -> None:
        manifest.update(decoder=None, text=None)
        manifest["graphs"] = {name: it for name, it in manifest["graphs"].items() if name not in FP32_GRAPHS}

    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")
    edit_manifest(bundle, strip)
    found = {}
    for backend in ("torch", "onnxruntime"):
        build_target(bundle, backend)
        with tc_deploy.load(bundle, backend) as pipeline:
            found[backend] = pipeline(**pipeline.placeholders(1)).latents
    error = np.abs(found["torch"] - found["onnxruntime"]).max() / np.abs(found["onnxruntime"]).max()
    assert error <= tolerance("torch", "fp32", "trajectory_max_rel")


@ONE
def test_prompts_without_their_library(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with tc_deploy.load(made.bundle, "onnxruntime") as pipeline:
        with pytest.raises(BackendError, match=r"tokenizers, which is not installed; install tc-deploy\[text\]"):
            pipeline(prompts=["a cat"])
        # Who gives arrays needs none, and the failed request holds nothing.
        assert pipeline(**pipeline.placeholders(1)).images.shape == (1, *made.shape)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda it: it.update(decoder=None), "the graph decoder and what is said of it go together"),
    (lambda it: it.update(text=None), "the graph text-encoder and what is said of it go together"),
    (lambda it: it["text"].update(tokenizers=[]), "text.tokenizers"),
    (lambda it: it["text"].update(cleaning="html"), "text.cleaning"),
    (lambda it: it["text"].update(more=1), "text.more: unknown key"),
    (lambda it: it["text"]["tokenizers"][0].update(tokens=9), r"the graph text-encoder: expected the inputs"),
    (lambda it: it["text"]["tokenizers"][0].update(ids="ids"), r"the graph text-encoder: expected the inputs"),
    (lambda it: it["text"]["tokenizers"][0].update(file="tokenizers/x.json"), "no checksum for tokenizers/x.json"),
    (lambda it: it["text"].update(defaults={"encoder_attention_mask": 1.0}), "expected the outputs"),
    (lambda it: it["graphs"]["decoder"]["inputs"][0].update(name="z"), r"the graph decoder: expected the inputs"),
    (lambda it: it.update(latent_shape=[4, 8, 8]), r"the graph decoder: expected the inputs"),
]


@ONE
@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_manifest_that_does_not_fit_its_graphs_is_refused(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    shutil.copyfile(made.bundle / MANIFEST, tmp_path / MANIFEST)
    edit_manifest(tmp_path, change)
    with pytest.raises(BundleError, match=message) as raised:
        read_manifest(tmp_path)
    assert "\n" not in str(raised.value)


@ONE
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --class-label, --prompt or --conditions FILE, one of them"),
        (("--prompt", "a cat", "--class-label", 1), "one of them"),
        (("--prompt", "a cat", "-n", 0), "-n must be at least 1, found 0"),
        (
            ("--prompt", "a cat", "--distilled-guidance", 2.0),
            "is not for a request to give beside prompts, as this",
        ),
        (("--class-label", 1, "--negative-prompt", "a dog"), "go with --prompt; a file of conditions holds its own"),
        (("--class-label", 1), "class_labels: this model takes no labels; give conditions"),
    ],
)
def test_a_command_line_that_does_not_fit_is_refused(
    made: Made, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    answer = run_cli("generate", made.bundle, "--backend", "onnxruntime", *words, "-o", tmp_path / "out.png")
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
    made: Made, tmp_path: Path, words: tuple[object, ...], code: int, message: str
) -> None:
    answer = run_cli("export", made.plan, "-o", tmp_path / "bundle", *words)
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.error
    assert "exporting" not in answer.err
    assert snapshot(tmp_path) == {}
