"""Tiny models of every family, random weights, odd shapes: made from configurations, so nothing is downloaded.

Each is a real class behind the package's own loader. Two blocks of a kind, a few dozen tokens, latents that
are not square where the class knows such.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from torch import Tensor, nn

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model

SMALL = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
WIDTH = 64
IMAGE = {**SMALL, "sample_size": 8, "patch_size": 2, "in_channels": 4}
SD3 = {**IMAGE, "out_channels": 4, "joint_attention_dim": 24, "caption_projection_dim": WIDTH} | {
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
FLUX = {**SMALL, "patch_size": 1, "in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 24} | {
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}

Entry: TypeAlias = tuple[str, Mapping[str, Any], ModelOptions]
MODELS: dict[str, Entry] = {
    "dit": ("DiTTransformer2DModel", {**IMAGE, "out_channels": 8, "num_embeds_ada_norm": 10}, ModelOptions()),
    "pixart": (
        "PixArtTransformer2DModel",
        {**IMAGE, "out_channels": 8, "cross_attention_dim": WIDTH, "caption_channels": 24},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
    "pixart-sizes": (
        "PixArtTransformer2DModel",
        # Thirds of the width hold the sizes: 2 x 96 / 3, beside 96 / 3 of the timestep's.
        {
            **IMAGE,
            "attention_head_dim": 24,
            "out_channels": 8,
            "cross_attention_dim": 96,
            "caption_channels": None,
            "use_additional_conditions": True,
        },
        ModelOptions(latent_size=(12, 8), text_tokens=1),
    ),
    "sd3": ("SD3Transformer2DModel", SD3, ModelOptions(latent_size=(8, 12), text_tokens=5)),
    "sd35": (
        "SD3Transformer2DModel",
        {**SD3, "num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        ModelOptions(latent_size=(8, 8), text_tokens=1),
    ),
    "flux": ("FluxTransformer2DModel", FLUX, ModelOptions(latent_size=(8, 12), text_tokens=5)),
    "flux-schnell": (
        "FluxTransformer2DModel",
        # A single block alone, with as many heads as DiT-XL's, of the same odd width.
        {
            **FLUX,
            "num_layers": 0,
            "num_single_layers": 1,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "guidance_embeds": False,
        }
        | {"axes_dims_rope": (16, 28, 28)},
        ModelOptions(latent_size=(8, 8), text_tokens=1),
    ),
    "wan": (
        "WanTransformer3DModel",
        {**SMALL, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32}
        | {"ffn_dim": 128, "cross_attn_norm": True},
        ModelOptions(latent_size=(3, 4, 8), text_tokens=5),
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {**SMALL, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {**SMALL, "patch_size": 1, "in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 24}
        | {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4}
        | {"cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]},
        ModelOptions(latent_size=(8, 16), text_tokens=32),
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {**SMALL, "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
        | {"joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 16}
        | {"approximator_hidden_dim": 32, "approximator_layers": 1},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
    "longcat-image": (
        "LongCatImageTransformer2DModel",
        {**SMALL, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24}
        | {"pooled_projection_dim": 24, "axes_dims_rope": [4, 6, 6]},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {**IMAGE, "out_channels": 4, "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8}
        | {"pos_embed_max_size": 16, "rope_axes_dim": (16, 16)},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 8}
        | {"hidden_size": WIDTH, "num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": 24, "text_len": 5}
        | {
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 12,
            "text_len_t5": 3,
            "activation_fn": "gelu-approximate",
        },
        ModelOptions(latent_size=(8, 12)),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {**SMALL, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32, "text_embed_dim": 24, "sample_width": 8}
        | {"sample_height": 4, "sample_frames": 9, "patch_size": 2, "temporal_compression_ratio": 4}
        | {"max_text_seq_length": 5, "use_rotary_positional_embeddings": True},
        ModelOptions(latent_size=(3, 4, 8), text_tokens=5),
    ),
    "ltx-video": (
        "LTXVideoTransformer3DModel",
        {**SMALL, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "caption_channels": 24},
        ModelOptions(latent_size=(3, 2, 4), text_tokens=5),
    ),
}
WHOLE: dict[str, Entry] = {
    "sana": (
        "SanaTransformer2DModel",
        {**SMALL, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 4, "cross_attention_head_dim": 16}
        | {"cross_attention_dim": WIDTH, "caption_channels": 24, "sample_size": 8, "patch_size": 1},
        ModelOptions(latent_size=(4, 6), text_tokens=5),
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {**SMALL, "in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "adaln_lora_dim": 4}
        | {"patch_size": (1, 2, 2), "max_size": (4, 32, 32), "concat_padding_mask": False},
        ModelOptions(latent_size=(3, 4, 8), text_tokens=5),
    ),
    "allegro": (
        "AllegroTransformer3DModel",
        {**SMALL, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "caption_channels": 24}
        | {"cross_attention_dim": 96, "sample_height": 8, "sample_width": 8, "sample_frames": 3},
        ModelOptions(latent_size=(2, 4, 8), text_tokens=5),
    ),
    "aura-flow": (
        "AuraFlowTransformer2DModel",
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1}
        | {"num_single_dit_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24}
        | {"caption_projection_dim": WIDTH, "pos_embed_max_size": 64},
        ModelOptions(latent_size=(8, 12), text_tokens=5),
    ),
}
"""Of classes without a family, which are taken as one piece."""
ALL = MODELS | WHOLE
DIFFUSERS = tuple(MODELS)
"""Of diffusers' own classes."""
NAMES = (*DIFFUSERS, "uvit")
"""And the documented example of a class that is not."""

EXAMPLE = Path(__file__).parent.parent / "examples" / "uvit.py"


def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter, adaLN's and the head's too, which start at zero and would make all steps alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            inputs = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)


def save(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a model of :data:`MODELS`, with changes to its configuration, as a diffusers model folder."""
    model_class, config, _ = ALL[name]
    module = getattr(diffusers, model_class)(**{**config, **changes})
    randomise(module, seed)
    module.save_pretrained(folder)
    return folder


@functools.cache
def model(name: str) -> DiffusionTransformer:
    """A loaded model; tests leave it as it is."""
    with tempfile.TemporaryDirectory() as folder:
        if name in ALL:
            return load_model(save(name, Path(folder) / name), ALL[name][2])
        module = uvit().build(uvit().CONFIG)
        randomise(module, seed=0)
        return load_model(uvit().save(Path(folder) / name, module))


@functools.cache
def uvit() -> Any:
    """The example's code; to load it makes its family known."""
    spec = importlib.util.spec_from_file_location("uvit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


def inputs_of(model: DiffusionTransformer, batch: int, seed: int) -> dict[str, Tensor]:
    """Inputs of a step, every sample with a timestep, latents and conditions of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn((batch, *model.geometry.latent_shape), generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 999,
        **model.random_conditions(batch, generator),
    }
