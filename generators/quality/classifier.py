"""The fixed small CNN of the measures: a classifier of its own training, and the extractor in its penultimate layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from generators.quality.repeatable import repeatable_convolutions
from generators.training import fit_steps
from lightning_modules.classifier import Classifier, OptimizerSettings
from lightning_modules.networks import SmallCNN

__all__ = ["SmallClassifier"]

_BATCH = 64
_PREDICTED = 500  # images at once


class SmallClassifier:
    """``SmallCNN`` (16 and 32 channels, 64 hidden) trained with Adam at 1e-3 on batches of 64; the same for every data
    set, so that no recipe's choice of a model changes a measure.

    Args:
        images, labels: uint8 [N, C, H, W] and integers [N] below ``classes``.
        seed: of the weights and batches.
        steps: optimiser steps.

    Raises:
        ValueError: the images are too small for it.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: int, seed: int, steps: int) -> None:
        _, channels, size, _ = images.shape
        with repeatable_convolutions(), torch.random.fork_rng():
            torch.manual_seed(seed)
            module = Classifier(SmallCNN(channels, size, classes), OptimizerSettings("adam", lr=1e-3))
            y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
            fit_steps(module, _scaled(images), y, _BATCH, steps, lambda *told: None, seed=seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = nn.Sequential(*module.network).eval().to(device)
        self._device, self._scale = device, 1.0
        self._scale = float(np.sqrt(np.mean(self.features(images) ** 2))) or 1.0

    def features(self, images: np.ndarray) -> np.ndarray:
        """The penultimate layer, float64 [N, 64], over its root mean square on the training images: KID's kernel,
        a cubic polynomial, is made for features of about that size.
        """
        return self._through(self._network[:-1], images) / self._scale

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The likeliest class of each image, int64 [N]."""
        return self._through(self._network, images).argmax(axis=1)

    @torch.no_grad()
    def _through(self, layers: nn.Module, images: np.ndarray) -> np.ndarray:
        pieces = [images[start : start + _PREDICTED] for start in range(0, len(images), _PREDICTED)]
        with repeatable_convolutions():
            return np.concatenate([layers(_scaled(piece).to(self._device)).double().cpu().numpy() for piece in pieces])


def _scaled(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).float().div(127.5).sub(1)
