"""Write a small PixArt-Sigma pipeline with random weights: text encoder, tokenizer, transformer, decoder, scheduler.

It is a whole text-to-image pipeline of diffusers, made in seconds and without a download, to try every command on. Its
pictures are noise, since nothing was trained; its tokenizer knows a dozen words.

    python examples/make_random_pixart.py pixart
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import tokenizers
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("<pad>", "</s>", "<unk>", "a", "the", "on", "in", "and", "cat", "dog", "mat", "red", "bridge", "fog")
TEXT_TOKENS, TEXT_WIDTH = 300, 32
LATENT_CHANNELS, LATENT_SIDE = 4, 16


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words by number; a prompt ends in ``</s>``, as T5's do."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TEXT_TOKENS, **special)


def draw_weights(module: nn.Module) -> nn.Module:
    """Draw every parameter, adaLN's and the head's too, which start at zero and would make all steps alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return module


def random_pipeline(seed: int = 0) -> Any:
    """A PixArtSigmaPipeline for pictures of 128 x 128 pixels."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        sample_size=LATENT_SIDE,
        patch_size=2,
        cross_attention_dim=64,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    encoder = T5EncoderModel(
        T5Config(d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(WORDS))
    )
    levels = 4
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return PixArtSigmaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=encoder.eval(),
        vae=autoencoder.eval(),
        transformer=draw_weights(transformer).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    """Write the pipeline to FOLDER, as diffusers saves one."""
    if folder.exists():
        raise click.UsageError(f"{folder} exists; name a new folder")
    random_pipeline(seed).save_pretrained(folder)
    click.echo(f"{folder}: PixArtSigmaPipeline with random weights")


if __name__ == "__main__":
    main()
