"""The diffusion generator: what it learns, its steps against closed forms, its pipeline folder, wrong input."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DModel,
)

from generators.base import Block, TrainingImages, block_seed
from generators.diffusion import ClassConditionalPipeline, DiffusionGenerator
from generators.pipelines import to_pixels
from lightning_modules.diffusion import ClassConditionalDDPM, default_widths, make_unet
from tests.conftest import TINY_GENERATOR

TINY = {name: value for name, value in TINY_GENERATOR.items() if name != "name"}


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    """Two classes of 8x8 images: dark and bright."""
    labels = np.arange(40) % 2
    pixels = np.random.default_rng(0).integers(0, 40, (40, 1, 8, 8)) + 200 * labels[:, None, None, None]
    return TrainingImages(pixels.astype(np.uint8), labels, ["dark", "bright"])


@pytest.fixture(scope="module")
def folder(images: TrainingImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generator") / "weights"
    told: list[int] = []
    DiffusionGenerator(**{**TINY, "train_steps": 150, "lr": 3e-3, "ema": 0.9}).fit(
        images, path, lambda step, steps, loss: told.append(step)
    )
    assert told[-1] == 150
    return path


def test_it_learns_which_class_is_which(folder: Path) -> None:
    sampler = DiffusionGenerator(**{**TINY, "steps": 10}).load(folder, torch.device("cpu"))
    dark, bright = (sampler.sample(Block(0, label, 0)) for label in (0, 1))
    assert dark.shape == bright.shape == (5, 1, 8, 8)
    assert dark.dtype == np.uint8
    assert bright.mean() - dark.mean() > 100


def test_dark_images_come_out_dark(tmp_path: Path) -> None:
    """A bright pixel on black: a sampling that begins where the mean of the pixels still shows makes the black grey."""
    pixels = np.zeros((40, 1, 8, 8), dtype=np.uint8)
    pixels[:, 0, 2, 2] = 255
    dark = TrainingImages(pixels, np.zeros(40, dtype=np.int64), ["spot"])
    generator = DiffusionGenerator(**{**TINY, "train_steps": 200, "lr": 5e-3, "ema": 0.9, "steps": 10})
    generator.fit(dark, tmp_path, lambda step, steps, loss: None)
    made = generator.load(tmp_path, torch.device("cpu")).sample(Block(0, 0, 0))
    assert np.median(made, axis=(1, 2, 3)).max() < 25
    assert made[:, 0, 2, 2].mean() > 150  # of one image it may be less, as chance in the training has it


def clean_and_noise(
    pipeline: ClassConditionalPipeline, x: torch.Tensor, t: int, label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 = sqrt(a) x - sqrt(1 - a) v and eps = sqrt(a) v + sqrt(1 - a) x of the network's v (arXiv 2202.00512)."""
    alpha_bar = pipeline.scheduler.alphas_cumprod[t]
    with torch.no_grad():
        v = pipeline.unet(x, t, class_labels=torch.full((len(x),), label)).sample
    return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v, alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x


def test_the_training_target_is_the_velocity() -> None:
    """A network that gives v = sqrt(a) eps - sqrt(1 - a) x0 has no loss."""
    unet, scheduler = make_unet(8, 1, 2, [8, 16]), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    module, images = ClassConditionalDDPM(unet, scheduler), torch.randn(4, 1, 8, 8)

    def velocity(noised: torch.Tensor, steps: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        alpha_bar = scheduler.alphas_cumprod[steps][:, None, None, None]
        noise = (noised - alpha_bar.sqrt() * images) / (1 - alpha_bar).sqrt()
        return SimpleNamespace(sample=alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images)

    unet.forward = velocity
    assert module.training_step((images, torch.tensor([0, 1, 0, 1])), 0) < 1e-6


def test_the_folder_is_a_diffusers_pipeline(folder: Path) -> None:
    assert (folder / "model_index.json").exists()
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    loaded = ClassConditionalPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert isinstance(loaded, DiffusionPipeline)
    assert isinstance(loaded.unet, UNet2DModel)


def test_blocks_have_seeds_of_their_own() -> None:
    blocks = [Block(seed, label, number) for seed in (7, 8) for label in (0, 1) for number in range(3)]
    assert len({block_seed(block) for block in blocks}) == len(blocks)


def test_guidance_is_the_sum_of_both_predictions(folder: Path) -> None:
    """eps = eps_null + 3 (eps_class - eps_null), each predicted by itself."""
    pipeline = DiffusionGenerator(**TINY).load(folder, torch.device("cpu")).pipeline
    x, t = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(5)), torch.tensor(500)
    with torch.no_grad():
        found = pipeline.predict(x, t, torch.tensor([1, 1]), guidance=3.0)
    (_, conditional), (_, free) = (clean_and_noise(pipeline, x, t, label) for label in (1, 2))
    assert (conditional - free).abs().max() > 1e-3
    assert torch.allclose(found, free + 3.0 * (conditional - free), atol=1e-5)


