"""What every generator keeps to: samples fixed by (seed, class, index) alone, on any pool, and in any request.

A new generator needs its smallest settings in ``TINY``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_ray.config import Component, RunConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.recipes import build, make_config
from fl_ray.registry import REGISTRY
from fl_ray.synthesis import Synthesis
from generators.base import Block, Generator, Sampler, TrainingImages
from generators.pool import GeneratorPool, LocalPool
from tests.conftest import TINY_GENERATOR
from tests.generators.tiny_pipelines import dit_pipeline, latent_pipeline, text_pipeline
from tests.synthesis import synthesis_of

# Stand for folders that a fixture makes: images with a folder for each class, pipelines of random weights.
IMAGES, TEXT, DIT = "FOLDER OF IMAGES", "FOLDER OF A TEXT-TO-IMAGE PIPELINE", "FOLDER OF A DIT PIPELINE"
LATENT = "FOLDER OF AN UNCONDITIONAL PIPELINE"

# The smallest settings of every registered generator, and one setting that makes other weights (none: it has no such).
TINY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "diffusion": ({name: value for name, value in TINY_GENERATOR.items() if name != "name"}, {"train_steps": 31}),
    "cvae": ({"hidden": [16], "train_steps": 20, "lr": 1e-2, "binarise": False}, {"latent": 2}),
    "cgan": ({"width": 4, "noise": 8, "train_steps": 5, "batch_size": 8}, {"loss": "bce"}),
    "text_to_image": ({"model": TEXT, "steps": 2}, {}),
    "dit": ({"model": DIT, "steps": 2}, {}),
    "unconditional": ({"model": LATENT, "steps": 2}, {}),
    "folder": ({"root": IMAGES}, {}),
    "real": ({}, {}),
    "noise": ({}, {}),
}
NAMES = list(REGISTRY["generator"])
SIZE = 4  # of a block
CLASSES = 10
DATA = {
    "grey": {"name": "digits", "max_samples": 600},
    "colour": {"name": "random", "samples": 400, "channels": 3, "size": 12},
}


def test_every_registered_generator_is_tested() -> None:
    assert set(TINY) == set(NAMES), "give the generator's smallest settings in TINY"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of each class."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(CLASSES):
        (root / str(label)).mkdir()
        for index in range(9):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / str(label) / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What TINY's words for folders stand for."""
    root, names = tmp_path_factory.mktemp("pipelines"), [str(label) for label in range(CLASSES)]
    text, dit = text_pipeline(root / "text"), dit_pipeline(root / "dit", names, 1000)
    return {IMAGES: files, TEXT: text, DIT: dit, LATENT: latent_pipeline(root / "latent")}


@pytest.fixture(scope="module")
def recipe(made: dict[str, Path]) -> Callable[..., RunConfig]:
    """A recipe with a generator's smallest settings; ``changes`` of these."""

    def make(name: str, data: str = "grey", **changes: Any) -> RunConfig:
        settings = TINY[name][0] | {"block_size": SIZE} | changes
        settings = {
            key: str(made[value]) if isinstance(value, str) and value in made else value
            for key, value in settings.items()
        }
        parts = {"public_fraction": 0.2, "reserve_fraction": 0.3, **DATA[data]}
        return make_config({"data": parts, "generator": {"name": name, **settings}})

    return make


def synthesis(config: RunConfig, cache: Path | None = None) -> Synthesis:
    generator = replace(config.generator, cache=str(cache) if cache else None)
    return synthesis_of(replace(config, generator=generator))


def data_of(config: RunConfig) -> FederatedData:
    return prepare(config.data, config.seed)


def trained(config: RunConfig) -> tuple[Generator, Path]:
    """The generator, and its weights in the session's cache."""
    made = build("generator", Component(config.generator.name, config.generator.settings))
    return made, synthesis(config).trained.prepare()


