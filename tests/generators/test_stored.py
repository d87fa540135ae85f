"""Images that exist already: from a folder, or the reserve; and noise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError
from fl_ray.synthesis import Synthesis
from generators.base import Block, TrainingImages
from generators.folder import FolderGenerator
from generators.noise import NoiseGenerator
from generators.real import RealGenerator
from tests.synthesis import synthesis_of

Run = Callable[..., tuple[object, dict]]


def data(channels: int = 1, size: int = 6, classes: tuple[str, ...] = ("Cat", "dog")) -> TrainingImages:
    return TrainingImages(np.empty((0, channels, size, size), np.uint8), np.empty(0, np.int64), list(classes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three cats of tones 10, 20, 30, as png, jpg and webp; two dogs, red."""
    for name in ("cat", "DOG"):
        (tmp_path / "files" / name).mkdir(parents=True)
    for index, suffix in enumerate(("png", "jpg", "webp")):
        Image.new("L", (12, 12), 10 * (index + 1)).save(tmp_path / "files" / "cat" / f"{index}.{suffix}", quality=100)
    for index in range(2):
        Image.new("RGB", (9, 15), (200, 0, index)).save(tmp_path / "files" / "DOG" / f"{index}.png")
    (tmp_path / "files" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "files"


def fitted(generator: FolderGenerator | RealGenerator, learned: TrainingImages, folder: Path) -> Callable:
    folder.mkdir()
    generator.fit(learned, folder, lambda *told: None)
    sampler = generator.load(folder, torch.device("cpu"))
    return lambda label, number=0, seed=0: sampler.sample(Block(seed, label, number))


def test_image_i_of_a_class_is_its_file_i(root: Path, tmp_path: Path) -> None:
    sample = fitted(FolderGenerator(str(root), block_size=2), data(), tmp_path / "weights")
    cats = np.concatenate([sample(0), sample(0, 1)])
    assert cats.shape == (3, 1, 6, 6)
    assert np.abs(cats.mean(axis=(1, 2, 3)) - [10, 20, 30]).max() < 2  # two of them are compressed
    assert (sample(0, seed=5) == sample(0)).all()
    with pytest.raises(ValueError, match="has 3 images, so there is no image 4"):
        sample(0, 2)


def test_files_take_the_data_s_size_and_channels(root: Path, tmp_path: Path) -> None:
    grey = fitted(FolderGenerator(str(root)), data(), tmp_path / "grey")(1)
    assert grey.shape == (2, 1, 6, 6)
    assert np.abs(grey.astype(int) - round(0.299 * 200)).max() <= 1
    colour = fitted(FolderGenerator(str(root)), data(3, 20), tmp_path / "colour")(1)
    assert colour.shape == (2, 3, 20, 20)
    assert (colour == np.array([[200, 0, 0], [200, 0, 1]])[:, :, None, None]).all()


def test_making_smaller_averages(tmp_path: Path) -> None:
    """Lines of one pixel in 32 come out grey, not as lines or gone."""
    (tmp_path / "files" / "a").mkdir(parents=True)
    lines = np.zeros((32, 32), np.uint8)
    lines[::2] = 200
    Image.fromarray(lines).save(tmp_path / "files" / "a" / "0.png")
    made = fitted(FolderGenerator(str(tmp_path / "files")), data(1, 4, ("a",)), tmp_path / "weights")(0)
    assert np.abs(made.astype(int) - 100).max() <= 5


def test_the_weights_folder_needs_no_root(root: Path, tmp_path: Path) -> None:
    generator = FolderGenerator(str(root))
    sample = fitted(generator, data(), tmp_path / "weights")
    before = sample(0)
    for file in root.glob("cat/*"):
        file.unlink()
    after = generator.load(tmp_path / "weights", torch.device("cpu")).sample(Block(0, 0, 0))
    assert (after == before).all()


def test_changed_files_make_another_key(root: Path) -> None:
    def key() -> dict:
        return FolderGenerator(str(root)).training_settings()

    first = key()
    assert key() == first
    Image.new("L", (12, 12), 11).save(root / "cat" / "0.png")
    changed = key()
    (root / "cat" / "0.png").rename(root / "cat" / "3.png")
    assert len({str(settings) for settings in (first, changed, key())}) == 3


def test_files_that_change_before_they_are_stored_are_refused(root: Path, tmp_path: Path) -> None:
    """They would be kept, for good, as the images of the files that the key was made of."""
    generator = FolderGenerator(str(root))
    generator.training_settings()
    Image.new("L", (12, 12), 11).save(root / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"cat/0.png has changed since the files of root were hashed; run again"):
        fitted(generator, data(), tmp_path / "weights")
    assert fitted(FolderGenerator(str(root)), data(), tmp_path / "again")(0)[0].mean() == 11


def test_what_is_wrong_in_the_folder_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root is .*nowhere.* no such folder"):
        FolderGenerator(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no images .* of class bird; .* Cat, bird"):
        fitted(FolderGenerator(str(root)), data(classes=("Cat", "bird")), tmp_path / "one")
    (root / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/0.png can't be read as an image"):
        fitted(FolderGenerator(str(root)), data(), tmp_path / "two")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)).save(whole)
    (root / "cat" / "0.png").write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cat/0.png can't be read as an image"):
        fitted(FolderGenerator(str(root)), data(), tmp_path / "three")
    (root / "Cat").mkdir()
    with pytest.raises(ValueError, match="two folders cat"):
        FolderGenerator(str(root)).training_settings()


def reserve(classes: int = 3, images: int = 40) -> TrainingImages:
    """Every image is of one tone, its number."""
    pixels = np.broadcast_to(np.arange(images, dtype=np.uint8)[:, None, None, None], (images, 1, 4, 4))
    return TrainingImages(pixels, np.arange(images) % classes, [str(label) for label in range(classes)])


def test_every_real_image_comes_once_in_an_order_by_seed_and_class(tmp_path: Path) -> None:
    learned = reserve()
    sample = fitted(RealGenerator(block_size=5), learned, tmp_path / "weights")

    def given(label: int, seed: int) -> list[int]:
        return [int(image.max()) for number in range(3) for image in sample(label, number, seed)]

    for label in range(3):
        assert sorted(given(label, 0)) == np.flatnonzero(learned.labels == label).tolist()
        assert given(label, 0) == given(label, 0) != given(label, 1)
    assert [tone // 3 for tone in given(1, 0)] != [tone // 3 for tone in given(2, 0)]
    with pytest.raises(ValueError, match="has 13 images, so there is no image 15"):
        sample(1, 3)


def test_more_images_than_there_are_name_the_way_out(small: Callable[..., RunConfig], root: Path) -> None:
    def synthesis(name: str, **settings: object) -> Synthesis:
        given = {f"generator__{key}": value for key, value in settings.items()}
        config = small(generator__name=name, data__reserve_fraction=0.2, **given)
        return synthesis_of(config)

    real = synthesis("real", block_size=4)
    there = real.available()
    assert real.images(there, seed=0)[0].shape == (there.sum(), 1, 8, 8)
    more = there + np.eye(10, dtype=int)[3]
    with pytest.raises(SettingError, match=rf"{more[3]} images of class 3 .* are {there[3]}; .*data.reserve_fraction"):
        real.images(more, seed=0)
    with pytest.raises(SettingError, match=r"generator folder: .*no images .* of class 0, 1"):
        synthesis("folder", root=str(root)).images(np.ones(10, dtype=int), seed=0)
    for label in range(10):
        (root / str(label)).mkdir()
        Image.new("L", (8, 8), label).save(root / str(label) / "only.png")
    files = synthesis("folder", root=str(root))
    assert files.images(np.ones(10, dtype=int), seed=0)[0].mean(axis=(1, 2, 3)).tolist() == list(range(10))
    with pytest.raises(SettingError, match="2 images of class 0 are asked for, but there are 1; add files"):
        files.images(np.full(10, 2), seed=0)


def test_public_images_as_if_they_were_generated(small: Callable[..., RunConfig]) -> None:
    source = synthesis_of(small(generator__name="real", generator__part="public", data__public_fraction=0.2))
    there = np.bincount(source.data.public_labels, minlength=10)
    assert source.available().tolist() == there.tolist()
    images, labels = source.images(there, seed=3)
    given, public = (
        sorted(zip(answers.tolist(), (image.tobytes() for image in pixels), strict=True))
        for pixels, answers in ((images, labels), (source.data.public_images, source.data.public_labels))
    )
    assert given == public
    with pytest.raises(SettingError, match=r"data\.public_fraction"):
        source.images(there + 1, seed=3)


def test_no_reserve_is_said(small: Callable[..., RunConfig]) -> None:
    config = small(generator__name="real")
    with pytest.raises(SettingError, match=r"reserve part holds no images.*data\.reserve_fraction"):
        synthesis_of(config)


@pytest.mark.parametrize("name", ["real", "noise"])
def test_a_run_with_few_real_images_shows_those_that_there_are(run_small: Run, name: str) -> None:
    """The run's sample sheet asks for more than the reserve has."""
    few = {"method__images_per_round": 3, "method__max_images": 3, "data__reserve_fraction": 0.1}
    experiment, summary = run_small(method__name="genfl", generator__name=name, **few)
    assert sum(summary["synthetic_images"]) == 3
    assert (experiment.folder / "samples.png").exists()
    assert summary["synthesis"]["real_images"] == (len(experiment.data.reserve) if name == "real" else 0)


def test_noise_is_uniform(tmp_path: Path) -> None:
    generator = NoiseGenerator(block_size=200)
    generator.fit(data(3, 8), tmp_path, lambda *told: None)
    images = generator.load(tmp_path, torch.device("cpu")).sample(Block(0, 1, 0))
    counts = np.bincount(images.ravel(), minlength=256)
    expected = images.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350  # chi-square of 255 degrees: 99.99 % are below 346
