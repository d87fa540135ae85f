"""FedLMG (arXiv 2311.08870, ICML 2025): one round; the clients' classifiers guide the server's diffusion model.

Each client k trains a classifier F_k to the end and sends it once, with its batch norm statistics. For each client and
class the server samples images x under L_CE + lambda L_BN of F_k (``generators.guidance``) and trains its own model F:

    fine_tune         CE(F(x), y)
    multi_teacher     CE + H(mean_k softmax F_k(x), softmax F(x))
    specific_teacher  CE + H(softmax F_k(x)(x), softmax F(x)), the teacher being the client that guided x

H is a cross-entropy, linear in its first argument, so each is one cross-entropy against y + the teacher's distribution.
Our reconstruction: which classes a client guides (those it has), and what a teacher says of classes it has never seen.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.errors import SettingError
from fl_ray.guides import keep_upload
from fl_ray.methods.acceptance import accepted
from fl_ray.methods.base import require_counts
from fl_ray.methods.one_shot import OneShot
from fl_ray.methods.server_training import AS_FEDLMG, ServerTraining
from fl_ray.model import ImageShape, build_module
from fl_ray.runtime.base import RoundResult
from generators.base import Generator
from generators.guidance.generator import LOSSES
from generators.guidance.losses import Statistics, batch_norms
from generators.guidance.sampling import GuidanceSettings

__all__ = ["FedLMG", "recognised", "teachers"]


def teachers(probabilities: np.ndarray, known: np.ndarray, guided_by: np.ndarray | None) -> np.ndarray:
    """What the teachers say of each image, float32 [N, classes]; rows sum to 1.

    A class that a teacher has never seen is masked and the rest renormalised; the mean over several teachers is, for
    each class, over those that know it (our reconstruction; the paper's third open question).

    Args:
        probabilities: [teachers, N, classes].
        known: bool [teachers, classes]; every class is known to one.
        guided_by: int [N], each image's one teacher; None: the mean of all.
    """
    if guided_by is None:
        masked = probabilities * known[:, None, :]
        mean = masked.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    else:
        mean = probabilities[guided_by, np.arange(probabilities.shape[1])] * known[guided_by]
    total = mean.sum(axis=1, keepdims=True)
    return (mean / np.maximum(total, 1e-12)).astype(np.float32)


class FedLMG(OneShot):
    """FedLMG.

    Args:
        aggregation: ``fine_tune``, ``multi_teacher`` or ``specific_teacher``.
        images_per_class: of each client and class that it has.
        edits: M, steps of noise editing; with ``edit_with`` ``norms`` by L_BN alone (the released code).
        eta: step of the guidance; with ``step_rule`` ``rms`` relative to the image (our option).
        norm_weight: lambda of L_BN.
        form: ``shift`` (FedLMG) or ``epsilon`` (our option, ``recurrence`` times a step).
        statistics: L_BN over an ``image``'s places, as the released code has it, or over the ``batch`` of a block.
        renormalise: give the edited noise its norm back (our option).
        block_size: images made together.
        accept: train on images alone that the classifier that guided them takes for their class with a cross-entropy of
            at most this (our option, 0.5 in a comment of the released code; see ``fl_ray.methods.acceptance``);
            default: on all.
        client_models, server: see ``OneShot``. The generator's ``steps`` and ``guidance`` are those of its sampling.
    """

    uses_generator = True
    needs_classes = False  # the guides know them

    def __init__(
        self,
        aggregation: Literal["fine_tune", "multi_teacher", "specific_teacher"] = "specific_teacher",
        images_per_class: int = 30,
        edits: int = 10,
        eta: float = 1.0,
        norm_weight: float = 0.1,
        edit_with: Literal["all", "norms"] = "all",
        step_rule: Literal["fixed", "rms"] = "fixed",
        form: Literal["shift", "epsilon"] = "shift",
        recurrence: int = 1,
        statistics: Statistics = "image",
        renormalise: bool = False,
        block_size: int = 10,
        accept: float | None = None,
        client_models: list[Any] | None = None,
        server: ServerTraining = AS_FEDLMG,
    ) -> None:
        super().__init__(client_models, server)
        require_counts(images_per_class=images_per_class, block_size=block_size)
        if norm_weight < 0:
            raise ValueError(f"norm_weight is {norm_weight}, but it must be at least 0")
        if accept is not None and not accept > 0:
            raise ValueError(
                f"accept is {accept}, but it must be positive, as 0.5; leave it out to train on all images"
            )
        self.aggregation, self.images_per_class, self.block_size = aggregation, images_per_class, block_size
        self.norm_weight, self.statistics, self.accept = norm_weight, statistics, accept
        self.guidance = GuidanceSettings(
            edits=edits,
            eta=eta,
            edit_with=edit_with,
            step_rule=step_rule,
            form=form,
            recurrence=recurrence,
            renormalise=renormalise,
        )

    def check(self, config: RunConfig, generator: Generator | None) -> None:
        super().check(config, generator)
        try:
            generator.check_guidable(self.guidance.recurrence)
        except ValueError as error:
            raise SettingError(f"generator {config.generator.name}: {error}") from error

    def setup(self, run: RunContext) -> None:
        super().setup(run)
        shape, training = ImageShape.of(run.data.source), run.config.training
        models = self.own_models or (run.config.model,)
        plain = [model.name for model in models if not batch_norms(build_module(model, shape, training))]
        if plain and self.norm_weight:
            names = ", ".join(dict.fromkeys(plain))
            run.progress.message(f"without batch norm, and so guiding by cross-entropy alone: {names}")

    def learn(self, run: RunContext, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        clients, classes = list(self.uploads), run.data.num_classes
        known = run.data.counts(np.array(clients)) > 0
        nobody = [run.data.source.classes[label] for label in np.flatnonzero(~known.any(axis=0))]
        if nobody:  # whoever has them was left out of the round
            run.notes["classes_of_nobody"] = nobody
            run.progress.message(f"no classifier that came in knows {', '.join(nobody)}: there will be no images of it")
        images, labels, guided_by = self.synthesise(run, clients)
        given = run.runtime.predict(self.uploads, run.runtime.put(images, labels))
        logs = np.stack([given[client] for client in clients])
        owned = [run.data.domains_of(client) for client in clients]
        domains = None if run.data.source.domains is None else [own.tolist() for own in owned]
        run.notes["guided_accuracy"] = recognised(logs.argmax(axis=2) == labels, labels, guided_by, known, domains)
        if self.accept is not None:
            found = accepted(logs[guided_by, np.arange(len(labels))], labels, guided_by, self.accept)
            run.notes["accepted"] = found.note(guided_by, len(clients))
            images, labels, guided_by = (each[found.rows] for each in (images, labels, guided_by))
            logs = logs[:, found.rows]
        run.notes["synthetic_images"] = np.bincount(labels, minlength=classes).tolist()
        targets = np.eye(classes, dtype=np.float32)[labels]
        if self.aggregation != "fine_tune":
            teacher = guided_by if self.aggregation == "specific_teacher" else None
            targets += teachers(np.exp(logs), known, teacher)
        return self.train(run, weights, images, targets)

    def synthesise(self, run: RunContext, clients: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images that the clients' uploads guide, their classes, and the place in ``clients`` of who guided each.

        Images are fixed by (seed, client, class, index) and the client's upload, whoever else came in.
        """
        known, classes = run.data.counts(np.array(clients)) > 0, run.data.num_classes
        shape, folder = ImageShape.of(run.data.source), run.synthesis.trained.folder / "guides"
        guides = {
            client: keep_upload(
                folder,
                self.uploads[client],
                self.model_of(run.config, client),
                shape,
                self.norm_weight,
                self.statistics,
                run.config.seed,
            )
            for client in clients
        }
        guided = run.synthesis.guided(guides, self.guidance, self.block_size)
        try:
            with run.phases.phase("synthesis"):
                wanted = np.zeros((max(clients) + 1, classes), dtype=np.int64)
                wanted[clients] = np.where(known, self.images_per_class, 0)
                images, jobs = guided.images(wanted.ravel(), run.config.seed)
            report = guided.sampled()
            blocks = report.get("blocks", 0)
            for name in LOSSES:
                total = report.pop(name, 0.0)
                report |= {name: total / blocks} if blocks else {}  # nothing was guided, or all was made before
            run.notes.setdefault("guided_synthesis", report)  # of when they were made
        finally:
            guided.close()
        client_of, labels = np.divmod(jobs, classes)
        return images, labels, np.searchsorted(clients, client_of)

    def guided_samples(self, run: RunContext) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        clients = list(self.uploads)
        images, labels, guided_by = self.synthesise(run, clients)
        return {client: (images[guided_by == at], labels[guided_by == at]) for at, client in enumerate(clients)}


def recognised(
    right: np.ndarray, labels: np.ndarray, guided_by: np.ndarray, known: np.ndarray, domains: list[list[int]] | None
) -> dict[str, float | None]:
    """The share of guided images that classifiers take for their class: those that guided, the others that know the
    class, and of these the ones whose images are of the same domains as the guide's. None where there are none.

    Args:
        right: bool [clients, images], whether a client's classifier does.
        labels: of the images.
        guided_by: place of each image's guide among the clients.
        known: bool [clients, classes].
        domains: of each client's images; None where the data have none.
    """
    own = np.arange(len(known))[:, None] == guided_by
    others = ~own & known[:, labels]
    found = {"own_classifier": own, "other_classifiers": others}
    if domains is not None:
        like = np.array([[one == other for other in domains] for one in domains])
        found["other_classifiers_of_the_domain"] = others & like[:, guided_by]
    return {name: float(right[chosen].mean()) if chosen.any() else None for name, chosen in found.items()}
