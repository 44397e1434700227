"""Real diffusers pipelines of tiny random parts, and the PyTorch cached forward in the place of their transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from bundles import make_plan
from torch import Tensor, nn

from tc_deploy.backends.build import build_target
from tc_deploy.export.stage import export_bundle, token_index_tables
from tc_deploy.models.loading import load_model
from tc_deploy.plan import load_plan
from tc_deploy.tokencache.sampler import TokenCachedSteps


class CachedTransformer(nn.Module):
    """A plan's cached forward in PyTorch, called as the engines are; it counts steps and looks at no timestep."""

    def __init__(self, plan: Path, model: Path) -> None:
        super().__init__()
        document, tables = load_plan(plan)
        self.model = load_model(model)
        self.config, self.dtype = self.model.module.config, torch.float32
        self.device = torch.device("cpu")
        self.count = document.schedule.steps
        index = token_index_tables(document, tables)
        self.steps = TokenCachedSteps(self.model, document.cache, document.tprr(), index)
        self.step = 0

    def forward(self, hidden_states: Tensor, *, timestep: Tensor, return_dict: bool = True, **conditions: Any) -> Any:
        given = {"hidden_states": hidden_states, "timestep": timestep.float(), **conditions}
        inputs = {name: given[name] for name in self.model.input_names}
        sample = self.steps(self.step, inputs)
        self.step = (self.step + 1) % self.count
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def tiny_autoencoder(channels: int) -> diffusers.AutoencoderKL:
    """One that leaves the size as it is."""
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1
    ).eval()


def build_bundle(model: Path, folder: Path, **settings: Any) -> Path:
    """Plan, export and build; the engines are compared with PyTorch by the test, so not here."""
    export_bundle(make_plan(model, folder / "plan", **settings), folder / "bundle", check=False)
    build_target(folder / "bundle", options={"threads": 1})
    return folder / "bundle"
