"""The figures against their definitions, and what fails."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import tolerance

from tc_deploy.validate.metrics import failures_of, is_close, metrics_of, psnr_db, relative_l2

ENGINE = ("onnxruntime", "fp32")
EXPECTED = np.array([[3.0, -4.0], [0.001, 12.0]], np.float32)


def test_by_hand() -> None:
    metrics = metrics_of(EXPECTED + np.array([[0.3, 0.4], [0.0, 0.0]], np.float32), EXPECTED)
    exact = tolerance("torch", "fp32", "metric")
    assert metrics.max_abs == pytest.approx(0.4, rel=exact)
    assert metrics.median_abs == pytest.approx(0.15, rel=exact)
    # The element of 0.001 is left out: its relative error says nothing.
    assert metrics.max_rel == pytest.approx(0.1, rel=exact)
    assert metrics.median_rel == pytest.approx(0.1, rel=exact)
    assert metrics.sqnr_db == pytest.approx(10 * np.log10((9 + 16 + 144 + 1e-6) / 0.25), rel=exact)
    found = EXPECTED.astype(np.float64) + np.array([[0.3, 0.4], [0, 0]])
    cosine = (EXPECTED * found).sum() / np.linalg.norm(EXPECTED.astype(np.float64)) / np.linalg.norm(found)
    assert metrics.cosine == pytest.approx(cosine, rel=exact)
    assert metrics.to_deviation == pytest.approx(0.4 / EXPECTED.std(), rel=exact)


def test_equal_tensors_pass() -> None:
    metrics = metrics_of(EXPECTED, EXPECTED)
    assert (metrics.max_abs, metrics.sqnr_db) == (0.0, None)
    assert failures_of(metrics, *ENGINE) == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    found = EXPECTED.copy()
    found[0, 0] = value
    assert failures_of(metrics_of(found, EXPECTED), *ENGINE) == ("not finite",)
    assert psnr_db(found[None, None], EXPECTED[None, None], pixels=True) is None
    assert relative_l2(found, EXPECTED) is None


def test_another_shape_is_not_close() -> None:
    assert not is_close(EXPECTED[:1], EXPECTED, *ENGINE)
    with pytest.raises(ValueError, match="expected shape"):
        metrics_of(EXPECTED[:1], EXPECTED)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_the_largest_error_decides(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    expected = (scale * generator.standard_normal((2, 64))).astype(np.float32)
    allowed = tolerance(*ENGINE, "output_max_rel") * expected.std()
    for share, passes in ((0.5, True), (2.0, False)):
        found = expected.copy()
        found[1, 7] += share * allowed
        assert is_close(found, expected, *ENGINE) is passes


def test_psnr_of_pictures_is_of_what_is_seen() -> None:
    seen = np.full((1, 1, 2, 2), 1.0, np.float32)
    assert psnr_db(seen + 5, seen, pixels=True) == 140.0
    assert psnr_db(seen - 0.2, seen, pixels=True) == pytest.approx(20.0, abs=tolerance("torch", "fp32", "psnr_db"))