def test_sampling_begins_at_pure_noise(folder: Path) -> None:
    for sampler in ("ddim", "ddpm", "dpmpp"):
        scheduler = (
            DiffusionGenerator(**{**TINY, "sampler": sampler, "steps": 4})
            .load(folder, torch.device("cpu"))
            .pipeline.scheduler
        )
        scheduler.set_timesteps(8)
        assert scheduler.timesteps[0] == 999
        assert scheduler.alphas_cumprod[999] < 1e-8


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_guidance_of_one_is_plain_conditional_sampling(folder: Path, sampler: str) -> None:
    """Against a hand-written loop."""
    settings = DiffusionGenerator(**{**TINY, "sampler": sampler, "guidance": 1.0, "steps": 4})
    found = settings.load(folder, torch.device("cpu")).sample(Block(0, 1, 0))
    pipeline = settings.load(folder, torch.device("cpu")).pipeline
    noise = torch.Generator().manual_seed(block_seed(Block(0, 1, 0)))
    x = torch.randn((5, 1, 8, 8), generator=noise)
    pipeline.scheduler.set_timesteps(4)
    for t in pipeline.scheduler.timesteps:
        _, eps = clean_and_noise(pipeline, x, t, 1)
        x = pipeline.scheduler.step(eps, t, x, generator=noise).prev_sample
    assert (found == ((x + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()).all()


def test_ddpm_steps_match_the_closed_form(folder: Path) -> None:
    """x_{t-1} is the posterior's mean (arXiv 2006.11239, eq. 7) plus noise of its variance, but for the last step."""
    generator = DiffusionGenerator(**{**TINY, "sampler": "ddpm", "guidance": 1.0, "steps": 4})
    pipeline = generator.load(folder, torch.device("cpu")).pipeline
    labels = torch.zeros(2, dtype=torch.long)
    found = pipeline(labels, torch.Generator().manual_seed(1), steps=4, guidance=1.0)
    alphas = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    noise = torch.Generator().manual_seed(1)
    x = torch.randn((2, 1, 8, 8), generator=noise)
    steps = [999, 749, 499, 249]
    for t, after in zip(steps, [*steps[1:], None], strict=True):
        clean, _ = clean_and_noise(pipeline, x, t, 0)
        before = alphas[after] if after is not None else torch.tensor(1.0)
        alpha = alphas[t] / before
        mean = before.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - before) * x
        x = mean / (1 - alphas[t])
        if after is not None:
            variance = (1 - before) / (1 - alphas[t]) * (1 - alpha)
            x = x + variance.sqrt() * torch.randn(x.shape, generator=noise)
    assert torch.allclose(found, ((x + 1) / 2).clamp(0, 1), atol=2e-3)  # x0 of eps, divided by 5e-5 at the first step


def test_ddim_steps_match_the_closed_form(folder: Path) -> None:
    """x_{t-1} = sqrt(a_{t-1}) x0 + sqrt(1 - a_{t-1}) eps, with the x0 and the eps of the velocity."""
    generator = DiffusionGenerator(**{**TINY, "sampler": "ddim", "guidance": 1.0, "steps": 4})
    pipeline = generator.load(folder, torch.device("cpu")).pipeline
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    labels = torch.zeros(2, dtype=torch.long)
    found = pipeline(labels, torch.Generator().manual_seed(1), steps=4, guidance=1.0)
    alphas = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    steps = [999, 749, 499, 249]
    for t, after in zip(steps, [*steps[1:], None], strict=True):
        clean, eps = clean_and_noise(pipeline, x, t, 0)
        last = alphas[after] if after is not None else pipeline.scheduler.final_alpha_cumprod
        x = last.sqrt() * clean + (1 - last).sqrt() * eps
    assert torch.allclose(found, ((x + 1) / 2).clamp(0, 1), atol=2e-3)


def test_dpm_solver_steps_match_the_paper(folder: Path) -> None:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: the first step and the last (to no noise) are of first order."""
    generator = DiffusionGenerator(**{**TINY, "sampler": "dpmpp", "guidance": 1.0, "steps": 4})
    pipeline = generator.load(folder, torch.device("cpu")).pipeline
    labels = torch.zeros(2, dtype=torch.long)
    found = pipeline(labels, torch.Generator().manual_seed(1), steps=4, guidance=1.0)
    alphas = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod.double()
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1)).double()

    def half_log_snr(t: int) -> torch.Tensor:
        return (alphas[t] / (1 - alphas[t])).log() / 2

    steps, clean = pipeline.scheduler.timesteps.tolist(), []
    assert steps[0] == 999
    for number, (t, after) in enumerate(itertools.pairwise(steps)):
        clean.append(clean_and_noise(pipeline, x.float(), t, 0)[0].double())
        h, data = half_log_snr(after) - half_log_snr(t), clean[-1]
        if number:
            r = (half_log_snr(t) - half_log_snr(steps[number - 1])) / h
            data = (1 + 1 / (2 * r)) * clean[-1] - 1 / (2 * r) * clean[-2]
        sigma = ((1 - alphas[after]) / (1 - alphas[t])).sqrt()
        x = sigma * x - alphas[after].sqrt() * ((-h).exp() - 1) * data
    last, _ = clean_and_noise(pipeline, x.float(), steps[-1], 0)
    assert torch.allclose(found, ((last + 1) / 2).clamp(0, 1), atol=2e-3)


def test_what_is_kept_is_the_average_of_the_weights(
    images: TrainingImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step n the average moves by 1 - d with d = min(ema, n / (9 + n)), from the first step's weights."""
    after: list[list[torch.Tensor]] = []

    class Watched(ClassConditionalDDPM):
        def optimizer_step(self, *arguments: object, **more: object) -> None:
            super().optimizer_step(*arguments, **more)
            after.append([parameter.detach().clone() for parameter in self.unet.parameters()])

    monkeypatch.setattr("generators.diffusion.ClassConditionalDDPM", Watched)
    generator = DiffusionGenerator(**{**TINY, "train_steps": 6, "lr": 3e-3, "ema": 0.3})
    generator.fit(images, tmp_path, lambda step, steps, loss: None)
    average = after[0]
    for number, weights in enumerate(after[1:], 2):
        decay = min(0.3, number / (9 + number))
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
    kept = list(generator.load(tmp_path, torch.device("cpu")).pipeline.unet.parameters())
    assert all(torch.allclose(found, wanted, atol=1e-6) for found, wanted in zip(kept, average, strict=True))
    assert any((found - raw).abs().max() > 1e-4 for found, raw in zip(kept, after[-1], strict=True))


def test_bf16_is_near_fp32(folder: Path) -> None:
    full, mixed = (
        DiffusionGenerator(**{**TINY, "precision": name}).load(folder, torch.device("cpu")).sample(Block(0, 1, 0))
        for name in ("fp32", "bf16")
    )
    difference = np.abs(full.astype(int) - mixed)
    assert difference.max() > 0
    assert difference.mean() < 8


@pytest.mark.parametrize(
    ("size", "widths"), [(8, [32, 64]), (28, [32, 64, 128]), (32, [32, 64, 128]), (64, [32, 64, 128, 256]), (9, [32])]
)
def test_default_widths_follow_the_size_of_the_images(size: int, widths: list[int]) -> None:
    assert default_widths(size) == widths
    unet = make_unet(size, 1, 2, widths)
    with torch.no_grad():
        made = unet(torch.zeros(1, 1, size, size), 0, class_labels=torch.zeros(1, dtype=torch.long)).sample
    assert made.shape == (1, 1, size, size)


def test_dropped_labels_are_the_null_class() -> None:
    unet = make_unet(8, 1, 3, [8, 16])
    assert unet.config.num_class_embeds == 4
    module = ClassConditionalDDPM(unet, DDPMScheduler(), label_dropout=0.999999)
    seen: list[torch.Tensor] = []
    unet.class_embedding.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    module.training_step((torch.zeros(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])), 0)
    assert set(seen[0].tolist()) == {3}


