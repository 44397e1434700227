"""Classifier-free guidance in PyTorch, by each pipeline's rule; ``export/solver_graph.py`` has the same as a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from tc_deploy.types import LEAST_NORM, GuidanceRule


def guided_output(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, rule: GuidanceRule = GuidanceRule.PLAIN
) -> Tensor:
    """Classifier-free guidance as pipelines of diffusers have it, in their order of operations."""
    start = conditional if rule is GuidanceRule.BEYOND else unconditional
    mixed: Tensor = start + scale * (conditional - unconditional)
    if not rule.rescales:
        return mixed
    own, found = (torch.norm(half, dim=-1, keepdim=True) for half in (conditional, mixed))
    ratio: Tensor = own / found if rule is GuidanceRule.RESCALED else (own / (found + LEAST_NORM)).clamp(max=1.0)
    return mixed * ratio
