"""Training a generator's LightningModule for a number of steps with Lightning's Trainer."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["fit_steps", "seeded"]


class _Batches(IterableDataset):
    """Endless random batches of tensors that are in memory; drawn with replacement."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, steps: int) -> None:
        self.images, self.labels, self.batch_size, self.steps = images, labels, batch_size, steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            rows = torch.randint(len(self.images), (self.batch_size,))
            yield self.images[rows], self.labels[rows]

    def __len__(self) -> int:
        return self.steps


class _Report(pl.Callback):
    def __init__(self, steps: int, progress: Callable[[int, int, float], None]) -> None:
        self.steps, self.progress = steps, progress

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Tensor],
        batch: object,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % 20 == 0 or batch_idx + 1 == self.steps:
            self.progress(batch_idx + 1, self.steps, float(outputs["loss"]))


def fit_steps(
    module: pl.LightningModule,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    steps: int,
    progress: Callable[[int, int, float], None],
) -> None:
    """Train ``module`` for ``steps`` batches, on a GPU where there is one; ``progress`` hears (step, steps, loss)."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The data are tensors in memory: a loader worker would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*IterableDataset.*`__len__` defined.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Report(steps, progress)],
        )
        trainer.fit(module, DataLoader(_Batches(images, labels, batch_size, steps), batch_size=None))


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
