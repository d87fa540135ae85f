"""The generator pool: actors that share CPUs or GPUs and make blocks of images, each the next that is waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from generators.base import Block, Generator, Sampler
from generators.cache import weights_hash

__all__ = ["ActorsLostError", "GeneratorPool", "LocalPool"]

_IN_FLIGHT = 2  # blocks at an actor: it never waits for the driver
_LOST = (RayActorError, ObjectLostError, OutOfMemoryError)
_RESTARTS = 3  # of an actor that dies; its blocks are made again


class ActorsLostError(RuntimeError):
    """No actor of the pool is left."""


class LocalPool:
    """The pool's interface in this process.

    Args:
        device: on which images are made; default: CUDA where it is.
        threads: torch threads that make them; default: as many as there are set.
        weights: hash that the folder's weights must have; default: any.
    """

    def __init__(
        self,
        generator: Generator,
        folder: Path,
        device: str | None = None,
        threads: int | None = None,
        weights: str | None = None,
    ) -> None:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        self._threads = threads
        self._sampler = _load(generator, folder, device or here, weights)

    def make(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, np.ndarray]]:
        """Every block with its images, as they are made."""
        for block in blocks:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads or before)
            try:
                images = self._sampler.sample(block)
            finally:
                torch.set_num_threads(before)
            yield block, images

    def report(self) -> dict[str, float]:
        """What the sampler has counted."""
        return self._sampler.report()

    def close(self) -> None:
        """Nothing to let go of."""


@ray.remote
class _GeneratorActor:
    """Loads in a call, not in its constructor: what the generator raises then reaches the driver as it is."""

    def __init__(
        self,
        generator: Generator,
        folder: Path,
        threads: int,
        device: str,
        weights: str | None,
        set_up: Callable[[], None] | None,
    ) -> None:
        torch.set_num_threads(threads)
        if set_up is not None:
            set_up()
        self.generator, self.folder, self.device, self.weights = generator, folder, device, weights
        self._sampler: Sampler | None = None

    def started(self) -> None:
        """Answers once Ray has placed and started it."""

    def load(self) -> Sampler:
        """The sampler, loaded by the first call (of a restarted actor, too)."""
        if self._sampler is None:
            if self.device == "cuda" and not torch.cuda.is_available():
                raise ValueError(
                    f"an actor on {ray.util.get_node_ip_address()} has a share of a GPU, but PyTorch finds no CUDA "
                    "there; install a build of torch for it, or set generator.pool.gpus to 0"
                )
            self._sampler = _load(self.generator, self.folder, self.device, self.weights)
        return self._sampler

    def warm_up(self) -> None:
        """Load."""
        self.load()

    def make(self, block: Block) -> np.ndarray:
        return self.load().sample(block)

    def report(self) -> dict[str, float]:
        return self.load().report()


def _load(generator: Generator, folder: Path, device: str, weights: str | None) -> Sampler:
    """A sampler of the weights that are expected: another process may have trained them anew, with other bits."""
    if weights is not None and weights_hash(folder) != weights:
        raise ValueError(f"the weights in {folder} are not those that it began with; run again")
    return generator.load(folder, torch.device(device))


def _result(reference: ray.ObjectRef) -> Any:
    """What a call gave; a refusal as the generator raised it, without the actor's traceback around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, (ValueError, torch.OutOfMemoryError)):
            raise error.cause from None
        raise


class GeneratorPool:
    """Ray actors, each with the generator loaded once.

    An actor that dies is started again and makes its blocks again; one that dies too often is given up, and the others
    take its blocks. A block depends on nothing but its key, so that changes no image.

    Args:
        generator, folder: what to load, and the folder (on a disk that all nodes see) with its weights.
        actors: how many.
        cpus, gpus: Ray resources of each; fractions of a GPU share it.
        threads: torch threads of each.
        timeout_s: for Ray to start them; loading the generator is not counted.
        device: on which they make images: ``cpu`` or ``cuda``.
        weights: hash that the folder's weights must have; default: any.
        set_up: each actor's process calls it when it starts, before anything is loaded.

    Raises:
        TimeoutError: Ray did not start all actors in time: others hold the resources.
        ActorsLostError: an actor died too often while it loaded.
        ValueError: as ``Generator.load``; or there is no such device, or the weights are others.
    """

    def __init__(
        self,
        generator: Generator,
        folder: Path,
        actors: int,
        cpus: float,
        gpus: float,
        threads: int,
        timeout_s: float,
        device: str = "cpu",
        weights: str | None = None,
        set_up: Callable[[], None] | None = None,
    ) -> None:
        kind = _GeneratorActor.options(num_cpus=cpus, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
        arguments = (generator, folder, threads, device, weights, set_up)
        self._actors = {number: kind.remote(*arguments) for number in range(actors)}
        with ExitStack() as unless_ready:
            unless_ready.callback(self.close)
            self._start(actors, timeout_s)
            unless_ready.pop_all()

    def _start(self, actors: int, timeout_s: float) -> None:
        try:
            starting = [actor.started.remote() for actor in self._actors.values()]
            ready, _ = ray.wait(starting, num_returns=actors, timeout=timeout_s)
            if len(ready) < actors:
                raise TimeoutError(f"{len(ready)} of {actors} generator actors started within {timeout_s:g} s")
            for reference in [actor.warm_up.remote() for actor in self._actors.values()]:
                _result(reference)
        except _LOST as error:
            raise ActorsLostError(f"a generator actor died while it loaded the generator: {error}") from error

    def make(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, np.ndarray]]:
        """Every block with its images, in the order in which they are done. ``blocks`` are taken as they are needed.

        Raises:
            ActorsLostError: no actor is left.
            ValueError: as ``Sampler.sample``.
        """
        waiting, again, lost = iter(blocks), list[Block](), ""
        running: dict[ray.ObjectRef, tuple[int, Block]] = {}

        def hand_out() -> None:
            while self._actors:
                busy = Counter(number for number, _ in running.values())
                idlest = min(self._actors, key=busy.__getitem__)
                block = None
                if busy[idlest] < _IN_FLIGHT:
                    block = again.pop() if again else next(waiting, None)
                if block is None:
                    return
                running[self._actors[idlest].make.remote(block)] = (idlest, block)
            raise ActorsLostError(f"the last of the generator's actors is lost ({lost}); see Ray's logs")

        hand_out()
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            number, block = running.pop(done)
            try:
                images = _result(done)
            except _LOST as error:
                lost = str(error).strip().splitlines()[0]
                again.append(block)
                self._give_up(number)
                hand_out()
                continue
            hand_out()
            yield block, images

    def report(self) -> dict[str, float]:
        """What the actors' samplers have counted, added up; an actor that died takes its counts along."""
        total: Counter[str] = Counter()
        for reference in [actor.report.remote() for actor in self._actors.values()]:
            try:
                total.update(_result(reference))
            except _LOST:
                continue
        return dict(total)

    def _give_up(self, number: int) -> None:
        actor = self._actors.pop(number, None)
        if actor is not None:
            ray.kill(actor)

    def close(self) -> None:
        """End the actors."""
        for number in list(self._actors):
            self._give_up(number)
