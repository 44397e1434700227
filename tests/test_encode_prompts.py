"""The example that encodes prompts, with real pipelines of tiny random text encoders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner
from diffusers_pipelines import CLIP_TOKENS, tiny_clip, tiny_t5, tiny_tokenizer, tiny_umt5

WIDTH, TOKENS = 16, 7
PROMPTS = ["a cat on a mat", "a red bridge"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "encode_prompts.py"
    spec = importlib.util.spec_from_file_location("encode_prompts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tiny_tokenizer(300),
        text_encoder=tiny_t5(),
        vae=None,
        transformer=None,
        scheduler=diffusers.DDIMScheduler(),
    )


def sd3() -> Any:
    kind = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny_clip(kind),
        tokenizer=tiny_tokenizer(CLIP_TOKENS),
        text_encoder_2=tiny_clip(kind),
        tokenizer_2=tiny_tokenizer(CLIP_TOKENS),
        text_encoder_3=tiny_t5(),
        tokenizer_3=tiny_tokenizer(256),
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny_clip(transformers.CLIPTextModel),
        tokenizer=tiny_tokenizer(CLIP_TOKENS),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_tokenizer(512),
    )


def wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(512),
        text_encoder=tiny_umt5(),
        vae=None,
        transformer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


CASES = {
    "pixart": (pixart, TOKENS, {"encoder_hidden_states": (TOKENS, WIDTH), "encoder_attention_mask": (TOKENS,)}),
    # T5's rows stand behind CLIP's, which are padded to its width.
    "sd3": (
        sd3,
        CLIP_TOKENS + TOKENS,
        {"encoder_hidden_states": (CLIP_TOKENS + TOKENS, WIDTH), "pooled_projections": (16,)},
    ),
    "flux": (
        flux,
        TOKENS,
        {"encoder_hidden_states": (TOKENS, WIDTH), "pooled_projections": (8,), "guidance": ()},
    ),
    "wan": (wan, TOKENS, {"encoder_hidden_states": (TOKENS, WIDTH)}),
}


@pytest.mark.parametrize("case", CASES)
def test_arrays_are_named_and_shaped_as_the_transformer_takes_them(example: ModuleType, case: str) -> None:
    make, tokens, shapes = CASES[case]
    pipeline = make()
    arrays = example.encoded(pipeline, PROMPTS, "a dog", tokens, 3.5 if case == "flux" else None)
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    given = {name: (len(PROMPTS), *shape) for name, shape in shapes.items()}
    assert found == given | {f"unconditional.{name}": (1, *shape) for name, shape in shapes.items()}
    assert all(array.dtype == torch.float32 and array.isfinite().all() for array in arrays.values())
    # Each row is its prompt's own, and the unconditional one that of its words.
    embeddings = arrays["encoder_hidden_states"]
    assert not torch.allclose(embeddings[0], embeddings[1])
    alone = example.encoded(pipeline, ["a dog"], "", tokens)["encoder_hidden_states"]
    torch.testing.assert_close(arrays["unconditional.encoder_hidden_states"], alone)


def test_a_folder_becomes_a_file(example: ModuleType, tmp_path: Path) -> None:
    pixart().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\n\na red mat\n")
    output = tmp_path / "prompts.safetensors"
    words = [tmp_path / "pipeline", "a bridge", "--prompts", tmp_path / "prompts.txt", "--text-tokens", 5, "-o", output]
    answer = CliRunner().invoke(example.main, [str(word) for word in words])
    assert answer.exit_code == 0, answer.output
    assert "encoder_hidden_states (3, 5, 16)" in answer.output
    assert safetensors.torch.load_file(output)["encoder_attention_mask"].sum(1).tolist() == [3, 3, 4]


def test_what_cannot_be_encoded_is_said(example: ModuleType, tmp_path: Path) -> None:
    answer = CliRunner().invoke(example.main, [str(tmp_path), "-o", str(tmp_path / "x.safetensors")])
    assert answer.exit_code == 2
    assert "no prompt given" in answer.output
    with pytest.raises(Exception, match="object is not known here; known: PixArtAlphaPipeline"):
        example.encoded(object(), PROMPTS)
