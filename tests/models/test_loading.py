"""Checkpoints on disk: what loads, what it is identified by, and what every kind of broken folder is told."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tc_deploy.bundle import sha256_of_file
from tc_deploy.errors import ModelError, NotFiniteError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model, load_scheduler

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
A_WEIGHT = "transformer_blocks.1.attn1.to_q.weight"


@pytest.fixture
def folder(tiny_dit_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(tiny_dit_folder, tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path, tiny_dit: DiffusionTransformer) -> Path:
    """The same model in several files."""
    shutil.rmtree(folder / "transformer")
    tiny_dit.module.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(shards_of(folder)) > 1
    return folder


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "transformer").glob("*-of-*.safetensors"))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder: Path, **changes: Any) -> None:
    edit_json(folder / "transformer" / "config.json", **changes)


def edit_scheduler(folder: Path, **changes: Any) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", **changes)


def error_of(load: Callable[[Path], Any], path: Path, *parts: str) -> None:
    """``load`` refuses in one line, which holds ``parts``."""
    with pytest.raises(ModelError) as raised:
        load(path)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    assert message.startswith(str(path)), message
    for part in parts:
        assert part in message


def assert_same_weights(model: DiffusionTransformer, other: DiffusionTransformer) -> None:
    mine, theirs = model.module.state_dict(), other.module.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ------------------------------------------------------------------------------------------------------------- it loads
def test_a_pipeline_folder_and_its_transformer_folder_are_the_same_model(
    tiny_dit_folder: Path, tiny_dit: DiffusionTransformer
) -> None:
    inner = load_model(tiny_dit_folder / "transformer")
    assert_same_weights(inner, tiny_dit)
    assert inner.weights_sha256 == tiny_dit.weights_sha256
    assert inner.config == tiny_dit.config


def test_a_model_is_described_by_its_configuration(tiny_dit: DiffusionTransformer) -> None:
    geometry = tiny_dit.geometry
    assert (geometry.tokens, geometry.width, geometry.latent_shape, geometry.output_channels) == (16, 64, (4, 8, 8), 8)
    assert [(item.name, item.classes) for item in geometry.conditions] == [("class_labels", 10)]
    assert tiny_dit.input_names == ("hidden_states", "timestep", "class_labels")
    record = tiny_dit.record()
    assert (record.model_class, record.blocks, record.tokens) == ("DiTTransformer2DModel", 3, 16)
    assert record.config["num_layers"] == 3
    assert not any(key.startswith("_") for key in record.config)


def test_a_model_is_frozen_and_runs_the_unmodified_class(tiny_dit: DiffusionTransformer) -> None:
    assert type(tiny_dit.module) is diffusers.DiTTransformer2DModel
    assert not tiny_dit.module.training
    assert not any(parameter.requires_grad for parameter in tiny_dit.module.parameters())
    assert not any("forward" in vars(module) for module in tiny_dit.module.modules())


def test_half_precision_weights_load_as_fp32(folder: Path, tiny_dit: DiffusionTransformer) -> None:
    edit_weights(folder, lambda weights: weights.update({name: value.half() for name, value in weights.items()}))
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    stored = dict(model.module.named_parameters())[A_WEIGHT]
    assert torch.equal(stored, dict(tiny_dit.module.named_parameters())[A_WEIGHT].half().float())


def test_the_source_is_relative_below_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(folder).source == folder.as_posix()
    monkeypatch.chdir(folder.parent)
    assert load_model(folder).source == "model"
    assert load_model(Path("model")).source == "model"


# --------------------------------------------------------------------------------------------------------- its identity
def test_the_hash_of_one_file_is_that_files_own(tiny_dit_folder: Path, tiny_dit: DiffusionTransformer) -> None:
    assert tiny_dit.weights_sha256 == sha256_of_file(tiny_dit_folder / "transformer" / WEIGHTS)


def test_the_hash_changes_with_one_weight(folder: Path, tiny_dit: DiffusionTransformer) -> None:
    edit_weights(folder, lambda weights: weights[A_WEIGHT][0, 0].add_(1e-3))
    assert load_model(folder).weights_sha256 != tiny_dit.weights_sha256


def test_a_sharded_model_loads_and_every_shard_counts_in_its_hash(
    sharded: Path, tiny_dit: DiffusionTransformer
) -> None:
    model = load_model(sharded)
    assert_same_weights(model, tiny_dit)
    hashes = {model.weights_sha256}
    for shard in shards_of(sharded):
        weights = load_file(shard)
        next(iter(weights.values())).view(-1)[0] += 1e-3
        save_file(weights, shard, metadata={"format": "pt"})
        hashes.add(load_model(sharded).weights_sha256)
    assert len(hashes) == len(shards_of(sharded)) + 1


def test_the_hash_is_of_the_weights_that_are_read_where_one_file_stands_beside_shards(
    sharded: Path, tiny_dit_folder: Path, tiny_dit: DiffusionTransformer
) -> None:
    before = load_model(sharded).weights_sha256
    single = sharded / "transformer" / WEIGHTS
    shutil.copy(tiny_dit_folder / "transformer" / WEIGHTS, single)
    edit_weights(sharded, lambda weights: weights[A_WEIGHT].zero_())
    model = load_model(sharded)
    assert_same_weights(model, tiny_dit)
    assert model.weights_sha256 == before


# --------------------------------------------------------------------------------------------------- broken checkpoints
def test_a_missing_folder(tmp_path: Path) -> None:
    error_of(load_model, tmp_path / "nothing", "no such folder", "transformer/")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").unlink()
    error_of(load_model, folder, "config.json", "save_pretrained")


@pytest.mark.parametrize("text", ["{", "", "\N{NULL}", "[]", '"DiTTransformer2DModel"'])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "transformer" / "config.json").write_text(text)
    error_of(load_model, folder, "transformer/config.json", "JSON", "download or save the checkpoint again")


@pytest.mark.parametrize("name", ["UNet2DModel", None, ["DiTTransformer2DModel"]])
def test_a_class_without_a_family(folder: Path, name: Any) -> None:
    edit_config(folder, _class_name=name)
    error_of(load_model, folder, "config.json", repr(name), "adapters.md")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": "three"},
        {"patch_size": 0},
        {"sample_size": [8, 8]},
        {"norm_type": "layer_norm"},
        {"num_embeds_ada_norm": None},
        {"num_attention_heads": 8},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    error_of(load_model, folder, "config.json", "download or save the checkpoint again")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(folder: Path, suffix: str) -> None:
    weights = folder / "transformer" / WEIGHTS
    weights.rename(weights.with_suffix(suffix))
    error_of(load_model, folder, f"diffusion_pytorch_model{suffix}", "pickle", "safe_serialization=True")


def test_a_lone_pickle_without_config_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "DiT-XL-2-256x256.pt").write_bytes(b"PK")
    error_of(load_model, tmp_path, "DiT-XL-2-256x256.pt", "pickle")


def test_missing_weights(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).unlink()
    error_of(load_model, folder, f"{WEIGHTS} is missing", "download or save the checkpoint again")


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    error_of(load_model, folder, WEIGHTS, "not a whole safetensors file", "download or save the checkpoint again")


def test_a_missing_shard(sharded: Path) -> None:
    shards = shards_of(sharded)
    shards[1].unlink()
    error_of(load_model, sharded, f"1 of {len(shards)} shards", shards[1].name, "download or save")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = shards_of(sharded)[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    error_of(load_model, sharded, shard.name, "not a whole safetensors file", "download or save")


@pytest.mark.parametrize("weight_map", [{}, [], None, {A_WEIGHT: 3}, {A_WEIGHT: ["a"]}], ids=str)
def test_an_index_that_names_no_shards(sharded: Path, weight_map: Any) -> None:
    edit_json(sharded / "transformer" / INDEX, weight_map=weight_map)
    error_of(load_model, sharded, INDEX, "weight_map", "download or save")


def test_an_index_that_leads_out_of_the_folder(sharded: Path) -> None:
    path = sharded / "transformer" / INDEX
    outside = sharded / "outside.safetensors"
    shards_of(sharded)[0].rename(outside)
    path.write_text(path.read_text().replace(shards_of(sharded)[0].name, f"../{outside.name}"))
    error_of(load_model, sharded)


def test_a_missing_key(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(A_WEIGHT))
    error_of(load_model, folder, "1 missing key", A_WEIGHT, "config.json", "download or save")


def test_an_unexpected_key(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update(surplus=torch.zeros(2)))
    error_of(load_model, folder, "1 unexpected key", "surplus", "config.json", "download or save")


@pytest.mark.parametrize("layers", [2, 4])
def test_weights_of_another_depth(folder: Path, layers: int) -> None:
    edit_config(folder, num_layers=layers)
    error_of(load_model, folder, "transformer_blocks.", "config.json", "download or save")


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "NaN"), (-torch.inf, "infinity")])
def test_weights_that_are_not_finite(sharded: Path, value: float, said: str) -> None:
    shard = next(path for path in shards_of(sharded) if A_WEIGHT in load_file(path))
    weights = load_file(shard)
    weights[A_WEIGHT][1, 2] = value
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(NotFiniteError) as raised:
        load_model(sharded)
    assert str(raised.value).startswith(f"{shard}: the weights of {A_WEIGHT} hold {said}; ")


def test_weights_that_float32_cannot_hold(folder: Path) -> None:
    large = torch.full((64, 64), 1e300, dtype=torch.float64)
    edit_weights(folder, lambda weights: weights.update({A_WEIGHT: large}))
    with pytest.raises(NotFiniteError, match=rf"transformer: the weights of {A_WEIGHT} do not fit into float32"):
        load_model(folder)


def test_finite_weights_whose_sum_is_not(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights[A_WEIGHT].fill_(3e38))
    assert float(load_model(folder).module.state_dict()[A_WEIGHT][0, 0]) == pytest.approx(3e38)


def test_a_wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({A_WEIGHT: torch.zeros(3, 3)}))
    error_of(load_model, folder, A_WEIGHT, "[64, 64]", "[3, 3]", "download or save")
    with pytest.raises(ModelError) as raised:
        load_model(folder)
    assert not re.search("randomly|ignore_mismatched_sizes", str(raised.value))


# ----------------------------------------------------------------------------------------------------------- schedulers
def test_a_scheduler_is_found_in_the_pipeline_and_beside_the_transformer(tiny_dit_folder: Path) -> None:
    for path in (tiny_dit_folder, tiny_dit_folder / "transformer"):
        scheduler = load_scheduler(path)
        assert type(scheduler) is diffusers.DDIMScheduler
        assert scheduler.config.num_train_timesteps == 1000
        assert scheduler.config.clip_sample is False


def test_a_missing_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    error_of(load_scheduler, folder, "scheduler/scheduler_config.json", "save the pipeline's scheduler")


def test_a_scheduler_config_that_is_no_json(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    error_of(load_scheduler, folder, "scheduler_config.json", "JSON")


@pytest.mark.parametrize("name", ["FooScheduler", "DiTTransformer2DModel", "SchedulerMixin", "utils", "__name__", None])
def test_an_unknown_scheduler(folder: Path, name: str | None) -> None:
    edit_scheduler(folder, _class_name=name)
    error_of(load_scheduler, folder, "scheduler", repr(str(name)), diffusers.__version__)


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "bogus"}, {"num_train_timesteps": "many"}, {"num_train_timesteps": -3}], ids=str
)
def test_a_scheduler_that_refuses_its_configuration(folder: Path, changes: dict[str, Any]) -> None:
    edit_scheduler(folder, **changes)
    error_of(load_scheduler, folder, "DDIMScheduler refuses its configuration", "save the scheduler again")


# -------------------------------------------------------------------------------------------------- classes and options
def test_a_checkpoint_of_the_legacy_class_is_known_by_its_norm(folder: Path, tiny_dit: DiffusionTransformer) -> None:
    edit_config(folder, _class_name="Transformer2DModel")
    model = load_model(folder)
    assert type(model.module) is diffusers.DiTTransformer2DModel
    assert_same_weights(model, tiny_dit)
    edit_config(folder, norm_type="ada_norm")
    error_of(load_model, folder, "'Transformer2DModel'", "adapters.md")


@pytest.mark.parametrize(
    ("options", "reason"),
    [(ModelOptions(latent_size=(8, 12)), "square latents only"), (ModelOptions(text_tokens=3), "takes no text")],
)
def test_options_that_a_class_does_not_know(folder: Path, options: ModelOptions, reason: str) -> None:
    error_of(lambda path: load_model(path, options), folder, reason)


def test_another_latent_size_is_another_token_grid(folder: Path) -> None:
    model = load_model(folder, ModelOptions(latent_size=(12, 12)))
    assert (model.geometry.grid, model.geometry.tokens, model.geometry.latent_shape) == ((6, 6), 36, (4, 12, 12))
    assert model.record().latent_size == (12, 12)
