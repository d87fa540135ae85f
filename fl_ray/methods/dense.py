"""DENSE (arXiv 2112.12371, NeurIPS 2022): one-shot, data-free. A generator is trained against the clients' ensemble,
the server's model is distilled on what it makes, and the two take turns.

With D(x) the mean of the clients' logits and S the server's model, the generator's loss at x = G(z) for labels y is

    CE(D(x), y) + lambda_bn mean_k L_BN,k(x) - lambda_adv 1[argmax D != argmax S] KL(D(x) || S(x)),

and S learns KL(D(x) || S(x)). Our reconstruction where the paper leaves it open: the generator's network at sizes other
than 32 pixels, and that each turn's images are drawn afresh.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_ray.context import RunContext
from fl_ray.guides import guide_of
from fl_ray.head import frozen_but_head
from fl_ray.methods.base import require_counts
from fl_ray.methods.one_shot import OneShot
from fl_ray.methods.server_training import AS_FEDLMG, ServerTraining
from fl_ray.model import WeightLayout, optimizer_settings
from fl_ray.randomness import seeded_torch
from fl_ray.runtime.base import RoundResult
from generators.guidance.losses import ClassifierGuide

__all__ = ["Dense", "DenseSettings", "ImageMaker", "distil"]


@dataclass(frozen=True)
class DenseSettings:
    """As of ``Dense``."""

    turns: int
    generator_steps: int
    student_steps: int
    latent: int
    generator_lr: float
    norm_weight: float
    adversarial_weight: float


class ImageMaker(nn.Sequential):
    """Noise [N, latent] to images in [0, 1], [N, channels, size, size]: two doublings, then up to the size."""

    def __init__(self, latent: int, channels: int, size: int, width: int = 64) -> None:
        quarter = max(1, size // 4)
        super().__init__(
            nn.Linear(latent, 2 * width * quarter**2),
            nn.Unflatten(1, (2 * width, quarter, quarter)),
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(size=(size, size)),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )


def distil(
    host: Any,
    uploads: dict[int, np.ndarray],
    weights: np.ndarray,
    settings: DenseSettings,
    server: ServerTraining,
    seed: int,
) -> np.ndarray:
    """The student's weights [size] after all turns, from ``weights``; in the server's process.

    Args:
        host: the ``ClientHost`` there, whose models are used.
        uploads: clients' weights.
        server: how the student trains.
    """
    device, shape = host.device, host.job.shape
    guides = [
        guide_of(host.fresh(values, host.job.model_of(client)), shape, settings.norm_weight, "batch")
        for client, values in uploads.items()
    ]
    student = host.fresh(weights, 0)
    inputs = guide_of(host.fresh(weights, 0), shape, 0.0, "batch").inputs  # as the student takes images
    part = frozen_but_head(student, shape.classes) if server.head_only else nullcontext(student)
    with part as trained, seeded_torch(seed, "dense"):
        maker = ImageMaker(settings.latent, shape.channels, shape.size).to(device)
        making = torch.optim.Adam(maker.parameters(), settings.generator_lr)
        learning = optimizer_settings(server.training()).make(trained.parameters())

        def draw() -> tuple[Tensor, Tensor]:
            count = server.batch_size
            return torch.randn(count, settings.latent).to(device), torch.randint(0, shape.classes, (count,)).to(device)

        for _ in range(settings.turns):
            noise, labels = draw()
            maker.train()
            student.eval()
            for _ in range(settings.generator_steps):
                loss = maker_loss(maker(noise), labels, guides, lambda images: student(inputs(images)), settings)
                making.zero_grad()
                loss.backward()
                making.step()
            trained.train()
            for _ in range(settings.student_steps):
                noise, _ = draw()
                with torch.no_grad():
                    images = maker(noise)
                    taught = torch.stack([guide.look(images)[0] for guide in guides]).mean(dim=0)
                loss = divergence(taught, student(inputs(images))).mean()
                learning.zero_grad()
                loss.backward()
                learning.step()
    return WeightLayout(student).read().numpy()


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax teacher || softmax student) of each row of logits [N, classes]."""
    told = functional.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="none", log_target=True)
    return told.sum(dim=1)


def maker_loss(
    images: Tensor,
    labels: Tensor,
    guides: list[ClassifierGuide],
    student: Callable[[Tensor], Tensor],
    settings: DenseSettings,
) -> Tensor:
    """The generator's loss, as at the head of this file.

    Args:
        images: in [0, 1], [N, C, H, W].
        student: logits of such images.
    """
    seen = [guide.look(images) for guide in guides]
    taught = torch.stack([logits for logits, _ in seen]).mean(dim=0)
    distance = torch.stack([distance for _, distance in seen]).mean()
    learned = student(images)
    apart = (taught.argmax(dim=1) != learned.argmax(dim=1)).float()
    adversarial = (apart * divergence(taught, learned)).mean()
    crossed = functional.cross_entropy(taught, labels)
    return crossed + settings.norm_weight * distance - settings.adversarial_weight * adversarial


class Dense(OneShot):
    """DENSE.

    Args:
        turns: of generator and student.
        generator_steps, student_steps: of each in a turn.
        latent: length of the generator's noise.
        generator_lr: of its Adam.
        norm_weight, adversarial_weight: lambda_bn and lambda_adv.
        client_models, server: see ``OneShot``; of ``server``, the epochs do not count.
    """

    def __init__(
        self,
        turns: int = 100,
        generator_steps: int = 10,
        student_steps: int = 10,
        latent: int = 100,
        generator_lr: float = 1e-3,
        norm_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        client_models: list[Any] | None = None,
        server: ServerTraining = AS_FEDLMG,
    ) -> None:
        super().__init__(client_models, server)
        require_counts(turns=turns, generator_steps=generator_steps, student_steps=student_steps, latent=latent)
        for name, value in {"norm_weight": norm_weight, "adversarial_weight": adversarial_weight}.items():
            if value < 0:
                raise ValueError(f"{name} is {value}, but it must be at least 0")
        self.settings = DenseSettings(
            turns, generator_steps, student_steps, latent, generator_lr, norm_weight, adversarial_weight
        )

    def learn(self, run: RunContext, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        known = self.settings, self.server, run.config.seed
        with run.phases.phase("train"):
            return run.runtime.on_server(distil, self.uploads, weights, *known)

    def server_samples(self, run: RunContext, round_number: int) -> int:
        """What the student trains on; the generator's steps see as many images again, with every client's model."""
        settings = self.settings
        return settings.turns * (settings.generator_steps + settings.student_steps) * self.server.batch_size
