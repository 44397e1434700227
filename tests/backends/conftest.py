"""Engines of TensorRT-RTX that several files' tests share; tests leave them as they are."""

from __future__ import annotations

import pytest
import tensorrt_rtx
from bundles import Made, run_cli

RTX = "tensorrt-rtx"


@pytest.fixture(scope="session")
def built(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The mixed bundle with engines for three kinds of GPU and 1 to 4 samples, built by the command line."""
    bundle = mixed.copy(tmp_path_factory.mktemp("rtx") / "bundle")
    words = ("--compute-capability", "8.6,8.9,12.0", "--batch-profile", 1, 2, 4)
    answer = run_cli("build", bundle, "--backend", RTX, *words)
    assert answer.code == 0, answer.err
    assert answer.out == f"{bundle / RTX}: built with {RTX} {tensorrt_rtx.__version__}, computes in fp32\n"
    for name in ("full", "cached-1", "cached-2", "solver"):
        assert f"building {name}" in answer.err
    return Made(model=mixed.model, plan=mixed.plan, bundle=bundle)
