"""A vector per client, for methods whose clients keep state between rounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["ClientVectors"]

_PREFIX = "client/"


class ClientVectors:
    """Float32 [size] by client; zero until the client's first update has come in.

    It lives with the method, in the driver: where a client is trained next does not matter, and no actor's death loses
    it. Vectors are replaced and never changed: checkpoints hold on to them. Memory grows with the clients that have
    taken part, not with the population.
    """

    def __init__(self) -> None:
        self._vectors: dict[int, np.ndarray] = {}

    def get(self, client: int, like: np.ndarray) -> np.ndarray:
        """A client's vector; zeros shaped as ``like`` where it has none."""
        found = self._vectors.get(client)
        return np.zeros(len(like), dtype=np.float32) if found is None else found

    def commit(self, vectors: Mapping[int, np.ndarray]) -> None:
        """Replace the vectors of these clients."""
        self._vectors.update(vectors)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return {f"{_PREFIX}{client}": vector for client, vector in self._vectors.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what ``state`` gave, out of a state that may hold more."""
        self._vectors = {
            int(name.removeprefix(_PREFIX)): vector for name, vector in state.items() if name.startswith(_PREFIX)
        }
