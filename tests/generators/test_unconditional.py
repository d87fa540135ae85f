"""Pipelines without classes: diffusers' own images, and guides that are heard through UNet and decoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, LDMPipeline
from torch import Tensor, nn

from generators.base import Block, key_seed
from generators.guidance.losses import ClassifierGuide
from generators.guidance.sampling import GuidanceSettings, GuidedSampler
from generators.unconditional import Unconditional, UnconditionalDenoiser
from tests.generators.test_text_to_image import wanted
from tests.generators.tiny_pipelines import dit_pipeline, latent_pipeline, pixel_pipeline

CPU = torch.device("cpu")
PIPELINES = {"pixel": (pixel_pipeline, DDIMPipeline), "latent": (latent_pipeline, LDMPipeline)}


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PIPELINES[kind][0](tmp_path_factory.mktemp("models") / kind)


@pytest.fixture
def fitted(model: Path, tmp_path: Path) -> Callable[..., tuple[Unconditional, Path]]:
    def fit(model: Path = model, **settings: object) -> tuple[Unconditional, Path]:
        folder = tmp_path / f"weights{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        generator = Unconditional(str(model), **{"steps": 4, "block_size": 3, **settings})
        generator.fit(wanted(), folder, lambda *told: None)
        return generator, folder

    return fit


def test_files_that_change_after_the_key_was_made_are_refused(
    model: Path, fitted: Callable[..., tuple[Unconditional, Path]], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    generator, folder = fitted(own)
    generator.training_settings()
    (own / "unet" / "config.json").write_text((own / "unet" / "config.json").read_text() + " ")
    for load in (generator.load, generator.denoiser):
        with pytest.raises(ValueError, match=r"^model is .*/own, whose files have changed since they were hashed"):
            load(folder, CPU)


class Bright(nn.Module):
    """Class 1 is what is bright."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.mean(dim=(1, 2, 3))
        return torch.stack([-level, level], dim=1) * 5


GUIDE = ClassifierGuide(Bright(), 0.0, 16, 3, [0.5] * 3, [0.5] * 3)


def test_images_are_those_of_the_pipeline_s_own_call(
    kind: str, model: Path, fitted: Callable[..., tuple[Unconditional, Path]]
) -> None:
    generator, folder = fitted()
    found = generator.load(folder, CPU).sample(Block(7, 1, 2))
    own = (
        PIPELINES[kind][1]
        .from_pretrained(model)(
            batch_size=3,
            generator=[torch.Generator().manual_seed(key_seed(7, 1, index)) for index in (6, 7, 8)],
            num_inference_steps=4,
            output_type="np",
        )
        .images
    )
    assert np.abs(found.astype(int) - (own * 255).round().transpose(0, 3, 1, 2)).max() <= 1


def test_without_guidance_guided_sampling_is_plain_sampling(
    fitted: Callable[..., tuple[Unconditional, Path]],
) -> None:
    generator, folder = fitted()
    model = generator.denoiser(folder, CPU)
    noise = torch.stack(
        [torch.randn(model.shape, generator=torch.Generator().manual_seed(key_seed(7, 1, index))) for index in range(3)]
    )
    sampler = GuidedSampler(model, GUIDE, GuidanceSettings(steps=4, edits=0, eta=0.0))
    made = sampler(noise, torch.tensor([1, 1, 1]), torch.Generator())
    plain = generator.load(folder, CPU).sample(Block(7, 1, 0))
    assert ((made * 255).round().to(torch.uint8).numpy() == plain).all()


def test_the_guide_s_loss_falls(fitted: Callable[..., tuple[Unconditional, Path]]) -> None:
    generator, folder = fitted()
    model, labels = generator.denoiser(folder, CPU), torch.tensor([1, 0])
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    free, guided = (
        GuidedSampler(model, GUIDE, GuidanceSettings(steps=4, edits=edits, eta=eta, step_rule="rms"))(
            noise, labels, torch.Generator()
        )
        for edits, eta in ((0, 0.0), (3, 0.5))
    )
    assert (GUIDE.losses(guided, labels)[0] < GUIDE.losses(free, labels)[0]).all()


def test_a_large_model_computes_its_activations_again(
    fitted: Callable[..., tuple[Unconditional, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for most in (10**8, 0):
        monkeypatch.setattr("generators.pipelines._LARGE", most)
        generator, folder = fitted()
        model = generator.denoiser(folder, CPU)
        assert model.unet.is_gradient_checkpointing == (most == 0)
        sampler = GuidedSampler(model, GUIDE, GuidanceSettings(steps=4))
        model.scheduler.set_timesteps(4)
        noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
        gradients.append(sampler.gradient(noise, model.scheduler.timesteps[1], torch.tensor([1]))[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_the_noise_follows_from_what_a_unet_predicts(
    predicts: str, tmp_path: Path, fitted: Callable[..., tuple[Unconditional, Path]]
) -> None:
    """As diffusers' scheduler has it: its clean estimate of the same prediction, and the noise that goes with it."""
    generator, folder = fitted(pixel_pipeline(tmp_path / predicts, prediction_type=predicts))
    pipeline = generator.pipeline(folder, CPU, torch.float32)
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    s, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(400)
    with torch.no_grad():
        found = UnconditionalDenoiser(pipeline).predict(s, t, torch.zeros(2, dtype=torch.int64))
        clean = own.step(pipeline.unet(s, t).sample, 400, s).pred_original_sample
    alpha_bar = own.alphas_cumprod[400]
    torch.testing.assert_close(found, (s - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt(), atol=1e-5, rtol=1e-5)


def test_what_it_can_not_use_is_refused(tmp_path: Path, fitted: Callable[..., tuple[Unconditional, Path]]) -> None:
    with pytest.raises(ValueError, match="a DiTPipeline, but unconditional takes a DDIMPipeline, DDPMPipeline, LDMP"):
        fitted(dit_pipeline(tmp_path / "dit", ["cat"], 2))
    generator, folder = fitted(pixel_pipeline(tmp_path / "odd", prediction_type="flow"))
    with pytest.raises(ValueError, match="predicts flow"):
        generator.load(folder, CPU)
    with pytest.raises(ValueError, match="precision is fp16"):
        Unconditional("x", precision="fp16").check_guidable(1)
    with pytest.raises(ValueError, match=r"scheduler is dpmpp.*recurrence is 2"):
        Unconditional("x", scheduler="dpmpp").check_guidable(2)
