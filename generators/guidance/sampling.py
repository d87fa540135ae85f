"""Guided diffusion sampling: noise editing, then denoising with the guide's gradient (FedLMG, arXiv 2311.08870).

At a step t the guide sees the clean estimate s0 = (s - sqrt(1 - a) eps) / sqrt(a), a = alpha-bar_t, in closed form and
with its gradient: ``scheduler.step`` would draw noise, and an estimate under ``no_grad`` would cut the gradient. Unlike
in the authors' released code the image that it sees is not clamped to [0, 1]: early estimates lie far outside, where a
clamp would leave no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from generators.guidance.losses import ClassifierGuide

__all__ = ["Denoiser", "GuidanceSettings", "GuidedSampler", "clean_estimate"]


class Denoiser(Protocol):
    """A diffusion model: what it predicts, what its samples look like, and how it steps.

    Attributes:
        shape: (c, h, w) of a sample.
    """

    scheduler: object
    shape: tuple[int, int, int]

    def predict(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The noise in ``s`` at step ``t``, classifier-free guidance included; [N, c, h, w]."""

    def decode(self, s: Tensor) -> Tensor:
        """Images in [0, 1] (not clamped), differentiable; [N, C, H, W]."""


@dataclass(frozen=True)
class GuidanceSettings:
    """How much and in which form the guide's gradient goes in.

    Attributes:
        edits: M, steps of noise editing at the first time step (of those at which anything shows, see
            ``GuidedSampler``); with ``edit_with`` ``norms`` by L_BN alone, as the authors' released code does.
        eta: the step. ``fixed``: s <- s - eta grad; ``rms``: eta times rms(sqrt(a) s0) / rms(grad), for each image (in
            the manner of FreeDoM, arXiv 2303.09833; our option).
        form: ``shift`` moves s before the model predicts again (FedLMG); ``epsilon`` adds sqrt(1 - a) eta grad to the
            predicted noise (our option), ``recurrence`` times a step, going back to noise in between.
        renormalise: give the edited noise its expected norm back (our option).
    """

    steps: int = 50
    edits: int = 10
    eta: float = 1.0
    edit_with: Literal["all", "norms"] = "all"
    step_rule: Literal["fixed", "rms"] = "fixed"
    form: Literal["shift", "epsilon"] = "shift"
    recurrence: int = 1
    renormalise: bool = False

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "edits": 0, "eta": 0, "recurrence": 1}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least {least}")
        if self.recurrence > 1 and self.form == "shift":
            raise ValueError(f"recurrence is {self.recurrence}, but it goes with form epsilon alone; set it to 1")


