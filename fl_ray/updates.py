"""Post-processors of a client's update, applied in a chain before it leaves the client: clipping and compression.

They act on the parameters' part of the update; buffers (running statistics) travel as they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fl_ray.config import Component
from fl_ray.randomness import torch_generator
from fl_ray.recipes import build

__all__ = ["Message", "NormClip", "Quantise", "TopK", "UpdateChain", "UpdateProcessor"]


@dataclass(frozen=True)
class Message:
    """What an update takes on a link: ``values`` of its ``entries``, of ``bits`` bits each (with their 4-byte indices,
    unless all are sent), and ``extra_bytes`` beside them.
    """

    entries: int
    values: int
    bits: int = 32
    extra_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        indices = 4 * self.values if self.values < self.entries else 0
        return math.ceil(self.values * self.bits / 8) + indices + self.extra_bytes


class UpdateProcessor(ABC):
    """One link of the chain; constructor arguments are settings."""

    @abstractmethod
    def __call__(self, update: Tensor, draws: torch.Generator) -> Tensor:
        """The update as the server will read it, float32 [parameters]."""

    def message(self, before: Message) -> Message:
        """What it makes of the message; most change nothing."""
        return before


class NormClip(UpdateProcessor):
    """Scale the update down to L2 norm ``norm`` where it is longer."""

    def __init__(self, norm: float = 1.0) -> None:
        if not norm > 0:
            raise ValueError(f"norm is {norm}, but it must be positive")
        self.norm = norm

    def __call__(self, update: Tensor, draws: torch.Generator) -> Tensor:
        length = float(update.double().norm())
        return update * (self.norm / length) if length > self.norm else update


class Quantise(UpdateProcessor):
    """Unbiased stochastic rounding to ``bits`` bits, evenly spaced over the update's range (QSGD, arXiv 1610.02132).

    The range is sent as two fp32 numbers. Entries that are 0 (as after ``top_k``) stay 0 and need not be sent.
    """

    def __init__(self, bits: int = 8) -> None:
        if not 1 <= bits <= 16:
            raise ValueError(f"bits is {bits}, but it must be in 1..16")
        self.bits = bits

    def __call__(self, update: Tensor, draws: torch.Generator) -> Tensor:
        low, high = torch.aminmax(update)
        step = (high - low) / (2**self.bits - 1)
        if not step > 0:
            return update
        noise = torch.rand(update.shape, generator=draws)
        rounded = low + ((update - low) / step + noise).floor().clamp_(max=2**self.bits - 1) * step
        return torch.where(update == 0, update, rounded)

    def message(self, before: Message) -> Message:
        return replace(before, bits=self.bits, extra_bytes=before.extra_bytes + 8)


class TopK(UpdateProcessor):
    """Keep the ``fraction`` of entries that are largest in size (arXiv 1704.05021); each is sent with its index.

    Of equal entries the first are kept. There is no error feedback: what is left out is lost.
    """

    def __init__(self, fraction: float = 0.01) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}, but it must be in (0, 1]")
        self.fraction = fraction

    def _kept(self, size: int) -> int:
        return max(1, round(self.fraction * size))

    def __call__(self, update: Tensor, draws: torch.Generator) -> Tensor:
        order = torch.sort(update.abs(), descending=True, stable=True).indices
        kept = order[: self._kept(len(update))]
        sparse = torch.zeros_like(update)
        sparse[kept] = update[kept]
        return sparse

    def message(self, before: Message) -> Message:
        return replace(before, values=min(before.values, self._kept(before.entries)))


class UpdateChain:
    """The recipe's ``updates``, applied in order.

    Args:
        is_parameter: bool [size], of the flat weights.
    """

    def __init__(self, components: Sequence[Component], is_parameter: np.ndarray, seed: int) -> None:
        self._links: list[UpdateProcessor] = [build("update", component) for component in components]
        self._parameters = torch.from_numpy(is_parameter)
        self._seed = seed

    def __bool__(self) -> bool:
        return bool(self._links)

    def apply(self, update: Tensor, turn: int, client: int) -> Tensor:
        """The processed update [size]; random draws have the key (seed, "update", turn, client)."""
        draws = torch_generator(self._seed, "update", turn, client)
        values = update[self._parameters]
        for link in self._links:
            values = link(values, draws)
        processed = update.clone()
        processed[self._parameters] = values
        return processed

    def upload_bytes(self) -> int:
        """Bytes of one client's update on its uplink."""
        parameters = int(self._parameters.sum())
        message = Message(parameters, parameters)
        for link in self._links:
            message = link.message(message)
        return message.size_bytes + 4 * (len(self._parameters) - parameters)
