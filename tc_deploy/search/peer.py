"""A peer in the same run: the same checkpoint, noise and labels in PyTorch under cache-dit, where that is installed.

In: a model, its sampler, noise. Out: per setting the latents, what was computed, and how long a run takes over
PyTorch's own full run. Never: changes the model; cache-dit patches a copy of its modules, which shares the weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tc_deploy.errors import BackendError
from tc_deploy.libraries import imported
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.search.in_pytorch import FULL, PeerRun, batches_of, kept_tensors, key_of, ratios_to_full, sample
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling, device_of

FIRST_BLOCKS = 1
"""Blocks that DBCache computes in every step, and judges by whether to compute the others."""


@dataclass(frozen=True, kw_only=True)
class PeerSetting:
    """DBCache and its TaylorSeer calibrator, in cache-dit's own terms."""

    threshold: float
    """``residual_diff_threshold``: a step is cached while the first block's residual has changed by less; 0: never."""
    warmup: int
    """``max_warmup_steps``: so many steps at the start are full."""
    in_a_row: int
    """``max_continuous_cached_steps``; -1: no limit."""
    order: int
    """``taylorseer_order``; 0: the last full step's residual is reused."""

    @property
    def name(self) -> str:
        """``cache-dit DBCache F1B0, threshold 0.24, warm-up 8, 3 in a row, TaylorSeer order 1``."""
        limit = "no limit in a row" if self.in_a_row < 0 else f"{self.in_a_row} in a row"
        parts = [
            f"cache-dit DBCache F{FIRST_BLOCKS}B0",
            f"threshold {self.threshold:g}",
            f"warm-up {self.warmup}",
            limit,
            *([f"TaylorSeer order {self.order}"] if self.order else []),
        ]
        return ", ".join(parts)


SETTINGS = (
    PeerSetting(threshold=0.08, warmup=8, in_a_row=-1, order=0),
    PeerSetting(threshold=0.24, warmup=4, in_a_row=3, order=0),
    PeerSetting(threshold=0.24, warmup=4, in_a_row=3, order=1),
    PeerSetting(threshold=0.24, warmup=2, in_a_row=1, order=2),
    PeerSetting(threshold=0.24, warmup=2, in_a_row=2, order=2),
    PeerSetting(threshold=0.12, warmup=3, in_a_row=3, order=2),
    PeerSetting(threshold=0.12, warmup=2, in_a_row=4, order=2),
    PeerSetting(threshold=0.16, warmup=3, in_a_row=6, order=2),
    PeerSetting(threshold=0.16, warmup=2, in_a_row=6, order=2),
    PeerSetting(threshold=0.24, warmup=2, in_a_row=8, order=2),
)
"""cache-dit's default threshold and warm-up; what SGLang sets by default, without and with TaylorSeer; and the best
that were found for the digits in 50 steps, all with TaylorSeer of order 2 and a short warm-up."""


def why_no_peer(model: DiffusionTransformer | None = None) -> str | None:
    """What keeps :func:`cache_dit_runs` from running, with any model or this one; None where nothing does."""
    try:
        cache_dit = imported("cache_dit")
    except BackendError as error:
        return str(error)
    if model is not None and not cache_dit.BlockAdapterRegister.is_supported(model.module):
        return f"cache-dit {importlib.metadata.version('cache-dit')} does not know {model.family.model_class}"
    return None


def cache_dit_runs(
    model: DiffusionTransformer,
    sampling: Sampling,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    batch_size: int,
    rounds: int,
    kept: Path,
    settings: Sequence[PeerSetting] = SETTINGS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PeerRun, ...]:
    """Sample under cache-dit, and time its runs in turn with PyTorch's full run.

    Args:
        model: the model.
        sampling: scheduler, steps, guidance.
        noise: (n, C, H, W) standard normal.
        conditions: by name, (n, ...).
        batch_size: pictures per run, timed or not: cache-dit takes one decision per step for a whole batch. A batch
            that the noise does not fill is filled up from its start.
        rounds: timed runs of each; 0 times nothing.
        kept: a folder for what was found, of this model, sampler, noise and conditions alone: nothing runs twice.
        settings: of DBCache.
        progress: told how many sampling runs are done, and of how many.

    Returns:
        One per setting; none where :func:`why_no_peer` has a reason.
    """
    if why_no_peer(model) is not None:
        return ()
    batches = list(batches_of(noise, conditions, batch_size))
    untimed = len(settings) * len(batches)
    total = untimed + rounds * (1 + len(settings))
    with _quiet():
        cached_step_cost = _cached_step_cost(model)
        peers = {setting: _patched(model, setting, sampling.steps) for setting in settings}
        sampled: dict[PeerSetting, _Sampled] = {}
        for setting, peer in peers.items():
            path = kept / f"{_key([setting], len(noise), batch_size)}.safetensors"
            sampled[setting] = _sampled(peer, sampling, batches, len(noise), path)
            progress(len(sampled) * len(batches), total)
        requests: dict[str, Callable[[], object]] = {FULL: partial(sample, model, sampling, *batches[0])}
        for setting, peer in peers.items():
            requests[setting.name] = partial(_sample_anew, peer, sampling, *batches[0])
        path = kept / f"{_key(settings, batch_size, rounds)}.json"
        ratios = (
            ratios_to_full(requests, rounds, path, lambda done, _: progress(untimed + done, total)) if rounds else {}
        )
    return tuple(
        _peer_run(setting, found, sampling.steps, cached_step_cost, ratios.get(setting.name, {}))
        for setting, found in sampled.items()
    )


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    """One setting's pictures."""

    latents: Tensor
    """(n, C, H, W)."""
    cached_steps: list[int]
    """By batch."""


