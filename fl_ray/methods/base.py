"""What a method is: the stages that the round loop (``fl_ray.server``) calls. Constructor arguments are settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from fl_ray.config import Component, RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData
from fl_ray.devices.fleet import Fleet
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import Evaluation, Task
from fl_ray.synthesis import Synthesis
from generators.base import Generator

__all__ = ["Method", "require_counts"]


def require_counts(**values: int | None) -> None:
    """Refuse what is neither left out nor a whole number of at least one."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but it must be at least 1")


class Method(ABC):
    """Base of all methods. Rounds count from 0 here; weights are flat float32 vectors [size].

    Attributes:
        needs: ``sum``: the shares' weighted average of updates is enough, and memory does not grow with the cohort;
            ``individual``: ``RoundResult.weights`` holds every client's weights.
        uses_generator: the recipe needs a ``generator``.
        needs_classes: its images must be of the classes that they are asked for.
        trains_clients: clients train in this method's rounds.
        exchanges_weights: clients receive and send the model each round.
        weighs_clients: a client's share counts in the average.
        asynchronous: updates of clients that started from different versions may be averaged.
        server_waits: what the server trains on begins when the clients are done, not beside them.
        server_epochs: epochs that the server trains in a round, where it does; None: training.local_epochs.
        own_models: what clients train where that is not the run's model: client k the one of number k modulo their
            count. Needs ``individual``; the run's model is then the server's.
        keeps_client_models: what clients have trained is kept, and found by a run that would train the same
            (``fl_ray.client_models``). Needs ``individual``.
        proximal: mu of a term mu/2 ||w - start||^2 that is added to every client's loss.
    """

    needs: Literal["sum", "individual"] = "sum"
    uses_generator: bool = False
    needs_classes: bool = True
    trains_clients: bool = True
    exchanges_weights: bool = True
    weighs_clients: bool = True
    asynchronous: bool = False
    proximal: float = 0.0
    server_waits: bool = False
    server_epochs: int | None = None
    own_models: tuple[Component, ...] = ()
    keeps_client_models: bool = False

    def input_files(self) -> list[str]:
        """Files that the settings name and that decide results, as they are written there."""
        return []

    def check(self, config: RunConfig, generator: Generator | None) -> None:
        """Refuse settings that the method can't run with, before data are read or a generator is trained."""

    def equip(
        self, config: RunConfig, data: FederatedData, fleet: Fleet, synthesis: Synthesis | None
    ) -> tuple[FederatedData, Fleet]:
        """What the clients have and how their devices run, before anything starts; also where a run is resumed."""
        return data, fleet

    def setup(self, run: RunContext) -> None:
        """Once, before round 0."""

    def start(self, run: RunContext, weights: np.ndarray) -> Iterator[np.ndarray]:
        """The work before round 0, on the weights that were drawn; after ``setup``.

        Yields the weights after every step that shall be kept. A run that is cut there calls it again, with these
        weights, and ``state`` and ``run.notes`` as they were then; one that has begun its rounds does not.
        """
        yield from ()

    def begin_round(self, run: RunContext, round_number: int) -> None:
        """First of all in a round; it may change ``run.fleet``, by the round's number alone."""

    def cohort(self, run: RunContext, round_number: int, weights: np.ndarray) -> np.ndarray:
        """The clients of a round, in ascending order: as ``sampling`` chooses them."""
        return run.sampler.choose(run, round_number, run.config.cohort_size, weights)

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        """Each client's share of the average: its part of the cohort's samples (or equal, see ``ClientSampler``)."""
        cohort = cohort[run.data.partition.sizes[cohort] > 0]  # nobody trains on nothing
        sizes = run.data.partition.sizes[cohort]
        shares = np.full(len(cohort), 1 / max(len(cohort), 1)) if run.sampler.equal_shares else sizes / sizes.sum()
        return [Task(int(client), float(share)) for client, share in zip(cohort, shares, strict=True)]

    def link_bytes(self, run: RunContext, cohort: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that each client of a cohort receives and sends in a round, int64 [cohort] each."""
        down, up = (run.model_bytes, run.upload_bytes) if self.exchanges_weights else (0, 0)
        return np.full(len(cohort), down), np.full(len(cohort), up)

    def before_training(self, run: RunContext, round_number: int, weights: np.ndarray, cohort: np.ndarray) -> None:
        """Begin what the server does while the clients train."""

    def after_training(self, run: RunContext) -> None:
        """Wait for what ``before_training`` began; counts as training time."""

    @abstractmethod
    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        """The next global weights."""

    def server_samples(self, run: RunContext, round_number: int) -> int:
        """Samples times epochs that the server trained on in this round (for the virtual clock)."""
        return 0

    def epochs_on_server(self, run: RunContext) -> int:
        return self.server_epochs or run.config.training.local_epochs

    def train_loss(self, result: RoundResult) -> float:
        """The round's training loss in the history."""
        return result.train_loss

    def evaluate(self, run: RunContext, weights: np.ndarray, images: Any = None) -> Evaluation:
        """The method's model (or models) on the global test images, or on those of a handle of ``Runtime.put``."""
        return run.runtime.evaluate([weights], images)[0]

    def evaluate_at_clients(
        self, run: RunContext, weights: np.ndarray, clients: Sequence[int]
    ) -> list[Evaluation | None]:
        """The method's model (or models) on the clients' held-out images."""
        return run.runtime.evaluate_clients(self.client_models(run, weights), clients)

    def guided_samples(self, run: RunContext) -> dict[int, tuple[np.ndarray, np.ndarray]] | None:
        """Synthetic images that each client has guided, and their classes, for samples.png; None: nobody did."""
        return None

    def client_models(self, run: RunContext, weights: np.ndarray) -> dict[int | None, np.ndarray]:
        """Which weights are tested on clients' held-out images: by client, or ``None`` for all clients."""
        return {None: weights}

    def models(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """What model.safetensors holds: flat weights by prefix of the tensors' names."""
        return {"": weights}

    def model_of(self, config: RunConfig, client: int) -> Component:
        """What a client trains."""
        return self.own_models[client % len(self.own_models)] if self.own_models else config.model

    def uploaded(self) -> dict[int, np.ndarray]:
        """Clients' own models that the run keeps in ``uploads``, by client."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold beside the weights."""
        return {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what ``state`` gave."""
