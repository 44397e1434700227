"""A search judges as it does on the CPU wherever PyTorch runs the model: shown without a GPU."""

import importlib.util
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import zoo
from elsewhere import elsewhere, moved
from torch.nn.attention import SDPBackend, sdpa_kernel

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.search.peer import PeerRun, PeerSetting, cache_dit_runs
from tc_deploy.search.screen import Judged, Screen
from tc_deploy.search.space import Candidate
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.tokencache.selection import spread_importance
from tc_deploy.types import Attention, Reuse, Skip

STEPS = 6
SAMPLING = Sampling(
    scheduler=diffusers.DDIMScheduler(clip_sample=False), steps=STEPS, guidance_scale=2.0, set_timesteps_kwargs={}
)


def test_a_candidate_is_judged_the_same_there(tmp_path: Path) -> None:
    candidate = Candidate(
        phase_start=3,
        cache_interval_early=2,
        cache_interval_late=2,
        keep_ratio=(0.5, 0.5),
        forecast_order=1,
        reuse=Reuse.BRANCH,
        attention=Attention.ALL,
        skip=Skip.BLOCKS,
    )

    def judged(model: DiffusionTransformer, folder: str) -> Judged:
        blocks, tokens = len(model.blocks), model.geometry.tokens
        importance = np.stack([spread_importance(blocks, tokens, step) for step in range(STEPS)])
        return Screen(model, SAMPLING, importance, 4, 2, None, tmp_path / folder, lambda _: None)(candidate)

    # One kernel for both: which one attention takes depends on the device.
    with sdpa_kernel(SDPBackend.MATH):
        here = judged(zoo.model("pixart"), "here")
        with elsewhere():
            assert judged(moved(zoo.model("pixart")), "there") == here


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
