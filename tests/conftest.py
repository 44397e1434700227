"""Fixtures that several rooms share: tiny real models, on disk and in memory. Tests leave both as they are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import hypothesis
import pytest
import torch
from kept import Keep
from zoo import randomise

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model

# Models this small only lose by sharing their work between threads, ten times over on a busy machine.
torch.set_num_threads(1)
# Nor is a busy machine a defect of the code.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=200)
hypothesis.settings.load_profile("quick")

pytest_plugins = ["bundles", "prompted"]

DIT_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 3,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Keep:
    """Keeps in pytest's cache; where that is switched off, in the folder of this run, which its workers share."""
    away, base = tmp_path_factory.mktemp("away"), tmp_path_factory.getbasetemp()
    if request.config.pluginmanager.hasplugin("cacheprovider"):
        return Keep(Path(request.config.cache.mkdir("kept")), away)
    return Keep((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kept", away)


@pytest.fixture(scope="session")
def save_dit() -> Callable[..., Path]:
    """Saves a pipeline folder: a random DiT as ``transformer/``, a DDIM scheduler as ``scheduler/``.

    Called with the folder and keyword changes to the transformer's configuration. ``edit``, called with the module,
    alters its weights before they are saved.
    """

    def save(folder: Path, seed: int = 0, edit: Callable[[Any], None] = lambda module: None, **changes: Any) -> Path:
        module = diffusers.DiTTransformer2DModel(**DIT_CONFIG | changes)
        randomise(module, seed)
        with torch.no_grad():
            edit(module)
        module.save_pretrained(folder / "transformer")
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        scheduler.save_pretrained(folder / "scheduler")
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_dit_folder(kept: Keep, save_dit: Callable[..., Path]) -> Path:
    """A pipeline folder: 3 blocks, 16 tokens, width 64, latents (4, 8, 8), learned variance, 10 classes."""
    return kept("tiny-dit", lambda folder: save_dit(folder / "model")) / "model"


@pytest.fixture(scope="session")
def tiny_dit(tiny_dit_folder: Path) -> DiffusionTransformer:
    """The model of :func:`tiny_dit_folder`."""
    return load_model(tiny_dit_folder)
