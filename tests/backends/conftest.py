"""Engines of TensorRT-RTX that several files' tests share; tests leave them as they are."""

from __future__ import annotations

import pytest
import tensorrt_rtx
from bundles import Made, build_rtx

RTX = "tensorrt-rtx"
CHOSEN = "batch_profile 1 2 4, compute_capability 8.6 8.9 12.0, use_cuda_graph True"


@pytest.fixture(scope="session")
def built(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The mixed bundle with engines for three kinds of GPU and 1 to 4 samples, built by the command line."""
    made, answer = build_rtx(mixed, tmp_path_factory.mktemp("rtx"))
    assert (
        answer.out == f"{made.bundle / RTX}: built with {RTX} {tensorrt_rtx.__version__}, computes in fp32, {CHOSEN}\n"
    )
    for name in ("full", "cached-1", "cached-2", "solver"):
        assert f"building {name}" in answer.err
    return made
