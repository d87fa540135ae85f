"""``data.classes``: any data set with some of its classes, renumbered, in every part."""

from collections.abc import Callable

import numpy as np
import pytest

from fl_ray.config import DataConfig
from fl_ray.data.classes import keep_classes
from fl_ray.data.datasets import ImageData
from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment

Run = Callable[..., tuple[Experiment, dict]]


def numbered() -> ImageData:
    """Image i has the pixel i, the class i modulo 4, domain and owner; test images go on from 100."""
    labels = np.arange(12) % 4
    images, tests = (np.arange(n, n + 12, dtype=np.uint8).reshape(12, 1, 1, 1) for n in (0, 100))
    names, domains = list("abcd"), np.arange(12) % 3
    return ImageData(images, labels, names, [0.5], [0.5], tests, labels, domains, domains + 1, ["x"], domains + 5)


def test_labels_follow_the_list_and_all_arrays_the_images() -> None:
    kept = keep_classes(numbered(), [3, 1])
    assert kept.classes == ["d", "b"]
    assert kept.images.ravel().tolist() == [1, 3, 5, 7, 9, 11]
    assert kept.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert kept.test_images.ravel().tolist() == [101, 103, 105, 107, 109, 111]
    assert kept.test_labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert kept.domains.tolist() == [1, 0, 2, 1, 0, 2]
    assert kept.test_domains.tolist() == [2, 1, 3, 2, 1, 3]
    assert kept.owners.tolist() == [6, 5, 7, 6, 5, 7]


def test_a_number_keeps_the_first_classes() -> None:
    one, same = keep_classes(numbered(), 2), keep_classes(numbered(), [0, 1])
    assert one.classes == ["a", "b"]
    assert (one.images == same.images).all()
    assert (one.labels == same.labels).all()
    assert one.labels.dtype == np.int64


def test_max_samples_counts_what_is_kept() -> None:
    data = prepare(DataConfig("digits", clients=4, classes=[7, 2, 9], max_samples=200), seed=0)
    assert data.source.classes == ["7", "2", "9"]
    assert len(data.partition.owned()) + len(data.public) + len(data.test_labels) == 200
    assert set(data.test_labels.tolist()) == {0, 1, 2}


def test_a_run_on_three_classes_has_three_outputs(run_small: Run) -> None:
    experiment, summary = run_small(data__classes=3)
    assert summary["parameters"] == 64 * 16 + 16 + 16 * 3 + 3
    assert summary["best_accuracy"] > 0.5
    assert experiment.folder.config().data.classes == 3


@pytest.mark.parametrize("classes", [1, [4], [1, 1], [-1, 3]])
def test_what_is_no_choice_of_classes_is_refused(classes: object) -> None:
    with pytest.raises(SettingError, match=r"data\.classes is"):
        DataConfig("digits", classes=classes)


@pytest.mark.parametrize("classes", [11, [0, 10]])
def test_classes_that_are_not_there_are_named(classes: object) -> None:
    with pytest.raises(SettingError, match="10 classes, 0 to 9"):
        prepare(DataConfig("digits", clients=4, classes=classes), seed=0)
