"""What a client host tests: models on the global test images, on clients' own, and gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fl_ray.runtime.base import sum_evaluations
from fl_ray.runtime.resident import Resident, make_resident
from fl_ray.runtime.tasks import EVALUATION_BLOCK, Evaluation, Job, JobData

__all__ = ["HostTests"]

GRADIENT_BLOCK = 256  # images at a time; a whole client's activations may not fit


class HostTests:
    """The part of ``ClientHost`` that trains nothing; who inherits sets these attributes."""

    job: Job
    data: JobData
    device: torch.device
    _residents: dict[int, Resident]
    _test: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def _take(self, model: int) -> None:
        """Work with a model of the job's from now on; it is built when it is first needed."""
        if model not in self._residents:
            self._residents[model] = make_resident(self.job, self.job.models[model], self.device)
        taken = self._residents[model]
        self.module, self.layout, self._shape, self._format = taken.module, taken.layout, taken.shape, taken.format

    def _load(self, weights: np.ndarray, model: int = 0) -> None:
        """Take a model and give it these weights."""
        self._take(model)
        self.layout.write(torch.from_numpy(weights))

    def _inputs(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = self._shape.normalise(self.data.images[rows], self.device)
        return x, torch.from_numpy(self.data.labels[rows]).to(self.device)

    def evaluate_test(self, weights: np.ndarray, blocks: list[int]) -> list[Evaluation]:
        """Evaluate on blocks of the global test images."""
        self._load(weights)
        return [self._evaluate(*self._test_block(block)) for block in blocks]

    def _test_block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        if block not in self._test:  # normalised once, then kept
            self._test[block] = self._block(self.data.test_images, self.data.test_labels, block)
        return self._test[block]

    def _block(self, images: np.ndarray, labels: np.ndarray, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(block * EVALUATION_BLOCK, (block + 1) * EVALUATION_BLOCK)
        x = self._shape.normalise(images[rows], self.device)
        return x.contiguous(memory_format=self._format), torch.from_numpy(labels[rows]).to(self.device)

    def evaluate_on(self, images: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Evaluation:
        """Evaluate on images that are no part of the run's own."""
        self._load(weights)
        blocks = range(-(-len(labels) // EVALUATION_BLOCK))
        return sum_evaluations([self._evaluate(*self._block(images, labels, block)) for block in blocks])

    def fresh(self, weights: np.ndarray, model: int) -> torch.nn.Module:
        """A module of its own with these weights, of a model of the job's."""
        made = make_resident(self.job, self.job.models[model], self.device)
        made.layout.write(torch.from_numpy(weights))
        return made.module

    def predict(self, weights: np.ndarray, client: int, images: np.ndarray | None = None) -> np.ndarray:
        """A client's model's log-probabilities of the classes, float32 [N, classes], on uint8 ``images`` [N, C, H, W].

        Default: the global test images.
        """
        self._load(weights, self.job.model_of(client))
        self.module.eval()
        images = self.data.test_images if images is None else images
        found = []
        with torch.no_grad():
            for start in range(0, len(images), EVALUATION_BLOCK):
                x = self._shape.normalise(images[start : start + EVALUATION_BLOCK], self.device)
                found.append(self.module(x.contiguous(memory_format=self._format)).float().log_softmax(dim=1).cpu())
        return torch.cat(found).numpy()

    def evaluate_clients(
        self, weights: np.ndarray, clients: list[int], part: str, own: bool = False
    ) -> list[Evaluation | None]:
        """Evaluate on each client's own images of a part (``held_out`` or ``partition``); None where it has none.

        ``own``: the weights are a client's, of the model that it trains.
        """
        self._load(weights, self.job.model_of(clients[0]) if own else 0)
        found: list[Evaluation | None] = []
        for client in clients:
            rows = getattr(self.data, part).of(client)
            if len(rows) == 0:
                found.append(None)
                continue
            # In blocks: thousands of images at once leave the processor's caches, and take three times as long.
            blocks = [rows[at : at + EVALUATION_BLOCK] for at in range(0, len(rows), EVALUATION_BLOCK)]
            inputs = (self._inputs(block) for block in blocks)
            evaluated = [self._evaluate(x.contiguous(memory_format=self._format), y) for x, y in inputs]
            found.append(sum_evaluations(evaluated))
        return found

    def gradient(self, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of the mean cross-entropy on ``rows`` of the images, in evaluation mode: float32 [parameters]."""
        self._load(weights)
        self.module.eval()
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(rows), GRADIENT_BLOCK):
            x, y = self._inputs(rows[start : start + GRADIENT_BLOCK])
            logits = self.module(x.contiguous(memory_format=self._format))
            loss = functional.cross_entropy(logits, y, reduction="sum") / len(rows)
            for part, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                part += found
        return torch.cat([part.ravel() for part in total]).cpu().numpy()

    def gradient_cosines(self, weights: np.ndarray, clients: list[int], wanted: np.ndarray) -> list[float]:
        """Cosine of each client's gradient on all its images with ``wanted``; 0 where one is 0, NaN where one is
        not finite.
        """
        cosines = []
        for client in clients:
            own = self.gradient(weights, self.data.partition.of(client)).astype(np.float64)
            norms = np.linalg.norm(own) * np.linalg.norm(wanted.astype(np.float64))
            cosines.append(0.0 if norms == 0 else float(own @ wanted / norms))
        return cosines

    @torch.no_grad()
    def _evaluate(self, x: torch.Tensor, y: torch.Tensor) -> Evaluation:
        self.module.eval()
        if hasattr(self.module, "evaluation"):  # no classifier: it says itself how good it is
            correct, loss = self.module.evaluation(x, y)
            return Evaluation(int(correct), float(loss), len(y))
        logits = self.module(x)
        correct = int((logits.argmax(dim=1) == y).sum())
        loss = float(functional.cross_entropy(logits.double(), y, reduction="sum"))
        return Evaluation(correct, loss, len(y))
