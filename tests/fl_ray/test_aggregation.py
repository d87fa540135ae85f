"""Aggregation against plain sums, exactness in any order, server optimisers and water-filling by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_ray.aggregation import ExactSum, combine
from fl_ray.allocation.categories import apportion, class_amounts, water_fill


def test_exact_sum_equals_a_plain_sum_and_does_not_depend_on_order() -> None:
    rng = np.random.default_rng(0)
    updates = [torch.from_numpy(rng.normal(0, 10.0**scale, 1000).astype(np.float32)) for scale in range(-4, 3)]
    shares = rng.dirichlet(np.ones(7))
    totals = []
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 1, 5, 3]):
        total = ExactSum(1000)
        for index in order:
            total.add(updates[index][None], [shares[index]])
        totals.append(total)
    assert np.array_equal(totals[0].total, totals[1].total)
    plain = sum(share * update.double().numpy() for share, update in zip(shares, updates, strict=True))
    assert np.abs(totals[0].value() - plain).max() < 7 * 2.0**-43 + 1e-12


def test_merged_parts_equal_one_sum() -> None:
    updates = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    whole, left, right = ExactSum(50), ExactSum(50), ExactSum(50)
    for index, update in enumerate(updates):
        whole.add(update[None], [0.25])
        (left if index % 2 else right).add(update[None], [0.25])
    left.merge(right.total)
    assert np.array_equal(whole.total, left.total)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**20])
def test_updates_that_would_spoil_the_sum_do_not_fit(bad: float) -> None:
    updates = torch.zeros(2, 5)
    assert ExactSum.fits(updates).tolist() == [True, True]
    updates[1, 3] = bad
    assert ExactSum.fits(updates).tolist() == [True, False]


def test_the_fast_rounding_equals_the_plain_one() -> None:
    """Products below 2^51 quanta take another way; halves, negative numbers and zeros round alike."""
    values = torch.tensor([0.0, -0.0, 1.5 * 2.0**-42, 2.5 * 2.0**-42, -0.5 * 2.0**-42, 3.7, -511.0, 1e-30])
    for share in (1.0, 0.3):
        total = ExactSum(len(values))
        for _ in range(3):
            total.add(values[None], [share])
        expected = 3 * np.rint(values.double().numpy() * (share * 2.0**42)).astype(np.int64)
        assert np.array_equal(total.total, expected)
    large = torch.tensor([2.0**19, -(2.0**19), 1.0])  # takes the slow way; mixes with the fast one
    total = ExactSum(3)
    total.add(torch.stack([large, torch.ones(3)]), [0.75, 0.25])
    assert total.value().tolist() == [0.75 * 2**19 + 0.25, -0.75 * 2**19 + 0.25, 1.0]


def test_combine_is_the_weighted_sum() -> None:
    a, b = np.array([1.0, 2.0], dtype=np.float32), np.array([3.0, -2.0], dtype=np.float32)
    assert combine([(0.25, a), (0.75, b)]).tolist() == [2.5, -1.0]


def test_water_fill_by_hand() -> None:
    assert water_fill(np.array([5, 0, 2]), 3).tolist() == [0, 3, 0]
    assert water_fill(np.array([5, 0, 2]), 8).tolist() == [0, 5, 3]
    assert water_fill(np.array([5, 0, 2]), 4).tolist() == [0, 3, 1]
    assert water_fill(np.array([0, 0, 0]), 5).tolist() == [2, 2, 1]
    assert water_fill(np.array([4, 4]), 0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="negative"):
        water_fill(np.array([1]), -1)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), amount=st.integers(0, 7))
def test_water_fill_has_the_largest_entropy_of_all_amounts(counts: list[int], amount: int) -> None:
    def entropy(given_out: tuple[int, ...]) -> float:
        shares = (np.array(counts) + given_out) / max(sum(counts) + amount, 1)
        return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())

    found = water_fill(np.array(counts), amount)
    assert found.sum() == amount
    assert (found >= 0).all()
    candidates = (c for c in itertools.product(range(amount + 1), repeat=len(counts)) if sum(c) == amount)
    assert entropy(tuple(found)) == pytest.approx(max(entropy(candidate) for candidate in candidates), abs=1e-12)


def test_apportion_by_hand() -> None:
    assert apportion(np.array([1.0, 2.0, 1.0]), 8).tolist() == [2, 4, 2]
    assert apportion(np.array([0.5, 0.25, 0.25]), 3).tolist() == [1, 1, 1]  # 1.5, 0.75, 0.75
    assert apportion(np.array([0.3, 0.3, 0.3]), 5).tolist() == [2, 2, 1]
    assert apportion(np.zeros(4), 6).tolist() == [2, 2, 1, 1]
    assert apportion(np.array([0.0, 0.7]), 9).tolist() == [0, 9]


def test_class_choices_by_hand() -> None:
    counts, made = np.array([8, 2, 0, 10]), np.array([3, 0, 0, 0])
    assert class_amounts("deficit", counts, made, 6).tolist() == [0, 2, 4, 0]
    assert class_amounts("uniform", counts, made, 6).tolist() == [0, 2, 2, 2]
    assert class_amounts("proportional", counts, made, 6).tolist() == [0, 2, 4, 0]  # lacking 0, 0.15, 0.25, 0
    assert class_amounts("proportional", counts, made, 8).tolist() == [0, 3, 5, 0]
    assert class_amounts("proportional", np.full(4, 9), made, 5).tolist() == [2, 1, 1, 1]
    assert class_amounts("proportional", np.zeros(4, dtype=int), made, 4).tolist() == [1, 1, 1, 1]


@given(
    counts=st.lists(st.integers(0, 10**6), min_size=2, max_size=12),
    amount=st.integers(0, 10**5),
    choice=st.sampled_from(["deficit", "uniform", "proportional"]),
)
def test_class_choices_keep_the_sum(counts: list[int], amount: int, choice: str) -> None:
    given_now = class_amounts(choice, np.array(counts), np.arange(len(counts)), amount)
    assert given_now.sum() == amount
    assert given_now.min() >= 0
