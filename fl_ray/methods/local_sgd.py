"""What methods that reckon with the clients' SGD steps must know of them: how many, of which size."""

from __future__ import annotations

from fl_ray.context import RunContext
from fl_ray.errors import SettingError
from fl_ray.model import ImageShape, build_module
from fl_ray.runtime.local_training import count_batches, has_batch_norm, lr_factor

__all__ = ["LocalSGD"]


class LocalSGD:
    """The clients' SGD in one run.

    A LightningModule of the user's own keeps its own optimiser, which is not looked at: a method that uses this is
    right for it only if that is SGD as ``training`` says.

    Raises:
        SettingError: ``training.optimizer`` is not ``sgd``.
    """

    def __init__(self, run: RunContext) -> None:
        training = run.config.training
        if training.optimizer != "sgd":
            raise SettingError(
                f"training.optimizer is {training.optimizer}, but method {run.config.method.name} reckons with steps "
                "of SGD; use sgd"
            )
        self._training, self._rounds = training, run.config.rounds
        self._sizes = training.samples_of(run.data.partition.sizes)
        self._normalises = has_batch_norm(build_module(run.config.model, ImageShape.of(run.data.source), training))

    def steps(self, client: int) -> int:
        """Steps of a client in a round."""
        batches = count_batches(int(self._sizes[client]), self._training.batch_size, self._normalises)
        return self._training.local_epochs * batches

    def lr(self, round_number: int) -> float:
        """Size of the steps in a round, after ``training.lr_schedule``."""
        return self._training.lr * lr_factor(self._training, round_number, self._rounds)
