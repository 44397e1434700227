"""Classes without a family, taken as one piece: against the untouched class, and what they cannot have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import zoo
from bundles import make_plan, recipe_of, run_cli

from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model
from tc_deploy.plan import CacheRecord, load_plan
from tc_deploy.tokencache.forward import OUTPUT, cached_tensors, run_cached, run_full
from tc_deploy.tokencache.precision import half_products
from tc_deploy.types import Attention, Precision, Reuse, Skip


def _masks_whole(inputs: dict[str, Any]) -> dict[str, Any]:
    """Masks are whole numbers in a pipeline."""
    return {name: value.long() if name.endswith("mask") else value for name, value in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.WHOLE)
def test_a_full_step_is_the_class_s_own_forward_bit_for_bit(name: str) -> None:
    model = zoo.model(name)
    cache = CacheRecord(
        reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=1, keep_counts=((), ()), skip=Skip.MODEL
    )
    inputs = zoo.inputs_of(model, batch=3, seed=1)
    output, noted = run_full(model, cache, inputs)
    assert torch.equal(output, model.module(**_masks_whole(inputs), return_dict=False)[0])
    assert output.std() > 0.1
    assert list(cached_tensors(model, cache, (1,))) == [OUTPUT] == list(noted)
    weights = torch.tensor([[2.0, -1.0]]).expand(3, -1)
    earlier = {OUTPUT: torch.ones_like(output)}
    assert torch.equal(run_cached(model, cache, 1, {}, [noted, earlier], weights, None), 2 * output - 1)


def test_shapes_are_found_where_no_family_names_them() -> None:
    shapes = {name: zoo.model(name).geometry.latent_shape for name in zoo.WHOLE}
    assert shapes == {"sana": (4, 4, 6), "cosmos": (4, 3, 4, 8), "allegro": (4, 2, 4, 8), "aura-flow": (4, 8, 12)}
    conditions = {item.name: item.shape for item in zoo.model("sana").geometry.conditions}
    assert conditions == {"encoder_hidden_states": (5, 24), "encoder_attention_mask": (5,)}


def test_it_is_said_that_a_model_is_taken_as_one_piece(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = zoo.save("sana", tmp_path / "transformer")
    load_model(folder, zoo.WHOLE["sana"][2])
    assert "SanaTransformer2DModel has no family: it is taken as one piece" in caplog.text
    assert "sampled by its scheduler's own timesteps" in caplog.text
    caplog.clear()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    model = load_model(tmp_path, zoo.WHOLE["sana"][2])
    assert "sampled as SanaPipeline does" in caplog.text
    assert model.record().pipeline == "SanaPipeline"


@pytest.mark.parametrize(
    ("model_class", "config", "options", "reason"),
    [
        (*zoo.WHOLE["cosmos"][:2], ModelOptions(), "names none; give --latent-size"),
        (*zoo.WHOLE["sana"][:2], ModelOptions(latent_size=(4,)), "found 1 axes"),
        (
            "OvisImageTransformer2DModel",
            {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24}
            | {"attention_head_dim": 16, "num_attention_heads": 4, "axes_dims_rope": (4, 6, 6)},
            ModelOptions(latent_size=(4, 6)),
            "cannot be taken as one piece: its forward does not run on latents of 4x6: .*adapters.md",
        ),
        (
            "AnyFlowTransformer3DModel",
            {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "ffn_dim": 8}
            | {"text_dim": 8, "freq_dim": 8},
            ModelOptions(latent_size=(1, 4, 6)),
            "its forward needs 'r_timestep', which is no input that is known; adapters.md",
        ),
    ],
    ids=["no size", "axes", "another layout", "an unknown input"],
)
def test_what_cannot_be_taken_as_one_piece_is_refused(
    model_class: str, config: dict[str, Any], options: ModelOptions, reason: str, tmp_path: Path
) -> None:
    getattr(diffusers, model_class)(**config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as raised:
        load_model(tmp_path, options)
    assert "\n" not in str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.save("sana", tmp_path / "model" / "transformer")
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model"


WANTED = {"conditions": "random", "latent_size": (4, 6), "text_tokens": 5, "sampling": {"num_inference_steps": 6}}


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        ({"keep_ratio": (0.5, 0.0)}, r"keep some tokens \(--keep-ratio\)"),
        ({"keep_counts": ((4,), (0,))}, r"keep some tokens \(--keep-counts\)"),
        ({"skip": "blocks"}, r"skip blocks \(--skip blocks\)"),
    ],
    ids=["ratio", "counts", "blocks"],
)
def test_what_needs_blocks_is_refused(folder: Path, tmp_path: Path, cache: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=rf"cannot {reason}: nothing is known of the blocks .*adapters\.md"):
        make_plan(folder, tmp_path / "plan", **WANTED, cache=cache)


def test_a_block_that_is_to_stay_in_fp32_is_one_of_its_lists() -> None:
    model = zoo.model("sana")
    weight = model.module.get_parameter("transformer_blocks.1.attn2.to_q.weight")
    with half_products(model, Precision.BF16, ("transformer_blocks.0",)):
        assert model.module.transformer_blocks[0].attn2.to_q.weight.dtype is torch.float32
        assert model.module.transformer_blocks[1].attn2.to_q.weight.dtype is torch.bfloat16
        assert model.module.proj_out.weight.dtype is torch.float32
    assert model.module.transformer_blocks[1].attn2.to_q.weight is weight
    with pytest.raises(UsageError, match=r"its blocks are transformer_blocks\.0 to transformer_blocks\.1"):
        half_products(model, Precision.BF16, ("nothing",)).__enter__()


@pytest.mark.slow
def test_from_a_folder_to_validated_engines(folder: Path, tmp_path: Path) -> None:
    plan, bundle = tmp_path / "plan", tmp_path / "bundle"
    found = run_cli(
        *("plan", recipe_of(tmp_path, folder, latent_size=[4, 6]), "--steps", 6),
        *("--conditions", "random", "--text-tokens", 5),
        *("--from-flops", "--baselines", "none", "-o", plan),
    )
    assert found.code == 0, found.err
    assert load_plan(plan)[0].model.blocks == 0
    for words in (("export", plan, "-o", bundle), ("build", bundle), ("validate", bundle), ("inspect", bundle)):
        answer = run_cli(*words)
        assert answer.code == 0, answer.err
    assert run_cli("report", bundle, "-o", tmp_path / "page.html").code == 0
