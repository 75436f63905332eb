"""Every number equals a direct evaluation of its formula; identical views align perfectly."""

import math

import numpy as np
import pytest
import torch

from latentddae.transfer.probes import geometry


@pytest.fixture
def views() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    u = random.normal(size=(103, 7)).astype(np.float32) + 0.5
    return u, u + 0.3 * random.normal(size=u.shape).astype(np.float32)


def on_sphere(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


def direct_uniformity(x: np.ndarray) -> float:
    """The formula as it is written (Wang & Isola)."""
    unit = on_sphere(x)
    pairs = [
        math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum())
        for i in range(len(x))
        for j in range(i + 1, len(x))
    ]
    return math.log(sum(pairs) / len(pairs))


@pytest.mark.parametrize("chunk", [8, 50, 2048])
def test_alignment_and_uniformity_equal_their_formulas(views, chunk) -> None:
    u, v = views
    expected = ((on_sphere(u) - on_sphere(v)) ** 2).sum(axis=1).mean()
    assert geometry.alignment(u, v, chunk) == pytest.approx(expected, rel=1e-5)
    assert geometry.uniformity(u, chunk) == pytest.approx(direct_uniformity(u), rel=1e-5)


def test_identical_views_align_perfectly(views) -> None:
    assert geometry.alignment(views[0], views[0].copy()) == 0
    assert geometry.alignment(views[0], 2 * views[0]) < 1e-12  # only the direction counts


def test_minibatches_are_weighted_by_their_size(views) -> None:
    u, v = views
    parts = [(40, 0, 40), (40, 40, 80), (23, 80, 103)]
    expected = sum(
        n * (direct_uniformity(u[a:b]) + direct_uniformity(v[a:b])) / 2 for n, a, b in parts
    ) / len(u)
    assert geometry.minibatch_uniformity(u, v, 40) == pytest.approx(expected, rel=1e-5)
    assert geometry.minibatch_uniformity(u[:81], v[:81], 40) == pytest.approx(
        geometry.minibatch_uniformity(u[:80], v[:80], 40)
    )  # a batch of one has no pairs


def test_covariance_and_rank(views) -> None:
    u, v = views
    both = np.cov(u.T.astype(np.float64), v.T.astype(np.float64), bias=True)
    found = geometry.cross_covariance(u, v, chunk=17)
    np.testing.assert_allclose(found, both[:7, 7:], rtol=1e-4, atol=1e-6)
    values = np.linalg.eigvalsh(both[:7, :7])
    shares = values / values.sum()
    expected = math.exp(-(shares * np.log(shares)).sum())
    found = geometry.effective_rank(geometry.cross_covariance(u, u))
    assert found == pytest.approx(expected, rel=1e-4)
    assert geometry.effective_rank(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)
    assert geometry.effective_rank(torch.diag(torch.tensor([1.0, 0, 0]))) == pytest.approx(1)


def test_cka_equals_its_definition_and_ignores_rotation_and_scale(views) -> None:
    u, v = views
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0].astype(np.float32)
    found = geometry.linear_cka({1: u, 2: v, 3: 3 * u @ rotation})
    x, y = (a.astype(np.float64) - a.mean(axis=0, dtype=np.float64) for a in (u, v))
    gram_x, gram_y = x @ x.T, y @ y.T  # HSIC on the kernels of the samples
    expected = (gram_x * gram_y).sum() / math.sqrt((gram_x**2).sum() * (gram_y**2).sum())
    assert found[0, 1] == pytest.approx(expected, rel=1e-4)
    assert found[0, 2] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(np.diagonal(found), 1)
    np.testing.assert_allclose(found, found.T)
