"""Guided images as a generator: fixed by (seed, guide, class, index), plain ones where nothing guides."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from generators.base import Block, TrainingImages, image_seeds
from generators.diffusion import DiffusionGenerator
from generators.guidance.generator import GuidedGenerator
from generators.guidance.losses import ClassifierGuide
from generators.guidance.sampling import GuidanceSettings
from generators.noise import NoiseGenerator
from generators.pipelines import dtype_of
from generators.pool import GeneratorPool, LocalPool

CLASSES, SIZE = 3, 8


class Towards(nn.Module):
    """A classifier whose class y is brightness: 0 dark, 2 bright."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        level = self.sign * x.mean(dim=(1, 2, 3))
        return torch.stack([-level, level * 0, level], dim=1) * 10


class Broken(Towards):
    """Its gradient is not finite at images that differ much from grey: where the step is large."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().abs().amax(dim=(1, 2, 3)) < 1000
        return super().forward(x * torch.where(flat, 1.0, float("nan"))[:, None, None, None])


class Hopeless(Towards):
    """Its gradient is never finite."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


@dataclass(frozen=True)
class Source:
    kind: type[Towards]
    sign: float

    def key(self) -> dict[str, Any]:
        return {"kind": self.kind.__name__, "sign": self.sign}

    def load(self, device: torch.device) -> ClassifierGuide:
        return ClassifierGuide(self.kind(self.sign), 0.0, SIZE, 1, [0.5], [0.5])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionGenerator, Path]:
    generator = DiffusionGenerator(widths=[8, 16], train_steps=20, sampler="ddim", steps=4, guidance=1.0, block_size=4)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, SIZE, SIZE), dtype=np.uint8)
    data = TrainingImages(images, np.arange(60) % CLASSES, ["a", "b", "c"])
    folder = tmp_path_factory.mktemp("weights")
    generator.fit(data, folder, lambda *told: None)
    return generator, folder


def guided(trained: tuple[DiffusionGenerator, Path], guides: list[Source], **settings: Any) -> GuidedGenerator:
    kept = GuidanceSettings(steps=4, **{"edits": 2, "eta": 5.0, **settings})
    return GuidedGenerator(trained[0], dict(enumerate(guides)), CLASSES, (1, SIZE, SIZE), kept, 4)


BOTH = [Source(Towards, 1.0), Source(Towards, -1.0)]


def test_each_guide_pulls_its_own_way(trained: tuple[DiffusionGenerator, Path]) -> None:
    sampler = guided(trained, BOTH).load(trained[1], torch.device("cpu"))
    level = {(g, c): sampler.sample(Block(0, g * CLASSES + c, 0)).mean() for g in (0, 1) for c in (0, 2)}
    assert level[0, 2] > level[0, 0] + 5
    assert level[1, 0] > level[1, 2] + 5
    counted = sampler.report()
    assert counted["blocks"] == 4
    assert counted["loss_last"] < counted["loss_first"]
    assert counted["made_again"] == counted["unguided"] == 0


def test_an_image_is_fixed_whatever_is_made_before_it(trained: tuple[DiffusionGenerator, Path]) -> None:
    blocks = [Block(3, label, number) for label in (0, 4) for number in (0, 1)]
    one = dict(LocalPool(guided(trained, BOTH), trained[1]).make(blocks))
    other = dict(LocalPool(guided(trained, BOTH), trained[1]).make(blocks[::-1]))
    assert all(np.array_equal(one[block], other[block]) for block in blocks)
    assert not np.array_equal(one[blocks[0]], one[blocks[1]])


