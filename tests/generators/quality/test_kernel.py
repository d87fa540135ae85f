"""KID against a plain double loop; its mean is zero where both sides are alike, with classes far apart, too."""

import numpy as np
import pytest

from generators.quality.kernel import kid

Side = tuple[np.ndarray, np.ndarray]


def plain(real: Side, synthetic: Side) -> float:
    """The mean of the kernel over pairs of classes, by loops."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def mean(one: Side, other: Side, same: bool) -> float:
        found = []
        for c in np.unique(one[1]):
            for d in np.unique(other[1]):
                pairs = [
                    kernel(one[0][i], other[0][j])
                    for i in np.flatnonzero(one[1] == c)
                    for j in np.flatnonzero(other[1] == d)
                    if not (same and i == j)
                ]
                found.append(sum(pairs) / len(pairs))
        return float(np.mean(found))

    return mean(real, real, True) + mean(synthetic, synthetic, True) - 2 * mean(real, synthetic, False)


def drawn(rng: np.random.Generator, per_class: int, classes: int = 4, shift: float = 0.0) -> Side:
    """As many features of each class, classes three standard deviations apart."""
    labels = np.repeat(np.arange(classes), per_class)
    centres = 3 * np.eye(classes, 6)
    return centres[labels] + rng.normal(shift, 1, (len(labels), 6)), labels


def test_against_a_plain_double_loop() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = drawn(rng, 5, 3), drawn(rng, 4, 3, 0.5)
    order = rng.permutation(15)
    real = real[0][order], real[1][order]
    synthetic = synthetic[0][:11], synthetic[1][:11]  # classes of 4, 4 and 3
    assert kid(real, synthetic, rng)[0] == pytest.approx(plain(real, synthetic))


def test_it_is_zero_for_equal_distributions_and_not_for_others() -> None:
    """A share for each class is no sample at random: taken as one it would give less than zero."""
    rng = np.random.default_rng(1)
    values, _ = np.array([kid(drawn(rng, 10), drawn(rng, 10), rng) for _ in range(200)]).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
    value, error = kid(drawn(rng, 100), drawn(rng, 100, shift=0.5), rng)
    assert value > 4 * error > 0


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(2)
    values, errors = np.array([kid(drawn(rng, 25), drawn(rng, 25, shift=0.3), rng) for _ in range(60)]).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.3)


def test_the_jackknife_leaves_out_one_group_after_another() -> None:
    """With ten of a class and ten groups each group has one of each class."""
    rng = np.random.default_rng(3)
    real, synthetic = drawn(rng, 10, 2), drawn(rng, 10, 2)
    _, error = kid(real, synthetic, np.random.default_rng(9))
    orders = np.random.default_rng(9)
    groups = []
    for _ in range(2):
        number = np.empty(20, dtype=int)
        for place in range(2):
            number[10 * place + orders.permutation(10)] = np.sort((np.arange(10) + place) % 10)
        groups.append(number)
    without = []
    for left_out in range(10):
        kept = [group != left_out for group in groups]
        sides = [(side[0][own], side[1][own]) for side, own in zip((real, synthetic), kept, strict=True)]
        without.append(plain(*sides))
    assert error == pytest.approx(np.sqrt(9 * np.var(without)))


def test_what_can_not_be_compared_is_refused() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = drawn(rng, 5), drawn(rng, 5)
    with pytest.raises(ValueError, match="at least 3 images of each class on each side, but class 3 has 2"):
        kid(real, (synthetic[0][:17], synthetic[1][:17]), rng)
    with pytest.raises(ValueError, match="at least 3 images of each class on each side, but class 2 has 0"):
        kid(real, drawn(rng, 5, 2), rng)
    with pytest.raises(ValueError, match="6 and 4 numbers"):
        kid(real, (synthetic[0][:, :4], synthetic[1]), rng)
