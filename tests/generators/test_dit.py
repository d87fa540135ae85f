"""DiT with a pipeline of random weights: against diffusers' own call, with few classes, and with wrong class ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline

from generators.base import Block, Sampler, TrainingImages, key_seed
from generators.dit import DiT
from tests.generators.test_text_to_image import wanted
from tests.generators.tiny_pipelines import dit_pipeline, text_pipeline

TINY = {"steps": 3, "block_size": 4}
NAMES = ["tench, fish", "lorry, fire truck", "cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many classes as diffusers' own pipeline takes for granted."""
    return dit_pipeline(tmp_path_factory.mktemp("models") / "dit", NAMES, 1000)


def load(model: Path, folder: Path, data: TrainingImages | None = None, **settings: Any) -> Sampler:
    generator = DiT(**{"model": str(model), **TINY, **settings})
    folder.mkdir()
    generator.check_classes((data or wanted()).classes)
    generator.fit(data or wanted(), folder, lambda *told: None)
    return generator.load(folder, torch.device("cpu"))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_the_pipelines_own_call(model: Path, tmp_path: Path, guidance: float) -> None:
    found = load(model, tmp_path / "weights", guidance=guidance).sample(Block(7, 1, 1))
    own = DiTPipeline.from_pretrained(model)(
        class_labels=[1] * 4,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(key_seed(7, 1, index)) for index in range(4, 8)],
        num_inference_steps=3,
        output_type="np",
    ).images
    assert (found == (own * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)).all()


def test_ids_come_from_names_or_from_the_map(model: Path, tmp_path: Path) -> None:
    block = Block(7, 0, 0)  # the class cat
    named = load(model, tmp_path / "named").sample(block)
    mapped = load(model, tmp_path / "mapped", class_ids={"cat": 2, "fire truck": 1}).sample(block)
    other = load(model, tmp_path / "other", class_ids={"cat": 999, "fire truck": 1}).sample(block)
    assert (named == mapped).all()
    assert (named != other).any()


@pytest.mark.parametrize("scheduler", ["ddpm", "dpmpp"])
def test_few_classes_have_a_null_class_of_their_own(tmp_path: Path, scheduler: str) -> None:
    small = dit_pipeline(tmp_path / "small", ["cat", "fire truck"], 2)
    sampler = load(small, tmp_path / "weights", wanted(channels=1, size=8), scheduler=scheduler)
    first, again, other = (sampler.sample(Block(7, label, 0)) for label in (0, 0, 1))
    assert first.shape == (4, 1, 8, 8)
    assert (first == again).all()
    assert (first != other).any()


def test_a_part_of_a_block_has_the_same_noise(model: Path, tmp_path: Path) -> None:
    """With noise in every step, too."""
    whole = load(model, tmp_path / "whole", scheduler="ddpm").sample(Block(7, 0, 0))
    pairs = load(model, tmp_path / "pairs", scheduler="ddpm", block_size=2)
    split = np.concatenate([pairs.sample(Block(7, 0, number)) for number in (0, 1)])
    assert np.abs(whole.astype(int) - split).max() <= 1


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ({"cat": 2}, "no id of class fire truck; add them"),
        ({"cat": 1000, "fire truck": 1}, r"cat is 1000.*0\.\.999"),
        ({"cat": 2, "fire truck": 1, "hamster": 3}, "the data have no class hamster; known: cat, fire truck"),
    ],
)
def test_ids_that_do_not_fit_are_refused(model: Path, tmp_path: Path, ids: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(model, tmp_path / "weights", class_ids=ids)


def test_other_classes_and_pipelines_are_refused(model: Path, tmp_path: Path) -> None:
    data = TrainingImages(wanted().images, wanted().labels, ["zebra"])
    with pytest.raises(ValueError, match="no id of class zebra; give class_ids"):
        load(model, tmp_path / "unknown", data)
    with pytest.raises(ValueError, match="class 2 is unknown"):
        load(model, tmp_path / "known").sample(Block(0, 2, 0))
    with pytest.raises(ValueError, match="a StableDiffusionPipeline, but dit takes a DiTPipeline"):
        load(text_pipeline(tmp_path / "text"), tmp_path / "other")


def test_a_scheduler_that_wants_a_learned_variance_gets_none(model: Path, tmp_path: Path) -> None:
    """The pipeline's own, as the published DiT has it: the sampler hands on the noise alone."""
    learned = Path(shutil.copytree(model, tmp_path / "learned"))
    file = learned / "scheduler" / "scheduler_config.json"
    index = json.loads((learned / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (learned / "model_index.json").write_text(json.dumps(index))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variance_type": "learned_range"}))
    assert load(learned, tmp_path / "weights").sample(Block(7, 0, 0)).shape == (4, 3, 16, 16)


def test_more_steps_than_the_scheduler_has_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^steps is 2000, but it can't exceed the 1000 steps of .*'s scheduler$"):
        load(model, tmp_path / "weights", steps=2000)


def test_a_folder_without_its_files_is_refused(model: Path, tmp_path: Path) -> None:
    for number, (lost, match) in enumerate(
        [
            ("model_index.json", "model_index.json is not there; name the folder of a diffusers pipeline"),
            ("transformer/config.json", "transformer, which .* has no config.json; complete the folder"),
            ("transformer/diffusion_pytorch_model.safetensors", "transformer, which .* has no safetensors"),
            ("vae/diffusion_pytorch_model.safetensors", "vae, which .* has no safetensors; complete the folder"),
        ]
    ):
        damaged = Path(shutil.copytree(model, tmp_path / f"model{number}"))
        (damaged / lost).unlink()
        with pytest.raises(ValueError, match=match) as raised:
            load(damaged, tmp_path / f"weights{number}")
        assert str(damaged) in str(raised.value)
    nameless = Path(shutil.copytree(model, tmp_path / "nameless"))
    (nameless / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no num_embeds_ada_norm.*; complete the folder"):
        load(nameless, tmp_path / "of-nameless")
