"""GenFL (arXiv 2503.20166): FedAvg joined by a server-side model trained on generated images.

Clients share label statistics once. Each round the server generates images of under-represented classes and trains an
augmented model w_a on all it has generated, in parallel with the clients;

    w_{t+1} = kappa1 * sum_n rho_n w_n + kappa2 * w_a.

Stated by the paper: label sharing, parallel training, this sum with static kappas. Our reconstruction: w_a starts from
w_t, kappa1 + kappa2 = 1 with 0.5 each by default, an amount of images per round up to a cap, how their classes are
chosen, noisy or coarser label statistics, and kappas that change with the round.
"""

from __future__ import annotations

import numpy as np
import torch

from fl_ray.aggregation import ExactSum, combine
from fl_ray.allocation.categories import ClassChoice, class_amounts
from fl_ray.context import RunContext
from fl_ray.data.label_sharing import LabelSharing, SharedLabels
from fl_ray.errors import SettingError
from fl_ray.methods.base import require_counts
from fl_ray.methods.fedavg import FedAvg
from fl_ray.methods.kappa import KappaPolicy, kappa_by_accuracy, kappa_by_decay, kappa_by_emd, kappa_by_loss
from fl_ray.runtime.base import Pending, RoundResult
from generators.stored import StoredGenerator

__all__ = ["GenFL"]


