"""A LoRA in the weights, against what it adds to the untouched model's layers by hooks; and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from bundles import make_plan, run_cli
from safetensors.torch import save_file
from tolerances import tolerance
from torch import Tensor

from tc_deploy.errors import ModelError
from tc_deploy.manifest import read_manifest
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.models.lora import Lora, fuse_lora

RANK = 2
QUERY = "transformer.transformer_blocks.0.attn.to_q"
LAYERS = {
    "sd3": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"),
    "qwen-image": ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"),
    "flux2": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj", "transformer_blocks.0.ff.linear_in"),
}


def _loaded(name: str, folder: Path) -> DiffusionTransformer:
    return load_model(zoo.save(name, folder / "transformer"), zoo.MODELS[name][2])


def _factors(model: DiffusionTransformer, names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in names:
        out, width = model.module.get_submodule(name).weight.shape  # type: ignore[misc,union-attr]
        found[name] = (
            torch.randn(RANK, width, generator=generator) / width**0.5,
            torch.randn(out, RANK, generator=generator),
        )
    return found


def _save(path: Path, factors: Mapping[str, tuple[Tensor, Tensor]], **metadata: Any) -> Path:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    said = {f"transformer.{key}": value for key, value in metadata.items()}
    save_file(tensors, path, {"format": "pt", **({"lora_adapter_metadata": json.dumps(said)} if said else {})})
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    ("metadata", "strength"), [({}, 1.0), ({"r": RANK, "lora_alpha": 8}, 4.0)], ids=["plain", "alpha"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_the_model_is_the_untouched_one_with_the_lora_beside_its_layers(
    name: str, metadata: dict[str, Any], strength: float, tmp_path: Path
) -> None:
    model, scale = _loaded(name, tmp_path), 0.5
    inputs = zoo.inputs_of(model, 2, seed=1)
    factors = _factors(model, LAYERS[name])
    before = model.forward(inputs)

    def beside(down: Tensor, up: Tensor) -> Any:
        return lambda module, args, output: output + scale * strength * (args[0] @ down.T) @ up.T

    hooks = [model.module.get_submodule(layer).register_forward_hook(beside(*pair)) for layer, pair in factors.items()]
    expected = model.forward(inputs)
    for hook in hooks:
        hook.remove()
    fuse_lora(model, Lora(path=_save(tmp_path / "a.safetensors", factors, **metadata), scale=scale))
    found = model.forward(inputs)
    allowed = 10 * tolerance("torch", "fp32", "max_abs") * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= allowed
    assert float((found - before).abs().max()) > 100 * allowed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.update({"transformer.surplus": torch.ones(1)}), "key surplus is unknown"),
        (lambda tensors: tensors.update({"text_encoder.q.lora_A.weight": torch.ones(1, 1)}), "of another part"),
        (
            lambda tensors: tensors.update(
                {
                    "transformer.layers.7.q.lora_A.weight": torch.ones(1, 4),
                    "transformer.layers.7.q.lora_B.weight": torch.ones(4, 1),
                }
            ),
            r"layers\.7\.q is no linear layer of a SD3Transformer2DModel",
        ),
        (
            lambda tensors: tensors.update({f"{QUERY}.lora_A.weight": torch.ones(2, 5)}),
            "expected a LoRA for 64x64, found 64x5",
        ),
        (
            lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"),
            "has no .* beside it",
        ),
        (
            lambda tensors: tensors.clear() or tensors.update({"a": torch.ones(1)}),
            "read it|another part|unknown",
        ),
    ],
    ids=["a key", "a text encoder", "a layer", "a size", "half", "nothing"],
)
def test_what_does_not_fit_is_refused_in_one_line(change: Any, reason: str, tmp_path: Path) -> None:
    model = _loaded("sd3", tmp_path)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in _factors(model, LAYERS["sd3"][:1]).items():
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    change(tensors)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=reason) as raised:
        fuse_lora(model, Lora(path=path))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "file", "reason"),
    [
        ("sd3", "missing.safetensors", "no such file"),
        ("sd3", "a.bin", "a pickle can run code"),
        ("pixart", "a.safetensors", "no pipeline of diffusers reads a LoRA for a PixArtTransformer2DModel"),
    ],
)
def test_files_that_are_no_lora_are_refused(model: str, file: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / file
    if "missing" not in file:
        save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=reason):
        fuse_lora(_loaded(model, tmp_path), Lora(path=path))


def test_an_export_holds_the_lora_and_says_so(tmp_path: Path) -> None:
    zoo.save("sd3", tmp_path / "model" / "transformer", num_layers=1)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    plan = make_plan(
        tmp_path / "model",
        tmp_path / "plan",
        conditions="random",
        latent_size=(8, 8),
        text_tokens=5,
        sampling={"num_inference_steps": 4},
    )
    model = load_model(tmp_path / "model", zoo.MODELS["sd3"][2])
    path = _save(tmp_path / "a.safetensors", _factors(model, LAYERS["sd3"][:1]))
    bundle = tmp_path / "bundle"
    answer = run_cli("export", plan, "-o", bundle, "--lora", f"{path}:0.5")
    assert answer.code == 0, answer.err
    (record,) = read_manifest(bundle).loras
    assert (record.file, record.scale) == ("a.safetensors", 0.5)
    weights = (bundle / "onnx" / "weights.bin").read_bytes()
    model = load_model(tmp_path / "model", zoo.MODELS["sd3"][2])
    own = model.module.get_parameter("transformer_blocks.0.attn.to_q.weight").clone()
    fuse_lora(model, Lora(path=path, scale=0.5))
    fused = model.module.get_parameter("transformer_blocks.0.attn.to_q.weight")

    def is_held(weight: Tensor) -> bool:
        return any(turned.contiguous().numpy().tobytes() in weights for turned in (weight, weight.T))

    assert (is_held(fused), is_held(own)) == (True, False)
    refused = run_cli("export", plan, "-o", tmp_path / "other", "--lora", f"{path}:much")
    assert "expected FILE or FILE:SCALE with a finite number, found 'much'" in refused.error
