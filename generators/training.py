"""Training a generator's LightningModule for a number of steps with Lightning's Trainer, over interruptions."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from generators.base import key_seed

__all__ = ["drop_checkpoint", "fit_steps", "interrupted", "seeded"]

CHECKPOINT_EVERY_S = 30.0
_CHECKPOINT, _DRAFT = "training.ckpt", "training.draft"
_ROWS, _NOISE = range(2)  # purposes of a step's seeds


class _Batches(IterableDataset):
    """Batches of tensors that are in memory, drawn with replacement; step n's rows depend on (seed, n) alone."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int, done: int, steps: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.done, self.steps = seed, done, steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self.done, self.steps):
            generator = torch.Generator().manual_seed(key_seed(self.seed, step, _ROWS))
            rows = torch.randint(len(self.images), (self.batch_size,), generator=generator)
            yield self.images[rows], self.labels[rows]

    def __len__(self) -> int:
        return self.steps


class _Steps(pl.Callback):
    """Seeds every step's noise by (seed, step), tells how far it is, and leaves a checkpoint every so many seconds."""

    def __init__(
        self, checkpoint: Path | None, seed: int, steps: int, progress: Callable[[int, int, float], None]
    ) -> None:
        self.checkpoint, self.seed, self.steps, self.progress = checkpoint, seed, steps, progress
        self.done, self._saved = 0, time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        torch.manual_seed(key_seed(self.seed, batch_idx, _NOISE))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Tensor],
        batch: object,
        batch_idx: int,
    ) -> None:
        self.done = batch_idx + 1
        if (
            self.checkpoint is not None
            and self.done < self.steps
            and time.monotonic() - self._saved >= CHECKPOINT_EVERY_S
        ):
            draft = self.checkpoint.with_name(_DRAFT)
            trainer.save_checkpoint(draft)
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.replace(self.checkpoint)
            self._saved = time.monotonic()
        if self.done % 20 == 0 or self.done == self.steps:
            loss = float(outputs["loss"])
            if not math.isfinite(loss):
                raise ValueError(f"the loss of the training is {loss} after step {self.done}; lower lr")
            self.progress(self.done, self.steps, loss)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["steps_done"] = self.done


def fit_steps(
    module: pl.LightningModule,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    steps: int,
    progress: Callable[[int, int, float], None],
    *,
    seed: int,
    folder: Path | None = None,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
) -> None:
    """Train ``module`` for ``steps`` batches, on a GPU where there is one.

    Batches and all that the module draws at random are fixed by (``seed``, step). A training that is interrupted leaves
    its last checkpoint in ``folder``, and the next call goes on from there: the weights are those of an undisturbed
    training to the bit (on a GPU, whose kernels may add up in any order, to rounding). ``drop_checkpoint`` takes the
    checkpoint away.

    Args:
        images, labels: [N, ...] and [N], on the CPU.
        folder: where checkpoints go; None: nothing is kept.
        progress: hears (step, steps, loss) every 20 steps and at the end.

    Raises:
        ValueError: the checkpoint that is there can't be read, or the loss is not finite.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    checkpoint, done = folder / _CHECKPOINT if folder is not None else None, 0
    if checkpoint is not None and checkpoint.exists():
        try:
            done = torch.load(checkpoint, map_location="cpu", weights_only=True)["steps_done"]
        except (RuntimeError, EOFError, KeyError, UnpicklingError) as error:
            raise ValueError(f"{checkpoint} is no checkpoint of a training; remove it to begin anew") from error
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # The data are tensors in memory: a loader worker would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*IterableDataset.*`__len__` defined.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # it begins at ``done``
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="auto",
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Steps(checkpoint, seed, steps, progress)],
        )
        batches = DataLoader(_Batches(images, labels, batch_size, seed, done, steps), batch_size=None)
        try:
            trainer.fit(module, batches, ckpt_path=checkpoint if done else None, weights_only=True)
        except SystemExit as ended:  # how Lightning passes Ctrl-C on, with the signal switched off
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from ended


def interrupted(folder: Path) -> bool:
    """Whether a training that was interrupted goes on in this folder."""
    return (folder / _CHECKPOINT).exists()


def drop_checkpoint(folder: Path) -> None:
    """Take the checkpoint of a training away, when its weights are kept."""
    for name in (_CHECKPOINT, _DRAFT):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Pre-training by random numbers of its own, and on all cores (or $OMP_NUM_THREADS): it runs alone, in the driver.

    The last bits of the weights depend on the threads; they are trained once and kept, so that all runs that read one
    cache have the same.
    """
    before, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(wanted) if wanted.isdigit() else os.cpu_count() or 1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
