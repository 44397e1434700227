"""A search judges as it does on the CPU wherever PyTorch runs the model: shown without a GPU."""

import importlib.util
from pathlib import Path

import diffusers
import pytest
import torch
import zoo
from elsewhere import elsewhere, moved
from torch.nn.attention import SDPBackend, sdpa_kernel

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.search.peer import PeerRun, PeerSetting, cache_dit_runs
from tc_deploy.tokencache.sampler import Sampling

STEPS = 6
SAMPLING = Sampling(
    scheduler=diffusers.DDIMScheduler(clip_sample=False), steps=STEPS, guidance_scale=2.0, set_timesteps_kwargs={}
)


@pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="needs cache-dit")
def test_a_peer_samples_the_same_there(tmp_path: Path) -> None:
    setting = PeerSetting(threshold=1.0, warmup=3, in_a_row=1, order=1)

    def sampled(model: DiffusionTransformer, folder: str) -> PeerRun:
        noise, conditions = draw_batch(model, SAMPLING, range(2))
        (run,) = cache_dit_runs(
            model, SAMPLING, noise, conditions, batch_size=2, rounds=0, kept=tmp_path / folder, settings=(setting,)
        )
        return run

    with sdpa_kernel(SDPBackend.MATH):
        here = sampled(zoo.model("dit"), "here")
        with elsewhere():
            there = sampled(moved(zoo.model("dit")), "there")
    assert here.steps_cached
    assert (there.steps_cached, there.cost_in_full_steps) == (here.steps_cached, here.cost_in_full_steps)
    assert torch.equal(there.latents, here.latents)
