"""Guidance: losses by hand and as torch normalises, the gradient by finite differences, plain sampling to the bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.nn import functional

from generators.guidance.losses import ClassifierGuide, norm_distance
from generators.guidance.sampling import GuidanceSettings, GuidedSampler, clean_estimate
from lightning_modules.diffusion import make_unet

CLASSES, SIZE = 3, 8


@dataclass
class Pixels:
    """A class-conditional UNet in pixel space."""

    unet: nn.Module
    scheduler: Any
    guidance: float = 1.0

    def predict(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        given = self.unet(s, t, class_labels=labels).sample
        if self.guidance == 1.0:
            return given
        free = self.unet(s, t, class_labels=torch.full_like(labels, CLASSES)).sample
        return free + self.guidance * (given - free)

    def decode(self, s: Tensor) -> Tensor:
        return (s + 1) / 2


def schedule(kind: type = DDIMScheduler) -> Any:
    return kind.from_config(
        DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", timestep_spacing="leading").config
    )


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    made = make_unet(SIZE, 1, CLASSES, [8, 16]).eval()
    for parameter in made.parameters():  # an untrained UNet's last layer is so small that nothing would depend on it
        parameter.data += 0.02 * torch.randn_like(parameter)
    return made


def classifier(norms: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if norms else []), nn.SiLU()]
    layers += [nn.Conv2d(4, 6, 3, stride=2), *([nn.BatchNorm2d(6)] if norms else []), nn.SiLU()]
    made = nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, CLASSES))
    made.train()
    for _ in range(20):  # running statistics of some data
        made(torch.randn(16, 1, SIZE, SIZE) * 0.5 + 0.3)
    return made.eval()


def guide(weight: float = 0.1, statistics: str = "image", norms: bool = True) -> ClassifierGuide:
    return ClassifierGuide(classifier(norms), weight, SIZE, 1, [0.5], [0.25], statistics)


def start(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, SIZE, SIZE, generator=drawn).to(dtype), torch.arange(count) % CLASSES


def test_l_bn_by_hand() -> None:
    layer = nn.BatchNorm2d(2).eval()
    layer.running_mean[:] = torch.tensor([1.0, -1.0])
    layer.running_var[:] = torch.tensor([2.0, 0.5])
    inputs = torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]], [[[4.0, 4.0]], [[-1.0, 3.0]]]])
    # Image 0: means 1 and 1, biased variances 1 and 0; image 1: means 4 and 1, variances 0 and 4.
    expected = [
        np.hypot(1 - 2, 0 - 0.5) + np.hypot(1 - 1, 1 + 1),
        np.hypot(0 - 2, 4 - 0.5) + np.hypot(4 - 1, 1 + 1),
    ]
    assert norm_distance(inputs, layer, "image").tolist() == pytest.approx(expected)
    values = inputs.transpose(0, 1).reshape(2, -1).numpy()
    both = np.linalg.norm(values.var(axis=1) - [2, 0.5]) + np.linalg.norm(values.mean(axis=1) - [1, -1])
    assert norm_distance(inputs, layer, "batch").tolist() == pytest.approx([both, both])


def test_the_statistics_are_those_that_train_mode_normalises_with() -> None:
    """A batch norm whose running statistics are the batch's has no distance, and gives what train mode gives."""
    inputs = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    layer = nn.BatchNorm2d(3).eval()
    variance, mean = torch.var_mean(inputs, dim=(0, 2, 3), correction=0)
    layer.running_mean[:], layer.running_var[:] = mean, variance
    assert norm_distance(inputs, layer, "batch").abs().max() < 1e-5
    torch.testing.assert_close(layer(inputs), copy.deepcopy(layer).train()(inputs))