def blocks(seed: int, numbers: dict[int, int]) -> list[Block]:
    return [Block(seed, label, number) for label, count in numbers.items() for number in range(count)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_fixed_by_seed_class_and_index(name: str, recipe: Callable[..., RunConfig]) -> None:
    """Whatever is asked for before it, of whatever class: in any order, in any amount, alone."""
    generator, folder = trained(recipe(name))
    wanted = blocks(7, {2: 2, 5: 1, 9: 2})
    first = dict(LocalPool(generator, folder).make(wanted))
    assert all(images.dtype == np.uint8 and images.shape == (SIZE, 1, 8, 8) for images in first.values())
    assert len({images.tobytes() for images in first.values()}) == len(wanted)
    backwards = dict(LocalPool(generator, folder).make([*reversed(wanted), Block(8, 2, 0)]))
    alone = dict(LocalPool(generator, folder).make([Block(7, 9, 1)]))
    for block in wanted:
        assert (first[block] == backwards[block]).all()
    assert (alone[Block(7, 9, 1)] == first[Block(7, 9, 1)]).all()


@pytest.mark.parametrize("name", NAMES)
def test_more_images_begin_with_the_same(name: str, recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    counts = np.array([5, 0, 1, 0, 0, 0, 0, 0, 0, 4])
    images, labels = synthesis(recipe(name)).images(counts, seed=3)
    assert images.shape == (10, 1, 8, 8)
    assert images.dtype == np.uint8
    assert np.bincount(labels, minlength=CLASSES).tolist() == counts.tolist()
    more, more_labels = synthesis(recipe(name)).images(counts + 2, seed=3)
    for label in (0, 2, 9):
        assert (more[more_labels == label][: counts[label]] == images[labels == label]).all()
    nothing, none = synthesis(recipe(name), tmp_path).images(np.zeros(CLASSES, dtype=int), seed=3)
    assert nothing.shape == (0, 1, 8, 8)
    assert len(none) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing was trained or made


@pytest.mark.parametrize("name", NAMES)
def test_images_are_of_the_data_s_shape(name: str, recipe: Callable[..., RunConfig]) -> None:
    images, labels = synthesis(recipe(name, "colour")).images(np.full(CLASSES, 3), seed=0)
    assert images.shape == (30, 3, 12, 12)
    assert images.dtype == np.uint8
    assert labels.tolist() == np.repeat(np.arange(CLASSES), 3).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_gives_the_same_bytes(name: str, recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    counts = np.full(CLASSES, 3)
    fresh = synthesis(recipe(name), tmp_path)
    images, _ = fresh.images(counts, seed=0)
    again = synthesis(recipe(name), tmp_path)
    assert (again.images(counts, seed=0)[0] == images).all()
    assert fresh.report()["images_made"] == CLASSES * SIZE
    assert again.report()["images_made"] == 0
    again.images(counts, seed=1)  # another seed is made anew
    assert again.report()["images_made"] == CLASSES * SIZE


@pytest.mark.parametrize("name", NAMES)
def test_other_settings_have_other_keys(name: str, recipe: Callable[..., RunConfig]) -> None:
    weights, images = synthesis(recipe(name)).keys()
    assert synthesis(recipe(name)).keys() == [weights, images]
    larger = synthesis(recipe(name, block_size=SIZE + 1)).keys()
    assert larger[0] == weights
    assert larger[1] != images
    if TINY[name][1]:
        assert synthesis(recipe(name, **TINY[name][1])).keys()[0] != weights
    assert synthesis(recipe(name, "colour")).keys()[0] != weights


def test_the_keys_of_generators_differ(recipe: Callable[..., RunConfig]) -> None:
    assert len({synthesis(recipe(name)).trained.key for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_an_unknown_class_is_refused(name: str, label: int, recipe: Callable[..., RunConfig]) -> None:
    generator, folder = trained(recipe(name))
    with pytest.raises(ValueError, match=rf"class {label} is unknown.*0\.\.9"):
        generator.load(folder, torch.device("cpu")).sample(Block(0, label, 0))


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_block_size_is_refused(name: str, recipe: Callable[..., RunConfig]) -> None:
    settings = recipe(name, block_size=0).generator.settings
    with pytest.raises(ValueError, match="block_size is 0"):
        build("generator", Component(name, settings))


class Every(Generator):
    """All of them in one pool, so that its actors start once: generator k makes class 10 k + c of the pool."""

    def __init__(self, parts: list[tuple[Generator, Path]]) -> None:
        self.parts = parts

    def training_settings(self) -> dict[str, Any]:
        return {}

    def sampling_settings(self) -> dict[str, Any]:
        return {}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        """Each has its own weights."""

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _EverySampler([generator.load(own, device) for generator, own in self.parts])


class _EverySampler(Sampler):
    def __init__(self, samplers: list[Sampler]) -> None:
        self.samplers = samplers

    def sample(self, block: Block) -> np.ndarray:
        return self.samplers[block.label // CLASSES].sample(Block(block.seed, block.label % CLASSES, block.number))


def test_samples_do_not_depend_on_the_pool(recipe: Callable[..., RunConfig], ray_session: None, tmp_path: Path) -> None:
    every = Every([trained(recipe(name)) for name in NAMES])
    wanted = [Block(7, CLASSES * k + label, number) for k in range(len(NAMES)) for label in (1, 6) for number in (0, 1)]
    local = dict(LocalPool(every, tmp_path).make(wanted))
    for actors in (1, 3):
        pool = GeneratorPool(every, tmp_path, actors, cpus=0, gpus=0, threads=1, timeout_s=120)
        made = dict(pool.make(list(reversed(wanted))))
        pool.close()
        assert made.keys() == local.keys()
        wrong = {NAMES[block.label // CLASSES] for block in wanted if (made[block] != local[block]).any()}
        assert not wrong, f"with {actors} actors"


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_sent_to_an_actor(name: str, recipe: Callable[..., RunConfig]) -> None:
    generator, folder = trained(recipe(name))
    sent = pickle.loads(pickle.dumps(generator))
    assert sent.training_settings() == generator.training_settings()
    one, two = (it.load(folder, torch.device("cpu")).sample(Block(1, 4, 0)) for it in (generator, sent))
    assert (one == two).all()
