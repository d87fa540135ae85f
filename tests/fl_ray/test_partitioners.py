"""Partitions against hand counts, and properties that every partitioner keeps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_ray.data.partitioners import (
    IID,
    DirichletPerClass,
    DirichletPerClient,
    DomainSkew,
    LabelBlocks,
    Natural,
    Partitioner,
    QuantitySkew,
    Shards,
    partition,
)
from fl_ray.data.rows import Partition
from fl_ray.data.statistics import emd, label_counts, label_entropy
from fl_ray.errors import SettingError

LABELS = np.repeat(np.arange(10), 30)
GROUPS = np.tile([0, 1, 2], 100)
ALL = [
    IID(),
    DirichletPerClass(alpha=0.5),
    DirichletPerClient(alpha=0.5),
    Shards(),
    LabelBlocks(),
    LabelBlocks(classes_per_client=4),
    QuantitySkew(alpha=1.0),
    DomainSkew(),
    Natural(),
]


@pytest.mark.parametrize("partitioner", ALL, ids=lambda p: type(p).__name__)
def test_every_partitioner_is_seeded_and_gives_each_sample_to_one_client(partitioner: Partitioner) -> None:
    clients = {Natural: 3, LabelBlocks: 20}.get(type(partitioner), 10)
    first, again, other = (partition(partitioner, LABELS, clients, seed, GROUPS) for seed in (0, 0, 1))
    assert first.digest() == again.digest()
    assert sorted(first.indices) == list(range(300))
    assert first.sizes.sum() == 300
    assert (first.sizes >= 1).all()
    if not isinstance(partitioner, Natural):
        assert first.digest() != other.digest()


def counts_of(drawn: Partition) -> np.ndarray:
    return label_counts(drawn, np.arange(len(drawn)), LABELS, 10)


def test_iid_parts_differ_by_one_sample_at_most() -> None:
    sizes = partition(IID(), LABELS[:100], 7, 0).sizes
    assert sizes.min() == 14
    assert sizes.max() == 15


def test_shards_by_hand() -> None:
    counts = counts_of(partition(Shards(classes_per_client=2), LABELS, 5, 0))
    assert ((counts > 0).sum(axis=1) <= 2).all()
    assert (counts.sum(axis=1) == 60).all()  # 10 shards of one class each, two a client


def test_label_blocks_by_hand() -> None:
    counts = counts_of(partition(LabelBlocks(), LABELS, 5, 0))
    expected = np.zeros((5, 10), dtype=int)
    for client in range(5):
        expected[client, 2 * client : 2 * client + 2] = 30
    assert (counts == expected).all()
    shared = counts_of(partition(LabelBlocks(), LABELS, 20, 0))
    assert (shared.max(axis=1) == 15).all()
    assert (shared.argmax(axis=1) == np.arange(20) % 10).all()


def test_overlapping_label_blocks_by_hand() -> None:
    counts = counts_of(partition(LabelBlocks(classes_per_client=6), LABELS, 5, 0))
    expected = np.zeros((5, 10), dtype=int)
    for client in range(5):
        expected[client, (2 * client + np.arange(6)) % 10] = 10  # each class has three holders
    assert (counts == expected).all()
    apart = counts_of(partition(LabelBlocks(classes_per_client=2), LABELS, 5, 0))
    assert (apart == counts_of(partition(LabelBlocks(), LABELS, 5, 0))).all()
    uneven = counts_of(partition(LabelBlocks(classes_per_client=4), LABELS, 3, 0))  # they begin at 0, 3 and 6
    assert [np.flatnonzero(row).tolist() for row in uneven] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_domains_stay_apart() -> None:
    drawn = partition(DomainSkew(), LABELS, 6, 0, GROUPS)
    for client in range(6):
        assert set(GROUPS[drawn.of(client)]) == {client % 3}
        assert len(drawn.of(client)) == 50


def test_natural_clients_are_the_owners() -> None:
    owners = np.repeat([7, 3, 9], 100)
    drawn = partition(Natural(), LABELS, 2, 0, owners)
    assert set(drawn.of(0)) == set(range(100, 200))
    assert set(drawn.of(1)) == set(range(100))


def test_dirichlet_skew_falls_with_alpha() -> None:
    entropies = [
        label_entropy(counts_of(partition(DirichletPerClass(alpha=alpha), LABELS, 5, 0))).mean()
        for alpha in (0.1, 1.0, 1000.0)
    ]
    assert entropies[0] < entropies[1] < entropies[2]
    assert entropies[2] == pytest.approx(np.log2(10), abs=0.05)


def test_dirichlet_shares_follow_the_draw() -> None:
    """Independent of the code's cutting: the same generator's draws, applied to class sizes by hand."""
    drawn = DirichletPerClass(alpha=0.5)(LABELS, 4, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    for label in range(10):
        rng.permutation(30)
        shares = rng.dirichlet([0.5] * 4)
        sizes = np.bincount(drawn[label == LABELS], minlength=4)
        assert np.abs(sizes - shares * 30).max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    clients=st.integers(1, 8),
    alpha=st.floats(0.05, 50),
    seed=st.integers(0, 1000),
)
def test_dirichlet_keeps_every_sample_once(counts: list[int], clients: int, alpha: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    if clients > len(labels):
        clients = len(labels)
    for kind in (DirichletPerClass, DirichletPerClient):
        drawn = partition(kind(alpha=alpha, min_samples=0), labels, clients, seed)
        assert sorted(drawn.indices) == list(range(len(labels)))
        assert (label_counts(drawn, np.arange(clients), labels, len(counts)).sum(axis=0) == counts).all()


def test_statistics_by_hand() -> None:
    counts = np.array([[4, 0], [2, 2]])
    assert label_entropy(counts) == pytest.approx([0.0, 1.0])
    # global (6/8, 2/8): |1 - .75| + |0 - .25| = .5 and |.5 - .75| + |.5 - .25| = .5
    assert emd(counts) == pytest.approx([0.5, 0.5])
    assert emd(np.array([[5, 0], [0, 5]])) == pytest.approx([1.0, 1.0])


def test_partition_from_owners_leaves_out_minus_one() -> None:
    made = Partition.from_owners(np.array([1, -1, 0, 1]), 3)
    assert made.of(0).tolist() == [2]
    assert made.of(1).tolist() == [0, 3]
    assert made.of(2).tolist() == []


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DirichletPerClass(alpha=0.0), "alpha"),
        (lambda: QuantitySkew(alpha=-1), "alpha"),
        (lambda: Shards(classes_per_client=0), "classes_per_client"),
        (lambda: LabelBlocks(classes_per_client=0), "classes_per_client is 0"),
        (lambda: partition(LabelBlocks(classes_per_client=3), LABELS, 3, 0), r"is 3, but .* must be in 4\.\.10"),
        (lambda: partition(LabelBlocks(classes_per_client=11), LABELS, 3, 0), r"is 11, but .* must be in 4\.\.10"),
        (lambda: partition(IID(), LABELS[:5], 6, 0), "fewer clients"),
        (lambda: partition(IID(min_samples=31), LABELS, 10, 0), "min_samples"),
        (lambda: partition(DirichletPerClass(alpha=0.01, min_samples=25), LABELS, 10, 0), "min_samples"),
        (lambda: partition(Shards(classes_per_client=1), LABELS, 5, 0), "classes_per_client"),
        (lambda: partition(DomainSkew(), LABELS, 2, 0, GROUPS), "domains"),
        (lambda: partition(Natural(), LABELS, 4, 0, GROUPS), "clients"),
    ],
)
def test_bad_partitions_are_refused(make: object, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        make()
    assert isinstance(caught.value, SettingError) or "must be" in str(caught.value)
