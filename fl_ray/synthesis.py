"""A run's synthetic images: the recipe's generator, trained once on the public images, and its cache of blocks.

What is kept is found by all that decides it, but for the versions of the libraries: an update of torch changes the last
bits of new images, and would otherwise throw away hours of training and sampling. Every file of images names the
versions that made it (``generators.cache``), so that a difference can be traced, and the hash of the weights: images of
weights that were trained anew, and came out with other bits, are never mixed with those of before.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch

from fl_ray.config import Component, GeneratorConfig
from fl_ray.data.parts import FederatedData, digest
from fl_ray.devices.cost import Ledger
from fl_ray.errors import FlRayError, LostActorsError, OutputError, PlacementError, SettingError
from fl_ray.model_store.base import ModelStore
from fl_ray.progress import Progress
from fl_ray.recipes import build
from fl_ray.registry import code_hash
from fl_ray.run_folder import environment
from generators.base import Block, Generator, RealImages, TrainingImages, settings_digest
from generators.cache import TRAINED_FILE, BlockCache, stored_folder, weights_hash

if TYPE_CHECKING:
    from generators.guidance.generator import GuideSource
    from generators.guidance.sampling import GuidanceSettings

__all__ = ["FederatedGenerator", "Synthesis", "cache_root"]

_LEGS_FILE = "seconds.txt"  # in a draft: what legs that were cut have taken
_TIMINGS = 3  # of the seconds for an image
FORMAT = 6  # of the cache; raised when the code that makes weights or images changes what it makes


def cache_root(config: GeneratorConfig | None) -> Path:
    """Where what was trained is kept: ``generator.cache``, else $FL_RAY_CACHE, else ~/.cache/fl_ray."""
    own = config.cache if config is not None else None
    return Path(own or os.environ.get("FL_RAY_CACHE") or "~/.cache/fl_ray").expanduser()


class FederatedGenerator(Protocol):
    """Clients that train a generator together; ``fl_ray.federated_generator`` has the one that does."""

    def digest(self) -> str:
        """A hash of all that decides what comes of it."""

    def train(self, draft: Path) -> pl.LightningModule:
        """Do it, going on from what an interrupted call left in ``draft``."""

    def spent(self, folder: Path) -> Ledger:
        """Virtual time, energy and bytes of the training that is kept in ``folder``."""


class Synthesis:
    """Images by class and number. Training and actors start only when images are asked for that no cache holds.

    Args:
        on_ray: sample in a pool of Ray actors; otherwise in this process.
        device: on which images are made: ``cuda`` or ``cpu``; default: CUDA where it is (for actors with a share of a
            GPU: here, or on a node of the cluster), else the CPU.
        wait: until Ray answers; default: it does.
        federated: lets clients train a generator whose settings ask for that.
        store: where trained generators are looked for before they are trained, and put afterwards.

    Attributes:
        train_seconds: of this run alone; 0 where the generator was there.
        unpublished: what kept the generator from the store.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        data: FederatedData,
        progress: Progress,
        on_ray: bool,
        threads: int,
        federated: FederatedGenerator | None = None,
        store: ModelStore | None = None,
        device: str | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.generator: Generator = build("generator", Component(config.name, config.settings))
        self.config, self.data, self.progress = config, data, progress
        self.on_ray, self.threads = on_ray, threads
        self.train_seconds = 0.0
        self.unpublished: OutputError | None = None
        self._store, self._published = store, False
        self._pool: object | None = None
        self._images = 0
        self._seconds = 0.0
        self._federated = federated if self.generator.federated() is not None else None
        images, labels = data.server_part(self._learns_from)
        if self._learns_from != "none":
            self._check_classes(labels)
        source = self._federated.digest() if self._federated else digest(images, labels)
        self._learned = TrainingImages(images, labels, data.source.classes, source)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        self._device, self._weights_hash = device, ""
        self._wait = wait or (lambda: None)
        with self._as_setting_error():
            training = self.generator.training_settings()
        own = code_hash("generator", config.name)
        self._code = [] if own is None else [own]
        self.key = settings_digest(FORMAT, config.name, training, here, data.source.classes, source, *self._code)[:16]
        self._home = cache_root(config) / "generators" / f"{config.name.replace(':', '.')}-{self.key}"
        made = environment()
        self._manifest = {
            "generator": config.name,
            "training": {"settings": training, "data_sha256": source, "device": here, "key": self.key},
            "classes": data.source.classes,
            "fl_ray": {"version": made["fl_ray"], "git_revision": made["git_revision"], "format": FORMAT},
        }
        self._versions = made["packages"]
        self._sample_with(self.generator)

    @property
    def _learns_from(self) -> RealImages:
        """Which of the server's images the generator is trained on."""
        return "none" if self._federated else self.generator.learns_from

    def _sample_with(self, generator: Generator) -> None:
        """Make images with this one from now on, kept apart from others'."""
        self.generator = generator
        self._caches: dict[int, BlockCache] = {}
        with self._as_setting_error():
            self._settings = generator.sampling_settings()

    @property
    def sampled_on(self) -> str:
        """The device on which images are made. Of actors with a share of a GPU it is known when Ray answers."""
        if self._device is None:
            here = "cuda" if torch.cuda.is_available() else "cpu"
            if self.on_ray and self.config.pool.gpus == 0:
                here = "cpu"
            elif self.on_ray and here == "cpu":
                import ray

                # The driver's node need not have one. Ray names the kind of those that it finds, not of GPUs that it
                # was only told of.
                self._wait()
                found = any(name.startswith("accelerator_type:") for name in ray.cluster_resources())
                here = "cuda" if found else "cpu"
            self._device = here
        return self._device

    @property
    def sampling_key(self) -> str:
        """What fixes the images, given the trained generator."""
        return self._sampling_key(self._settings)

    def _sampling_key(self, settings: dict[str, Any]) -> str:
        threads = self.threads if self.sampled_on == "cpu" else None  # an image's last bits depend on them
        return settings_digest(settings, self.sampled_on, threads, *self._code)[:16]

    def _cache_of(self, label: int) -> BlockCache:
        """Where the images of a class are kept: by what decides these, and nothing else."""
        part = self.generator.part_of(label)
        if part not in self._caches:
            settings = self.generator.settings_of(part)
            key = self._sampling_key(settings)
            sampling = {"settings": settings, "device": self.sampled_on, "threads": self.threads, "key": key}
            size, folder = self.generator.block_size, self._home / f"images-{key}"
            manifest = {**self._manifest, "sampling": sampling}
            self.prepare()
            made = BlockCache(folder, size, manifest, self._weights_hash, self._versions, self.progress.message)
            self._caches[part] = made
        return self._caches[part]

    def guided(self, guides: Mapping[int, GuideSource], settings: GuidanceSettings, block_size: int) -> Synthesis:
        """The same trained generator, guided: its label ``k * classes + c`` is class c under client k's guide.

        The steps are the generator's own.
        """
        from generators.guidance.generator import GuidedGenerator

        classes, shape = self.data.num_classes, self.data.images.shape[1:]
        settings = replace(settings, steps=self.generator.steps)
        made = copy.copy(self)
        made._pool, made._images, made._seconds, made.train_seconds = None, 0, 0.0, 0.0
        made._sample_with(GuidedGenerator(self.generator, guides, classes, shape, settings, block_size))
        return made

    @property
    def folder(self) -> Path:
        """Where the trained generator, and what belongs to it, is kept."""
        return self._home

    @contextmanager
    def _as_setting_error(self) -> Iterator[None]:
        """What a generator refuses is a setting of the recipe."""
        try:
            yield
        except FlRayError:
            raise
        except ValueError as error:
            raise self._refused(error) from error

    def _refused(self, why: object) -> SettingError:
        return SettingError(f"generator {self.config.name}: {why}")

    def _check_classes(self, labels: np.ndarray) -> None:
        part = self.generator.learns_from
        counts = np.bincount(labels, minlength=self.data.num_classes)
        missing = [name for name, count in zip(self.data.source.classes, counts, strict=True) if count == 0]
        if missing:
            raise SettingError(
                f"generator: the {part} part holds no images of class {', '.join(missing)}, so it can't learn them; "
                f"raise data.{part}_fraction"
            )

    def prepare(self) -> Path:
        """Train the generator unless the cache or the store holds it; its folder."""
        folder = self._home / "weights"
        start, brought = time.perf_counter(), False

        def write(draft: Path) -> None:
            nonlocal brought
            brought = self._store is not None and self._store.bring("generators", self._home.name, draft)
            if brought:
                return
            legs = draft / _LEGS_FILE
            before = float(legs.read_text(encoding="utf-8")) if legs.exists() else 0.0
            try:
                self._train(draft)
            finally:  # whatever has ended this leg
                seconds = before + time.perf_counter() - start
                legs.write_text(f"{seconds:.3f}", encoding="utf-8")
            legs.unlink()
            noted = {"seconds": seconds, "sha256": weights_hash(draft)}
            (draft / TRAINED_FILE).write_text(json.dumps(noted), encoding="utf-8")

        with self._as_setting_error():
            trained = stored_folder(folder, write) and not brought
        if trained:
            self.train_seconds = time.perf_counter() - start
            self.progress.message(f"generator ready after {self.train_seconds:.0f} s, kept in {folder}")
        if trained or not self._weights_hash:
            found = self._checked(folder)
            if self._weights_hash not in ("", found):
                raise SettingError(
                    f"generator {self.config.name}: its weights in {folder} were taken away and trained anew while "
                    "this run used them, and have come out with other bits; run again"
                )
            self._weights_hash = found
        if self._store is not None and not brought and not self._published:
            self._publish(self._store, folder, again=trained)
        return folder

    def _checked(self, folder: Path) -> str:
        """The hash of the weights, which are as they were written."""
        found, noted = weights_hash(folder), self._noted(folder)["sha256"]
        if found != noted:
            raise SettingError(
                f"generator {self.config.name}: its weights in {folder} are damaged (SHA-256 {found[:12]}, but "
                f"{noted[:12]} was written); remove that folder to have it trained again"
            )
        return found

    @property
    def weights(self) -> str:
        """The hash of the trained generator's weights."""
        self.prepare()
        return self._weights_hash

    def _noted(self, folder: Path) -> dict[str, Any]:
        """What was written when the training ended."""
        try:
            noted = json.loads((folder / TRAINED_FILE).read_text(encoding="utf-8"))
            return {"seconds": float(noted["seconds"]), "sha256": str(noted["sha256"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(
                f"generator {self.config.name}: {folder / TRAINED_FILE} is damaged or gone; remove {folder} to have "
                "the generator trained again"
            ) from error

    def _publish(self, store: ModelStore, folder: Path, again: bool) -> None:
        """Put the generator into the store. Where that fails the run goes on: it has what it needs."""
        self._published = True  # it is asked for many times
        try:
            store.publish("generators", self._home.name, folder, again)
        except OutputError as error:
            self.unpublished = error
            self.progress.message(f"{error}; the generator is kept in {folder} alone")

    def _train(self, draft: Path) -> None:
        if self._federated:
            self.generator.store(self._federated.train(draft), self._learned, draft)
            return
        if len(self._learned.labels):
            self.progress.message(f"pre-training the generator on {len(self._learned.labels)} real images")
        self.generator.fit(
            self._learned,
            draft,
            lambda step, steps, loss: self.progress.steps("pre-training", step, steps, f"loss {loss:.3f}"),
        )

    def training_seconds(self) -> float:
        """What the training took when the generator was made, over all its legs (but for one that was killed)."""
        return self._noted(self.prepare())["seconds"]

    def spent(self) -> Ledger:
        """What clients have spent on training the generator; nothing where the server did that."""
        return self._federated.spent(self.prepare()) if self._federated else Ledger()

    def images(self, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``counts[c]`` images of each class c for a sampling seed.

        Returns:
            uint8 [sum of counts, C, H, W] and int64 labels, ordered by class and number.
        """
        counts = np.asarray(counts, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        images = np.empty((int(counts.sum()), *self.data.images.shape[1:]), dtype=np.uint8)
        for block, made in self.stream(counts, seed):
            first = starts[block.label] + block.number * self.generator.block_size
            images[first : first + len(made)] = made
        return images, np.repeat(np.arange(len(counts)), counts)

    def stream(self, counts: np.ndarray, seed: int) -> Iterator[tuple[Block, np.ndarray]]:
        """The same images block by block, as they are there: what a cache holds first, then what the pool makes.

        A class's last block is cut to the count. Memory does not grow with the counts.

        Raises:
            SettingError: the generator has not so many.
        """
        self.check_counts(counts)
        size = self.generator.block_size
        shares = {label: int(count) for label, count in enumerate(counts)}
        missing = {label: np.zeros(-(-count // size), dtype=bool) for label, count in shares.items()}
        for label, flags in missing.items():
            for number in range(len(flags)):
                block = Block(seed, label, number)
                images = self._cache_of(label).get(block)
                if images is None:
                    flags[number] = True
                else:
                    yield block, self._fitting(images)[: shares[label] - number * size]
        wanted = (Block(seed, label, int(n)) for label, flags in missing.items() for n in np.flatnonzero(flags))
        total = sum(int(flags.sum()) for flags in missing.values())
        if total:
            for block, images in self._make(wanted, total):
                yield block, images[: shares[block.label] - block.number * size]

    def available(self) -> np.ndarray | None:
        """How many images of each class there are, int64 [classes]; None: any number."""
        with self._as_setting_error():
            return self.generator.available(self._learned)

    def check_counts(self, counts: np.ndarray) -> None:
        """Refuse to make more images of a class than there are.

        Raises:
            SettingError: the generator has not so many.
        """
        available = self.available()
        if available is None:
            return
        for name, asked, there in zip(self.data.source.classes, counts, available, strict=True):
            if asked > there:
                raise self._refused(
                    f"{asked} images of class {name} are asked for, but there are {there}; {self.generator.more_from}"
                )

    def prompt(self, label: int, index: int) -> str | None:
        """The words that an image is made from; None where there are none."""
        return self.generator.prompt(self.data.source.classes, label, index)

    def provenance(self) -> dict[str, Any]:
        """What made the images: generator, settings, data, weights, device, and the versions of the libraries here."""
        sampling = {"settings": self._settings, "device": self.sampled_on, "key": self.sampling_key}
        return {**self._manifest, "weights_sha256": self.weights, "sampling": sampling, "versions": self._versions}

    def counted(self) -> dict[str, float]:
        """What the samplers of this run have counted; empty where the cache had everything."""
        return self._pool.report() if self._pool is not None else {}

    def _fitting(self, images: np.ndarray) -> np.ndarray:
        shape = self.data.images.shape[1:]
        if images.shape[1:] != shape:
            raise self._refused(
                f"it makes images of channels, height and width {images.shape[1:]}, but the data "
                f"have {shape}; its sampler has to convert them"
            )
        return images

    def _make(self, blocks: Iterable[Block], total: int) -> Iterator[tuple[Block, np.ndarray]]:
        from generators.pool import ActorsLostError

        with self._as_setting_error():
            try:
                pool, waited = self._start_pool(), time.perf_counter()
                made = 0
                for number, (block, images) in enumerate(pool.make(blocks), 1):
                    self._cache_of(block.label).put(block, self._fitting(images))
                    made += len(images)
                    self._images += len(images)
                    self._seconds += time.perf_counter() - waited
                    self.progress.steps("synthesis", number, total, f"{made} images")
                    yield block, images
                    waited = time.perf_counter()
            except ActorsLostError as error:
                raise LostActorsError(f"generator.pool: {error}") from error

    def _start_pool(self) -> object:
        if self._pool is not None:
            return self._pool
        from generators.pool import GeneratorPool, LocalPool

        folder = self.prepare()
        if not self.on_ray:
            self._pool = LocalPool(self.generator, folder, self.sampled_on, self.threads, self._weights_hash)
            return self._pool
        import ray

        self._wait()
        pool, cluster = self.config.pool, ray.cluster_resources()
        for name, amount, setting in (("CPU", pool.cpus, "cpus"), ("GPU", pool.gpus, "gpus")):
            if amount * pool.actors > cluster.get(name, 0.0) + 1e-9:
                raise PlacementError(
                    f"generator.pool asks for {pool.actors} actors x {amount:g} {name}, but the cluster has "
                    f"{cluster.get(name, 0.0):g}; lower generator.pool.actors or generator.pool.{setting}"
                )
        threads, timeout = self.threads, self.config.pool.timeout_s
        try:
            self._pool = GeneratorPool(
                self.generator,
                folder,
                pool.actors,
                pool.cpus,
                pool.gpus,
                threads,
                timeout,
                self.sampled_on,
                self._weights_hash,
            )
        except TimeoutError as error:
            raise PlacementError(
                f"generator.pool: {error}; free: {ray.available_resources()}. The clients' actors hold their bundles "
                "all the while: lower generator.pool.cpus, generator.pool.gpus or runtime.num_actors"
            ) from error
        return self._pool

    def seconds_per_image(self, seed: int) -> float:
        """Wall seconds of the whole pool for an image, measured now on blocks that are made past the cache (median)."""
        pool, count = self._start_pool(), self.config.pool.actors if self.on_ray else 1
        blocks = [Block(seed, number % self.data.num_classes, 0) for number in range(count)]
        for _ in pool.make(blocks):  # the first images of a process take longer
            pass
        found = []
        for _ in range(_TIMINGS):
            start = time.perf_counter()
            made = sum(len(images) for _, images in pool.make(blocks))
            found.append((time.perf_counter() - start) / made)
        return statistics.median(found)

    def keys(self) -> list[str]:
        """What the recipe says of the images: the keys of the trained generator and of its sampling."""
        return [self.key, f"images-{self.sampling_key}"]

    def report(self) -> dict[str, float | str]:
        """What was done, for summary.json; seconds are of this run alone (0 where the cache had everything)."""
        return {
            "key": self.key,
            "weights": self._weights_hash,
            "real_images": len(self._learned.labels),
            **self._real_images_by_domain(),
            "train_seconds": self.train_seconds,
            "images_made": self._images,
            "sampling_seconds": self._seconds,
            **self.counted(),
        }

    def _real_images_by_domain(self) -> dict[str, int]:
        source = self.data.source
        if source.domains is None or self._learns_from == "none":
            return {}
        counts = np.bincount(source.domains[getattr(self.data, self._learns_from)], minlength=len(source.domain_names))
        return {f"real_images_of_{name}": int(count) for name, count in zip(source.domain_names, counts, strict=True)}

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
