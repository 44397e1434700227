"""What a step costs: FLOPs counted by PyTorch on the very modules that are exported."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tc_deploy.errors import PlanError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord, CostRecord, Plan
from tc_deploy.schedule import PHASES
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.forward import run_cached, run_full
from tc_deploy.tokencache.sampler import device_of

COUNT_DEPARTS = 0.01
"""By how much of a full step two counts of the same step may differ: other versions of PyTorch know other operators."""


@torch.no_grad()
def count_flops(model: DiffusionTransformer, cache: CacheRecord) -> CostRecord:
    """FLOPs of a full step and of each phase's cached step, for one row of the model's batch.

    Only what PyTorch counts (matrix products, convolutions, attention): what is left is element-wise and bound by
    memory, so a step that computes nothing counts its embeddings, modulations and head, and is not free.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn((1, *model.geometry.latent_shape), generator=generator),
        "timestep": torch.zeros(1),
        **model.random_conditions(1, generator),
    }
    device = device_of(model)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # The math kernel is made of the products that the counter knows; fused CPU kernels are not in its tables.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            _, noted = run_full(model, cache, inputs)
        full = counter.get_total_flops()
        cached = []
        for phase in PHASES:
            keep_counts = cache.keep_counts[phase - 1]
            pruned = pruned_blocks(keep_counts, model.geometry.tokens)
            rows = [torch.arange(keep_counts[block], device=device) for block in pruned]
            index = torch.cat(rows)[None] if rows else None
            depth = cache.forecast_order + 1
            with FlopCounterMode(display=False) as counter:
                run_cached(
                    model, cache, phase, inputs, [noted] * depth, torch.ones(1, depth, device=device) / depth, index
                )
            cached.append(counter.get_total_flops())
    return CostRecord(full_flops=full, cached_flops=(cached[0], cached[1]))


def check_cost(plan: Plan, model: DiffusionTransformer, where: str) -> None:
    """Check what a plan says that its steps cost, by counting again.

    Raises:
        PlanError: they cost something else.
    """
    found = count_flops(model, plan.cache)
    names = ("full_flops", "cached_flops of phase 1", "cached_flops of phase 2")
    said = (plan.cost.full_flops, *plan.cost.cached_flops)
    counted = (found.full_flops, *found.cached_flops)
    for name, value, right in zip(names, said, counted, strict=True):
        if abs(value - right) > COUNT_DEPARTS * found.full_flops:
            raise PlanError(
                f"{where}: cost.{name}: expected {right}, counted on the checkpoint, found {value}, so the plan was"
                " edited; calibrate again"
            )
