"""A run's synthetic images: the recipe's generator, trained once on the public images, and its cache of blocks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

from fl_ray.config import Component, GeneratorConfig
from fl_ray.data.parts import FederatedData
from fl_ray.errors import PlacementError, SettingError
from fl_ray.progress import Progress
from fl_ray.recipes import build
from generators.base import Block, Generator, TrainingImages, settings_digest
from generators.cache import BlockCache, stored_folder

__all__ = ["Synthesis", "cache_root"]

FORMAT = 1  # of the cache; raised when the code that makes weights or images changes what it makes


def cache_root(config: GeneratorConfig) -> Path:
    """Where generators and their images are kept: ``generator.cache``, else $FL_RAY_CACHE, else ~/.cache/fl_ray."""
    return Path(config.cache or os.environ.get("FL_RAY_CACHE") or "~/.cache/fl_ray").expanduser() / "generators"


class Synthesis:
    """Images by class and number. Training and actors start only when images are asked for that no cache holds.

    Args:
        on_ray: sample in a pool of Ray actors; otherwise in this process.
    """

    def __init__(
        self, config: GeneratorConfig, data: FederatedData, progress: Progress, on_ray: bool, threads: int
    ) -> None:
        self.generator: Generator = build("generator", Component(config.name, config.settings))
        self.config, self.data, self.progress = config, data, progress
        self.on_ray, self.threads = on_ray, threads
        self.train_seconds = 0.0
        self._pool: object | None = None
        self._images = 0
        self._seconds = 0.0
        counts = np.bincount(data.public_labels, minlength=data.num_classes)
        missing = [name for name, count in zip(data.source.classes, counts, strict=True) if count == 0]
        if missing:
            raise SettingError(
                f"generator: the public part holds no images of class {', '.join(missing)}, so it can't learn them; "
                "raise data.public_fraction"
            )
        parts = (
            FORMAT,
            config.name,
            self.generator.training_settings(),
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        self.key = settings_digest(*parts, data.public_digest())[:16]
        self._home = cache_root(config) / f"{config.name.replace(':', '.')}-{self.key}"
        gpu = torch.cuda.is_available() and (config.pool.gpus > 0 or not on_ray)
        sampling = settings_digest(self.generator.sampling_settings(), "cuda" if gpu else "cpu")[:16]
        self._cache = BlockCache(self._home / f"images-{sampling}")

    def prepare(self) -> Path:
        """Train the generator unless the cache holds it; its folder."""
        folder = self._home / "weights"
        data = self.data
        training = TrainingImages(data.public_images, data.public_labels, data.source.classes, data.public_digest())
        start = time.perf_counter()

        def write(draft: Path) -> None:
            self.progress.message(f"pre-training the generator on {len(training.labels)} public images")
            try:
                self.generator.fit(
                    training,
                    draft,
                    lambda step, steps, loss: self.progress.steps("pre-training", step, steps, f"loss {loss:.3f}"),
                )
            except ValueError as error:
                raise SettingError(f"generator {self.config.name}: {error}") from error

        if stored_folder(folder, write):
            self.train_seconds = time.perf_counter() - start
            self.progress.message(f"generator trained in {self.train_seconds:.0f} s, kept in {folder}")
        return folder

    def images(self, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``counts[c]`` images of each class c for a sampling seed.

        Returns:
            uint8 [sum of counts, C, H, W] and int64 labels, ordered by class and number.
        """
        size = self.generator.block_size
        wanted = [Block(seed, label, n) for label, count in enumerate(counts) for n in range(-(-int(count) // size))]
        found = {block: images for block in wanted if (images := self._cache.get(block)) is not None}
        missing = [block for block in wanted if block not in found]
        if missing:
            found |= self._make(missing)
        parts, labels = [], []
        for label, count in enumerate(counts):
            blocks = [found[Block(seed, label, n)] for n in range(-(-int(count) // size))]
            if blocks:
                parts.append(np.concatenate(blocks)[: int(count)])
                labels.append(np.full(int(count), label, dtype=np.int64))
        shape = self.data.images.shape[1:]
        if not parts:
            return np.empty((0, *shape), dtype=np.uint8), np.empty(0, dtype=np.int64)
        images = np.concatenate(parts)
        if images.shape[1:] != shape:
            raise SettingError(
                f"generator {self.config.name}: makes images {images.shape[1:]}, but the data are {shape}"
            )
        return images, np.concatenate(labels)

    def _make(self, blocks: list[Block]) -> dict[Block, np.ndarray]:
        pool = self._start_pool()
        start, made = time.perf_counter(), {}
        for block, images in pool.make(blocks):
            self._cache.put(block, images)
            made[block] = images
            self._images += len(images)
            self.progress.steps("synthesis", len(made), len(blocks), f"{len(made) * len(images)} images")
        self._seconds += time.perf_counter() - start
        return made

    def _start_pool(self) -> object:
        if self._pool is not None:
            return self._pool
        from generators.pool import GeneratorPool, LocalPool

        folder = self.prepare()
        if not self.on_ray:
            self._pool = LocalPool(self.generator, folder)
            return self._pool
        import ray

        pool, cluster = self.config.pool, ray.cluster_resources()
        for name, amount, setting in (("CPU", pool.cpus, "cpus"), ("GPU", pool.gpus, "gpus")):
            if amount * pool.actors > cluster.get(name, 0.0) + 1e-9:
                raise PlacementError(
                    f"generator.pool asks for {pool.actors} actors x {amount:g} {name}, but the cluster has "
                    f"{cluster.get(name, 0.0):g}; lower generator.pool.actors or generator.pool.{setting}"
                )
        threads, timeout = self.threads, self.config.pool.timeout_s
        try:
            self._pool = GeneratorPool(self.generator, folder, pool.actors, pool.cpus, pool.gpus, threads, timeout)
        except TimeoutError as error:
            raise PlacementError(
                f"generator.pool: {error}; free: {ray.available_resources()}. The clients' actors hold their bundles "
                "all the while: lower generator.pool.cpus, generator.pool.gpus or runtime.num_actors"
            ) from error
        return self._pool

    def keys(self) -> list[str]:
        """What fixes the images that were made: the keys of the trained generator and of its samples in the cache."""
        return [self.key, self._cache.folder.name]

    def report(self) -> dict[str, float | str]:
        """What was done, for summary.json; seconds are of this run alone (0 where the cache had everything)."""
        return {
            "key": self.key,
            "public_images": len(self.data.public),
            "train_seconds": self.train_seconds,
            "images_made": self._images,
            "sampling_seconds": self._seconds,
        }

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
