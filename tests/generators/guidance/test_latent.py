"""Stable Diffusion with a guide: plain samples where nothing guides, and a loss that falls through the decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from generators.base import TrainingImages
from generators.guidance.latent import LatentDenoiser
from generators.guidance.losses import ClassifierGuide
from generators.guidance.sampling import GuidanceSettings, GuidedSampler
from generators.text_to_image import TextToImage
from tests.generators.tiny_pipelines import text_pipeline

CPU = torch.device("cpu")
CLASSES = ["cat", "dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("models") / "tiny-diffusion")


def fitted(model: Path, folder: Path, **settings: object) -> TextToImage:
    generator = TextToImage(model=str(model), **{"steps": 4, "guidance": 3.0, "scheduler": "ddim", **settings})
    empty = np.empty((0, 3, 16, 16), dtype=np.uint8)
    generator.fit(TrainingImages(empty, np.empty(0, dtype=np.int64), CLASSES), folder, lambda *told: None)
    return generator


class Bright(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        level = x.mean(dim=(1, 2, 3))
        return torch.stack([-level, level], dim=1) * 5


def guide() -> ClassifierGuide:
    return ClassifierGuide(Bright(), 0.0, 16, 3, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_without_guidance_it_is_the_pipelines_own_call(model: Path, tmp_path: Path, weight: float) -> None:
    generator = fitted(model, tmp_path, guidance=weight, negative_prompt="rain")
    denoiser = generator.denoiser(tmp_path, CPU)
    assert isinstance(denoiser, LatentDenoiser)
    noise = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    plain = GuidedSampler(denoiser, guide(), GuidanceSettings(steps=4, edits=0, eta=0.0))
    made = plain(noise, labels, torch.Generator())
    expected = denoiser.pipeline(
        prompt=["a photo of a cat", "a photo of a dog"],
        negative_prompt=["rain", "rain"],
        latents=noise,
        num_inference_steps=4,
        guidance_scale=weight,
        output_type="pt",
    ).images
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_the_guide_s_loss_falls_through_the_decoder(model: Path, tmp_path: Path) -> None:
    denoiser = fitted(model, tmp_path).denoiser(tmp_path, CPU)
    noise, labels = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 1])
    own = guide()
    free = GuidedSampler(denoiser, own, GuidanceSettings(steps=4, edits=0, eta=0.0))(noise, labels, torch.Generator())
    settings = GuidanceSettings(steps=4, edits=3, eta=0.3, step_rule="rms")
    guided = GuidedSampler(denoiser, own, settings)(noise, labels, torch.Generator())
    assert own.losses(guided, labels)[0].mean() < own.losses(free, labels)[0].mean()


def test_a_large_model_computes_its_activations_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for most in (10**8, 0):
        monkeypatch.setattr("generators.pipelines._LARGE", most)
        denoiser = fitted(model, tmp_path).denoiser(tmp_path, CPU)
        assert denoiser.pipeline.unet.is_gradient_checkpointing == (most == 0)
        assert denoiser.pipeline.vae.is_gradient_checkpointing == (most == 0)
        sampler = GuidedSampler(denoiser, guide(), GuidanceSettings(steps=4))
        denoiser.scheduler.set_timesteps(4)
        noise = torch.randn(1, *denoiser.shape, generator=torch.Generator().manual_seed(0))
        gradients.append(sampler.gradient(noise, denoiser.scheduler.timesteps[1], torch.tensor([1]))[0])
    torch.testing.assert_close(*gradients)


def test_what_can_not_be_guided_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision is fp16"):
        fitted(model, tmp_path, precision="fp16").denoiser(tmp_path, CPU)
    with pytest.raises(ValueError, match="size is 17, but it must be a multiple of 2"):
        fitted(model, tmp_path, size=17).denoiser(tmp_path, CPU)
    pipeline = fitted(model, tmp_path).pipeline(tmp_path, CPU, torch.float32)
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts v_prediction"):
        LatentDenoiser(pipeline, ["a"], None, 1.0, None)
