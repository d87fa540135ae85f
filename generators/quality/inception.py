"""Inception-v3 features from weights that the user has: a state dict of torchvision's ``inception_v3``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from generators.quality.repeatable import repeatable_convolutions

__all__ = ["InceptionExtractor"]

_SIZE = 299
_BATCH = 32


class InceptionExtractor:
    """The 2,048 pooled features, of images resized to 299x299 (grey ones in three channels), scaled to [-1, 1].

    torchvision's weights are not those of the published FID values, which can't be compared with what these give.

    Args:
        file: .safetensors, or a .pth of tensors (nothing else in it is unpickled).

    Raises:
        ValueError: there is no such file, or it is no state dict of torchvision's ``inception_v3``.
    """

    def __init__(self, file: Path) -> None:
        from torchvision.models import inception_v3

        network = inception_v3(weights=None, aux_logits=False, init_weights=False, transform_input=False)
        state = {name: value for name, value in _tensors(file).items() if not name.startswith("AuxLogits.")}
        classes = state["fc.weight"].shape[0] if "fc.weight" in state else 1000
        network.fc = nn.Linear(2048, classes)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"{file} is no state dict of torchvision's inception_v3 ({reason})") from error
        network.fc = nn.Identity()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = network.eval().to(self._device)

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Of uint8 [N, C, H, W] with one or three channels, float64 [N, 2048]."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"the images have {images.shape[1]} channels, but Inception takes 1 or 3")
        found = []
        for start in range(0, len(images), _BATCH):
            x = torch.from_numpy(images[start : start + _BATCH]).to(self._device).float().div(127.5).sub(1)
            x = nn.functional.interpolate(x, (_SIZE, _SIZE), mode="bilinear", antialias=True)
            with repeatable_convolutions():
                found.append(self._network(x.expand(-1, 3, -1, -1)).double().cpu().numpy())
        return np.concatenate(found)


def _tensors(file: Path) -> dict[str, Tensor]:
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{file} can't be read as a file of tensors") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict")
    return state