def clean_estimate(s: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """s0 = (s - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar): the schedulers' ``pred_original_sample``, unclipped."""
    return (s - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


_SHOWS = 1e-6  # alpha-bar from which on a sample holds something of its image


class GuidedSampler:
    """Samples images for the classes of one classifier.

    A schedule that begins at pure noise has a first step at which the clean estimate does not depend on the sample:
    nothing is to be guided or edited there. Such steps are taken as they are, and the noise is edited at the next one.

    Attributes:
        losses: the guide's mean loss at each step of the last call, edits first; of images where it is finite.
        cross_entropies: L_CE's part of these.
        broken: bool [N], images of the last call whose gradient was not finite at some step; that step was left out for
            them.
    """

    def __init__(self, model: Denoiser, guide: ClassifierGuide, settings: GuidanceSettings) -> None:
        self.model, self.guide, self.settings = model, guide, settings
        self.losses: list[float] = []
        self.cross_entropies: list[float] = []
        self.broken = torch.zeros(0, dtype=torch.bool)
        scheduler = model.scheduler
        if settings.recurrence > 1 and getattr(scheduler.config, "solver_order", 1) > 1:
            raise ValueError("recurrence above 1 needs a scheduler of one step: take ddim or ddpm")

    def __call__(self, noise: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images in [0, 1], [N, C, H, W].

        Args:
            noise: the starting point, standard normal [N, c, h, w].
            labels: int64 [N].
            generator: of the noise that the scheduler draws, on the CPU.
        """
        settings, scheduler = self.settings, self.model.scheduler
        self.losses, self.cross_entropies = [], []
        self.broken = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        try:
            scheduler.set_timesteps(settings.steps, device=noise.device)
        except ValueError as error:
            kind = type(scheduler).__name__
            raise ValueError(f"steps is {settings.steps}, but the model's {kind} refuses: {error}") from error
        steps, s = scheduler.timesteps, noise
        blind = min(int((self._alpha_bar(steps) < _SHOWS).sum()), len(steps) - 1)
        for t in steps[:blind]:
            s = self._denoise(s, t, self._predict(s, t, labels), generator)
        for _ in range(settings.edits):
            s = s - self._step(s, steps[blind], labels, with_classes=settings.edit_with == "all")
        if settings.renormalise and settings.edits:
            s = s * (s[0].numel() ** 0.5 / torch.linalg.vector_norm(s.flatten(1), dim=1))[:, None, None, None]
        for number, t in enumerate(steps[blind:], blind):
            if settings.form == "shift":
                s = s - self._step(s, t, labels)
                s = self._denoise(s, t, self._predict(s, t, labels), generator)
                continue
            for turn in range(settings.recurrence):
                moved = (1 - self._alpha_bar(t)).sqrt() * self._step(s, t, labels)
                before = self._denoise(s, t, self._predict(s, t, labels) + moved, generator)
                last = turn + 1 == settings.recurrence
                s = before if last else self._noised(before, number, generator)
        with torch.no_grad():
            return self.model.decode(s).clamp(0, 1)

    def _step(self, s: Tensor, t: Tensor, labels: Tensor, with_classes: bool = True) -> Tensor:
        """eta times the gradient of the guide's losses at s; 0 for images whose gradient is not finite."""
        if self.settings.eta == 0:
            return torch.zeros((), device=s.device)
        gradient, clean = self.gradient(s, t, labels, with_classes)
        finite = gradient.flatten(1).isfinite().all(dim=1)
        self.broken |= ~finite
        gradient = torch.where(finite[:, None, None, None], gradient, 0.0)
        if self.settings.step_rule == "fixed":
            return self.settings.eta * gradient

        def rms(values: Tensor) -> Tensor:
            return values.flatten(1).square().mean(dim=1).sqrt()[:, None, None, None]

        scale = rms(self._alpha_bar(t).sqrt() * clean) / rms(gradient).clamp_min(1e-12)
        return self.settings.eta * scale * gradient

    def gradient(self, s: Tensor, t: Tensor, labels: Tensor, with_classes: bool = True) -> tuple[Tensor, Tensor]:
        """d (sum of the images' losses) / d s through model, clean estimate, decoder and classifier; and s0."""
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            clean = clean_estimate(s, self.model.predict(s, t, labels), self._alpha_bar(t))
            whole, norms = self.guide.losses(self.model.decode(clean), labels)
            # Classes alone guide where there are no norms, whatever was asked.
            chosen = whole if with_classes or not self.guide.has_norms else norms
            (gradient,) = torch.autograd.grad(chosen.sum(), s)
        told, finite = whole.detach(), whole.isfinite()
        self.losses.append(float(told[finite].mean()))
        self.cross_entropies.append(float((told - norms.detach())[finite].mean()))
        return gradient, clean.detach()

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return self.model.scheduler.alphas_cumprod.to(t.device)[t.long()]

    @torch.no_grad()
    def _predict(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.model.predict(s, t, labels)

    def _denoise(self, s: Tensor, t: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        return self.model.scheduler.step(noise, t, s, generator=generator).prev_sample

    def _noised(self, s: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """From the step before back to step ``number``: s = sqrt(r) s + sqrt(1 - r) z, r = a_t / a_(t-1)."""
        scheduler = self.model.scheduler
        steps, here = scheduler.timesteps, self._alpha_bar(scheduler.timesteps[number])
        last = getattr(scheduler, "final_alpha_cumprod", torch.ones(())).to(here)  # DDIM may end above no noise
        before = self._alpha_bar(steps[number + 1]) if number + 1 < len(steps) else last
        ratio = here / before
        drawn = torch.randn(s.shape, generator=generator, dtype=s.dtype).to(s.device)
        return ratio.sqrt() * s + (1 - ratio).sqrt() * drawn
