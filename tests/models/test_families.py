"""Every family against its untouched class, called as its pipelines call it; and what a family refuses."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid as hunyuan_region
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from tc_deploy.errors import ModelError, UsageError
from tc_deploy.models.families import FAMILIES
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import known_families, load_model, register_family
from tc_deploy.models.rows import Rows, Streams

Inputs = Mapping[str, Tensor]


def _dit(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    return {**inputs, "class_labels": inputs["class_labels"].long()}


def _pixart(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    if not model.module.use_additional_conditions:
        return {**inputs, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    height, width = (8.0 * axis for axis in model.geometry.latent_shape[1:])
    batch = len(inputs["timestep"])
    sizes = {"resolution": torch.tensor([[height, width]]), "aspect_ratio": torch.tensor([[height / width]])}
    return {**inputs, "added_cond_kwargs": {name: value.repeat(batch, 1) for name, value in sizes.items()}}


def _flux(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    ids = FluxPipeline._prepare_latent_image_ids(1, *model.geometry.grid, torch.device("cpu"), torch.float32)
    text = torch.zeros(inputs["encoder_hidden_states"].shape[1], 3)
    return {**inputs, "timestep": inputs["timestep"] / 1000, "img_ids": ids, "txt_ids": text}


def _flux2(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    batch, (rows, columns) = len(inputs["timestep"]), model.geometry.grid
    ids = Flux2Pipeline._prepare_latent_ids(torch.zeros(batch, 4, rows, columns))
    text = Flux2Pipeline._prepare_text_ids(inputs["encoder_hidden_states"])
    return {**inputs, "timestep": inputs["timestep"] / 1000, "img_ids": ids, "txt_ids": text}


def _qwen_image(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    shapes = [[(1, *model.geometry.grid)]] * len(inputs["timestep"])
    return {**inputs, "timestep": inputs["timestep"] / 1000, "img_shapes": shapes}


def _z_image(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    latents, captions = inputs["hidden_states"].unsqueeze(2), inputs["cap_feats"]
    return {"x": list(latents), "t": (1000 - inputs["timestep"]) / 1000, "cap_feats": list(captions)}


def _chroma(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    shown = torch.ones(len(inputs["timestep"]), model.geometry.tokens, dtype=torch.bool)
    return {**_flux(model, inputs), "attention_mask": torch.cat([inputs["attention_mask"], shown], dim=1)}


def _longcat_image(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    rows, columns = model.geometry.grid
    image = prepare_pos_ids(modality_id=1, type="image", start=(512, 512), height=rows, width=columns)
    text = prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=inputs["encoder_hidden_states"].shape[1])
    return {**inputs, "timestep": inputs["timestep"] / 1000, "img_ids": image, "txt_ids": text}


def _cogview4(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    height, width = (8.0 * axis for axis in model.geometry.latent_shape[1:])
    size = torch.tensor([[height, width]]).repeat(len(inputs["timestep"]), 1)
    return {**inputs, "original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def _hunyuan_dit(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    rows, columns = model.geometry.grid
    batch = len(inputs["timestep"])
    region = hunyuan_region((rows, columns), 512 // 8 // 2)
    tables = get_2d_rotary_pos_embed(
        model.module.inner_dim // model.module.num_heads, region, (rows, columns), device="cpu", output_type="pt"
    )
    sizes = torch.tensor([[1024, 1024, 16 * rows, 16 * columns, 0, 0]], dtype=torch.float32).repeat(batch, 1)
    style = torch.tensor([0]).repeat(batch)
    return {**inputs, "image_meta_size": sizes, "style": style, "image_rotary_emb": tables}


def _cogvideox(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    frames, rows, columns = model.geometry.grid
    pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model.module)
    tables = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, 16 * rows, 16 * columns, frames, "cpu")
    return {**inputs, "image_rotary_emb": tables}


def _ltx_video(model: DiffusionTransformer, inputs: Inputs) -> dict[str, Any]:
    frames, rows, columns = model.geometry.grid
    sizes = {"num_frames": frames, "height": rows, "width": columns}
    return {**inputs, **sizes, "rope_interpolation_scale": (8 / 25, 32, 32)}


PIPELINES: Mapping[str, Callable[[DiffusionTransformer, Inputs], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": lambda model, inputs: dict(inputs),
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": lambda model, inputs: dict(inputs),
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "ChromaTransformer2DModel": _chroma,
    "LongCatImageTransformer2DModel": _longcat_image,
    "CogView4Transformer2DModel": _cogview4,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx_video,
}


def test_every_family_is_in_the_zoo() -> None:
    assert {zoo.MODELS[name][0] for name in zoo.DIFFUSERS} == set(FAMILIES) == set(PIPELINES)


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.DIFFUSERS)
def test_the_forward_is_the_pipelines_own(name: str) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, batch=3, seed=1)
    plain = model.module(**PIPELINES[model.family.model_class](model, inputs)).sample
    if model.family.model_class == "ZImageTransformer2DModel":
        plain = -torch.stack(plain).squeeze(2)
    output = model.forward(inputs)
    assert torch.equal(output, plain)
    assert output.shape == (3, model.geometry.output_channels, *model.geometry.latent_shape[1:])
    assert output.std() > 0.1


@pytest.mark.parametrize("name", zoo.NAMES)
def test_sizes_are_the_module_s_own(name: str) -> None:
    model = zoo.model(name)
    seen: list[tuple[int, ...]] = []

    def note(module: object, arguments: object, keywords: Mapping[str, Tensor], output: Any) -> None:
        image = model.described_blocks[0][1].gives.split(output, model.geometry.tokens).image
        assert image is not None
        seen.append(tuple(image.shape))

    hook = model.blocks[0].register_forward_hook(note, with_kwargs=True)
    model.forward(zoo.inputs_of(model, batch=2, seed=1))
    hook.remove()
    assert seen == [(2, model.geometry.tokens, model.geometry.width)]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_guidance_doubles_every_condition_and_the_forward_takes_it(name: str) -> None:
    model = zoo.model(name)
    inputs = zoo.inputs_of(model, batch=2, seed=1)
    given = {condition.name: inputs[condition.name] for condition in model.geometry.conditions}
    doubled = model.with_unconditional(given)
    for condition, tensor in given.items():
        assert torch.equal(doubled[condition][:2], tensor)
        assert doubled[condition].shape == (4, *tensor.shape[1:])
        assert doubled[condition].dtype == tensor.dtype
    both = {key: torch.cat([inputs[key]] * 2) for key in ("hidden_states", "timestep")}
    output = model.forward({**both, **doubled})
    assert output.isfinite().all()
    assert not torch.equal(output[:2], output[2:])


# -------------------------------------------------------------------------------------------------------- not covered
@pytest.mark.parametrize(
    ("name", "changes", "pipeline", "reason"),
    [
        ("pixart", {"attention_type": "gated"}, {}, "GLIGEN"),
        ("sd3", {"in_channels": 8}, {}, r"8 channels in and 4 out \(control or inpainting\)"),
        ("flux", {"out_channels": 8}, {}, r"16 channels in and 8 out \(fill, canny, depth\)"),
        ("wan", {"image_dim": 16}, {}, r"image embeddings \(image_dim 16, image to video\)"),
        ("wan", {"added_kv_proj_dim": 64}, {}, r"image embeddings \(added_kv_proj_dim 64"),
        ("wan", {"in_channels": 9}, {}, r"9 channels in and 4 out \(image to video\)"),
        ("wan", {}, {"boundary_ratio": 0.875}, "two transformers that take turns"),
    ],
    ids=str,
)
def test_what_a_family_does_not_cover_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], pipeline: dict[str, Any], reason: str
) -> None:
    zoo.save(name, tmp_path / "transformer", **changes)
    (tmp_path / "model_index.json").write_text(json.dumps(pipeline))
    with pytest.raises(ModelError, match=rf"{reason}.* is not covered; .*adapters\.md") as raised:
        load_model(tmp_path, zoo.MODELS[name][2])
    assert str(raised.value).startswith(str(tmp_path / "transformer" / "config.json"))


def test_a_pipeline_that_asks_for_nothing_unusual_loads(tmp_path: Path) -> None:
    zoo.save("wan", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"expand_timesteps": True, "boundary_ratio": None}))
    assert load_model(tmp_path, zoo.MODELS["wan"][2]).geometry.tokens == 24


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sd3", ModelOptions(latent_size=(8, 18)), "positions for 8 patches along an axis, found 9"),
        ("sd3", ModelOptions(latent_size=(8, 9)), "multiples of 2x2"),
        ("flux", ModelOptions(latent_size=(8, 9)), "multiples of 2x2"),
        ("wan", ModelOptions(latent_size=(8, 8)), "expected 3 axes"),
        ("wan", ModelOptions(text_tokens=-1), "at least 1, found -1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, name: str, options: ModelOptions, reason: str) -> None:
    folder = zoo.save(name, tmp_path / "model")
    with pytest.raises(ModelError, match=reason) as raised:
        load_model(folder, options)
    assert str(raised.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("name", "tokens", "text", "latents"),
    [
        ("sd3", 16, 333, (4, 8, 8)),
        ("flux", 4096, 512, (4096, 16)),
        ("wan", 21 * 30 * 52, 512, (4, 21, 60, 104)),
    ],
)
def test_the_defaults_are_the_pipelines_own(
    tmp_path: Path, name: str, tokens: int, text: int, latents: tuple[int, ...]
) -> None:
    model = load_model(zoo.save(name, tmp_path / "model"))
    geometry = model.geometry
    assert (geometry.tokens, geometry.text_tokens, geometry.latent_shape) == (tokens, text, latents)
    assert (model.record().latent_size, model.record().text_tokens) == (None, None)


def test_a_block_that_is_not_as_its_family_says_is_named(tmp_path: Path) -> None:
    model = load_model(zoo.save("sd3", tmp_path / "model"), zoo.MODELS["sd3"][2])
    del model.module.transformer_blocks[1].norm2
    with pytest.raises(ModelError, match=r"transformer_blocks\.1: a JointTransformerBlock has no submodule 'norm2'"):
        _ = model.blocks


# --------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("rows", list(Rows))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_are_taken_apart_and_put_together(rows: Rows, axis: int) -> None:
    shape = [4, 4, 4]
    shape[axis] = 3
    image = torch.full(shape, 1.0)
    shape[axis] = 2
    text = torch.full(shape, 2.0)
    given = Streams(image if rows.has_image else None, text if rows.has_text else None)
    value = rows.join(given, axis=axis)
    found = rows.split(value, 3, axis=axis)
    for mine, theirs in zip(found, given, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine, theirs)


# -------------------------------------------------------------------------------------- classes that are not diffusers'
@torch.no_grad()
def test_the_example_s_forward_is_the_class_s_own() -> None:
    model = zoo.model("uvit")
    inputs = zoo.inputs_of(model, batch=3, seed=1)
    output = model.forward(inputs)
    assert torch.equal(output, model.module(inputs["hidden_states"], inputs["timestep"], inputs["label"].long()))
    assert output.shape == (3, *model.geometry.latent_shape)
    assert output.std() > 0.1


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A checkpoint of the example's class."""
    code = zoo.uvit()
    return Path(code.save(tmp_path / "model", code.build(code.CONFIG)))