def test_images_that_are_not_finite_are_refused(folder: Path) -> None:
    """They would be black, and a model would learn from them."""
    sampler = DiffusionGenerator(**TINY).load(folder, torch.device("cpu"))
    with torch.no_grad():
        next(iter(sampler.pipeline.unet.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="its images are not finite: its training has diverged"):
        sampler.sample(Block(0, 0, 0))


def test_a_training_that_diverges_is_refused(images: TrainingImages, tmp_path: Path) -> None:
    generator = DiffusionGenerator(**{**TINY, "train_steps": 40, "lr": 1e9})
    with pytest.raises(ValueError, match=r"the loss of the training is nan after step \d+; lower lr"):
        generator.fit(images, tmp_path, lambda step, steps, loss: None)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_no_data_have_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"have {channels} channels, but the data have 3; set model"):
        to_pixels(torch.zeros(1, channels, 8, 8), (3, 8, 8))


@pytest.mark.parametrize(
    "bad",
    [
        {"train_steps": 0},
        {"label_dropout": 1.0},
        {"ema": 1.0},
        {"guidance": float("nan")},
        {"guidance": -1.0},
        {"label_dropout": 0.0, "guidance": 1.5},
        {"steps": 2000},
        {"steps": 60, "sampler": "ddim"},
        {"lr": -1.0},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DiffusionGenerator(**bad)


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_counts_of_steps_that_the_schedulers_round_to_one_more_are_refused(kind: type[SchedulerMixin]) -> None:
    """That one would be at -1, where they read the noise of the last step, and the image is lost."""
    refused = []
    for steps in range(1, 101):
        scheduler = kind(num_train_timesteps=100, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        whole = len(scheduler.timesteps) == steps and scheduler.timesteps.min() >= 0
        with nullcontext() if whole else pytest.raises(ValueError, match=f"steps is {steps}, .*; take"):
            DiffusionGenerator(diffusion_steps=100, steps=steps)
        refused += [] if whole else [steps]
    assert refused == [29, 31, 58, 62, 97]
    with pytest.raises(ValueError, match=r"steps is 121, but .* take 120 or 123"):
        DiffusionGenerator(steps=121)


def test_an_unknown_class_is_refused(folder: Path) -> None:
    sampler = DiffusionGenerator(**TINY).load(folder, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"class 2 is unknown.*0\.\.1"):
        sampler.sample(Block(0, 2, 0))
