"""Which of a bundle's targets is meant."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
from bundles import Made, run_cli

import tc_deploy
from tc_deploy.bench.measure import bench_bundles
from tc_deploy.diffusers import EngineTransformer
from tc_deploy.errors import UsageError
from tc_deploy.validate.validation import validate_bundle


def test_of_several_targets_none_is_chosen_silently(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    shutil.copytree(bundle / "onnxruntime", bundle / "openvino")
    several = (
        f"{bundle}: built for onnxruntime and openvino, and none is named; choose one with --backend onnxruntime, in"
        " Python with backend='onnxruntime'"
    )
    for choose in (tc_deploy.load, EngineTransformer, validate_bundle, functools.partial(bench_bundles, rounds=1)):
        with pytest.raises(UsageError, match=re.escape(several)):
            choose(bundle)  # type: ignore[operator]
    with tc_deploy.load(bundle, "onnxruntime") as pipeline:
        assert pipeline.backend == "onnxruntime"
    answer = run_cli("generate", bundle, "--class-label", 1, "-o", tmp_path / "made.npy")
    assert (answer.code, answer.error) == (2, f"error: {several}")
    only = run_cli("-v", "generate", mixed.bundle, "--class-label", 1, "-o", tmp_path / "made.npy")
    assert only.code == 0
    assert only.out.endswith("s with onnxruntime\n")
    chosen = f"{mixed.bundle}: onnxruntime {onnxruntime.__version__}, computes in fp32, provider cpu, threads 1"
    assert chosen in only.err
