"""Synthetic images of a trained generator, by class and number, and the cache of their blocks.

Every file of images names the versions of the libraries that made it (``generators.cache``), so that a difference can
be traced, and the hash of the weights: images of weights that were trained anew, and came out with other bits, are
never mixed with those of before.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fl_ray.cache_folder import cache_errors
from fl_ray.errors import LostActorsError, PlacementError
from fl_ray.runtime.memory import keep_freed_memory
from fl_ray.trained_generator import TrainedGenerator
from generators.base import Block, Generator, settings_digest
from generators.cache import BlockCache, Claim

if TYPE_CHECKING:
    from generators.guidance.generator import GuideSource
    from generators.guidance.sampling import GuidanceSettings

__all__ = ["Synthesis"]

_TIMINGS = 3  # of the seconds for an image


class Synthesis:
    """Images by class and number. Training and actors start only when images are asked for that no cache holds.

    Args:
        trained: the generator; the weights are its, and its folder holds the images, too.
        on_ray: sample in a pool of Ray actors; otherwise in this process.
        device: on which images are made: ``cuda`` or ``cpu``; default: CUDA where it is (for actors with a share of a
            GPU: here, or on a node of the cluster), else the CPU.
        wait: until Ray answers; default: it does.
    """

    def __init__(
        self,
        trained: TrainedGenerator,
        on_ray: bool,
        threads: int,
        device: str | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.trained, self.data, self.progress = trained, trained.data, trained.progress
        self.on_ray, self.threads, self._pool_config = on_ray, threads, trained.config.pool
        self._pool: object | None = None
        self._images = 0
        self._seconds = 0.0
        self._device = device
        self._wait = wait or (lambda: None)
        self._sample_with(trained.generator)

    def _sample_with(self, generator: Generator) -> None:
        """Make images with this one from now on, kept apart from others'."""
        self.generator = generator
        self._caches: dict[int, BlockCache] = {}
        self._available: np.ndarray | None = None  # of the stream at work
        with self.trained.refusals():
            self._settings = generator.sampling_settings()

    @property
    def sampled_on(self) -> str:
        """The device on which images are made. Of actors with a share of a GPU it is known when Ray answers."""
        if self._device is None:
            here = "cuda" if torch.cuda.is_available() else "cpu"
            if self.on_ray and self._pool_config.gpus == 0:
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
        return settings_digest(settings, self.sampled_on, threads, *self.trained.code)[:16]

    def _cache_of(self, label: int) -> BlockCache:
        """Where the images of a class are kept: by what decides these, and nothing else."""
        part = self.generator.part_of(label)
        if part not in self._caches:
            settings = self.generator.settings_of(part)
            key = self._sampling_key(settings)
            sampling = {"settings": settings, "device": self.sampled_on, "threads": self.threads, "key": key}
            size, folder = self.generator.block_size, self.trained.folder / f"images-{key}"
            manifest = {**self.trained.manifest, "sampling": sampling}
            known = self.trained.weights, self.trained.versions, self.progress.message
            self._caches[part] = BlockCache(folder, size, manifest, *known)
        return self._caches[part]

    def guided(self, guides: Mapping[int, GuideSource], settings: GuidanceSettings, block_size: int) -> Synthesis:
        """The same trained generator, guided: its label ``k * classes + c`` is class c under client k's guide.

        The steps are the generator's own.
        """
        from generators.guidance.generator import GuidedGenerator

        classes, shape = self.data.num_classes, self.data.images.shape[1:]
        settings = replace(settings, steps=self.generator.steps)
        made = copy.copy(self)
        made._pool, made._images, made._seconds = None, 0, 0.0
        made._sample_with(GuidedGenerator(self.generator, guides, classes, shape, settings, block_size))
        return made

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

        A class's last block is cut to the count. Memory does not grow with the counts. Blocks that another process is
        making come last, when it has made them.

        Raises:
            SettingError: the generator has not so many.
        """
        self.check_counts(counts)
        size = self.generator.block_size
        shares = {label: int(count) for label, count in enumerate(counts)}
        missing = {label: np.zeros(-(-count // size), dtype=bool) for label, count in shares.items()}

        def cut(block: Block, images: np.ndarray) -> tuple[Block, np.ndarray]:
            return block, images[: shares[block.label] - block.number * size]

        for label, flags in missing.items():
            for number in range(len(flags)):
                cache, block = self._cache_of(label), Block(seed, label, number)
                with cache_errors(self.trained.config):
                    images = cache.get(block)
                if images is None:
                    flags[number] = True
                else:
                    yield cut(block, self._fitting(block, images))
        wanted = (Block(seed, label, int(n)) for label, flags in missing.items() for n in np.flatnonzero(flags))
        total = sum(int(flags.sum()) for flags in missing.values())
        if total:
            for block, images in self._make_once(wanted, total):
                yield cut(block, images)

    def available(self) -> np.ndarray | None:
        """How many images of each class there are, int64 [classes]; None: any number."""
        with self.trained.refusals():
            return self.generator.available(self.trained.learned)

    def check_counts(self, counts: np.ndarray) -> None:
        """Refuse to make more images of a class than there are.

        Raises:
            SettingError: the generator has not so many.
        """
        available = self._available = self.available()
        if available is None:
            return
        for name, asked, there in zip(self.data.source.classes, counts, available, strict=True):
            if asked > there:
                raise self.trained.refused(
                    f"{asked} images of class {name} are asked for, but there are {there}; {self.generator.more_from}"
                )

    def prompt(self, label: int, index: int) -> str | None:
        """The words that an image is made from; None where there are none."""
        return self.generator.prompt(self.data.source.classes, label, index)

    def provenance(self) -> dict[str, Any]:
        """What made the images: generator, settings, data, weights, device, and the versions of the libraries here."""
        sampling = {"settings": self._settings, "device": self.sampled_on, "key": self.sampling_key}
        made = self.trained
        return {**made.manifest, "weights_sha256": made.weights, "sampling": sampling, "versions": made.versions}

    def counted(self) -> dict[str, float]:
        """What the samplers of this run have counted; empty where the cache had everything."""
        return self._pool.report() if self._pool is not None else {}

    def _fitting(self, block: Block, images: np.ndarray) -> np.ndarray:
        """The images of a block, which are as many and as the data need them."""
        shape, count = self.data.images.shape[1:], self.generator.block_size
        if self._available is not None:
            count = min(count, int(self._available[block.label]) - block.number * count)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
            found = f"a {type(images).__name__}, no array"
            if isinstance(images, np.ndarray):
                found = f"images of channels, height and width {images.shape[1:]} as {images.dtype}"
            raise self.trained.refused(
                f"it makes {found}, but the data have {shape} as uint8; its sampler has to return such images"
            )
        if len(images) != count:
            raise self.trained.refused(
                f"it makes {len(images)} images where block {block.number} of class {block.label} has {count}; its "
                "sampler has to fill a block of block_size images, as far as its available() goes"
            )
        return images

    def _make_once(self, blocks: Iterable[Block], total: int) -> Iterator[tuple[Block, np.ndarray]]:
        """Make blocks that no other process is making, or has made since; then wait for the others'."""
        claims: dict[Block, Claim] = {}
        others = list[Block]()

        def own() -> Iterator[Block]:
            for block in blocks:
                cache = self._cache_of(block.label)
                with cache_errors(self.trained.config):
                    claim = cache.claim(block)
                    made_since = claim is not None and cache.get(block) is not None
                if claim is not None and not made_since:
                    claims[block] = claim
                    yield block
                    continue
                others.append(block)
                if claim is not None:
                    claim.release()

        try:
            for block, images in self._make(own(), total):
                claims.pop(block).release()
                yield block, images
            if others:
                self.progress.message(f"{len(others)} blocks of images are, or were, another process's to make")
            for block in others:
                cache = self._cache_of(block.label)
                with cache_errors(self.trained.config):
                    claims[block] = cache.claim(block, wait=True)
                    images = cache.get(block)
                if images is None:  # the other has ended before it had made it
                    ((_, images),) = self._make([block], 1)
                claims.pop(block).release()
                yield block, self._fitting(block, images)
        finally:
            for claim in claims.values():
                claim.release()

    def _make(self, blocks: Iterable[Block], total: int) -> Iterator[tuple[Block, np.ndarray]]:
        from generators.pool import ActorsLostError

        with self.trained.refusals():
            try:
                pool, waited = self._start_pool(), time.perf_counter()
                made = 0
                for number, (block, images) in enumerate(pool.make(blocks), 1):
                    with cache_errors(self.trained.config):
                        self._cache_of(block.label).put(block, self._fitting(block, images))
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

        folder = self.trained.prepare()
        if not self.on_ray:
            self._pool = LocalPool(self.generator, folder, self.sampled_on, self.threads, self.trained.weights)
            return self._pool
        import ray

        self._wait()
        pool, cluster = self._pool_config, ray.cluster_resources()
        for name, amount, setting in (("CPU", pool.cpus, "cpus"), ("GPU", pool.gpus, "gpus")):
            if amount * pool.actors > cluster.get(name, 0.0) + 1e-9:
                raise PlacementError(
                    f"generator.pool asks for {pool.actors} actors x {amount:g} {name}, but the cluster has "
                    f"{cluster.get(name, 0.0):g}; lower generator.pool.actors or generator.pool.{setting}"
                )
        try:
            self._pool = GeneratorPool(
                self.generator,
                folder,
                pool.actors,
                pool.cpus,
                pool.gpus,
                self.threads,
                pool.timeout_s,
                self.sampled_on,
                self.trained.weights,
                keep_freed_memory,
            )
        except TimeoutError as error:
            raise PlacementError(
                f"generator.pool: {error}; free: {ray.available_resources()}. The clients' actors hold their bundles "
                "all the while: lower generator.pool.cpus, generator.pool.gpus or runtime.num_actors"
            ) from error
        return self._pool

    def seconds_per_image(self, seed: int) -> float:
        """Wall seconds of the whole pool for an image, measured now on blocks that are made past the cache (median)."""
        pool, count = self._start_pool(), self._pool_config.actors if self.on_ray else 1
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
        return [self.trained.key, f"images-{self.sampling_key}"]

    def report(self) -> dict[str, float | str]:
        """What was done, for summary.json; seconds are of this run alone (0 where the cache had everything)."""
        return {**self.trained.report(), **self.sampled()}

    def sampled(self) -> dict[str, float]:
        """Of that, the sampling."""
        return {"images_made": self._images, "sampling_seconds": self._seconds, **self.counted()}

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
