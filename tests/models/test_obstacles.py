"""Checkpoints that cannot be loaded as they are: each cause in a line of its own, with its cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from bundles import run_cli
from safetensors.torch import load_file, save_file

from tc_deploy.errors import ModelError
from tc_deploy.models.loading import load_model, load_scheduler, scheduler_from_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
A_LAYER = "transformer_blocks.1.attn1.to_q"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny_dit_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(tiny_dit_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[Weights], Weights]) -> None:
    path = folder / "transformer" / WEIGHTS
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def refusal_of(path: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load_model(path)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


# --------------------------------------------------------------------------------------------------------- quantisation
@pytest.mark.parametrize(
    ("given", "method", "weights"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes", "codes"),
        ({"load_in_8bit": True}, "bitsandbytes", "none"),
        ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto", "codes"),
        ({"quant_method": "modelopt", "quant_type": "FP8"}, "modelopt", "codes"),
        ({"quant_method": "torchao"}, "torchao", "pickle"),
        ({"quant_method": "gguf"}, "gguf", "none"),
        ("something", "something", "none"),
    ],
    ids=str,
)
def test_a_quantised_checkpoint_is_named_as_one(folder: Path, given: Any, method: str, weights: str) -> None:
    edit_config(folder, quantization_config=given)
    path = folder / "transformer" / WEIGHTS
    if weights == "codes":
        edit_weights(folder, lambda held: held | {f"{A_LAYER}.weight": torch.zeros(64, 32, dtype=torch.uint8)})
    elif weights == "pickle":
        path.rename(path.with_suffix(".bin"))
    else:
        path.unlink()
    message = refusal_of(folder)
    assert f"the checkpoint is quantised with {method}" in message
    assert "dequantise" in message
    assert "again" not in message


def test_what_was_dequantised_is_told_to_drop_the_setting(folder: Path) -> None:
    # diffusers' dequantize() leaves it in the configuration that it saves.
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "take quantization_config out of that file" in refusal_of(folder)
    edit_config(folder, quantization_config=None)
    load_model(folder)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (f"{A_LAYER}.weight.absmax", "bitsandbytes"),
        (f"{A_LAYER}.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (f"{A_LAYER}.SCB", "bitsandbytes"),
        (f"{A_LAYER}.weight._data", "quanto"),
        (f"{A_LAYER}.weight_quantizer._amax", "modelopt"),
        (f"{A_LAYER}._weight_qdata", "torchao"),
        (f"{A_LAYER}.qweight", "GPTQ"),
        (f"{A_LAYER}.scale_weight", "float8"),
    ],
)
def test_quantised_weights_are_told_by_their_names(folder: Path, name: str, method: str) -> None:
    edit_weights(folder, lambda held: held | {name: torch.ones(2)})
    message = refusal_of(folder)
    assert f"quantised with {method}" in message.replace("scaled ", "").replace("GPTQ, AWQ or SVDQuant", "GPTQ")
    assert name in message


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_in_eight_bits_are_no_weights(folder: Path, kind: torch.dtype) -> None:
    name = f"{A_LAYER}.weight"
    edit_weights(folder, lambda held: held | {name: held[name].to(kind)})
    message = refusal_of(folder)
    assert name in message
    assert "save them as fp32, bf16 or fp16" in message


def test_single_files_are_no_folders(folder: Path, tmp_path: Path) -> None:
    for name, cure in (("flux1-dev-Q4_K_S.gguf", "GGUF holds quantised weights"), ("flux.safetensors", "from_single")):
        alone = tmp_path / name.rpartition(".")[2] / name
        alone.parent.mkdir()
        alone.write_bytes(b"x")
        for path in (alone, alone.parent):
            message = refusal_of(path)
            assert message.startswith(str(alone))
            assert cure in message
        # Beside a configuration it stands in the place of the weights.
        (folder / "transformer" / WEIGHTS).unlink(missing_ok=True)
        shutil.copy(alone, folder / "transformer")
        assert cure in refusal_of(folder)
        (folder / "transformer" / name).unlink()


# ------------------------------------------------------------------------------------------------- names of the tensors
def test_a_lora_that_was_fused_and_not_unloaded(folder: Path) -> None:
    def wrapped(held: Weights) -> Weights:
        weight = held.pop(f"{A_LAYER}.weight")
        added = {f"{A_LAYER}.lora_A.default.weight": torch.zeros(4, 64)}
        return held | {f"{A_LAYER}.base_layer.weight": weight} | added

    edit_weights(folder, wrapped)
    message = refusal_of(folder)
    assert f"{A_LAYER}.base_layer.weight" in message
    assert "pipe.unload_lora_weights()" in message
    assert "again" not in message


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("module._orig_mod.", "torch.compile"),
        ("_fsdp_wrapped_module._checkpoint_wrapped_module.", "FSDP"),
    ],
)
def test_a_wrapper_s_prefix(folder: Path, prefix: str, wrapper: str) -> None:
    edit_weights(folder, lambda held: {prefix + name: value for name, value in held.items()})
    message = refusal_of(folder)
    assert f"{prefix}pos_embed" in message or f"{prefix}proj_out_1.bias" in message
    assert wrapper in message
    assert "save_pretrained(folder)" in message


def test_a_wrapper_inside_a_block(folder: Path) -> None:
    edit_weights(
        folder,
        lambda held: {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in held.items()},
    )
    assert "transformer_blocks.1._orig_mod." in refusal_of(folder)


def test_missing_and_unexpected_keys_are_both_named(folder: Path) -> None:
    edit_weights(folder, lambda held: held | {"surplus": held.pop(f"{A_LAYER}.weight")})
    message = refusal_of(folder)
    assert f"1 missing key, first {A_LAYER}.weight and 1 unexpected key, first surplus" in message


@pytest.mark.parametrize("prefix", ["model.", "pipe.transformer."])
def test_a_prefix_of_somebody_s_own_module(folder: Path, prefix: str) -> None:
    edit_weights(folder, lambda held: {prefix + name: value for name, value in held.items()})
    message = refusal_of(folder)
    assert f"would fit without the {prefix!r} before each name" in message
    assert "save_pretrained(folder)" in message
    assert "from_single_file" not in message


def test_names_as_outside_diffusers(folder: Path) -> None:
    edit_weights(folder, lambda held: {f"model.diffusion_model.x_{name}": value for name, value in held.items()})
    message = refusal_of(folder)
    assert "first model.diffusion_model." in message
    assert "from_single_file" in message


# ---------------------------------------------------------------------------------------------------------- half a file
def test_a_pointer_of_git_lfs(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for name in (f"transformer/{WEIGHTS}", "transformer/config.json"):
        path, before = folder / name, (folder / name).read_bytes()
        path.write_text(pointer)
        message = refusal_of(folder)
        assert message.startswith(str(path))
        assert "git lfs pull" in message
        path.write_bytes(before)


def test_an_empty_file(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).write_bytes(b"")
    assert "it is empty" in refusal_of(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "null", "\x00"], ids=["deep", "cut", "null", "binary"])
def test_an_index_that_is_no_json(folder: Path, text: str) -> None:
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(text)
    assert f"{WEIGHTS}.index.json" in refusal_of(folder)


@pytest.mark.parametrize("shard", [f"../{WEIGHTS}", f"/{WEIGHTS}", f"x/../{WEIGHTS}", "..", "."])
def test_shards_lie_beside_their_index(folder: Path, shard: str) -> None:
    shutil.copy(folder / "transformer" / WEIGHTS, folder / WEIGHTS)
    index = {"metadata": {}, "weight_map": {f"{A_LAYER}.weight": shard}}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    message = refusal_of(folder)
    assert repr(shard) in message
    assert "plain names" in message


def test_an_index_without_metadata(folder: Path) -> None:
    index = {"weight_map": {f"{A_LAYER}.weight": WEIGHTS}}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "no metadata" in refusal_of(folder)


# ---------------------------------------------------------------------------------------------------------- the library
def test_a_scheduler_s_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import dummy_torch_and_scipy_objects as without_scipy
    from diffusers.utils import import_utils

    # What diffusers is on a machine without scipy.
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", without_scipy.LMSDiscreteScheduler)
    unavailable = (lambda: False, import_utils.BACKENDS_MAPPING["scipy"][1])
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "scipy", unavailable)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "LMSDiscreteScheduler"}))
    with pytest.raises(ModelError, match=r"LMSDiscreteScheduler needs scipy, which is not installed here; pip install"):
        load_scheduler(folder)
    module = "diffusers.schedulers.scheduling_euler_discrete.is_scipy_available"
    monkeypatch.setattr(module, lambda: False)
    with pytest.raises(ModelError, match=r"EulerDiscreteScheduler needs scipy, which is not installed here"):
        scheduler_from_config("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "x")


# ------------------------------------------------------------------------------------------------------------- variants
def as_variant(folder: Path, name: str, *, sharded: bool) -> dict[str, bytes]:
    """Save the transformer's weights in fp16 as a variant alone; returns the usual files."""
    place = folder / "transformer"
    module = diffusers.DiTTransformer2DModel.from_pretrained(place).half()
    shutil.rmtree(place)
    module.save_pretrained(place, variant=name, max_shard_size="100KB" if sharded else "1GB")
    return {}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_alone_is_named_and_taken(folder: Path, tmp_path: Path, *, sharded: bool) -> None:
    expected = {name: value.half().float() for name, value in load_model(folder).module.state_dict().items()}
    as_variant(folder, "fp16", sharded=sharded)
    message = refusal_of(folder)
    assert f"{WEIGHTS} is missing, but diffusion_pytorch_model." in message
    assert message.endswith("take it with --variant fp16")
    plan = tmp_path / "plan"
    words = ("calibrate", folder, "-o", plan, "--variant", "fp16", "--steps", 4, "--samples", 0, "--keep-counts", 0, 0)
    assert run_cli(*words).code == 0
    # The plan says which, so that export finds it.
    if not sharded:
        exported = run_cli("export", plan, "-o", tmp_path / "bundle", "--no-check")
        assert exported.code == 0, exported.err
    from tc_deploy.models.geometry import ModelOptions
    from tc_deploy.plan import load_plan

    options = ModelOptions.of(load_plan(plan)[0].model)
    assert options.variant == "fp16"
    found = load_model(folder, options).module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_shards_of_a_variant_under_an_older_name(folder: Path) -> None:
    as_variant(folder, "fp16", sharded=True)
    place = folder / "transformer"
    newer = place / f"{WEIGHTS}.index.fp16.json"
    newer.rename(place / "diffusion_pytorch_model.fp16.safetensors.index.json")
    assert "--variant fp16" in refusal_of(folder)
    from tc_deploy.models.geometry import ModelOptions

    load_model(folder, ModelOptions(variant="fp16"))


