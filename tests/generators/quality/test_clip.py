"""The CLIP score of a tiny random model against cosines by hand; folders that are no CLIP model are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from generators.quality.clip import ClipScorer

transformers = pytest.importorskip("transformers", reason="the CLIP score needs transformers, which is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**side, **ends, "vocab_size": len(words), "max_position_embeddings": 40}
    vision = {**side, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(path)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


def test_it_is_the_mean_of_cosines(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 20, 20), dtype=np.uint8)
    labels, prompts = np.array([0, 1, 0, 1, 1]), ["a photo of a cat", "a photo of a dog"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    expected = []
    for image, label in zip(images, labels, strict=True):
        with torch.no_grad():
            batch = processor(text=[prompts[label]], images=image.transpose(1, 2, 0), return_tensors="pt")
            answer = model(**batch)
        a, b = answer.image_embeds[0].numpy(), answer.text_embeds[0].numpy()
        expected.append(max(0.0, 100 * float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))))
    assert max(expected) > 0
    assert ClipScorer(folder).score(images, labels, prompts) == pytest.approx(np.mean(expected), rel=1e-4)


def test_grey_images_are_taken(folder: Path) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (2, 1, 8, 8), dtype=np.uint8)
    scorer, labels = ClipScorer(folder), np.zeros(2, dtype=np.int64)
    assert scorer.score(grey, labels, ["six"]) == pytest.approx(scorer.score(np.repeat(grey, 3, 1), labels, ["six"]))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder of a CLIP model"):
        ClipScorer(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="no folder of a CLIP model"):
        ClipScorer(tmp_path)
