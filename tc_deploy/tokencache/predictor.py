"""The Cache Predictor: importance of every token per block and timestep, w = g(l, t).

It sees the block and the timestep and not the sample, so all its scores, and the index tables made of them, are known
before a run. Source: TokenCache (arXiv 2409.18523); the network's size is this project's own choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16
HIDDEN = 64


class CachePredictor(nn.Module):
    """Importance of tokens.

    Args:
        blocks: L.
        tokens: N.
        largest_timestep: the largest that occurs; it is divided out.
        keep_ratio: mean importance before training.
    """

    def __init__(self, blocks: int, tokens: int, largest_timestep: float, keep_ratio: float) -> None:
        super().__init__()
        self.scale = max(largest_timestep, 1e-6)
        self.block = nn.Embedding(blocks, HIDDEN)
        self.time = nn.Linear(2 * FREQUENCIES, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.score = nn.Linear(HIDDEN, tokens)
        nn.init.normal_(self.score.weight, std=0.02)
        bounded = min(max(keep_ratio, 0.02), 0.98)
        nn.init.constant_(self.score.bias, math.log(bounded / (1 - bounded)))

    def forward(self, timestep: Tensor) -> Tensor:
        """Score the tokens.

        Args:
            timestep: scalar, the diffusion timestep (or sigma) of a step.

        Returns:
            (L, N) in (0, 1); 1 means compute again.
        """
        octaves = torch.exp2(torch.arange(FREQUENCIES, dtype=torch.float32, device=timestep.device) * 0.5)
        angles = timestep.float() / self.scale * octaves
        features = self.time(torch.cat([angles.sin(), angles.cos()]))
        hidden = torch.nn.functional.silu(self.block.weight + features)  # (L, hidden)
        return torch.sigmoid(self.score(torch.nn.functional.silu(self.mix(hidden))))