def _key(settings: Sequence[PeerSetting], *numbers: int) -> str:
    """What a kept result depends on, beside what its folder stands for."""
    version = importlib.metadata.version("cache-dit")
    return key_of([version, FIRST_BLOCKS, *numbers, *map(dataclasses.asdict, settings)])


def _sampled(
    peer: DiffusionTransformer,
    sampling: Sampling,
    batches: Sequence[tuple[Tensor, dict[str, Tensor]]],
    count: int,
    path: Path,
) -> _Sampled:
    """Make the pictures of one setting, unless that was done before."""

    def make() -> dict[str, Tensor]:
        made, cached_steps = [], []
        for batch in batches:
            made.append(_sample_anew(peer, sampling, *batch))
            cached_steps.append(_cached_steps(peer))
        return {"latents": torch.cat(made)[:count].contiguous(), "cached_steps": torch.tensor(cached_steps)}

    stored = kept_tensors(path, make)
    return _Sampled(latents=stored["latents"], cached_steps=stored["cached_steps"].tolist())


def _peer_run(
    setting: PeerSetting,
    found: _Sampled,
    steps: int,
    cached_step_cost: float,
    ratio: Mapping[str, float],
) -> PeerRun:
    """Put what was found of one setting together."""
    cached = statistics.median_low(found.cached_steps)
    return PeerRun(
        name=setting.name,
        kind=Kind.CACHE_DIT,
        latents=found.latents,
        latency_ratio=ratio.get("median"),
        latency_iqr=ratio.get("iqr"),
        cost_in_full_steps=steps - statistics.mean(found.cached_steps) * (1 - cached_step_cost),
        steps_full=steps - cached,
        steps_cached=cached,
    )


def _patched(model: DiffusionTransformer, setting: PeerSetting, steps: int) -> DiffusionTransformer:
    """The model under cache-dit.

    cache-dit replaces the forward of the module that it is given, adds a submodule to a DiT's, and takes neither back
    when its cache is disabled. So it is given modules of its own, which hold the model's very weights.
    """
    import cache_dit

    weights = itertools.chain(model.module.parameters(), model.module.buffers())
    module = copy.deepcopy(model.module, {id(tensor): tensor for tensor in weights})
    cache_dit.enable_cache(
        module,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=FIRST_BLOCKS,
            Bn_compute_blocks=0,
            residual_diff_threshold=setting.threshold,
            max_warmup_steps=setting.warmup,
            max_continuous_cached_steps=setting.in_a_row,
            num_inference_steps=steps,
            enable_separate_cfg=False,  # both halves of a guided step are one batch
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=setting.order)
        if setting.order
        else None,
    )
    return dataclasses.replace(model, module=module)


def _sample_anew(
    peer: DiffusionTransformer, sampling: Sampling, noise: Tensor, conditions: Mapping[str, Tensor]
) -> Tensor:
    """A run that knows nothing of the one before.

    A pipeline under cache-dit starts every call with an empty cache. A bare module under cache-dit 1.5 takes the first
    step of a run for one more step of the last.
    """
    import cache_dit

    cache_dit.refresh_context(peer.module)
    return sample(peer, sampling, noise, conditions)


def _cached_steps(peer: DiffusionTransformer) -> int:
    """Of the last run, as cache-dit counts them; the module's own figures come last in its summary."""
    import cache_dit

    return len(cache_dit.summary(peer.module, logging=False)[-1].cached_steps)


@torch.no_grad()
def _cached_step_cost(model: DiffusionTransformer) -> float:
    """FLOPs of a cached step over those of a full step."""
    always = PeerSetting(threshold=1.0, warmup=1, in_a_row=-1, order=0)
    peer = _patched(model, always, steps=2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, *model.geometry.latent_shape), generator=generator)
    inputs = {"hidden_states": noise, "timestep": torch.zeros(1), **model.random_conditions(1, generator)}
    inputs = {name: value.to(device_of(model)) for name, value in inputs.items()}
    flops: list[int] = []
    # The math kernel is made of the products that the counter knows; fused CPU kernels are not in its tables.
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                peer.forward(inputs)
            flops.append(counter.get_total_flops())
    return flops[1] / flops[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what cache-dit reports of its set-up, which it writes to standard output."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
