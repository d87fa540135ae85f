"""Generators: samples fixed by (seed, class, index) for any pool; the pipeline folder; the cache; wrong input."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel

from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.errors import PlacementError, SettingError
from fl_ray.progress import Progress
from fl_ray.synthesis import Synthesis
from generators.base import Block, TrainingImages, block_seed
from generators.diffusion import ClassConditionalPipeline, DiffusionGenerator
from lightning_modules.diffusion import ClassConditionalDDPM, default_widths, make_unet
from tests.conftest import TINY_GENERATOR

TINY = {name: value for name, value in TINY_GENERATOR.items() if name != "name"}


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    """Two classes of 8x8 images: dark and bright."""
    labels = np.arange(40) % 2
    pixels = np.random.default_rng(0).integers(0, 40, (40, 1, 8, 8)) + 200 * labels[:, None, None, None]
    return TrainingImages(pixels.astype(np.uint8), labels, ["dark", "bright"], "made-here")


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
    assert bright.mean() - dark.mean() > 60


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
    """One DDIM step by hand with eps = eps_null + 3 (eps_class - eps_null), each predicted by itself."""
    generator = DiffusionGenerator(**{**TINY, "sampler": "ddim", "guidance": 3.0, "steps": 1})
    pipeline = generator.load(folder, torch.device("cpu")).pipeline
    labels, null = torch.tensor([1, 0]), torch.tensor([2, 2])
    found = pipeline(labels, torch.Generator().manual_seed(5), steps=1, guidance=3.0)
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    t = pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        conditional = pipeline.unet(x, t, class_labels=labels).sample
        free = pipeline.unet(x, t, class_labels=null).sample
    assert (conditional - free).abs().max() > 1e-3
    expected = pipeline.scheduler.step(free + 3.0 * (conditional - free), t, x).prev_sample
    assert torch.allclose(found, ((expected + 1) / 2).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_guidance_of_one_is_plain_conditional_sampling(folder: Path, sampler: str) -> None:
    """Against a hand-written loop."""
    settings = DiffusionGenerator(**{**TINY, "sampler": sampler, "guidance": 1.0, "steps": 4})
    found = settings.load(folder, torch.device("cpu")).sample(Block(0, 1, 0))
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False).eval()
    pipeline = settings.load(folder, torch.device("cpu")).pipeline
    noise = torch.Generator().manual_seed(block_seed(Block(0, 1, 0)))
    x = torch.randn((5, 1, 8, 8), generator=noise)
    pipeline.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            eps = unet(x, t, class_labels=torch.ones(5, dtype=torch.long)).sample
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
    steps = [750, 500, 250, 0]
    with torch.no_grad():
        for t, after in zip(steps, [*steps[1:], None], strict=True):
            eps = pipeline.unet(x, t, class_labels=labels).sample
            before = alphas[after] if after is not None else torch.tensor(1.0)
            alpha = alphas[t] / before
            clean = ((x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()).clamp(-1, 1)
            mean = before.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - before) * x
            x = mean / (1 - alphas[t])
            if after is not None:
                variance = (1 - before) / (1 - alphas[t]) * (1 - alpha)
                x = x + variance.sqrt() * torch.randn(x.shape, generator=noise)
    assert torch.allclose(found, ((x + 1) / 2).clamp(0, 1), atol=1e-4)


def test_ddim_steps_match_the_closed_form(folder: Path) -> None:
    """x_{t-1} = sqrt(a_{t-1}) x0 + sqrt(1 - a_{t-1}) eps with x0 = (x - sqrt(1 - a_t) eps) / sqrt(a_t), clipped."""
    generator = DiffusionGenerator(**{**TINY, "sampler": "ddim", "guidance": 1.0, "steps": 4})
    pipeline = generator.load(folder, torch.device("cpu")).pipeline
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    labels = torch.zeros(2, dtype=torch.long)
    found = pipeline(labels, torch.Generator().manual_seed(1), steps=4, guidance=1.0)
    alphas = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    steps = [750, 500, 250, 0]
    with torch.no_grad():
        for t, after in zip(steps, [*steps[1:], None], strict=True):
            eps = pipeline.unet(x, t, class_labels=labels).sample
            clean = ((x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()).clamp(-1, 1)
            last = alphas[after] if after is not None else pipeline.scheduler.final_alpha_cumprod
            x = last.sqrt() * clean + (1 - last).sqrt() * eps
    assert torch.allclose(found, ((x + 1) / 2).clamp(0, 1), atol=1e-4)


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


def data_of(config: RunConfig) -> FederatedData:
    return prepare(config.data, config.seed)


def test_images_are_made_once_and_counted_by_class(
    small: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(with_generator=True)
    first = Synthesis(config.generator, data_of(config), Progress(False), on_ray=False, threads=1)
    counts = np.array([7, 0, 1, 0, 0, 0, 0, 0, 0, 12])
    images, labels = first.images(counts, seed=11)
    assert np.bincount(labels, minlength=10).tolist() == counts.tolist()
    assert images.shape == (20, 1, 8, 8)
    made = first.report()["images_made"]
    assert made == 5 * (2 + 1 + 3)
    again = Synthesis(config.generator, data_of(config), Progress(False), on_ray=False, threads=1)
    more, more_labels = again.images(counts + 1, seed=11)
    assert (more[more_labels == 9][:12] == images[labels == 9]).all()
    assert again.report()["images_made"] == 5 * 7  # the seven classes that had none
    other, _ = again.images(counts, seed=12)
    assert (other != images).any()


def test_the_key_changes_with_data_and_settings_but_not_with_the_seed(small: Callable[..., RunConfig]) -> None:
    def key(**overrides: object) -> str:
        config = small(with_generator=True, **overrides)
        return Synthesis(config.generator, data_of(config), Progress(False), False, 1).key

    assert key() == key(seed=5)
    changed = [key(data__split_seed=1), key(generator__train_steps=31), key(data__public_fraction=0.3)]
    assert len({key(), *changed}) == 4
    assert key() == key(generator__steps=4)  # sampling settings keep the weights


def test_generator_that_can_not_learn_or_fit(small: Callable[..., RunConfig], ray_session: None) -> None:
    config = small(with_generator=True, data__public_fraction=0.0)
    with pytest.raises(SettingError, match="public part holds no images"):
        Synthesis(config.generator, data_of(config), Progress(False), False, 1)
    config = small(with_generator=True, generator__widths=[8, 8, 8, 8, 8])
    with pytest.raises(SettingError, match="not divisible"):
        Synthesis(config.generator, data_of(config), Progress(False), False, 1).prepare()
    config = small(with_generator=True, generator__pool__gpus=1.0)
    with pytest.raises(PlacementError, match=r"2 actors x 1 GPU.*generator.pool.gpus"):
        Synthesis(config.generator, data_of(config), Progress(False), True, 1).images(np.ones(10, dtype=int), 99)


@pytest.mark.parametrize("bad", [{"train_steps": 0}, {"label_dropout": 1.0}, {"steps": 2000}, {"lr": -1.0}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DiffusionGenerator(**bad)


def test_an_unknown_class_is_refused(folder: Path) -> None:
    sampler = DiffusionGenerator(**TINY).load(folder, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"class 2 is unknown.*0\.\.1"):
        sampler.sample(Block(0, 2, 0))
