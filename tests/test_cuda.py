"""On a real GPU: what is made and trained there, beside the same on the processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from fl_ray.config import Component, RunConfig, TrainingConfig
from fl_ray.data.parts import prepare
from fl_ray.experiment import Experiment
from fl_ray.model import ImageShape, initial_weights
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.tasks import Job, JobData, ServerTraining
from generators.base import Block, TrainingImages
from generators.diffusion import DiffusionGenerator
from generators.guidance.generator import GuidedGenerator
from generators.guidance.losses import ClassifierGuide
from generators.guidance.sampling import GuidanceSettings
from generators.pool import GeneratorPool, LocalPool
from lightning_modules.networks import ResNet18

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BLOCKS = [Block(3, label, number) for label in range(3) for number in range(2)]
_TONES = np.linspace(40, 200, 3)[np.arange(60) % 3, None, None, None]
_PIXELS = _TONES + np.random.default_rng(0).integers(-20, 20, (60, 1, 8, 8))
DATA = TrainingImages(_PIXELS.astype(np.uint8), np.arange(60) % 3, ["dark", "grey", "bright"])


def diffusion(precision: str) -> DiffusionGenerator:
    return DiffusionGenerator(
        widths=[8, 16], train_steps=40, sampler="ddim", steps=5, guidance=1.5, block_size=4, precision=precision
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    diffusion("fp32").fit(DATA, folder, lambda *told: None)
    return folder


def made(pool: LocalPool | GeneratorPool) -> np.ndarray:
    found = dict(pool.make(BLOCKS))
    pool.close()
    return np.concatenate([found[block] for block in BLOCKS]).astype(np.int64)


def test_actors_that_share_the_gpu_make_what_one_process_makes(ray_session: None, weights: Path) -> None:
    here = made(LocalPool(diffusion("fp32"), weights))
    pool = GeneratorPool(
        diffusion("fp32"), weights, actors=2, cpus=0, gpus=0.4, threads=1, timeout_s=180, device="cuda"
    )
    assert (made(pool) == here).all()
    on_cpu = made(LocalPool(diffusion("fp32"), weights, "cpu"))
    assert np.abs(here - on_cpu).mean() < 1  # of 255
    assert np.abs(made(LocalPool(diffusion("bf16"), weights)) - on_cpu).mean() < 8


class Guide:
    """A classifier with random weights and fixed running statistics."""

    def key(self) -> dict[str, Any]:
        return {"guide": "random"}

    def load(self, device: torch.device) -> ClassifierGuide:
        torch.manual_seed(0)
        classifier: nn.Module = ResNet18(1, 8, 3, width=4)
        classifier(torch.randn(64, 1, 8, 8))  # in train mode: running statistics of their own
        return ClassifierGuide(classifier.to(device), 0.1, 8, 1, [0.5], [0.5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_guidance_lowers_the_loss_on_the_gpu(weights: Path, precision: str) -> None:
    settings = GuidanceSettings(steps=5, edits=3, eta=0.1, step_rule="rms")
    pools = {
        device: LocalPool(
            GuidedGenerator(diffusion(precision), {0: Guide()}, 3, (1, 8, 8), settings, 4), weights, device
        )
        for device in ("cpu", "cuda")
    }
    images = {device: made(pool) for device, pool in pools.items()}
    for pool in pools.values():
        counted = pool.report()
        assert counted["loss_last"] < counted["loss_first"]
        assert counted["made_again"] == 0
    assert np.abs(images["cpu"] - images["cuda"]).mean() < (2 if precision == "fp32" else 12)


def test_clients_on_shares_of_the_gpu_train_what_the_processor_trains(
    ray_session: None, run_small: Callable[..., tuple[Experiment, dict[str, Any]]]
) -> None:
    on_cpu, _ = run_small(runtime__backend="ray", runtime__num_actors=2)
    on_gpu, summary = run_small(runtime__backend="ray", runtime__num_actors=2, runtime__gpus_per_actor=0.4)
    assert summary["status"] == "finished"
    models = [load_file(run.folder / "model.safetensors") for run in (on_gpu, on_cpu)]
    for name in models[0]:
        np.testing.assert_allclose(models[0][name], models[1][name], atol=1e-4)


def test_a_generator_that_helps_clients_on_the_same_gpu(
    ray_session: None, run_small: Callable[..., tuple[Experiment, dict[str, Any]]]
) -> None:
    _, summary = run_small(
        with_generator=True,
        method={"name": "genfl", "images_per_round": 30},
        runtime__backend="ray",
        runtime__num_actors=2,
        runtime__gpus_per_actor=0.25,
        generator__pool={"actors": 2, "gpus": 0.25},
    )
    assert summary["status"] == "finished"
    assert summary["synthesis"]["images_made"] > 0


def test_a_training_cut_on_the_gpu_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Bits may differ where a kernel adds up in no fixed order; what was learned must not."""

    class Cut(Exception):
        pass

    def cut(step: int, steps: int, loss: float) -> None:
        if step >= 20:
            raise Cut

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    diffusion("fp32").fit(DATA, whole, lambda *told: None)
    with pytest.raises(Cut):
        diffusion("fp32").fit(DATA, parts, cut)
    diffusion("fp32").fit(DATA, parts, lambda *told: None)
    first, second = (made(LocalPool(diffusion("fp32"), folder)) for folder in (whole, parts))
    assert np.abs(first - second).mean() < 1


def test_epochs_one_by_one_are_a_training_at_once(small: Callable[..., RunConfig]) -> None:
    """Dropout draws from the GPU's own generator, which goes on where the epoch before has left it."""
    config = small()
    data = prepare(config.data, 0)
    job = Job(Component("tests.fl_ray.own:OwnModule"), ImageShape.of(data.source), config.training, 0, 1, 1)
    arrays = JobData.of(data)
    host = ClientHost(job, arrays, torch.device("cuda"))
    adam, known = TrainingConfig("adam", 1e-2, batch_size=8), (data.images[:40], data.labels[:40])
    start = initial_weights(job.model, job.shape, job.training, 0)
    at_once, _ = host.train_on(*known, start, 0, 3, adam)
    state = ServerTraining(start)
    for _ in range(3):
        torch.rand(3, device="cuda")  # others may draw meanwhile
        state = host.train_epoch(*known, state, adam, "server")
    np.testing.assert_allclose(state.weights, at_once, atol=1e-5)
