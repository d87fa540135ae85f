"""Text-to-image with a pipeline of random weights: against diffusers' own call, by image, and what can go wrong."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from generators.base import Block, Sampler, TrainingImages, key_seed
from generators.pipelines import swap_scheduler, to_pixels
from generators.text_to_image import TextToImage
from tests.generators.tiny_pipelines import text_pipeline

TINY = {"steps": 3, "block_size": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipeline(tmp_path_factory.mktemp("models") / "tiny-diffusion")


def wanted(channels: int = 3, size: int = 16) -> TrainingImages:
    """No images, as for all generators that learn from none: classes and a shape."""
    empty = np.zeros((0, channels, size, size), dtype=np.uint8)
    return TrainingImages(empty, np.zeros(0, dtype=np.int64), ["cat", "fire truck"])


def load(model: Path, folder: Path, data: TrainingImages | None = None, **settings: Any) -> Sampler:
    return fit(model, folder, data, **settings).load(folder, CPU)


def fit(model: Path, folder: Path, data: TrainingImages | None = None, **settings: Any) -> TextToImage:
    generator = TextToImage(**{"model": str(model), **TINY, **settings})
    folder.mkdir()
    generator.check_classes((data or wanted()).classes)
    generator.fit(data or wanted(), folder, lambda *told: None)
    return generator


def seeded(label: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(key_seed(7, label, index))


def test_images_are_those_of_the_pipelines_own_call(model: Path, tmp_path: Path) -> None:
    """Prompts by image, noise by image, options handed on."""
    templates, names = ["a photo of a {class}", "{class}, drawn"], {"fire truck": "red lorry"}
    options = {"prompts": templates, "class_names": names, "negative_prompt": "blur", "guidance": 3.0, "size": 24}
    found = load(model, tmp_path / "weights", wanted(size=24), **options).sample(Block(7, 1, 2))
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    own = pipeline(
        prompt=["a photo of a red lorry", "red lorry, drawn"] * 2,
        negative_prompt=["blur"] * 4,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=24,
        width=24,
        generator=[seeded(1, index) for index in range(8, 12)],
        output_type="np",
    ).images
    assert (found == (own * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)).all()
    assert (found[0] != found[2]).any()  # one prompt, two noises
    assert TextToImage(**options).prompt(["cat", "fire truck"], 1, 9) == "red lorry, drawn"
    assert TextToImage(**options).prompt(["0 - zero", "1 - one"], 1, 0) == "a photo of a one"  # torchvision's MNIST


def test_an_image_depends_on_its_index_and_not_on_its_block(model: Path, tmp_path: Path) -> None:
    whole = load(model, tmp_path / "whole", prompts=["a {class}", "the {class}", "{class}"]).sample(Block(7, 0, 0))
    pairs = load(model, tmp_path / "pairs", prompts=["a {class}", "the {class}", "{class}"], block_size=2)
    split = np.concatenate([pairs.sample(Block(7, 0, number)) for number in (0, 1)])
    assert np.abs(whole.astype(int) - split).max() <= 1  # a batch's size changes the last bits
    assert np.abs(whole[0].astype(int) - whole[1]).max() > 10


def test_images_are_resized_as_pillow_does() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 3, 48, 48), dtype=np.uint8)
    found = to_pixels(torch.from_numpy(noise).float() / 255, (3, 12, 12))
    grey = to_pixels(torch.from_numpy(noise).float() / 255, (1, 12, 12))
    for image, made, shade in zip(noise, found, grey, strict=True):
        small = Image.fromarray(image.transpose(1, 2, 0)).resize((12, 12), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(small).astype(int).transpose(2, 0, 1) - made).max() <= 1
        assert np.abs(np.asarray(small.convert("L")).astype(int) - shade[0]).max() <= 1
    assert (to_pixels(torch.full((2, 1, 4, 4), 0.2), (3, 4, 4)) == 51).all()
    with pytest.raises(ValueError, match=r"not finite.*precision"):
        to_pixels(torch.full((1, 3, 4, 4), torch.nan), (3, 4, 4))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmpp"])
def test_another_scheduler_keeps_the_schedule_and_clips_no_latents(model: Path, scheduler: str, tmp_path: Path) -> None:
    sampler = load(model, tmp_path / "weights", scheduler=scheduler)
    config = sampler.pipeline.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert not config.get("clip_sample", False)  # DDIM's and DDPM's own default is to clip
    first, again, other = (sampler.sample(Block(7, 0, number)) for number in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_a_scheduler_that_does_not_fit_is_refused(model: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"scheduler is ddim.*FlowMatch.*leave scheduler out"):
        swap_scheduler(pipeline, "ddim")


def test_low_precision_is_near_full_precision(model: Path, tmp_path: Path) -> None:
    """Of the same noise: torch draws other numbers for another number format."""
    images = {}
    for precision in ("fp32", "bf16"):
        pipeline = load(model, tmp_path / precision, precision=precision).pipeline
        size = pipeline.unet.config.sample_size
        noise = torch.randn((4, 4, size, size), generator=seeded(0, 0)).to(pipeline.unet.dtype)
        made = pipeline(prompt=["a cat"] * 4, latents=noise, num_inference_steps=3, output_type="pt").images
        images[precision] = to_pixels(made, (3, 16, 16)).astype(int)
    difference = np.abs(images["fp32"] - images["bf16"])
    assert 0 < difference.max() < 40
    assert difference.mean() < 4


def test_the_key_follows_the_weights_and_not_the_place(model: Path, tmp_path: Path) -> None:
    def key(folder: Path) -> Any:
        return TextToImage(model=str(folder)).training_settings()["weights"]

    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    assert key(copied) == key(model)
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert key(copied) != key(model)


@pytest.mark.parametrize("setting", ["model", "lora"])
def test_files_that_change_after_the_key_was_made_are_refused(model: Path, tmp_path: Path, setting: str) -> None:
    """Their images would be kept under the key of the files of before. A copy of the generator, as actors have, too."""
    folders = {name: Path(shutil.copytree(model, tmp_path / name)) for name in ("model", "lora")}
    folders["lora"].joinpath("lora.safetensors").write_bytes(b"any")
    generator = fit(folders["model"], tmp_path / "weights", lora=str(folders["lora"]) if setting == "lora" else None)
    generator.training_settings()
    changed = folders[setting] / "text_encoder" / "model.safetensors"
    before = changed.read_bytes()
    changed.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for own in (generator, pickle.loads(pickle.dumps(generator))):
        for load in (own.load, own.denoiser):
            with pytest.raises(ValueError, match=rf"^{setting} is .*/{setting}, whose files have changed"):
                load(tmp_path / "weights", CPU)
    changed.write_bytes(before)
    if setting == "model":  # the LoRA is none
        generator.load(tmp_path / "weights", CPU).sample(Block(0, 0, 0))


def test_lora_adds_its_product_to_the_weights(model: Path, tmp_path: Path) -> None:
    """Against the same pipeline with W + B A written into its attention by hand."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    plain = StableDiffusionPipeline.from_pretrained(model)
    changed = StableDiffusionPipeline.from_pretrained(model)
    plain.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    generator, merged = torch.Generator().manual_seed(0), 0
    for name, module in plain.unet.named_modules():
        if name.endswith("to_q"):
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            b.copy_(2 * torch.randn(b.shape, generator=generator))
            changed.unet.get_submodule(name).weight.data += b @ a
            merged += 1
    assert merged > 0
    layers = get_peft_model_state_dict(plain.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    changed.save_pretrained(tmp_path / "changed")
    block = Block(7, 0, 0)
    found = load(model, tmp_path / "with", lora=str(tmp_path / "lora")).sample(block)
    expected = load(tmp_path / "changed", tmp_path / "by-hand").sample(block)
    without = load(model, tmp_path / "without").sample(block)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(found.astype(int) - without).max() > 2
    settings = TextToImage(model=str(model), lora=str(tmp_path / "lora")).training_settings()
    assert settings["lora"].startswith("sha256:")


def test_a_safety_checker_is_left_away_where_the_user_says_so(model: Path, tmp_path: Path) -> None:
    """This one has no checker's weights, so that loading it succeeds without the checker alone."""
    guarded = Path(shutil.copytree(model, tmp_path / "guarded"))
    index = json.loads((guarded / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (guarded / "model_index.json").write_text(json.dumps(index))
    assert load(guarded, tmp_path / "without", safety_checker=False).sample(Block(0, 0, 0)).shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="safety_checker"):
        fit(guarded, tmp_path / "with")


@pytest.mark.parametrize("offline", [False, True])
def test_weights_that_can_not_be_had(offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at the hub's address."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match="stable-diffusion-v1-5/stable-diffusion-v1-5") as raised:
        TextToImage().training_settings()
    assert time.monotonic() - start < 5
    assert str(Path("stable-diffusion-v1-5/stable-diffusion-v1-5").absolute()) in str(raised.value)
    assert str(tmp_path / "hub") in str(raised.value)
    assert f"HF_HUB_OFFLINE is {'set' if offline else 'not set'}" in str(raised.value)
    assert "Correct the folder's name; or" in str(raised.value)
    with pytest.raises(
        ValueError,
        match=r"neither a folder nor an id.*; give the folder of a diffusers pipeline, or an id as owner/name",
    ):
        TextToImage(model="../not/there").training_settings()


def test_an_id_in_the_hubs_cache_is_pinned_to_its_commit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, commit = "fl-ray-tests/no-such-model", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    assert TextToImage(model=name).training_settings()["weights"] == f"{name}@{commit}"
    block = Block(7, 0, 0)
    cached = load(Path(name), tmp_path / "cached").sample(block)
    assert (cached == load(model, tmp_path / "local").sample(block)).all()


def _pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def _cut(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _no_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def _no_tokenizer(folder: Path) -> None:
    """The pipeline itself would load, and fail at its first prompt."""
    shutil.rmtree(folder / "tokenizer")


def _empty_tokenizer(folder: Path) -> None:
    _no_tokenizer(folder)
    (folder / "tokenizer").mkdir()


def _no_vocabulary(folder: Path) -> None:
    _empty_tokenizer(folder)
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')


def _other_unet(folder: Path) -> None:
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 3}))


def _no_config(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()


def _no_kind(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")


def _other_kind(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "LDMPipeline"}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_pickled, "unet, which its model_index.json names, has no safetensors; complete the folder"),
        (_cut, r"unet, which .* has a damaged diffusion_pytorch_model.safetensors \(.*; complete the folder"),
        (_no_index, "model_index.json is not there; name the folder of a diffusers pipeline"),
        (_no_json, "model_index.json is no JSON file of a pipeline"),
        (_no_tokenizer, "tokenizer, which its model_index.json names, is not there"),
        (_empty_tokenizer, "tokenizer, which .* is empty"),
        (_no_vocabulary, "tokenizer, which .* has no vocabulary"),
        (_other_unet, "but its unet takes 3 channels and its vae decodes 4"),
        (_no_config, "vae, which .* has no config.json"),
        (_no_kind, r"model_index.json names no pipeline \(_class_name\)"),
        (_other_kind, ", a LDMPipeline, which takes no prompt .*; use a text-to-image pipeline"),
    ],
)
def test_folders_that_hold_no_whole_pipeline(model: Path, tmp_path: Path, damage: Any, match: str) -> None:
    """Refused where it is prepared, as by ``fl-ray pretrain``: not first by the actors of a run."""
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    damage(broken)
    with pytest.raises(ValueError, match=f"^model is .*broken.*{match}"):
        fit(broken, tmp_path / "weights")
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompts": []}, "prompts is an empty list"),
        ({"prompts": ["a photo"]}, "has no {class}"),
        ({"prompts": ["a {class}", "a {style} {class}"]}, "has {style}, but only {class} is filled in"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": -3.0}, "guidance is -3.0, but it must be at least 0 and finite"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"size": -8}, "size is -8"),
        ({"block_size": 0}, "block_size is 0"),
        ({"class_names": {"dog": "puppy"}}, "no class dog; known: cat, fire truck"),
        ({"steps": 1001}, "steps is 1001, but it can't exceed the 1000 steps of .*scheduler"),
        ({"steps": 1001, "scheduler": "dpmpp"}, "steps is 1001, but it can't exceed the 1000 steps"),
        ({"lora": "nowhere"}, "^lora is .*nowhere, but there is no such folder with safetensors"),
    ],
)
def test_bad_settings_are_refused(model: Path, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(model, tmp_path / "weights", **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": 33}, r"^steps is 3, size is 33, but the StableDiffusionPipeline of .* refuses: .*divisible by 8"),
        (
            {"scheduler": "ddpm", "size": 20},
            r"^steps is 3, scheduler is ddpm, size is 20, but the .* refuses: .*divisible",
        ),
    ],
)
def test_what_the_pipeline_refuses_is_told_by_the_settings(
    model: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    sampler = load(model, tmp_path / "weights", **settings)
    with pytest.raises(ValueError, match=match):
        sampler.sample(Block(0, 0, 0))


def test_a_relative_folder_is_found_from_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an actor, which works in another folder than the driver."""
    shutil.copytree(model, tmp_path / "near")
    monkeypatch.chdir(tmp_path)
    generator = TextToImage(model="near", lora="beside", **TINY)
    assert (generator.model, generator.lora) == (str(tmp_path / "near"), str(tmp_path / "beside"))
    assert TextToImage(model="some/id").model == "some/id"


def test_images_that_the_safety_checker_blackens_are_counted(model: Path, tmp_path: Path) -> None:
    sampler = load(model, tmp_path / "weights")
    assert sampler.report() == {}
    plain = type(sampler.pipeline).__call__

    class Checked(type(sampler.pipeline)):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            made = plain(self, *arguments, **options)
            made.nsfw_content_detected = [True, False, True, False]
            return made

    sampler.pipeline.__class__ = Checked
    sampler.sample(Block(0, 0, 0))
    sampler.sample(Block(0, 1, 0))
    assert sampler.report() == {"blackened_images": 4}
