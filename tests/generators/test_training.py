"""Pre-training: repeatable, and over interruptions the same to the bit as undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from generators.base import TrainingImages
from generators.diffusion import DiffusionGenerator

STEPS = 45
TINY = {"widths": [8, 16], "train_steps": STEPS, "batch_size": 8, "steps": 3, "block_size": 5}
DATA = TrainingImages(
    np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8), np.arange(40) % 2, ["a", "b"]
)


def fit(folder: Path, progress: Callable[[int, int, float], None] = lambda *told: None) -> bytes:
    folder.mkdir(exist_ok=True)
    DiffusionGenerator(**TINY).fit(DATA, folder, progress)
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


class Cut(Exception):
    """What ends a training in the middle."""


@pytest.mark.parametrize("interruption", [Cut, KeyboardInterrupt])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    interruption: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generators.training.CHECKPOINT_EVERY_S", 0.0)
    whole = fit(tmp_path / "whole")
    torch.manual_seed(99)  # whatever else was drawn meanwhile
    steps: list[int] = []

    def cut(step: int, steps_in_all: int, loss: float) -> None:
        steps.append(step)
        if steps in ([20], [20, 40]):
            raise interruption

    for _ in range(2):
        with pytest.raises(interruption):
            fit(tmp_path / "cut", cut)
        assert (tmp_path / "cut" / "training.ckpt").exists()
    assert fit(tmp_path / "cut", cut) == whole
    assert steps == [20, 40, 45]  # none was done twice
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"model_index.json", "scheduler", "unet"}


def test_training_is_repeatable_and_leaves_the_callers_randomness_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert fit(tmp_path / "one") == fit(tmp_path / "two")
    assert torch.equal(torch.rand(3), expected)


def test_a_training_that_ends_while_its_weights_are_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generators.training.CHECKPOINT_EVERY_S", 0.0)
    whole = fit(tmp_path / "whole")
    steps: list[int] = []
    with monkeypatch.context() as ended:
        ended.setattr("generators.diffusion.ClassConditionalPipeline.save_pretrained", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / "cut")
    assert fit(tmp_path / "cut", lambda step, steps_in_all, loss: steps.append(step)) == whole
    assert steps == [STEPS]  # the last step alone


@pytest.mark.parametrize("damaged", [True, False])
def test_a_checkpoint_that_is_cut_or_would_run_code_is_refused(damaged: bool, tmp_path: Path) -> None:
    torch.save({"steps_done": 1, "code": Path("anything")}, tmp_path / "training.ckpt")
    if damaged:
        content = (tmp_path / "training.ckpt").read_bytes()
        (tmp_path / "training.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"training\.ckpt is no checkpoint.*remove it"):
        fit(tmp_path)
