"""The audit of a run's folder: who could tell what its clients trained on, from what left them.

Every uploaded classifier and the final model are attacked (``membership``). Where classifiers were uploaded, images
are also drawn out of each by plain inversion, and where they have guided a generator, by that: are these images nearer
to what the client trained on than to images of the same domain that nobody trained on?
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import load_file

from fl_ray.audit.inversion import invert
from fl_ray.audit.membership import Attack, attack, features, shadow_scores
from fl_ray.config import Component, TrainingConfig
from fl_ray.errors import SettingError
from fl_ray.finished_run import FinishedRun
from fl_ray.guides import guide_of
from fl_ray.methods.dense import Dense
from fl_ray.methods.fedlmg import FedLMG
from fl_ray.methods.one_shot import OneShot
from fl_ray.methods.reference import ServerOnly
from fl_ray.model import ImageShape, build_module, initial_module
from fl_ray.progress import Progress
from fl_ray.randomness import key_seed, numpy_generator, seeded_torch
from fl_ray.runtime.local_training import train_locally
from generators.quality.memorisation import Memorisation, equal_counts, memorisation

__all__ = ["Audit", "ModelAudit", "audit_run"]

GLOBAL = "final model"
_LEAST = 10  # images of each kind below which nothing is said


@dataclass
class ModelAudit:
    """What was found of one model.

    Attributes:
        name: ``client 3``, or the final model.
        attacks: by ``loss threshold`` and ``shadow models``; a reason where an attack could not be made.
        inverted, guided: nearest neighbours of images drawn out of it; None where there are none.
        recognised: share of the inverted images that the other clients' classifiers that know their class take for it.
    """

    name: str
    attacks: dict[str, Attack | str] = field(default_factory=dict)
    inverted: Memorisation | None = None
    guided: Memorisation | None = None
    recognised: float | None = None


@dataclass
class Audit:
    """All of a run's models."""

    run: FinishedRun
    models: list[ModelAudit]

    def numbers(self) -> dict[str, float]:
        """The attacks' and the images' main numbers, by model and name."""
        found: dict[str, float] = {}
        for model in self.models:
            for name, made in model.attacks.items():
                if isinstance(made, Attack):
                    found |= {f"audit/{model.name}/{name}/{rate}": getattr(made, rate) for rate in ("auc", "tpr")}
            for kind in ("inverted", "guided"):
                images: Memorisation | None = getattr(model, kind)
                found |= {f"audit/{model.name}/{kind} closer": images.closer} if images is not None else {}
        return found


def audit_run(run: FinishedRun, shadows: int, inversion_steps: int, per_class: int, progress: Progress) -> Audit:
    """Audit a finished run.

    Args:
        shadows: classifiers that the shadow-model attack trains for each model, on the run's public images.
        inversion_steps: of Adam; 0: no inversion.
        per_class: images that inversion makes of each class.

    Raises:
        SettingError: the run has no classifier.
    """
    return Audit(run, _Auditor(run, progress).audit(shadows, inversion_steps, per_class))


