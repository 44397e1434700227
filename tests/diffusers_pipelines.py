"""Real diffusers pipelines of tiny random parts, and the PyTorch cached forward in the place of their transformer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from bundles import make_plan
from torch import nn

from tc_deploy.backends.build import build_target
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.models.geometry import ModelOptions, Values
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.tokencache.sampler import TokenCachedSteps

CLIP_TOKENS = 77
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "on", "mat", "red", "bridge", "dog"]


class CachedTransformer(nn.Module):
    """A plan's cached forward in PyTorch, called as the engines are.

    It counts the steps of each half of guidance and takes their timesteps from the plan, whatever it is given.
    """

    def __init__(self, plan: Path, model: Path) -> None:
        super().__init__()
        self.plan, tables = load_plan(plan)
        self.model = load_model(model, ModelOptions.of(self.plan.model))
        self.config, self.dtype, self.device = self.model.module.config, torch.float32, torch.device("cpu")
        self.tables = self.plan.step_tables(tables)
        self.runs: dict[str, tuple[int, TokenCachedSteps]] = {}
        self.half = ""

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        self.half = name
        yield
        self.half = ""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self.model.module.forward).bind(*args, **kwargs).arguments
        given = dict(self.model.family.received(bound))
        hidden_states, return_dict = given.pop("hidden_states"), given.pop("return_dict", True)
        # Some pipelines do not say which half it is; its prompts do.
        text = next((value for value in given.values() if isinstance(value, torch.Tensor) and value.ndim == 3), None)
        half = self.half + ("" if text is None else str(hash(text.numpy().tobytes())))
        step, steps = self.runs.get(half, (0, None))
        if step == 0 or steps is None:
            step, steps = 0, TokenCachedSteps(self.model, self.plan.cache, self.plan.run_schedule(), self.tables)
        timestep = torch.tensor(self.plan.sampling.timesteps[step]).expand(len(hidden_states))
        inputs = {"hidden_states": hidden_states, "timestep": timestep}
        for condition in self.model.geometry.conditions:
            value = given.get(condition.name)
            if value is None and condition.values is Values.MASK:
                value = torch.ones(len(hidden_states), *condition.shape)
            inputs[condition.name] = value.to(getattr(torch, condition.dtype))
        sample = self.model.family.returned(steps(step, inputs))
        self.runs[half] = (step + 1) % self.plan.schedule.steps, steps
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def tiny_autoencoder(channels: int, levels: int = 1) -> diffusers.AutoencoderKL:
    """One that halves the size at each level but the first."""
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def shifted_autoencoder(channels: int, levels: int) -> diffusers.AutoencoderKL:
    """One whose latents are neither centred nor of deviation 1."""
    autoencoder = tiny_autoencoder(channels, levels)
    autoencoder.register_to_config(scaling_factor=1.5, shift_factor=0.25)
    return autoencoder


WAN_MEANS, WAN_DEVIATIONS = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 3.0]


def tiny_wan_autoencoder(**changes: Any) -> diffusers.AutoencoderKLWan:
    """Of video: one that halves the number of frames."""
    torch.manual_seed(5)
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=WAN_MEANS,
        latents_std=WAN_DEVIATIONS,
        **changes,
    ).eval()


def tiny_tokenizer(length: int = CLIP_TOKENS) -> Any:
    """Words by number; a prompt ends in ``</s>``."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=length, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_t5(
    width: int = 16, kind: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config, seed: int = 0
) -> Any:
    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    return kind(config(**sizes)).eval()


def tiny_umt5(width: int = 16) -> Any:
    return tiny_t5(width, transformers.UMT5EncoderModel, transformers.UMT5Config)


def tiny_clip(kind: Any, width: int = 8, projection: int = 8, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 8, "projection_dim": projection, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        **sizes, num_hidden_layers=2, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return kind(config).eval()


def build_bundle(model: Path, folder: Path, batch_size: int | None = None, **settings: Any) -> Path:
    """Plan, export and build; the engines are compared with PyTorch by the test, so not here."""
    options = ExportOptions(check=False, batch_size=batch_size)
    export_bundle(make_plan(model, folder / "plan", **settings), folder / "bundle", options)
    build_target(folder / "bundle", options={"threads": 1})
    return folder / "bundle"
