"""Client, public and test parts: disjoint, fixed by split_seed alone; folders of images; users' own data."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_ray.config import Component, DataConfig
from fl_ray.data.datasets import load
from fl_ray.data.parts import prepare, split
from fl_ray.errors import DataMissingError, SettingError
from fl_ray.randomness import numpy_generator


def digits_config(**changes: object) -> DataConfig:
    return DataConfig(clients=8, public_fraction=0.2, client_test_fraction=0.25, **changes)


def test_the_parts_are_disjoint_and_complete() -> None:
    """What the server may train on (public) overlaps neither clients' training or held-out images nor the test part."""
    config = digits_config(partition=Component("dirichlet", {"alpha": 0.3}))
    data = prepare(config, seed=3)
    test = split(data.source, config).test
    parts = [set(data.public), set(data.partition.indices), set(data.held_out.indices), set(test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(data.labels)
    assert all(parts)


def test_a_reserve_is_disjoint_and_leaves_test_and_public_as_they_are() -> None:
    data = load("digits", None, False, {})
    plain, kept = split(data, digits_config()), split(data, digits_config(reserve_fraction=0.25))
    assert len(plain.reserve) == 0
    assert (kept.test == plain.test).all()
    assert (kept.public == plain.public).all()
    assert sorted([*kept.clients, *kept.reserve]) == plain.clients.tolist()
    shares = np.bincount(data.labels[kept.reserve]) / np.bincount(data.labels)
    assert shares == pytest.approx(0.2, abs=0.01)  # 25 % of what the test part (20 %) leaves
    whole = prepare(digits_config(reserve_fraction=0.25), seed=0)
    assert (whole.reserve == kept.reserve).all()
    owned = [*whole.partition.indices, *whole.held_out.indices]
    assert sorted(owned) == kept.clients.tolist()


def test_no_reserve_is_the_split_without_one() -> None:
    """Against the parts as they were drawn before there was a reserve."""
    data, config = load("digits", None, False, {}), digits_config()
    found, rng = split(data, config), numpy_generator(config.split_seed, "split")
    expected: dict[str, list[int]] = {"test": [], "public": [], "clients": []}
    for label in range(10):
        own = rng.permutation(np.flatnonzero(data.labels == label)).tolist()
        tests = round(0.2 * len(own))
        publics = round(0.2 * (len(own) - tests))
        expected["test"] += own[:tests]
        expected["public"] += own[tests : tests + publics]
        expected["clients"] += own[tests + publics :]
    for part, rows in expected.items():
        assert getattr(found, part).tolist() == sorted(rows), part


def test_the_split_depends_on_split_seed_alone() -> None:
    one, other = prepare(digits_config(), seed=0), prepare(digits_config(), seed=1)
    assert (one.public == other.public).all()
    assert one.public_digest() == other.public_digest()
    assert one.partition.digest() != other.partition.digest()
    assert set(prepare(digits_config(split_seed=1), seed=0).public) != set(one.public)


def test_the_split_keeps_class_shares() -> None:
    data = prepare(digits_config(), seed=0)
    shares = np.bincount(data.public_labels) / np.bincount(data.labels)
    assert shares == pytest.approx(0.16, abs=0.01)  # 20 % of what the test part (20 %) leaves


def test_every_client_keeps_a_training_sample() -> None:
    config = digits_config(partition=Component("dirichlet", {"alpha": 0.05, "min_samples": 1}))
    data = prepare(config, seed=0)
    owned = data.partition.sizes + data.held_out.sizes
    assert (data.partition.sizes >= 1).all()
    assert (np.abs(data.held_out.sizes - 0.25 * owned) <= 1).all()


def test_max_samples_limits_the_training_images() -> None:
    config = digits_config(max_samples=300)
    rows = split(load("digits", None, False, {}), config)
    assert len(rows.clients) + len(rows.public) + len(rows.test) == 300


def make_folder(base: Path, splits: tuple[str, ...]) -> None:
    for number, (domain, tone) in enumerate({"photo": 40, "sketch": 200}.items()):
        for split_name in splits or ("",):
            for label, name in enumerate(("cat", "dog")):
                folder = base / domain / split_name / name
                folder.mkdir(parents=True)
                for index in range(6):
                    Image.new("RGB", (10, 8), (tone, 10 * index, 100 * label + number)).save(folder / f"{index}.png")


def test_folders_of_several_domains(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", ())
    folder = {"path": "set", "image_size": 5}
    config = DataConfig("image_folder", str(tmp_path), clients=4, settings=folder, partition=Component("domain"))
    data = prepare(config, seed=0)
    assert data.source.classes == ["cat", "dog"]
    assert data.images.shape == (24, 3, 5, 5)
    for client in range(4):
        tones = set(data.images[data.partition.of(client), 0].ravel())
        assert tones == {40 if client % 2 == 0 else 200}


def test_folders_with_splits_and_natural_clients(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", ("train", "test"))
    rows = ["path,client"]
    rows += [
        f"{p.relative_to(tmp_path / 'set')},{'ann' if int(p.stem) % 2 else 'bob'}"
        for p in tmp_path.rglob("train/*/*.png")
    ]
    (tmp_path / "set" / "who.csv").write_text("\n".join(rows))
    settings = {"path": "set", "image_size": 8, "owners": "who.csv", "domains": ["sketch"]}
    config = DataConfig(
        "image_folder", str(tmp_path), clients=2, public_fraction=0.0, settings=settings, partition=Component("natural")
    )
    data = prepare(config, seed=0)
    assert data.partition.sizes.tolist() == [6, 6]
    assert len(data.test_labels) == 12
    assert set(data.images[:, 0].ravel()) == {200}


def test_gtsrb_in_its_published_layout(tmp_path: Path) -> None:
    """All 43 classes, in the folders and the table that torchvision reads."""
    base = tmp_path / "gtsrb"
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    (base / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    for label in range(43):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (15 + label, 20), (label, 2 * label, index)).save(folder / f"{index:05d}.ppm")
        Image.new("RGB", (30, 30), (label, 0, 0)).save(base / "GTSRB" / "Final_Test" / "Images" / f"{label:05d}.ppm")
        rows.append(f"{label:05d}.ppm;30;30;0;0;30;30;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows))
    data = load("gtsrb", str(tmp_path), False, {})
    assert data.images.shape == (86, 3, 32, 32)
    assert data.test_images.shape == (43, 3, 32, 32)
    assert (data.images[:, 0, 0, 0] == data.labels).all()
    assert (data.test_images[:, 0, 5, 5] == data.test_labels).all()


def test_own_data_set_and_partitioner_by_import_path() -> None:
    config = DataConfig(
        "tests.fl_ray.own:stripes",
        clients=3,
        public_fraction=0.0,
        settings={"samples": 60},
        partition=Component("tests.fl_ray.own:EvenOdd", {}),
    )
    data = prepare(config, seed=0)
    assert data.partition.sizes.tolist() == [16, 16, 16]


def test_missing_data_name_the_folder_and_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError) as caught:
        load("mnist", str(tmp_path), False, {})
    for part in (str(tmp_path), "--data.root", "FL_RAY_DATA", "--data.download true"):
        assert part in str(caught.value)
    with pytest.raises(DataMissingError, match="no folder"):
        load("image_folder", str(tmp_path), False, {"path": "nothing"})


def test_a_download_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at the mirrors' address."""
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(DataMissingError, match=f"the download to {tmp_path} failed .*refused.*--data.root DIR"):
        load("fashion_mnist", str(tmp_path), True, {})


def test_classes_without_samples_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", ())
    for image in (tmp_path / "set" / "photo" / "dog").iterdir():
        image.unlink()
    with pytest.raises(SettingError, match="photo/dog holds no images"):
        load("image_folder", str(tmp_path), False, {"path": "set"})
    with pytest.raises(SettingError, match="no samples of class"):
        prepare(digits_config(max_samples=20), seed=0)


def test_a_partitioner_whose_groups_the_set_lacks() -> None:
    with pytest.raises(SettingError, match="has no domains"):
        prepare(digits_config(partition=Component("domain")), seed=0)
