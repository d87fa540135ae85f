"""Domains: shifted step by step, and public images of some of them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_ray.config import Component, DataConfig
from fl_ray.data.domains import digit_domains
from fl_ray.data.parts import prepare
from fl_ray.data.shift import shifted
from fl_ray.errors import SettingError

IMAGES = np.zeros((2, 3, 9, 9), dtype=np.uint8)
IMAGES[:, :, 4, 6] = 200


def test_each_shift_by_hand() -> None:
    assert shifted(IMAGES, "invert", 1.0)[0, 0, 4, 6] == 55
    assert shifted(IMAGES, "invert", 0.5)[0, 0].tolist() == np.full((9, 9), 128).tolist()  # 127.5, to even
    turned = shifted(IMAGES, "rotate", 90)
    assert turned[0, 0, 2, 4] == 200  # against the clock: right of the middle becomes above it
    assert turned[0, 0].sum() == 200
    blurred = shifted(IMAGES, "blur", 1.0)[0, 0].astype(float)
    assert blurred[4, 6] == pytest.approx(200 * 0.159, abs=3)  # 1 / (2 pi sigma^2)
    assert blurred[4, 5] == pytest.approx(blurred[4, 6] * np.exp(-0.5), abs=1.5)
    noised = shifted(np.full((100, 1, 9, 9), 128, dtype=np.uint8), "noise", 0.1)
    assert noised.std() == pytest.approx(25.5, abs=0.6)
    assert np.array_equal(noised, shifted(np.full((100, 1, 9, 9), 128, dtype=np.uint8), "noise", 0.1))
    assert shifted(IMAGES, "blur", 0.0) is IMAGES


@pytest.mark.parametrize(("kind", "level"), [("invert", 1.5), ("blur", -1.0), ("rotate", 400)])
def test_a_level_out_of_range_is_refused(kind: str, level: float) -> None:
    with pytest.raises(SettingError, match=f"data.shift_level is {level}"):
        shifted(IMAGES, kind, level)


@pytest.fixture
def folders(tmp_path: Path) -> DataConfig:
    """Two domains, two classes, twenty images each."""
    for number, domain in enumerate(("day", "night")):
        for label in ("a", "b"):
            (tmp_path / "set" / domain / label).mkdir(parents=True)
            for image in range(20):
                grey = np.full((4, 4, 3), 100 * number + image, dtype=np.uint8)
                Image.fromarray(grey).save(tmp_path / "set" / domain / label / f"{image}.png")
    settings = {"path": "set", "image_size": 4, "domains": None, "owners": None}
    return DataConfig(
        name="image_folder",
        root=str(tmp_path),
        clients=2,
        public_fraction=0.5,
        settings=settings,
        partition=Component("domain", {"min_samples": 1}),
    )


def test_public_images_of_some_domains_alone(folders: DataConfig) -> None:
    data = prepare(replace(folders, public_domains=["night"]), 0)
    assert set(data.source.domains[data.public]) == {1}
    assert data.test_domains is not None
    assert len(data.test_domains) == len(data.test_labels) == 16
    both = prepare(folders, 0)
    assert set(both.source.domains[both.public]) == {0, 1}
    parts = [set(data.public), set(data.partition.owned())]
    assert not parts[0] & parts[1]
    left = len(data.source.labels) - len(data.test_labels)
    assert len(parts[0]) + len(parts[1]) == left
    with pytest.raises(SettingError, match="the data's domains are day, night"):
        prepare(replace(folders, public_domains=["noon"]), 0)


def test_what_is_like_a_clients_images_is_of_its_domains(folders: DataConfig) -> None:
    data = prepare(folders, 0)
    for client, name in enumerate(("day", "night")):
        assert data.domains_of(client).tolist() == [client]
        assert data.client_name(client) == f"client {client}, {name}"
        assert set(data.test_domains[data.tests_like(client)]) == {client}
        assert len(data.tests_like(client)) == (data.test_domains == client).sum()
        assert set(data.source.domains[data.public_like(client)]) == {client}
    assert sum(len(data.public_like(client)) for client in (0, 1)) == len(data.public)
    rows, tests = np.array([0, 1]), np.array([0])
    first, second = data.kinds(rows, tests)
    assert first.tolist() == (data.labels[rows] + 2 * data.source.domains[rows]).tolist()
    assert second.tolist() == (data.test_labels[tests] + 2 * data.test_domains[tests]).tolist()
    mixed = prepare(replace(folders, partition=Component("iid")), 0)
    assert mixed.client_name(0) == "client 0"
    assert len(mixed.tests_like(0)) == len(mixed.test_labels)


def test_accuracy_is_told_by_domain(folders: DataConfig, run_small: Callable) -> None:
    _, summary = run_small(
        data={"name": "image_folder", "root": folders.root, "path": "set", "image_size": 4, "clients": 2,
              "partition": {"name": "domain"}},
        model__name="mlp", clients_per_round=2, rounds=1,
    )  # fmt: skip
    found = summary["domain_accuracy"]
    assert set(found) == {"day", "night"}
    data = prepare(folders, 0)
    sizes = np.bincount(data.test_domains)
    mean = (sizes * [found["day"], found["night"]]).sum() / sizes.sum()
    assert mean == pytest.approx(summary["final_accuracy"])


def test_what_the_generator_saw_is_told_by_domain(folders: DataConfig, run_small: Callable) -> None:
    experiment, summary = run_small(
        data={"name": "image_folder", "root": folders.root, "path": "set", "image_size": 4, "clients": 2,
              "partition": {"name": "domain"}, "public_fraction": 0.5, "public_domains": ["night"]},
        method={"name": "prompts_only", "images_per_class": 2, "server_epochs": 1},
        generator={"name": "tests.generators.own:FlatGenerator"},
        model__name="mlp", clients_per_round=2, rounds=1,
    )  # fmt: skip
    made = summary["synthesis"]
    assert made["real_images"] == len(experiment.data.public) > 0
    assert (made["real_images_of_day"], made["real_images_of_night"]) == (0, made["real_images"])


def test_real_digit_domains(real_data: Path) -> None:
    data = digit_domains(real_data, False, per_domain=300, test_per_domain=100, shift_domain="usps", shift="invert",
                         shift_level=1.0)  # fmt: skip
    assert data.images.shape == (900, 3, 32, 32)
    assert np.bincount(data.domains).tolist() == [300] * 3
    assert np.bincount(data.test_domains).tolist() == [100] * 3
    assert data.images[data.domains == 0].mean() < 60  # white on black
    assert data.images[data.domains == 2].mean() > 150  # inverted
    assert data.images[data.domains == 1].std(axis=1).max() > 0  # coloured
    with pytest.raises(SettingError, match="it must list some of mnist, mnist_m, usps"):
        digit_domains(real_data, False, domains=["svhn"])
