"""Images in folders: which folder is the class and which the domain, and the paper's rules by client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_ray.config import Component, DataConfig
from fl_ray.data.folders import image_folder
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.errors import SettingError

OWN = {"bus": ["city", "depot", "road"], "cat": ["bed", "grass", "sofa"], "train": ["hall", "hill", "sea"]}


def fill(folder: Path, pairs: Iterable[tuple[str, str, str]], count: int = 8) -> None:
    """Images at ``folder/outer/split/inner``, grey by their place in the list."""
    for number, (outer, split, inner) in enumerate(pairs):
        inside = folder / outer / split / inner
        inside.mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", (6, 5), (10 * number + 5, image, 0)).save(inside / f"{image}.png")


def loaded(folder: Path, **settings: Any) -> FederatedData:
    settings = {"path": "set", "image_size": 4, **settings}
    config = DataConfig(
        "image_folder",
        str(folder),
        clients=3,
        public_fraction=0.0,
        settings=settings,
        partition=Component("domain"),
    )
    return prepare(config, 0)


def shades(data: FederatedData, client: int) -> dict[str, set[int]]:
    """By class, which folders (by their number in the list) a client's images come from."""
    rows = data.partition.of(client)
    found = (data.images[rows, 0, 0, 0].astype(int) - 5) // 10
    return {name: set(found[data.labels[rows] == label].tolist()) for label, name in enumerate(data.source.classes)}


def test_a_client_owns_the_k_th_context_of_each_class(tmp_path: Path) -> None:
    """NICO++'s unique contexts, and OpenImage's sub-categories of a super-category."""
    pairs = [(label, "", context) for label, contexts in OWN.items() for context in reversed(contexts)]
    fill(tmp_path / "set", pairs)
    data = loaded(tmp_path, layout="class/own")
    assert data.source.classes == ["bus", "cat", "train"]
    assert data.source.domain_names == ["1", "2", "3"]
    for client in range(3):  # they lie in the list from the last by name to the first
        assert shades(data, client) == {"bus": {2 - client}, "cat": {5 - client}, "train": {8 - client}}
    assert set(data.test_domains) == {0, 1, 2}
    two = image_folder(tmp_path, False, "set", 4, "class/own", 2)
    assert np.bincount(two.domains).tolist() == [24, 24]


def test_classes_may_have_fewer_contexts_than_others(tmp_path: Path) -> None:
    pairs = [("bus", "", "city"), ("cat", "", "bed"), ("cat", "", "grass"), ("cat", "", "sofa")]
    fill(tmp_path / "set", pairs)
    data = loaded(tmp_path, layout="class/own")
    assert shades(data, 0) == {"bus": {0}, "cat": {1}}
    assert shades(data, 2) == {"bus": set(), "cat": {3}}


def test_common_contexts_below_the_classes(tmp_path: Path) -> None:
    pairs = [(label, "", context) for label in ("bus", "cat") for context in ("dim", "grass", "rock")]
    pairs.remove(("bus", "", "dim"))
    fill(tmp_path / "set", pairs)
    data = loaded(tmp_path, layout="class/domain")
    assert data.source.domain_names == ["dim", "grass", "rock"]
    assert shades(data, 0) == {"bus": set(), "cat": {2}}  # by name, not by place
    assert shades(data, 1) == {"bus": {0}, "cat": {3}}
    some = image_folder(tmp_path, False, "set", 4, "class/domain", ["rock", "dim"])
    assert some.domain_names == ["rock", "dim"]
    assert np.bincount(some.domains).tolist() == [16, 8]


@pytest.mark.parametrize("layout", ["domain/class", "class/own"])
def test_splits_stand_between(tmp_path: Path, layout: str) -> None:
    fill(tmp_path / "set", [(outer, split, inner) for outer in "ab" for split in ("train", "test") for inner in "xy"])
    data = image_folder(tmp_path, False, "set", 4, layout)
    assert np.bincount(data.labels).tolist() == np.bincount(data.test_labels).tolist() == [16, 16]
    assert np.bincount(data.domains).tolist() == np.bincount(data.test_domains).tolist() == [16, 16]
    assert not {tuple(image.ravel()) for image in data.images} & {tuple(image.ravel()) for image in data.test_images}


def test_a_class_named_train_is_no_split(tmp_path: Path) -> None:
    """DomainNet and NICO++ have one."""
    fill(tmp_path / "set", [(domain, "", label) for domain in ("clipart", "sketch") for label in ("bus", "train")])
    data = image_folder(tmp_path, False, "set", 4)
    assert data.classes == ["bus", "train"]
    assert np.bincount(data.labels).tolist() == [16, 16]
    assert data.test_images is None


def test_at_most_so_many_training_images_of_each_class_and_domain(tmp_path: Path) -> None:
    fill(tmp_path / "set", [(outer, split, inner) for outer in "ab" for split in ("train", "test") for inner in "xy"])
    data = image_folder(tmp_path, False, "set", 4, per_class=3)
    assert np.unique(data.labels + 2 * data.domains, return_counts=True)[1].tolist() == [3, 3, 3, 3]
    assert len(data.test_labels) == 32
    again = image_folder(tmp_path, False, "set", 4, per_class=3)
    assert np.array_equal(data.images, again.images)
    whole = image_folder(tmp_path, False, "set", 4, per_class=9)
    assert len(whole.labels) == 32
    assert {image.tobytes() for image in data.images} < {image.tobytes() for image in whole.images}
    assert len({image[1, 0, 0] for image in data.images}) > 3  # not the first three of each


def test_a_block_of_classes_across_domains(tmp_path: Path) -> None:
    fill(tmp_path / "set", [(domain, "", label) for domain in ("photo", "sketch") for label in "abcdef"])
    settings = {"path": "set", "image_size": 4}
    config = DataConfig(
        "image_folder", str(tmp_path), clients=3, public_fraction=0.0, settings=settings,
        partition=Component("label_blocks"),
    )  # fmt: skip
    data = prepare(config, 0)
    for client in range(3):
        rows = data.partition.of(client)
        assert set(data.labels[rows]) == {2 * client, 2 * client + 1}
        assert set(data.source.domains[rows]) == {0, 1}


def test_bad_input(tmp_path: Path) -> None:
    fill(tmp_path / "set", [(label, "", context) for label, contexts in OWN.items() for context in contexts], 1)

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(SettingError, match=message):
            image_folder(tmp_path, False, "set", 4, **settings)

    refused(r"data\.domains: no folder 'boat' in", domains=["boat"])
    refused("'boat' in any class; there are bed, city", layout="class/domain", domains=["boat"])
    refused("each class has domains of its own; give how many", layout="class/own", domains=["city"])
    refused(r"data\.domains is 4, but it must be in 1\.\.3, of 1, 2, 3", layout="class/own", domains=4)
    refused(r"data\.domains is 0, but it must be in 1\.\.3, of bus, cat, train", domains=0)
    refused(r"data\.per_class is 0", per_class=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="no images in"):
        image_folder(tmp_path, False, "empty", 4)


def test_a_run_by_context(tmp_path: Path, run_small: Callable[..., Any]) -> None:
    """The whole way: contexts by client, and the accuracy of each."""
    folder = tmp_path / "data"
    fill(folder / "set", [(label, "", context) for label, contexts in OWN.items() for context in contexts])
    data = {"name": "image_folder", "root": str(folder), "path": "set", "image_size": 4, "layout": "class/own"}
    data |= {"domains": 2, "clients": 2, "partition": {"name": "domain"}}
    _, summary = run_small(data=data, clients_per_round=2, rounds=1)
    assert set(summary["domain_accuracy"]) == {"1", "2"}
