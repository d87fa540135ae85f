"""Inception features from a state dict in a file: the network's own pooled layer; other files are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import inception_v3

from generators.quality.inception import InceptionExtractor


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised state dict with its auxiliary classifier, as torchvision's file has it."""
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(inception_v3(weights=None, init_weights=True).state_dict(), file)
    return file


def test_features_are_those_before_the_last_layer(weights: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
    found = InceptionExtractor(weights).features(images)
    network = inception_v3(weights=None, init_weights=False).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    pooled: list[torch.Tensor] = []
    network.avgpool.register_forward_hook(lambda _, __, output: pooled.append(output))
    x = torch.from_numpy(images).float() / 127.5 - 1
    x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", antialias=True)
    with torch.no_grad():
        network(x.repeat(1, 3, 1, 1))
    assert found.shape == (3, 2048)
    assert np.allclose(found, pooled[0].flatten(1).numpy(), rtol=1e-4, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-6


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        InceptionExtractor(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not tensors")
    with pytest.raises(ValueError, match="can't be read as a file of tensors"):
        InceptionExtractor(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="can't be read as a file of tensors"):
        InceptionExtractor(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        InceptionExtractor(tmp_path / "list.pth")
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no state dict of torchvision's inception_v3"):
        InceptionExtractor(tmp_path / "other.safetensors")


def test_a_state_of_another_shape_is_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(16, 3, 3, 3)
    torch.save(state, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"no state dict of torchvision's inception_v3 \(.*Conv2d_1a_3x3"):
        InceptionExtractor(tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="2 channels"):
        InceptionExtractor(weights).features(np.zeros((1, 2, 8, 8), dtype=np.uint8))