def test_without_guidance_it_is_the_diffusion_model_s_own_sample(trained: tuple[DiffusionGenerator, Path]) -> None:
    generator, folder = trained
    sampler = guided(trained, BOTH, edits=0, eta=0.0).load(folder, torch.device("cpu"))
    block = Block(1, 1 * CLASSES + 2, 0)
    made = sampler.sample(block)
    pipeline = generator._pipeline(folder, torch.device("cpu"))
    draws = [torch.Generator().manual_seed(seed) for seed in image_seeds(block, 4)]
    s = torch.stack([torch.randn(1, SIZE, SIZE, generator=drawn) for drawn in draws])
    pipeline.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            alpha_bar = pipeline.scheduler.alphas_cumprod[t]
            velocity = pipeline.unet(s, t, class_labels=torch.full((4,), 2)).sample
            noise = alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * s
            s = pipeline.scheduler.step(noise, t, s).prev_sample
    expected = ((s + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    assert np.array_equal(made, expected)


def test_an_image_whose_gradient_is_not_finite_is_made_again_with_a_smaller_step(
    trained: tuple[DiffusionGenerator, Path],
) -> None:
    source = [Source(Broken, 1.0)]
    sampler = guided(trained, source, eta=1e5, edits=1).load(trained[1], torch.device("cpu"))
    images = sampler.sample(Block(0, 2, 0))
    counted = sampler.report()
    assert counted["made_again"] > 0
    assert images.shape == (4, 1, SIZE, SIZE)
    calm = guided(trained, source, eta=5.0, edits=1).load(trained[1], torch.device("cpu"))
    calm.sample(Block(0, 2, 0))
    assert calm.report()["made_again"] == 0


def test_bad_input(trained: tuple[DiffusionGenerator, Path]) -> None:
    sampler = guided(trained, BOTH).load(trained[1], torch.device("cpu"))
    with pytest.raises(ValueError, match="no guide of client 2, only of 0, 1"):
        sampler.sample(Block(0, 2 * CLASSES, 0))
    with pytest.raises(ValueError, match="no diffusion model that classifiers could guide"):
        NoiseGenerator().check_guidable(1)
    with pytest.raises(ValueError, match="recurrence is 2; take ddim or ddpm"):
        DiffusionGenerator().check_guidable(2)
    trained[0].check_guidable(2)


def test_what_never_has_a_finite_gradient_is_sampled_without_guidance(
    trained: tuple[DiffusionGenerator, Path],
) -> None:
    sampler = guided(trained, [Source(Hopeless, 1.0)]).load(trained[1], torch.device("cpu"))
    free = guided(trained, [Source(Hopeless, 1.0)], edits=0, eta=0.0).load(trained[1], torch.device("cpu"))
    assert np.array_equal(sampler.sample(Block(0, 1, 0)), free.sample(Block(0, 1, 0)))
    assert sampler.report()["unguided"] == 4
    assert sampler.report()["made_again"] == 4 * 4
    assert sampler.report()["blocks"] == sampler.report()["loss_first"] == 0  # of what is finite alone


def test_a_guide_is_loaded_once_while_its_jobs_last(
    trained: tuple[DiffusionGenerator, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[float] = []
    load = Source.load

    def counted(source: Source, device: torch.device) -> ClassifierGuide:
        loaded.append(source.sign)
        return load(source, device)

    monkeypatch.setattr(Source, "load", counted)
    generator = guided(trained, [Source(Towards, sign) for sign in (1.0, -1.0, 0.5)])
    jobs = [client * CLASSES + label for client in range(3) for label in (0, 2)]
    blocks = [Block(0, job, number) for job in jobs for number in (0, 1)]
    assert len(list(LocalPool(generator, trained[1], "cpu").make(blocks))) == 12
    assert loaded == [1.0, -1.0, 0.5]


def test_bf16_guides_as_fp32_does(trained: tuple[DiffusionGenerator, Path]) -> None:
    images, generator = {}, copy.copy(trained[0])
    for generator.precision in ("fp32", "bf16"):
        sampler = guided((generator, trained[1]), BOTH, eta=0.1, step_rule="rms").load(trained[1], torch.device("cpu"))
        images[generator.precision] = sampler.sample(Block(0, 2, 0)).astype(int)
        counted = sampler.report()
        assert counted["loss_last"] < counted["loss_first"]
        assert counted["made_again"] == 0
    assert 0 < np.abs(images["fp32"] - images["bf16"]).mean() < 6
    assert images["bf16"].mean() > trained[0].load(trained[1], torch.device("cpu")).sample(Block(0, 2, 0)).mean() + 4


def test_on_a_gpu_the_guided_path_is_bf16_where_the_recipe_leaves_it_open() -> None:
    gpu = torch.device("cuda")
    assert dtype_of("auto", gpu, torch.bfloat16) is torch.bfloat16
    assert dtype_of("auto", torch.device("cpu"), torch.bfloat16) is torch.float32
    assert dtype_of("fp32", gpu, torch.bfloat16) is torch.float32


def test_actors_make_the_same_images(trained: tuple[DiffusionGenerator, Path], ray_session: None) -> None:
    blocks = [Block(0, label, 0) for label in (0, 5)]
    generator = guided(trained, BOTH)
    here = dict(LocalPool(generator, trained[1], "cpu").make(blocks))
    pool = GeneratorPool(generator, trained[1], 1, 0, 0, 1, 180)
    there = dict(pool.make(blocks))
    counted = pool.report()
    pool.close()
    assert all(np.array_equal(here[block], there[block]) for block in blocks)
    assert counted["blocks"] == 2