def test_the_loss_is_cross_entropy_and_lambda_times_all_layers() -> None:
    own = guide(0.3)
    images, labels = torch.rand(4, 1, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    x = (images - 0.5) / 0.25
    inner = own.classifier
    first, second = inner[0](x), inner[3](inner[2](inner[1](inner[0](x))))
    distances = norm_distance(first, inner[1], "image") + norm_distance(second, inner[4], "image")
    crossed = functional.cross_entropy(inner(x), labels, reduction="none")
    torch.testing.assert_close(own.losses(images, labels), (crossed + 0.3 * distances, 0.3 * distances))
    torch.testing.assert_close(guide(0.0).losses(images, labels)[0], crossed)


def test_a_classifier_without_norms_guides_by_its_classes_alone() -> None:
    own = guide(0.3, norms=False)
    images, labels = torch.rand(2, 1, SIZE, SIZE), torch.tensor([0, 1])
    expected = functional.cross_entropy(own.classifier(own.inputs(images)), labels, reduction="none")
    torch.testing.assert_close(own.losses(images, labels)[0], expected)


def test_editing_by_norms_alone_falls_back_on_classes_where_there_are_no_norms(unet: nn.Module) -> None:
    noise, labels = start(2)
    found = {}
    for kind, norms in (("with", True), ("without", False)):
        own = guide(0.3, norms=norms)
        sampler = GuidedSampler(Pixels(unet, schedule()), own, GuidanceSettings(steps=4))
        sampler.model.scheduler.set_timesteps(4)
        t = sampler.model.scheduler.timesteps[0]
        found[kind] = [sampler.gradient(noise, t, labels, with_classes=every)[0] for every in (True, False)]
        assert sampler.losses[0] == pytest.approx(sampler.losses[1])  # the whole loss is told in both
        whole, distance = own.losses(sampler.model.decode(sampler.gradient(noise, t, labels)[1]), labels)
        assert sampler.losses[0] == pytest.approx(float(whole.mean()), rel=1e-4)
        assert sampler.cross_entropies[0] == pytest.approx(float((whole - distance).mean()), rel=1e-4)
    assert not torch.allclose(*found["with"])
    assert torch.equal(*found["without"])


def test_images_come_as_the_classifier_takes_them() -> None:
    own = ClassifierGuide(classifier(), 0.1, 16, 3, [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    made = own.inputs(torch.full((2, 1, 8, 8), 0.5))
    assert made.shape == (2, 3, 16, 16)
    assert made[0, :, 3, 3].tolist() == pytest.approx([0.4, 0.15, 0.05])


@pytest.mark.parametrize("statistics", ["image", "batch"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gradient_by_finite_differences(unet: nn.Module, statistics: str, guidance: float) -> None:
    model = Pixels(copy.deepcopy(unet).double(), schedule(), guidance)
    own = guide(0.2, statistics)
    own.classifier.double()
    sampler = GuidedSampler(model, own, GuidanceSettings(steps=10))
    model.scheduler.set_timesteps(10)
    s, labels = start(3, dtype=torch.float64)
    t = model.scheduler.timesteps[4]
    gradient, clean = sampler.gradient(s, t, labels)

    def total(at: Tensor) -> float:
        with torch.no_grad():
            alpha = model.scheduler.alphas_cumprod[t].double()
            estimate = (at - (1 - alpha).sqrt() * model.predict(at, t, labels)) / alpha.sqrt()
            return float(own.losses(model.decode(estimate), labels)[0].sum())

    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(s.shape, generator=draw, dtype=torch.float64)
        step = 1e-5
        slope = (total(s + step * direction) - total(s - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)
    assert not clean.requires_grad
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_the_clean_estimate_is_the_scheduler_s(unet: nn.Module, kind: type) -> None:
    scheduler = kind.from_config(schedule(kind).config, clip_sample=False)
    scheduler.set_timesteps(10)
    s, labels = start(2)
    for t in scheduler.timesteps[[0, 4, -1]]:
        noise = unet(s, t, class_labels=labels).sample.detach()
        found = scheduler.step(noise, t, s, generator=torch.Generator().manual_seed(0)).pred_original_sample
        torch.testing.assert_close(clean_estimate(s, noise, scheduler.alphas_cumprod[t]), found)


def plain(unet: nn.Module, scheduler: Any, noise: Tensor, labels: Tensor, steps: int, seed: int) -> Tensor:
    """Conditional sampling as diffusers has it, by itself."""
    drawn, s = torch.Generator().manual_seed(seed), noise
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            s = scheduler.step(unet(s, t, class_labels=labels).sample, t, s, generator=drawn).prev_sample
    return ((s + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("form", ["shift", "epsilon"])
def test_no_guidance_is_plain_sampling_to_the_bit(unet: nn.Module, kind: type, form: str) -> None:
    noise, labels = start(2)
    settings = GuidanceSettings(steps=6, edits=0, eta=0.0, form=form)
    sampler = GuidedSampler(Pixels(unet, schedule(kind)), guide(0.0), settings)
    made = sampler(noise, labels, torch.Generator().manual_seed(7))
    assert torch.equal(made, plain(unet, schedule(kind), noise, labels, 6, 7))
    assert sampler.losses == []


def moved(unet: nn.Module, own: ClassifierGuide, s: Tensor, t: int, label: Tensor, alpha: Tensor, rule: str) -> Tensor:
    """The step of eta = 0.3 at one image, written out."""
    s = s.detach().requires_grad_()
    clean = (s - (1 - alpha) ** 0.5 * unet(s, t, class_labels=label).sample) / alpha**0.5
    (slope,) = torch.autograd.grad(own.losses((clean + 1) / 2, label)[0].sum(), s)
    if rule == "rms":
        slope = slope * (alpha**0.5 * clean.detach()).square().mean() ** 0.5 / slope.square().mean() ** 0.5
    return 0.3 * slope


@pytest.mark.parametrize("rule", ["fixed", "rms"])
@pytest.mark.parametrize("form", ["shift", "epsilon"])
def test_guided_ddim_by_hand(unet: nn.Module, form: str, rule: str) -> None:
    """Image by image and without a scheduler: edits, then at each step the noise that is predicted at the moved sample
    (``shift``), or the predicted noise moved (``epsilon``); the last step as any other.
    """
    noise, labels = start(2)
    settings = GuidanceSettings(steps=5, edits=2, eta=0.3, form=form, step_rule=rule)
    own, alphas = guide(0.2), schedule().alphas_cumprod
    expected = []
    for s, label in zip(noise[:, None], labels[:, None], strict=True):
        for _ in range(2):
            s = s - moved(unet, own, s, 80, label, alphas[80], rule)
        for t in (80, 60, 40, 20, 0):
            step = moved(unet, own, s, t, label, alphas[t], rule)
            with torch.no_grad():
                if form == "shift":
                    s = s - step
                    predicted = unet(s, t, class_labels=label).sample
                else:
                    predicted = unet(s, t, class_labels=label).sample + (1 - alphas[t]) ** 0.5 * step
                clean = (s - (1 - alphas[t]) ** 0.5 * predicted) / alphas[t] ** 0.5
                before = alphas[t - 20] if t else torch.ones(())
                s = before**0.5 * clean + (1 - before) ** 0.5 * predicted
        expected.append(((s + 1) / 2).clamp(0, 1))
    kept = DDIMScheduler.from_config(schedule().config, clip_sample=False, set_alpha_to_one=True)
    made = GuidedSampler(Pixels(unet, kept), own, settings)(noise, labels, torch.Generator())
    torch.testing.assert_close(made, torch.cat(expected), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_guidance_draws_no_noise_and_takes_no_step_of_the_scheduler(unet: nn.Module, kind: type) -> None:
    """The scheduler steps once a time step, and draws what it draws without guidance."""
    noise, labels = start(2)
    stepped: list[int] = []
    scheduler = schedule(kind)
    step = scheduler.step

    def counted(output: Tensor, t: Tensor, *arguments: Any, **more: Any) -> Any:
        stepped.append(int(t))
        return step(output, t, *arguments, **more)

    scheduler.step = counted
    drawn, plainly = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    everywhere = torch.random.get_rng_state()
    sampler = GuidedSampler(Pixels(unet, scheduler), guide(), GuidanceSettings(steps=4, edits=2, eta=0.5))
    made = sampler(noise, labels, drawn)
    assert stepped == scheduler.timesteps.tolist()
    assert len(sampler.losses) == 2 + 4
    free = schedule(kind)
    free.set_timesteps(4)
    s = noise
    with torch.no_grad():
        for t in free.timesteps:
            s = free.step(unet(s, t, class_labels=labels).sample, t, s, generator=plainly).prev_sample
    assert torch.equal(drawn.get_state(), plainly.get_state())
    assert torch.equal(torch.random.get_rng_state(), everywhere)
    assert (made - ((s + 1) / 2).clamp(0, 1)).abs().max() > 0.01


def test_the_loss_falls(unet: nn.Module) -> None:
    noise, labels = start(4)
    for settings in (
        GuidanceSettings(steps=8, edits=8, eta=2.0),
        GuidanceSettings(steps=8, edits=8, eta=0.1, step_rule="rms"),
        GuidanceSettings(steps=8, edits=0, eta=1.0, step_rule="rms", form="epsilon", recurrence=2),
    ):
        own = guide(0.1)
        sampler = GuidedSampler(Pixels(unet, schedule()), own, settings)
        guided = sampler(noise, labels, torch.Generator().manual_seed(0))
        free = plain(unet, schedule(), noise, labels, 8, 0)
        assert own.losses(guided, labels)[0].mean() < 0.9 * own.losses(free, labels)[0].mean()
        turns = settings.edits + settings.steps * settings.recurrence
        assert len(sampler.losses) == turns
        assert sampler.losses[-1] < sampler.losses[0]
        assert sampler.cross_entropies[-1] < sampler.cross_entropies[0]


def test_at_pure_noise_nothing_is_guided_or_edited(unet: nn.Module) -> None:
    """A schedule down to alpha-bar 0: its first step is plain, and the edits move the sample that comes of it."""
    noise, labels = start(2)
    trailing = DDIMScheduler.from_config(schedule().config, timestep_spacing="trailing")
    seen: list[tuple[int, Tensor]] = []

    class Watched(Pixels):
        def predict(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            seen.append((int(t), s.detach().clone()))
            return super().predict(s, t, labels)

    sampler = GuidedSampler(Watched(unet, trailing), guide(0.1), GuidanceSettings(steps=4, edits=2, eta=0.5))
    sampler(noise, labels, torch.Generator())
    assert [t for t, _ in seen] == [99, 74, 74, 74, 74, 49, 49, 24, 24]  # plain, two edits, then a gradient and a step
    assert len(sampler.losses) == 2 + 3
    assert torch.equal(seen[0][1], noise)
    first = seen[1][1]
    assert torch.equal(
        first, trailing.step(Pixels(unet, trailing).predict(noise, torch.tensor(99), labels), 99, noise)[0]
    )
    assert not torch.equal(seen[3][1], first)


def test_an_image_by_itself_is_that_of_its_batch(unet: nn.Module) -> None:
    """Per-image statistics: no image depends on those beside it. Batch statistics: each does."""
    noise, labels = start(3)
    apart = {}
    for statistics in ("image", "batch"):
        settings = GuidanceSettings(steps=4, edits=2, eta=1.0)
        sampler = GuidedSampler(Pixels(unet, schedule()), guide(1.0, statistics), settings)
        together = sampler(noise, labels, torch.Generator())
        alone = sampler(noise[1:2], labels[1:2], torch.Generator())
        apart[statistics] = float((together[1:2] - alone).abs().max())
    assert apart["image"] < 1e-5 < 1e-3 < apart["batch"]


def test_one_image_s_gradient_is_as_large_with_batch_statistics(unet: nn.Module) -> None:
    """Three equal images: the batch's statistics are each image's own, and so are the steps."""
    noise, labels = start(1)
    steps = {}
    for statistics in ("image", "batch"):
        sampler = GuidedSampler(Pixels(unet, schedule()), guide(1.0, statistics), GuidanceSettings(steps=4))
        sampler.model.scheduler.set_timesteps(4)
        t = sampler.model.scheduler.timesteps[1]
        steps[statistics], _ = sampler.gradient(noise.expand(3, -1, -1, -1), t, labels.expand(3))
    torch.testing.assert_close(steps["batch"], steps["image"], rtol=1e-3, atol=1e-5)


def test_edits_renormalised_have_the_norm_of_noise(unet: nn.Module) -> None:
    noise, labels = start(2)
    seen: list[Tensor] = []
    model = Pixels(unet, schedule())
    sampler = GuidedSampler(model, guide(), GuidanceSettings(steps=2, edits=3, eta=50.0, renormalise=True))
    real = sampler._step

    def watched(s: Tensor, t: Tensor, classes: Tensor, with_classes: bool = True) -> Tensor:
        seen.append(s)
        return real(s, t, classes, with_classes)

    sampler._step = watched
    sampler(noise, labels, torch.Generator())
    assert torch.linalg.vector_norm(seen[3].flatten(1), dim=1).tolist() == pytest.approx([8.0, 8.0])
    assert torch.linalg.vector_norm(seen[2].flatten(1), dim=1).tolist() != pytest.approx([8.0, 8.0])


def test_gradients_that_are_not_finite_leave_that_image_s_step_out(unet: nn.Module) -> None:
    class Trouble(nn.Module):
        """A classifier whose gradient is infinite at the second image."""

        def forward(self, x: Tensor) -> Tensor:
            level = x.mean(dim=(1, 2, 3))
            bad = level[1:] + (level[1:] - level[1:].detach()).abs().sqrt()
            return torch.stack([torch.cat([level[:1], bad]), -level, level * 0], dim=1)

    own = ClassifierGuide(Trouble(), 0.0, SIZE, 1, [0.5], [1.0])
    noise, labels = start(2)
    sampler = GuidedSampler(Pixels(unet, schedule()), own, GuidanceSettings(steps=3, edits=1))
    made = sampler(noise, labels, torch.Generator())
    assert made.isfinite().all()
    assert sampler.broken.tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps is 0"), ({"eta": -1.0}, "eta is -1"), ({"recurrence": 2}, "goes with form epsilon")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceSettings(**settings)


@pytest.mark.parametrize("to_one", [True, False])
def test_a_step_back_to_noise_by_hand(unet: nn.Module, to_one: bool) -> None:
    """From the step before, and from what the last step leaves: with DDIM that may be a little noise."""
    scheduler = DDIMScheduler.from_config(schedule().config, set_alpha_to_one=to_one)
    sampler = GuidedSampler(Pixels(unet, scheduler), guide(), GuidanceSettings(form="epsilon", recurrence=2))
    scheduler.set_timesteps(5)
    s, _ = start(2)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].tolist()
    alphas.append(1.0 if to_one else float(scheduler.alphas_cumprod[0]))
    for number in (1, 4):
        ratio = alphas[number] / alphas[number + 1]
        drawn = torch.randn(s.shape, generator=torch.Generator().manual_seed(3))
        found = sampler._noised(s, number, torch.Generator().manual_seed(3))
        torch.testing.assert_close(found, ratio**0.5 * s + (1 - ratio) ** 0.5 * drawn)


def test_recurrence_needs_a_scheduler_of_one_step(unet: nn.Module) -> None:
    settings = GuidanceSettings(form="epsilon", recurrence=2)
    with pytest.raises(ValueError, match="take ddim or ddpm"):
        GuidedSampler(Pixels(unet, schedule(DPMSolverMultistepScheduler)), guide(), settings)


def test_steps_that_the_scheduler_refuses_are_named(unet: nn.Module) -> None:
    sampler = GuidedSampler(Pixels(unet, schedule()), guide(), GuidanceSettings(steps=101))
    with pytest.raises(ValueError, match=r"^steps is 101, but the model's DDIMScheduler refuses: .*100"):
        sampler(*start(1), torch.Generator())
