"""The generator pool: actors that share CPUs or GPUs and make blocks of images, each the next that is waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from generators.base import Block, Generator, Sampler

__all__ = ["GeneratorPool", "LocalPool"]


class LocalPool:
    """The pool's interface in this process."""

    def __init__(self, generator: Generator, folder: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._sampler = generator.load(folder, device)

    def make(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, np.ndarray]]:
        """Every block with its images, as they are made."""
        for block in blocks:
            yield block, self._sampler.sample(block)

    def close(self) -> None:
        """Nothing to let go of."""


@ray.remote
class _GeneratorActor:
    def __init__(self, generator: Generator, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        on_gpu = torch.cuda.is_available() and ray.get_gpu_ids()
        self.sampler: Sampler = generator.load(folder, torch.device("cuda" if on_gpu else "cpu"))

    def ready(self) -> bool:
        return True

    def make(self, block: Block) -> np.ndarray:
        return self.sampler.sample(block)


class GeneratorPool:
    """Ray actors, each with the generator loaded once.

    Args:
        generator, folder: what to load, and the folder (on a disk that all nodes see) with its weights.
        actors: how many.
        cpus, gpus: Ray resources of each; fractions of a GPU share it.
        threads: torch threads of each.
        timeout_s: for Ray to start them.

    Raises:
        TimeoutError: Ray did not start all actors in time: others hold the resources.
    """

    def __init__(
        self, generator: Generator, folder: Path, actors: int, cpus: float, gpus: float, threads: int, timeout_s: float
    ) -> None:
        options = _GeneratorActor.options(num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3)
        self._actors = [options.remote(generator, folder, threads) for _ in range(actors)]
        waiting = [actor.ready.remote() for actor in self._actors]
        ready, _ = ray.wait(waiting, num_returns=actors, timeout=timeout_s)
        ray.get(ready)
        if len(ready) < actors:
            self.close()
            raise TimeoutError(f"{len(ready)} of {actors} generator actors started within {timeout_s:g} s")

    def make(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, np.ndarray]]:
        """Every block with its images, in the order in which they are done."""
        waiting = list(reversed(blocks))
        running: dict[ray.ObjectRef, tuple[Any, Block]] = {}
        # Two blocks in flight for each actor: it never waits for the driver.
        for actor in self._actors * 2:
            if waiting:
                block = waiting.pop()
                running[actor.make.remote(block)] = (actor, block)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, block = running.pop(done)
            if waiting:
                following = waiting.pop()
                running[actor.make.remote(following)] = (actor, following)
            yield block, ray.get(done)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