class GenFL(FedAvg):
    """GenFL. ``kappa1`` = 0 is AIGC-only (no client trains), ``kappa2`` = 0 is FedAvg.

    Args:
        kappa1: weight of the clients' average; default: 1 - kappa2.
        kappa2: weight of the augmented model, of ``static``; where ``decay`` begins. kappa1 + kappa2 = 1.
        kappa_policy: kappa2 of a round (``fl_ray.methods.kappa``): ``static``; ``emd``, by how skewed the round's
            clients are, according to what they shared; ``heldout_accuracy`` or ``heldout_loss``, by how good the
            clients' average and the augmented model are on the public images, which neither trains on (but a generator
            that has learnt from them speaks for the augmented model); ``decay``.
        kappa_max: largest kappa2 of ``emd``.
        kappa_decay: of ``decay``: kappa2 is multiplied by it after each round, down to
        kappa_floor: of ``decay``.
        class_choice: ``deficit``, ``uniform`` or ``proportional``, see ``fl_ray.allocation.categories``.
        label_sharing: what clients tell of their labels: ``counts``, ``presence`` or ``noisy`` counts, see
            ``fl_ray.data.label_sharing``; nothing with ``uniform`` images, unless ``emd`` asks.
        epsilon: privacy budget of a client, of ``noisy``.
        images_per_round: images generated in each round, until
        max_images: the server has this many.
        server_epochs: epochs of the augmented model per round; default: training.local_epochs.
    """

    asynchronous = False  # its augmented model and the clients' updates belong to the same round

    def __init__(
        self,
        kappa1: float | None = None,
        kappa2: float = 0.5,
        kappa_policy: KappaPolicy = "static",
        kappa_max: float = 0.9,
        kappa_decay: float = 0.95,
        kappa_floor: float = 0.0,
        class_choice: ClassChoice = "deficit",
        label_sharing: LabelSharing = "counts",
        epsilon: float = 1.0,
        images_per_round: int = 200,
        max_images: int = 2000,
        server_epochs: int | None = None,
    ) -> None:
        super().__init__()
        kappa1 = 1 - kappa2 if kappa1 is None else kappa1
        for name, value in {"kappa1": kappa1, "kappa2": kappa2}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, but it must be in [0, 1], with kappa1 + kappa2 = 1")
        if abs(kappa1 + kappa2 - 1) > 1e-6:
            raise ValueError(
                f"kappa1 + kappa2 is {kappa1 + kappa2:g} ({kappa1} + {kappa2}), but it must be 1; set "
                f"kappa1 to {1 - kappa2:g} or to null"
            )
        for name, value in {"kappa_max": kappa_max, "kappa_decay": kappa_decay}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}, but it must be in (0, 1]")
        if kappa_policy == "decay" and not 0 <= kappa_floor <= kappa2:
            raise ValueError(f"kappa_floor is {kappa_floor}, but it must be in [0, kappa2], that is, [0, {kappa2}]")
        if not epsilon > 0:
            raise ValueError(f"epsilon is {epsilon}, but it must be positive")
        require_counts(images_per_round=images_per_round, max_images=max_images, server_epochs=server_epochs)
        self.kappa2, self.kappa_policy = kappa2, kappa_policy
        self.kappa_max, self.kappa_decay, self.kappa_floor = kappa_max, kappa_decay, kappa_floor
        self.class_choice, self.label_sharing, self.epsilon = class_choice, label_sharing, epsilon
        self.images_per_round, self.max_images, self.server_epochs = images_per_round, max_images, server_epochs
        self.uses_generator = kappa2 > 0 or kappa_policy not in ("static", "decay")
        self.trains_clients = kappa1 > 0 or kappa_policy != "static"
        self._made = np.zeros(0, dtype=np.int64)
        self._images: object = None
        self._held_out: object = None
        self._pending: Pending | None = None
        self._augmented: np.ndarray | None = None
        self._augmented_loss = float("nan")

    def setup(self, run: RunContext) -> None:
        if not self.uses_generator:
            return
        self._check_enough(run)
        self._labels = SharedLabels(run.data, self.label_sharing, self.epsilon, run.config.seed)
        if len(self._made) == 0:  # not resumed
            self._made = np.zeros(run.data.num_classes, dtype=np.int64)
            run.notes["kappa2"] = []
            if self.class_choice != "uniform" or self.kappa_policy == "emd":  # otherwise nothing reads them
                run.ledger.bytes_up += self._labels.bytes_per_client * run.config.data.clients
                run.notes["label_sharing"] = self._labels.note()
        else:
            self._images = self._fetch(run)
        if self.kappa_policy in ("heldout_accuracy", "heldout_loss"):
            if len(run.data.public) == 0:
                raise SettingError(
                    f"method.kappa_policy is {self.kappa_policy}, but data.public_fraction is 0, so the server has no "
                    "images to test on; raise it, or take another policy"
                )
            if isinstance(run.synthesis.generator, StoredGenerator) and run.synthesis.generator.learns_from == "public":
                raise SettingError(
                    f"method.kappa_policy is {self.kappa_policy}, which tests on the public images, but the augmented "
                    "model trains on these themselves (generator.part is public); take part reserve, or another policy"
                )
            self._held_out = run.runtime.put(run.data.public_images, run.data.public_labels)

    def _check_enough(self, run: RunContext) -> None:
        """A generator that has a limited number of images must have what the classes may be given."""
        available = run.synthesis.available()
        classes, uniform = run.data.num_classes, self.class_choice == "uniform"
        most = -(-self.max_images // classes) if uniform else self.max_images
        if available is not None and available.min() < most:
            of_all = available.min() * classes
            advice = f"lower it to {of_all if uniform else available.min()}"
            if not uniform and self.max_images <= of_all:
                advice += ", or take class_choice uniform"
            raise SettingError(
                f"method.max_images is {self.max_images}, so a class may be given {most} images, but the generator "
                f"{run.config.generator.name} has {available.min()} of one; {advice}"
            )

    def before_training(self, run: RunContext, round_number: int, weights: np.ndarray, cohort: np.ndarray) -> None:
        if not self.uses_generator:
            return
        amount = min(self.images_per_round, self.max_images - int(self._made.sum()))
        if amount > 0:
            counts = self._labels.total(cohort)
            self._made = self._made + class_amounts(self.class_choice, counts, self._made, amount)
            self._images = self._fetch(run)
        run.notes["synthetic_images"] = self._made.tolist()
        self._pending = run.runtime.train_on_server(self._images, weights, round_number, self.epochs_on_server(run))

    def _fetch(self, run: RunContext) -> object:
        with run.phases.phase("synthesis"):
            return run.runtime.put(*run.synthesis.images(self._made, run.config.seed))

    def after_training(self, run: RunContext) -> None:
        if self._pending is not None:
            self._augmented, self._augmented_loss = self._pending.result()

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        averaged = super().aggregate(run, round_number, weights, result) if self.trains_clients else weights
        if not self.uses_generator:
            return averaged
        kappa2 = 0.0
        if ExactSum.fits(torch.from_numpy(np.array(self._augmented))[None]).item():
            kappa2 = self._kappa2(run, round_number, averaged, result)
        else:
            run.notes["augmented_left_out"] = run.notes.get("augmented_left_out", 0) + 1
            run.progress.message(f"round {round_number + 1}: the augmented model is not finite and is left out")
        run.notes["kappa2"] = [*run.notes["kappa2"], kappa2]
        run.metrics["kappa2"] = kappa2
        if kappa2 in (0.0, 1.0):
            return averaged if kappa2 == 0 else self._augmented
        return combine([(1 - kappa2, averaged), (kappa2, self._augmented)])

    def _kappa2(self, run: RunContext, round_number: int, averaged: np.ndarray, result: RoundResult) -> float:
        if self.kappa_policy == "static":
            return self.kappa2
        if self.kappa_policy == "decay":
            return kappa_by_decay(self.kappa2, self.kappa_decay, self.kappa_floor, round_number)
        if self.kappa_policy == "emd":
            shares = np.array([record.share for record in result.included])
            clients = np.array([record.client for record in result.included])
            return kappa_by_emd(shares / shares.sum(), self._labels.distances(clients), self.kappa_max)
        clients, augmented = run.runtime.evaluate([averaged, self._augmented], self._held_out)
        if self.kappa_policy == "heldout_accuracy":
            return kappa_by_accuracy(clients.accuracy, augmented.accuracy)
        return kappa_by_loss(clients.loss, augmented.loss)

    def server_samples(self, run: RunContext, round_number: int) -> int:
        return int(self._made.sum()) * self.epochs_on_server(run) if self.uses_generator else 0

    def train_loss(self, result: RoundResult) -> float:
        return result.train_loss if self.trains_clients else self._augmented_loss

    def state(self) -> dict[str, np.ndarray]:
        return {"made": self._made} if self.uses_generator else {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self._made = state.get("made", self._made)
