"""Every measure of a set of images, against the real test images of one data set.

Our choices, where the measures' papers leave them open: the feature extractor and the classifier of the domain shift
are the fixed small CNN of ``generators.quality.classifier`` (the extractor trained on the public images, unless it is
Inception with the user's weights); CAS trains the recipe's own model with the recipe's own optimiser, for 20 epochs, or
more where these are few steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData
from fl_ray.errors import SettingError
from fl_ray.model import ImageShape, build_module
from fl_ray.randomness import key_seed, numpy_generator, seeded_torch
from fl_ray.runtime.local_training import train_locally
from generators.base import class_words
from generators.quality.cas import classification_accuracy
from generators.quality.classifier import SmallClassifier
from generators.quality.clip import ClipScorer
from generators.quality.domain_shift import domain_shift
from generators.quality.frechet import fid
from generators.quality.inception import InceptionExtractor
from generators.quality.kernel import kid
from generators.quality.manifold import NEIGHBOURS, precision_recall_by_class
from generators.quality.memorisation import equal_counts, memorisation

__all__ = ["ImageScores"]

EXTRACTOR_STEPS = 600
CAS_EPOCHS = 20
CAS_LEAST_STEPS = 600  # where images are few; as the extractor
PROMPT = "a photo of a {}"
_PREDICTED = 500  # images at once


class ImageScores:
    """What images are measured with: made once for all sets that shall be compared.

    Args:
        config: its data, model, training and seed are used.
        per_class: real images of each class that features are compared with (fewer where the test part has fewer).
        inception: file of Inception weights, in place of the extractor that is trained on the public images.
        clip: folder of a CLIP model; None: no CLIP score.
        setting: where ``per_class`` is from, for messages.

    Attributes:
        extractor: what features come from, for the report.

    Raises:
        SettingError: a class has too few real images, or a file is not what it should be.
    """

    def __init__(
        self,
        config: RunConfig,
        data: FederatedData,
        per_class: int,
        inception: str | None,
        clip: str | None,
        setting: str = "--per_class",
    ) -> None:
        self.config, self.data, self.per_class, self.seed = config, data, per_class, config.seed
        self._setting = setting
        self._classes, self._tests = np.arange(data.num_classes), np.arange(len(data.test_labels))
        # Rows of the real images that synthetic ones may have been learnt from.
        self._parts = {"public": data.public, "reserve": data.reserve, "clients": data.partition.owned()}
        self._clip = _option("--clip", lambda: ClipScorer(Path(clip))) if clip is not None else None
        if inception is not None:
            self._features = _option("--inception", lambda: InceptionExtractor(Path(inception))).features
            self.extractor: dict[str, Any] = {"kind": "inception_v3", "file": str(inception)}
        else:
            self._features = self._train_extractor()
        self._compare()

    def of_client(self, client: int) -> ImageScores:
        """The same measures for images of one client: of its classes alone, against test images of its domains, with
        neighbours looked for among its own images and the public ones of its domains.

        Raises:
            SettingError: a class of the client has too few of these test images.
        """
        data, made = self.data, copy.copy(self)
        own, tests = data.partition.of(client), data.tests_like(client)
        made._parts = {"public": data.public_like(client), "clients": own}
        made._classes = np.unique(data.labels[own])
        made._tests = tests[np.isin(data.test_labels[tests], made._classes)]
        made._compare(f"the test part of {data.client_name(client)}'s domains")
        return made

    def _compare(self, part: str = "the test part") -> None:
        """Choose the test images that features are compared with."""
        labels = self.data.test_labels[self._tests]
        self._check(labels, part, "raise data.test_fraction or data.max_samples")
        rows = self._tests[self._balanced(labels, "test")]
        self._real, self._real_labels = self.data.test_images[rows], self.data.test_labels[rows]
        self._real_features = _option("--inception", lambda: self._features(self._real))

    def _train_extractor(self) -> Callable[[np.ndarray], np.ndarray]:
        data, way = self.data, "raise data.public_fraction, or give --inception FILE"
        self._check(data.public_labels, "the public part", way, least=1)
        key = key_seed(self.seed, "quality/extractor")
        public = data.public_images, data.public_labels
        trained = _option("quality", lambda: SmallClassifier(*public, data.num_classes, key, EXTRACTOR_STEPS))
        accuracy = float((trained.predict(data.test_images) == data.test_labels).mean())
        known = {"trained_on": len(data.public), "steps": EXTRACTOR_STEPS, "test_accuracy": accuracy}
        self.extractor = {"kind": "small CNN, penultimate layer", **known}
        return trained.features

    def _check(self, labels: np.ndarray, part: str, way: str, least: int = NEIGHBOURS + 1) -> None:
        counts = np.bincount(labels, minlength=self.data.num_classes)
        label = int(self._classes[counts[self._classes].argmin()])
        if counts[label] < least:
            raise SettingError(
                f"quality: {part} holds {counts[label]} images of class {self.data.source.classes[label]}, "
                f"but {least} are needed; {way}"
            )

    def _balanced(self, labels: np.ndarray, part: str) -> np.ndarray:
        """Up to ``per_class`` random rows of each class, by key."""
        rng = numpy_generator(self.seed, f"quality/{part}")
        own = [rng.permutation(np.flatnonzero(labels == label)) for label in self._classes]
        return np.sort(np.concatenate([rows[: self.per_class] for rows in own]))

    def real_sets(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Real images by the part that they come from, as many as synthetic ones where there are so many; without parts
        in which a class has too few.
        """
        found = {}
        for name in ("public", "clients"):
            rows = self._parts[name]
            labels = self.data.labels[rows]
            if np.bincount(labels, minlength=self.data.num_classes)[self._classes].min() > NEIGHBOURS:
                chosen = rows[self._balanced(labels, name)]
                found[name] = self.data.images[chosen], self.data.labels[chosen]
        return found

    def of(self, images: np.ndarray, labels: np.ndarray, part: str | None = None) -> dict[str, Any]:
        """All measures of uint8 [N, C, H, W] and int64 [N].

        Args:
            part: that the images were taken from: nearest neighbours are not looked for there.

        Raises:
            SettingError: too few images.
        """
        try:
            return self._measure(images, labels, part)
        except SettingError:
            raise
        except ValueError as error:
            raise SettingError(f"{self._setting} is {self.per_class}: {error}; raise it") from error

    def _measure(self, images: np.ndarray, labels: np.ndarray, part: str | None) -> dict[str, Any]:
        features = self._features(images)
        kernel, kernel_error = kid(
            (self._real_features, self._real_labels), (features, labels), numpy_generator(self.seed, "quality/kid")
        )
        precision, recall = precision_recall_by_class(
            self._real_features, self._number(self._real_labels), features, self._number(labels), len(self._classes)
        )
        shift, shift_error = domain_shift(self._real, images, key_seed(self.seed, "quality/domain_shift"))
        tests = self.data.test_images[self._tests], self._number(self.data.test_labels[self._tests])
        cas, cas_by_class = classification_accuracy(
            self._fit_recipe_model, images, self._number(labels), *tests, len(self._classes)
        )
        parts = {name: rows for name, rows in self._parts.items() if len(rows) and name != part}
        neighbours = {name: self._neighbours(images, rows) for name, rows in parts.items()}
        return {
            "images": len(images),
            "fid": fid(self._real_features, features),
            "kid": kernel,
            "kid_error": kernel_error,
            "precision": float(precision.mean()),
            "recall": float(recall.mean()),
            "domain_shift": shift,
            "domain_shift_error": shift_error,
            "cas": cas,
            **({"clip_score": self._clip_score(images, labels)} if self._clip is not None else {}),
            **{f"closer_to_{name}": found["closer"] for name, found in neighbours.items()},
            "neighbours": neighbours,
            "by_class": {"precision": precision.tolist(), "recall": recall.tolist(), "cas": cas_by_class.tolist()},
        }

    def _number(self, labels: np.ndarray) -> np.ndarray:
        """Labels by their place among the classes that are measured."""
        return np.searchsorted(self._classes, labels)

    def _neighbours(self, images: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        data = self.data
        rng = numpy_generator(self.seed, "quality/neighbours")
        train, held_out = equal_counts(*data.kinds(rows, self._tests), rng)
        return asdict(memorisation(images, data.images[rows[train]], data.test_images[self._tests[held_out]]))

    def _clip_score(self, images: np.ndarray, labels: np.ndarray) -> float:
        return self._clip.score(images, labels, [PROMPT.format(class_words(name)) for name in self.data.source.classes])

    def _fit_recipe_model(self, images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shape, training = ImageShape.of(self.data.source), self.config.training
        with seeded_torch(self.seed, "quality/cas"):
            module = build_module(self.config.model, shape, training).to(device)
        x, y = shape.normalise(images, device), torch.from_numpy(labels).to(device)
        epochs = max(CAS_EPOCHS, -(-CAS_LEAST_STEPS // -(-len(x) // training.batch_size)))
        train_locally(module, x, y, training, epochs, 1.0, (self.seed, "quality/cas", 0, 0))
        module.eval()

        @torch.no_grad()
        def predict(wanted: np.ndarray) -> np.ndarray:
            pieces = [wanted[start : start + _PREDICTED] for start in range(0, len(wanted), _PREDICTED)]
            return np.concatenate(
                [module(shape.normalise(piece, device)).argmax(dim=1).cpu().numpy() for piece in pieces]
            )

        return predict


def _option(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from error
