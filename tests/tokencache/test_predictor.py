"""The Cache Predictor as a function: what it depends on and where it starts."""

import pytest
import torch

from tc_deploy.tokencache.predictor import CachePredictor

BLOCKS, TOKENS = 5, 64


def make(keep_ratio: float = 0.3, seed: int = 0) -> CachePredictor:
    torch.manual_seed(seed)
    return CachePredictor(BLOCKS, TOKENS, largest_timestep=999.0, keep_ratio=keep_ratio)


@pytest.fixture(autouse=True)
def _own_random_state() -> object:
    with torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0.0, 3.0, 500.5, 999.0])
def test_scores_are_shares_for_every_token_of_every_block(timestep: float) -> None:
    scores = make()(torch.tensor(timestep))
    assert scores.shape == (BLOCKS, TOKENS)
    assert scores.dtype == torch.float32
    assert scores.min() > 0
    assert scores.max() < 1


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.5, 0.9])
def test_training_starts_at_the_keep_ratio(keep_ratio: float) -> None:
    for seed in range(3):
        mean = make(keep_ratio, seed)(torch.tensor(500.0)).mean()
        assert abs(float(mean) - keep_ratio) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [0.0, 1.0])
def test_a_ratio_at_the_edge_still_leaves_something_to_learn(keep_ratio: float) -> None:
    scores = make(keep_ratio)(torch.tensor(500.0))
    assert scores.min() > 0
    assert scores.max() < 1


@torch.no_grad()
def test_scores_differ_between_blocks_tokens_and_timesteps() -> None:
    predictor = make()
    scores = torch.stack([predictor(torch.tensor(float(timestep))) for timestep in (0, 20, 500, 999)])
    assert len(scores.unique(dim=0)) == 4
    assert len(scores[0].unique(dim=0)) == BLOCKS
    assert len(scores[0].unique(dim=1).T) == TOKENS


@torch.no_grad()
def test_the_timestep_is_seen_on_its_own_scale() -> None:
    torch.manual_seed(0)
    small = CachePredictor(BLOCKS, TOKENS, largest_timestep=1.0, keep_ratio=0.3)
    assert torch.allclose(small(torch.tensor(0.25)), make()(torch.tensor(999.0 * 0.25)))


@torch.no_grad()
def test_a_schedule_whose_only_timestep_is_0_has_scores() -> None:
    torch.manual_seed(0)
    assert CachePredictor(BLOCKS, TOKENS, largest_timestep=0.0, keep_ratio=0.3)(torch.tensor(0.0)).isfinite().all()


def test_every_parameter_can_learn() -> None:
    predictor = make()
    predictor(torch.tensor(500.0)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in predictor.parameters())
