"""A trained generator and its images in a run: made once, told apart by all that decides them, refused by name."""

import contextlib
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from fl_ray.config import RunConfig
from fl_ray.errors import OutputError, PlacementError, SettingError
from fl_ray.experiment import check
from fl_ray.synthesis import Synthesis
from generators.base import Block, TrainingImages
from generators.cache import BlockCache
from generators.diffusion import DiffusionGenerator
from tests.synthesis import synthesis_of


def test_images_are_made_once_and_counted_by_class(small: Callable[..., RunConfig]) -> None:
    config = small(with_generator=True)
    first = synthesis_of(config)
    counts = np.array([7, 0, 1, 0, 0, 0, 0, 0, 0, 12])
    images, labels = first.images(counts, seed=11)
    assert np.bincount(labels, minlength=10).tolist() == counts.tolist()
    assert images.shape == (20, 1, 8, 8)
    made = first.report()["images_made"]
    assert made == 5 * (2 + 1 + 3)
    again = synthesis_of(config)
    more, more_labels = again.images(counts + 1, seed=11)
    assert (more[more_labels == 9][:12] == images[labels == 9]).all()
    assert again.report()["images_made"] == 5 * 7  # the seven classes that had none
    other, _ = again.images(counts, seed=12)
    assert (other != images).any()


def _hold_a_block(cache: tuple, block: Block, images: np.ndarray | None, holds: Event, go_on: Event) -> None:
    """Another process: makes a block, or (None) dies over it, when it is told to go on."""
    kept = BlockCache(*cache, tell=print)
    claim = kept.claim(block)
    holds.set()
    go_on.wait()
    if images is None:
        os._exit(1)
    kept.put(block, images)
    claim.release()


@pytest.mark.parametrize("dies", [False, True])
def test_images_that_another_process_makes_are_waited_for(small: Callable[..., RunConfig], dies: bool) -> None:
    source = synthesis_of(small(with_generator=True))
    counts, held = np.array([7, 5, *[0] * 8]), Block(40 + dies, 0, 1)
    others = np.full((5, 1, 8, 8), 77, dtype=np.uint8)
    cache = source._cache_of(0)
    spawn = multiprocessing.get_context("spawn")
    holds, go_on = spawn.Event(), spawn.Event()
    named = cache.folder, cache.block_size, cache.manifest, cache.weights, cache.versions
    other = spawn.Process(target=_hold_a_block, args=(named, held, None if dies else others, holds, go_on))
    other.start()
    assert holds.wait(60)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(source.images, counts, held.seed)
        while cache.get(Block(held.seed, 1, 0)) is None:  # the last that is this process's own
            time.sleep(0.05)
        time.sleep(0.3)
        assert not asked.done()
        assert cache.get(held) is None
        go_on.set()
        images, _ = asked.result(60)
    other.join()
    assert source.report()["images_made"] == 5 * (3 if dies else 2)
    assert (images[5:7] == 77).all() != dies
    assert not list(cache.folder.rglob("*.lock"))


def test_the_key_changes_with_data_and_settings_but_not_with_the_seed(small: Callable[..., RunConfig]) -> None:
    def key(**overrides: object) -> str:
        config = small(with_generator=True, **overrides)
        return synthesis_of(config).trained.key

    assert key() == key(seed=5)
    changed = [key(data__split_seed=1), key(generator__train_steps=31), key(data__public_fraction=0.3)]
    assert len({key(), *changed}) == 4
    assert key() == key(generator__steps=4)  # sampling settings keep the weights


def test_weights_that_are_trained_anew_make_all_images_anew(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = small(with_generator=True, generator__cache=str(tmp_path))
    counts = np.array([5] * 2 + [0] * 8)

    def source() -> Synthesis:
        return synthesis_of(config)

    first = source()
    before, _ = first.images(counts, seed=0)
    kept = first.trained.prepare()
    weights = kept / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SettingError, match=r"weights in .* are damaged .*remove that folder"):
        source().images(counts, seed=0)
    shutil.rmtree(kept)
    again = source()
    assert (again.images(counts, seed=0)[0] == before).all()  # the same bits: a training is repeatable
    assert again.report()["images_made"] == 0
    shutil.rmtree(kept)
    other = source()
    other.generator.train_steps += 1  # stands for a machine whose training ends in other bits
    after, _ = other.images(counts, seed=0)
    assert other.report()["images_made"] == 10
    assert (after != before).any()