def test_half_precision_weights_of_a_class_of_one_s_own_load_as_fp32(example: Path) -> None:
    (weights,) = example.glob("*.safetensors")
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights)
    module = load_model(example).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.equal(module.head.weight, halves["head.weight"].float())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda weights: weights.pop("head.weight"), r"1 missing key, first head\.weight"),
        (lambda weights: weights.update(surplus=torch.zeros(2)), "1 unexpected key, first surplus"),
        (lambda weights: weights.update({"head.weight": torch.zeros(3, 3)}), "do not make a UViT"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_weights_that_do_not_fit_a_class_of_one_s_own(
    example: Path, edit: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    (path,) = example.glob("*.safetensors")
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)
    with pytest.raises(ModelError, match=reason) as raised:
        load_model(example)
    assert "\n" not in str(raised.value)


def test_a_class_of_the_package_keeps_its_family() -> None:
    with pytest.raises(ModelError, match="'DiTTransformer2DModel' has a family already"):
        register_family(dataclasses.replace(zoo.uvit().FAMILY, model_class="DiTTransformer2DModel"))
    assert known_families()["DiTTransformer2DModel"] is FAMILIES["DiTTransformer2DModel"]


def test_an_installed_package_makes_its_families_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "import dataclasses\nfrom tc_deploy.models.dit import FAMILY as DIT\n"
        "FAMILY = dataclasses.replace(DIT, model_class='MyDiT')\n"
    )
    metadata = tmp_path / "my_models-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_models\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[tc_deploy.families]\nmine = my_models:FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert known_families()["MyDiT"].model_class == "MyDiT"
    (metadata / "entry_points.txt").write_text("[tc_deploy.families]\nmine = my_models:MISSING\n")
    with pytest.raises(ModelError, match=r"entry point 'mine' of tc_deploy\.families: .*MISSING"):
        known_families()


def test_a_timestep_per_token_is_one_where_all_are_alike() -> None:
    """As WanPipeline calls Wan 2.2 TI2V (``expand_timesteps``), against the untouched class."""
    model = zoo.model("wan")
    received = model.family.received
    latents, text = torch.randn(2, *model.geometry.latent_shape), torch.randn(2, 5, 24)
    given = {"hidden_states": latents, "encoder_hidden_states": text}
    per_token = {**given, "timestep": torch.full((2, model.geometry.tokens), 437.0)}
    with torch.no_grad():
        expected = model.module(**per_token, return_dict=False)[0]
        found = model.module(**received(per_token), return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    per_token["timestep"][1, 3] = 0.0
    with pytest.raises(UsageError, match="timestep: expected one for all tokens"):
        received(per_token)
