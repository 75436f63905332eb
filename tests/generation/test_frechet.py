"""The Frechet distance against closed forms."""

import numpy as np
import pytest

from latentddae.core.errors import DataError
from latentddae.generation.frechet import Moments, frechet_distance, moments


def spd(rng: np.random.Generator, dim: int) -> np.ndarray:
    a = rng.normal(size=(dim, dim))
    return a @ a.T / dim


def test_closed_form_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40))
    stds = rng.uniform(0.1, 3, size=(2, 40))
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    first = Moments(100, a, basis @ np.diag(stds[0] ** 2) @ basis.T)
    second = Moments(100, b, basis @ np.diag(stds[1] ** 2) @ basis.T)
    expected = ((a - b) ** 2).sum() + ((stds[0] - stds[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


def test_one_dimension() -> None:
    a = Moments(5, np.array([1.0]), np.array([[4.0]]))
    b = Moments(5, np.array([3.0]), np.array([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx(4 + 1, abs=1e-12)


def test_agrees_with_the_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a = Moments(9, rng.normal(size=30), spd(rng, 30))
    b = Moments(9, rng.normal(size=30), spd(rng, 30))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(500, 20), (10, 200), (2, 64), (50, 50)])
def test_zero_on_itself_and_never_nan_on_deficient_ranks(count: int, dim: int) -> None:
    """Fewer samples than dimensions give no NaN, no imaginary part, no offset."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, count, dim))
    y[:, : dim // 2] = 3.0  # constant features have no variance at all
    assert frechet_distance(moments(x), moments(x)) < 1e-6
    for a, b in [(x, y), (y, y), (y, x), (1e4 * x, 1e-4 * y)]:
        distance = frechet_distance(moments(a), moments(b))
        assert isinstance(distance, float)
        assert np.isfinite(distance)
        assert distance >= 0
    assert frechet_distance(moments(y), moments(y)) < 1e-6


def test_the_shortcut_for_few_vectors_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    x, y = moments(rng.normal(size=(12, 40))), moments(rng.normal(size=(15, 40)))
    assert x.factor is not None
    plain = [Moments(m.count, m.mean, m.covariance) for m in (x, y)]
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(*plain), abs=1e-6)


def test_moments_equal_numpy_in_any_batching() -> None:
    rng = np.random.default_rng(3)
    x = (1e4 + rng.normal(size=(101, 7))).astype(np.float32)
    for parts in ([x], np.array_split(x, 13), [x[:1], x[1:]]):
        streamed = moments(iter(parts))
        assert streamed.count == 101
        np.testing.assert_allclose(streamed.mean, x.astype(float).mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            streamed.covariance, np.cov(x.astype(float).T), rtol=1e-7, atol=1e-9
        )


def test_bad_features() -> None:
    with pytest.raises(DataError, match="not finite"):
        moments(np.array([[1.0, np.nan], [0.0, 0.0]]))
    with pytest.raises(DataError, match="at least 2"):
        moments(np.zeros((1, 3)))
    with pytest.raises(DataError, match="shape"):
        moments(np.zeros(3))
    with pytest.raises(DataError, match="4 dimensions, the first had 3"):
        moments(iter([np.zeros((2, 3)), np.zeros((2, 4))]))
    with pytest.raises(DataError, match="3 and 4"):
        frechet_distance(moments(np.eye(3)), moments(np.eye(4)))
