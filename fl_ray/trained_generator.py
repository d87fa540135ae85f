"""A recipe's generator, trained once and kept: by the server on its own images, or by the clients together.

What is kept is found by all that decides it, but for the versions of the libraries: an update of torch changes the last
bits of new images, and would otherwise throw away hours of training and sampling.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch

from fl_ray.cache_folder import cache_root, make_writable
from fl_ray.config import Component, GeneratorConfig
from fl_ray.data.parts import FederatedData, digest
from fl_ray.devices.cost import Ledger
from fl_ray.errors import FlRayError, OutputError, SettingError
from fl_ray.model_store.base import ModelStore
from fl_ray.progress import Progress
from fl_ray.recipes import build
from fl_ray.registry import code_hash
from fl_ray.run_folder import environment
from generators.base import Generator, RealImages, TrainingImages, settings_digest
from generators.cache import TRAINED_FILE, stored_folder, weights_hash

__all__ = ["FederatedGenerator", "TrainedGenerator"]

_LEGS_FILE = "seconds.txt"  # in a draft: what legs that were cut have taken
FORMAT = 6  # of the cache; raised when the code that makes weights or images changes what it makes


class FederatedGenerator(Protocol):
    """Clients that train a generator together; ``fl_ray.federated_generator`` has the one that does."""

    def digest(self) -> str:
        """A hash of all that decides what comes of it."""

    def train(self, draft: Path) -> pl.LightningModule:
        """Do it, going on from what an interrupted call left in ``draft``."""

    def spent(self, folder: Path) -> Ledger:
        """Virtual time, energy and bytes of the training that is kept in ``folder``."""


class TrainedGenerator:
    """A generator and its weights. Training starts only when these are asked for and neither cache nor store has them.

    Args:
        federated: lets clients train a generator whose settings ask for that.
        store: where trained generators are looked for before they are trained, and put afterwards.

    Attributes:
        generator: the recipe's.
        learned: what it is trained on.
        key: of all that decides the weights.
        manifest: what is told of these, and ``versions`` of the libraries, beside images.
        folder: where these are kept, and what belongs to them.
        code: a hash of the generator's module where that is the user's own.
        train_seconds: of this process alone; 0 where the generator was there.
        unpublished: what kept the generator from the store.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        data: FederatedData,
        progress: Progress,
        federated: FederatedGenerator | None = None,
        store: ModelStore | None = None,
    ) -> None:
        self.generator: Generator = build("generator", Component(config.name, config.settings))
        self.config, self.data, self.progress = config, data, progress
        self.train_seconds = 0.0
        self.unpublished: OutputError | None = None
        self._store, self._published = store, False
        self._federated = federated if self.generator.federated() is not None else None
        images, labels = data.server_part(self._learns_from)
        if self._learns_from != "none":
            self._check_classes(labels)
        source = self._federated.digest() if self._federated else digest(images, labels)
        self.learned = TrainingImages(images, labels, data.source.classes)
        self._hash = ""
        here = "cuda" if torch.cuda.is_available() else "cpu"
        with self.refusals():
            self.generator.check_classes(data.source.classes)
            training = self.generator.training_settings()
        own = code_hash("generator", config.name)
        self.code = [] if own is None else [own]
        self.key = settings_digest(FORMAT, config.name, training, here, data.source.classes, source, *self.code)[:16]
        self.folder = cache_root(config) / "generators" / f"{config.name.replace(':', '.')}-{self.key}"
        made = environment()
        self.versions: dict[str, str] = made["packages"]
        self.manifest = {
            "generator": config.name,
            "training": {"settings": training, "data_sha256": source, "device": here, "key": self.key},
            "classes": data.source.classes,
            "fl_ray": {"version": made["fl_ray"], "git_revision": made["git_revision"], "format": FORMAT},
        }

    @property
    def _learns_from(self) -> RealImages:
        """Which of the server's images the generator is trained on."""
        return "none" if self._federated else self.generator.learns_from

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """What a generator refuses, or a GPU has no room for, is a setting of the recipe."""
        try:
            yield
        except FlRayError:
            raise
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0]
            raise self.refused(
                f"{why} Lower generator.block_size (images made together), generator.batch_size (of its training) or "
                "generator.pool.actors, where it has them"
            ) from error
        except ValueError as error:
            raise self.refused(error) from error

    def refused(self, why: object) -> SettingError:
        """The error that says so."""
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
        """Train the generator unless the cache or the store holds it; its folder.

        Raises:
            OutputError: the cache can't be written.
            SettingError: the generator refuses its settings or its images, or its kept weights are damaged.
        """
        folder = self.folder / "weights"
        start, brought = time.perf_counter(), False

        def write(draft: Path) -> None:
            nonlocal brought
            brought = self._store is not None and self._store.bring("generators", self.folder.name, draft)
            if brought:
                return
            legs = draft / _LEGS_FILE
            before = float(legs.read_text(encoding="utf-8")) if legs.exists() else 0.0
            try:
                self._train(draft)
            finally:  # whatever has ended this leg
                seconds = before + time.perf_counter() - start
                if any(draft.iterdir()):  # it has come to something
                    legs.write_text(f"{seconds:.3f}", encoding="utf-8")
            legs.unlink(missing_ok=True)
            noted = {"seconds": seconds, "sha256": weights_hash(draft)}
            (draft / TRAINED_FILE).write_text(json.dumps(noted), encoding="utf-8")

        if not folder.exists():
            make_writable(self.folder, self.config)
        with self.refusals():
            trained = stored_folder(folder, write) and not brought
        if trained:
            self.train_seconds = time.perf_counter() - start
            self.progress.message(f"generator ready after {self.train_seconds:.0f} s, kept in {folder}")
        if trained or not self._hash:
            found = self._checked(folder)
            if self._hash not in ("", found):
                raise SettingError(
                    f"generator {self.config.name}: its weights in {folder} were taken away and trained anew while "
                    "this run used them, and have come out with other bits; run again"
                )
            self._hash = found
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
        return self._hash

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
            store.publish("generators", self.folder.name, folder, again)
        except OutputError as error:
            self.unpublished = error
            self.progress.message(f"{error}; the generator is kept in {folder} alone")

    def _train(self, draft: Path) -> None:
        if self._federated:
            self.generator.store(self._federated.train(draft), self.learned, draft)
            return
        if len(self.learned.labels):
            from generators.training import interrupted

            goes_on = ", from the checkpoint of a training that was interrupted" if interrupted(draft) else ""
            self.progress.message(f"pre-training the generator on {len(self.learned.labels)} real images{goes_on}")
        self.generator.fit(
            self.learned,
            draft,
            lambda step, steps, loss: self.progress.steps("pre-training", step, steps, f"loss {loss:.3f}"),
        )

    def training_seconds(self) -> float:
        """What the training took when the generator was made, over all its legs (but for one that was killed)."""
        return self._noted(self.prepare())["seconds"]

    def spent(self) -> Ledger:
        """What clients have spent on training the generator; nothing where the server did that."""
        return self._federated.spent(self.prepare()) if self._federated else Ledger()

    def report(self) -> dict[str, float | str]:
        """What was done, for summary.json; seconds are of this process alone (0 where the generator was there)."""
        return {
            "key": self.key,
            "weights": self._hash,
            "real_images": len(self.learned.labels),
            **self._real_images_by_domain(),
            "train_seconds": self.train_seconds,
        }

    def _real_images_by_domain(self) -> dict[str, int]:
        source = self.data.source
        if source.domains is None or self._learns_from == "none":
            return {}
        counts = np.bincount(source.domains[getattr(self.data, self._learns_from)], minlength=len(source.domain_names))
        return {f"real_images_of_{name}": int(count) for name, count in zip(source.domain_names, counts, strict=True)}