class _Auditor:
    def __init__(self, run: FinishedRun, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.config, self.method, self.data, self.folder = run.config, run.method, run.data, run.folder
        self.shape = ImageShape.of(run.data.source)

    def audit(self, shadows: int, steps: int, per_class: int) -> list[ModelAudit]:
        uploads = self.run.uploads()
        audits, training = [], self.config.training
        own = training, training.local_epochs
        for client, module in uploads.items():
            self.progress.message(f"client {client}: attacking its classifier")
            found = ModelAudit(f"client {client}")
            rows, tests = self.data.partition.of(client), self.data.tests_like(client)
            found.attacks = self._attacks(module, rows, tests, self.run.model_of(client), own, shadows, client)
            if steps:
                found.inverted, found.recognised = self._invert(client, uploads, rows, tests, steps, per_class)
            audits.append(found)
        final = self.folder / "model.safetensors"
        tensors = load_file(final)
        if set(tensors) == set(build_module(self.config.model, self.shape, self.config.training).state_dict()):
            rows, tests = self.data.partition.owned(), np.arange(len(self.data.test_labels))
            module = self.run.load(final, self.config.model)
            how, key = self._training_of_the_result(), self.config.data.clients
            attacks = self._attacks(module, rows, tests, self.config.model, how, shadows, key)
            audits.append(ModelAudit(GLOBAL, attacks))
        if not audits:
            raise SettingError(
                f"method {self.config.method.name} leaves no single classifier in {self.folder.path}, so there is "
                "nothing to audit"
            )
        if isinstance(self.method, FedLMG) and uploads:
            guided = self.run.guided_images(uploads, self.progress)
            for client, found in zip(uploads, audits, strict=False):
                rows, tests = self.data.partition.of(client), self.data.tests_like(client)
                if len(guided[client][0]):
                    found.guided = self._near(guided[client][0], rows, tests, client)
        return audits

    def _training_of_the_result(self) -> tuple[TrainingConfig, int] | str:
        """How, and for how many epochs, the run's model was trained, on whatever images; a reason where no shadow can
        be trained so.
        """
        method, training, rounds = self.method, self.config.training, self.config.rounds
        one_shot = isinstance(method, OneShot)
        if method.server.head_only if one_shot else isinstance(method, ServerOnly) and method.head_only:
            return "no shadows of a model whose head alone was trained"
        if isinstance(method, Dense):
            return "no shadows of a model that learned from images drawn for it"
        if one_shot:
            return method.server.training(), method.server.epochs
        own = method.server_epochs if isinstance(method, ServerOnly) else None
        return training, rounds * (own or training.local_epochs)

    def _pairs(self, rows: np.ndarray, tests: np.ndarray, *key: int) -> tuple[np.ndarray, np.ndarray]:
        """As many training rows as test rows, of each class and domain."""
        rng = numpy_generator(self.config.seed, "audit", *key)
        first, second = equal_counts(*self.data.kinds(rows, tests), rng)
        return rows[first], tests[second]

    def _inputs(self, images: np.ndarray) -> torch.Tensor:
        return self.shape.normalise(images, torch.device("cpu"))

    def _attacks(
        self,
        module: torch.nn.Module,
        rows: np.ndarray,
        tests: np.ndarray,
        component: Component,
        how: tuple[TrainingConfig, int] | str,
        shadows: int,
        key: int,
    ) -> dict[str, Attack | str]:
        data = self.data
        rows, tests = self._pairs(rows, tests, key)
        if len(rows) < _LEAST:
            why = f"only {len(rows)} images of its classes in both parts"
            return {"loss threshold": why, "shadow models": why}
        members = features(module, self._inputs(data.images[rows]), torch.from_numpy(data.labels[rows]))
        tested = data.test_images[tests], data.test_labels[tests]
        others = features(module, self._inputs(tested[0]), torch.from_numpy(tested[1]))
        found: dict[str, Attack | str] = {"loss threshold": attack(members[:, 0], others[:, 0])}
        if isinstance(how, str):
            found["shadow models"] = how
            return found
        if shadows == 0 or len(data.public) < 2 * _LEAST:
            found["shadow models"] = "no public images to train shadows on" if shadows else "not asked for"
            return found
        trained = [self._shadow(component, *how, key, number) for number in range(shadows)]
        found["shadow models"] = attack(*shadow_scores(trained, members, others))
        return found

    def _shadow(
        self, component: Component, training: TrainingConfig, epochs: int, key: int, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A classifier like the attacked one, trained on half of the public images: its features of both halves."""
        seed = self.config.seed
        rng = numpy_generator(seed, "audit/shadow", key, number)
        order = rng.permutation(len(self.data.public))
        half = len(order) // 2
        x, y = self._inputs(self.data.public_images), torch.from_numpy(self.data.public_labels)
        with seeded_torch(seed, "audit/shadow", key, number):
            module = initial_module(component, self.shape, training)
        inside, outside = order[:half], order[half : 2 * half]
        train_locally(module, x[inside], y[inside], training, epochs, 1.0, (seed, "audit/shadow", key, number))
        return features(module, x[inside], y[inside]), features(module, x[outside], y[outside])

    def _invert(
        self,
        client: int,
        uploads: dict[int, torch.nn.Module],
        rows: np.ndarray,
        tests: np.ndarray,
        steps: int,
        per_class: int,
    ) -> tuple[Memorisation | None, float | None]:
        data = self.data
        known = np.flatnonzero(data.counts(np.array([client]))[0])
        labels = np.repeat(known, per_class)
        guide = guide_of(uploads[client], self.shape, 1.0, "batch")
        images = invert(guide, labels, steps, key_seed(self.config.seed, "audit/inversion", client))
        right: list[np.ndarray] = []
        for other, module in uploads.items():
            knows = data.counts(np.array([other]))[0, labels] > 0
            if other != client and knows.any():
                with torch.no_grad():
                    taken = module(self._inputs(images[knows])).argmax(dim=1).numpy()
                right.append(taken == labels[knows])
        recognised = float(np.concatenate(right).mean()) if right else None
        return self._near(images, rows, tests, client), recognised

    def _near(self, images: np.ndarray, rows: np.ndarray, tests: np.ndarray, key: int) -> Memorisation | None:
        rows, tests = self._pairs(rows, tests, key)
        if len(rows) < _LEAST:
            return None
        return memorisation(images, self.data.images[rows], self.data.test_images[tests])