def test_copies_are_never_mixed(folder: Path) -> None:
    from tc_deploy.models.geometry import ModelOptions

    usual = (folder / "transformer" / WEIGHTS).read_bytes()
    expected = load_model(folder).weights_sha256
    as_variant(folder, "fp16", sharded=False)
    half = load_model(folder, ModelOptions(variant="fp16")).weights_sha256
    (folder / "transformer" / WEIGHTS).write_bytes(usual)
    assert load_model(folder).weights_sha256 == expected != half
    assert load_model(folder, ModelOptions(variant="fp16")).weights_sha256 == half
    with pytest.raises(ModelError, match=r"bf16.safetensors is missing, but .* is there; leave --variant bf16 out"):
        load_model(folder, ModelOptions(variant="bf16"))


@pytest.mark.parametrize("name", ["../x", "a.b", "", "fp16\n"])
def test_a_variant_is_a_plain_name(folder: Path, name: str) -> None:
    answer = run_cli("calibrate", folder, "-o", folder / "plan", "--variant", name)
    assert answer.code == 2
    assert "--variant" in answer.error


def test_every_family_s_weights_are_taken_for_plain(tmp_path: Path) -> None:
    """No layer of a known class is called as a quantisation's or an adapter's."""
    for name in zoo.DIFFUSERS:
        load_model(zoo.save(name, tmp_path / name), zoo.MODELS[name][2])
