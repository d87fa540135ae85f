"""KID against a plain double loop; its mean is zero where both sides are alike."""

import numpy as np
import pytest

from generators.quality.kernel import kid, mmd2


def test_against_a_plain_double_loop() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 4)), rng.normal(0.5, 1, (5, 4))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 4 + 1) ** 3

    within = [
        sum(kernel(a, b) for i, a in enumerate(side) for j, b in enumerate(side) if i != j) / (n * (n - 1))
        for side, n in ((first, 6), (second, 5))
    ]
    across = sum(kernel(a, b) for a in first for b in second) / 30
    assert mmd2(first, second) == pytest.approx(sum(within) - 2 * across)


def test_it_is_zero_for_equal_distributions_and_not_for_others() -> None:
    rng = np.random.default_rng(1)
    real, same, other = (rng.normal(mean, 1, (2000, 8)) for mean in (0, 0, 0.5))
    value, error = kid(real, same, rng)
    assert abs(value) < 4 * error
    value, error = kid(real, other, rng)
    assert value > 10 * error > 0


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(2)
    found = np.array([kid(rng.normal(size=(100, 3)), rng.normal(0.3, 1, (100, 3)), rng) for _ in range(60)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.3)


def test_it_is_of_all_rows_and_the_jackknife_leaves_out_one_group_after_another() -> None:
    rng = np.random.default_rng(3)
    real, synthetic = rng.normal(size=(41, 2)), rng.normal(size=(20, 2))  # groups of four and five, and of two
    value, error = kid(real, synthetic, np.random.default_rng(9))
    assert value == pytest.approx(mmd2(real, synthetic))
    orders = np.random.default_rng(9)
    first, second = (np.array_split(orders.permutation(count), 10) for count in (41, 20))
    without = [
        mmd2(np.delete(real, a, axis=0), np.delete(synthetic, b, axis=0)) for a, b in zip(first, second, strict=True)
    ]
    assert error == pytest.approx(np.sqrt(9 * np.var(without)))


def test_what_can_not_be_compared_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 20 images on each side, but has 19"):
        kid(np.zeros((40, 3)), np.zeros((19, 3)), rng)
    with pytest.raises(ValueError, match="3 and 4 numbers"):
        kid(np.zeros((40, 3)), np.zeros((40, 4)), rng)