def test_seconds_of_a_training_are_those_of_all_its_legs(
    small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(with_generator=True, generator__cache=str(tmp_path))
    plain = DiffusionGenerator.fit

    def cut(generator: DiffusionGenerator, data: TrainingImages, folder: Path, progress: object) -> None:
        time.sleep(1.5)
        (folder / "model_index.json").touch()
        raise KeyboardInterrupt

    for way in (cut, cut, plain):
        monkeypatch.setattr(DiffusionGenerator, "fit", way)
        made = synthesis_of(config)
        with contextlib.suppress(KeyboardInterrupt):
            made.trained.prepare()
    assert made.trained.training_seconds() > 3.0
    assert made.trained.training_seconds() > made.trained.train_seconds
    assert {path.name for path in made.trained.prepare().iterdir()} == {
        "model_index.json",
        "scheduler",
        "unet",
        "trained.json",
    }
    (made.trained.prepare() / "trained.json").write_text("{")
    again = synthesis_of(config)
    with pytest.raises(SettingError, match=r"trained\.json is damaged or gone; remove"):
        again.trained.prepare()


def test_weights_that_another_training_has_put_in_their_place_are_refused(
    small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Between the run's preparation and its first images; by another process, and by the run itself."""
    config = small(with_generator=True, generator__cache=str(tmp_path))
    counts = np.array([1] + [0] * 9)

    def source(steps: int) -> Synthesis:
        made = synthesis_of(config)
        made.generator.train_steps = steps  # stands for a machine whose training ends in other bits
        return made

    for by_itself in (False, True):
        run = source(30)
        shutil.rmtree(run.trained.prepare())
        if by_itself:
            run.generator.train_steps = 31
        else:
            source(31).trained.prepare()
        with pytest.raises(SettingError, match="run again"):
            run.images(counts, seed=0)
        shutil.rmtree(run.trained.folder / "weights")


def test_threads_have_images_of_their_own(small: Callable[..., RunConfig]) -> None:
    config = small(with_generator=True)
    one, two = (synthesis_of(config, threads=threads) for threads in (1, 2))
    assert one.trained.key == two.trained.key
    assert one.sampling_key != two.sampling_key


@pytest.mark.parametrize(("gpus", "named", "device"), [(0.0, True, "cpu"), (0.5, True, "cuda"), (0.5, False, "cpu")])
def test_a_driver_without_a_gpu_knows_that_the_clusters_actors_have_one(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, gpus: float, named: bool, device: str
) -> None:
    """By the kind of GPU that Ray names where it finds one, not by GPUs that it was only told of."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = {"GPU": 2.0} | ({"accelerator_type:H100": 1.0} if named else {})
    monkeypatch.setattr("ray.cluster_resources", lambda: found)
    config = small(with_generator=True, generator__pool__gpus=gpus)
    made = synthesis_of(config, on_ray=True)
    here = synthesis_of(config)
    assert made.sampled_on == device
    assert (made.sampling_key == here.sampling_key) is (device == "cpu")


def test_what_a_gpu_has_no_room_for_names_the_settings(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = small(generator={"name": "tests.generators.own:RaisingGenerator", "room": False, "cache": str(tmp_path)})
    with pytest.raises(SettingError, match=r"CUDA out of memory.*9 GiB\. Lower generator\.block_size .*pool\.actors"):
        synthesis_of(config).images(np.eye(10, dtype=int)[3], seed=0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it likes")
def test_actors_use_the_memory_of_a_block_for_the_next(
    small: Callable[..., RunConfig], tmp_path: Path, ray_session: None
) -> None:
    """Given back, its pages would be faulted in and zeroed anew for every block."""
    generator = {"name": "tests.generators.own:HungryGenerator", "cache": str(tmp_path)}
    made = synthesis_of(small(generator=generator, generator__pool__actors=1), on_ray=True)
    made.images(np.full(10, 8), seed=0)
    assert 24 < made.report()["grown_mb"] < 2 * 32  # after 20 blocks that took 32 each
    made.close()


def test_images_of_another_shape_are_refused(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A generator of a user's own that makes 4 x 4 pixels where the data have 8 x 8."""
    config = small(generator={"name": "tests.generators.own:SlowGenerator", "cache": str(tmp_path)})
    made = synthesis_of(config)
    with pytest.raises(SettingError, match=r"makes images .* \(1, 4, 4\) as uint8, but the data have \(1, 8, 8\)"):
        made.images(np.array([1] + [0] * 9), seed=0)


@pytest.mark.parametrize(
    ("unfit", "match"),
    [
        ({"kind": "float32"}, r"makes images of .* \(1, 8, 8\) as float32, but the data have \(1, 8, 8\) as uint8"),
        ({"kind": "nothing"}, r"it makes a NoneType, no array, but the data have \(1, 8, 8\) as uint8"),
        ({"count": 3}, "makes 3 images where block 0 of class 0 has 4; its sampler has to fill a block of block_size"),
    ],
)
def test_images_of_another_kind_or_number_are_refused(
    small: Callable[..., RunConfig], tmp_path: Path, unfit: dict[str, object], match: str
) -> None:
    """They would be cast in silence, or leave memory as it was for images; and nothing of them is kept."""
    config = small(generator={"name": "tests.generators.own:UnfitGenerator", "cache": str(tmp_path), **unfit})
    with pytest.raises(SettingError, match=match):
        synthesis_of(config).images(np.ones(10, dtype=int), seed=0)
    assert not list(tmp_path.rglob("block_*"))


def test_generator_that_can_not_learn_or_fit(
    small: Callable[..., RunConfig], tmp_path: Path, ray_session: None
) -> None:
    config = small(with_generator=True, data__public_fraction=0.0)
    with pytest.raises(SettingError, match="public part holds no images"):
        synthesis_of(config)
    config = small(with_generator=True, generator__widths=[8, 8, 8, 8, 8], generator__cache=str(tmp_path / "cache"))
    with pytest.raises(SettingError, match="not divisible"):
        synthesis_of(config).trained.prepare()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".part")]
    (tmp_path / "file").touch()
    config = small(with_generator=True, generator__cache=str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"generator\.cache .*/file: .*; name a folder that can be written"):
        synthesis_of(config).trained.prepare()
    config = small(with_generator=True, generator__pool__gpus=1.0)
    with pytest.raises(PlacementError, match=r"2 actors x 1 GPU.*generator.pool.gpus"):
        synthesis_of(config, on_ray=True).images(np.ones(10, dtype=int), 99)


def test_images_without_classes_are_for_those_that_need_none(small: Callable[..., RunConfig]) -> None:
    free = {"with_generator": True, "generator__guidance": 0.0}
    with pytest.raises(SettingError, match=r"diffusion knows no classes .* but method genfl needs images of them"):
        check(small(method__name="genfl", **free))
    check(small(method={"name": "feddf", "distil_on": "synthetic"}, rounds=1, clients_per_round=6, **free))
    check(small(method__name="fedlmg", model={"name": "mlp"}, rounds=1, clients_per_round=6, **free))


def test_a_user_s_own_generator_is_found_by_its_code(
    small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from tests.generators.own import FlatGenerator\nclass Mine(FlatGenerator):\n    pass\n"
    keys = []
    for change in ("", "    # a mended bug\n", ""):
        (tmp_path / "my_own_generator.py").write_text(source + change)
        config = small(generator={"name": "my_own_generator:Mine"})
        made = synthesis_of(config)
        keys.append((made.trained.key, made.sampling_key))
    assert keys[0] == keys[2] != keys[1]
    assert keys[0][1] != keys[1][1]
