"""Real diffusers pipelines of tiny random parts, and the PyTorch cached forward in the place of their transformer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from bundles import make_plan
from torch import Tensor, nn

from tc_deploy.backends.build import build_target
from tc_deploy.export.stage import export_bundle, token_index_tables
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.tokencache.sampler import TokenCachedSteps


class CachedTransformer(nn.Module):
    """A plan's cached forward in PyTorch, called as the engines are.

    It counts the steps of each half of guidance and takes their timesteps from the plan, whatever it is given.
    """

    def __init__(self, plan: Path, model: Path) -> None:
        super().__init__()
        self.plan, tables = load_plan(plan)
        self.model = load_model(model, ModelOptions.of(self.plan.model))
        self.config, self.dtype, self.device = self.model.module.config, torch.float32, torch.device("cpu")
        self.index = token_index_tables(self.plan, tables)
        self.runs: dict[str, tuple[int, TokenCachedSteps]] = {}
        self.half = ""

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        self.half = name
        yield
        self.half = ""

    def forward(self, hidden_states: Tensor, *, return_dict: bool = True, **given: Any) -> Any:
        step, steps = self.runs.get(self.half, (0, None))
        if step == 0 or steps is None:
            step, steps = 0, TokenCachedSteps(self.model, self.plan.cache, self.plan.tprr(), self.index)
        timestep = torch.tensor(self.plan.sampling.timesteps[step]).expand(len(hidden_states))
        inputs = {"hidden_states": hidden_states, "timestep": timestep}
        for condition in self.model.geometry.conditions:
            inputs[condition.name] = given[condition.name].to(getattr(torch, condition.dtype))
        sample = steps(step, inputs)
        self.runs[self.half] = (step + 1) % self.plan.schedule.steps, steps
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


def build_bundle(model: Path, folder: Path, **settings: Any) -> Path:
    """Plan, export and build; the engines are compared with PyTorch by the test, so not here."""
    export_bundle(make_plan(model, folder / "plan", **settings), folder / "bundle", check=False)
    build_target(folder / "bundle", options={"threads": 1})
    return folder / "bundle"
