"""CLIP score: how well images fit their classes' prompts (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

__all__ = ["ClipScorer"]

_BATCH = 32


class ClipScorer:
    """A CLIP model with its processor from a folder, as transformers' ``save_pretrained`` leaves them.

    Raises:
        ValueError: transformers is not installed, or the folder holds no CLIP model.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ValueError("the CLIP score needs transformers: pip install transformers") from error
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no folder of a CLIP model: it has no config.json")
        try:
            self._processor = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
            model = CLIPModel.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{folder} is no folder of a CLIP model with its processor ({reason})") from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)

    @torch.no_grad()
    def score(self, images: np.ndarray, labels: np.ndarray, prompts: Sequence[str]) -> float:
        """Mean of 100 max(cos, 0) of each image's embedding and that of its class's prompt (w = 100 in place of 2.5).

        Args:
            images, labels: uint8 [N, C, H, W] with one or three channels, and int64 [N].
            prompts: by class.
        """
        pictures = np.broadcast_to(images, (len(images), 3, *images.shape[2:])).transpose(0, 2, 3, 1)
        total = 0.0
        for label in np.unique(labels).tolist():
            own = pictures[labels == label]
            for start in range(0, len(own), _BATCH):
                batch = self._processor(
                    text=[prompts[label]], images=list(own[start : start + _BATCH]), return_tensors="pt", padding=True
                )
                answer = self._model(**batch.to(self._device))
                cosines = torch.cosine_similarity(answer.image_embeds, answer.text_embeds)
                total += float(cosines.clamp(min=0).double().sum())
        return 100 * total / len(images)
