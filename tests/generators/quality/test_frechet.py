"""FID against closed forms of two Gaussians and another matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from generators.quality.frechet import fid, frechet_distance


def test_the_closed_form_of_diagonal_covariances() -> None:
    """|m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(0)
    mean_1, mean_2, a, b = rng.normal(size=6), rng.normal(size=6), rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    expected = ((mean_1 - mean_2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mean_1, np.diag(a), mean_2, np.diag(b)) == pytest.approx(expected)


def test_the_closed_form_of_two_dimensions_that_do_not_commute() -> None:
    """The trace of a 2x2 matrix's root is sqrt(trace + 2 sqrt(determinant))."""
    first, second = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[0.5, -0.3], [-0.3, 1.5]])
    product = first @ second
    assert not np.allclose(product, product.T)
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 1 + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(np.zeros(2), first, np.array([1.0, 0.0]), second) == pytest.approx(expected)


def test_samples_of_two_gaussians_come_near_their_distance() -> None:
    rng = np.random.default_rng(1)
    real, synthetic = rng.normal(0, 1, (20_000, 3)), rng.normal(1, 2, (20_000, 3))
    assert fid(real, synthetic) == pytest.approx(3 * (1 + 1), rel=0.05)


def test_against_another_square_root_where_rank_is_missing() -> None:
    rng = np.random.default_rng(2)
    real, synthetic = rng.normal(size=(30, 8)), rng.normal(0.3, 1.2, (9, 8))
    covs = [np.cov(features, rowvar=False) for features in (real, synthetic)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    expected = ((real.mean(0) - synthetic.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * root)
    assert fid(real, synthetic) == pytest.approx(expected, rel=1e-6)


def test_of_the_same_images_it_is_nothing() -> None:
    features = np.random.default_rng(3).normal(size=(50, 80))
    assert fid(features, features) == pytest.approx(0, abs=1e-6)


def test_what_can_not_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        fid(np.zeros((5, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="3 and 4 numbers"):
        fid(np.zeros((5, 3)), np.zeros((5, 4)))
