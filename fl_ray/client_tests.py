"""The clients' own tests: every client's model on the images that it held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_ray.context import RunContext
from fl_ray.methods.base import Method
from fl_ray.randomness import numpy_generator
from fl_ray.summary import worst_decile

__all__ = ["client_accuracy", "domain_accuracy", "evaluate_clients", "gradient_cosine"]

IID_SAMPLES = 2000  # that the gradient on IID data is taken on


def evaluate_clients(run: RunContext, method: Method, weights: np.ndarray, number: int) -> list[dict[str, Any]]:
    """Test all clients that held images out after round ``number`` (from 1): rows of clients.csv."""
    clients = np.flatnonzero(run.data.held_out.sizes > 0).tolist()
    with run.phases.phase("evaluate"):
        found = method.evaluate_at_clients(run, weights, clients)
    return [
        {
            "round": number,
            "client": client,
            "samples": entry.count,
            "accuracy": entry.accuracy,
            "loss": entry.loss,
        }
        for client, entry in zip(clients, found, strict=True)
        if entry is not None
    ]


def domain_accuracy(run: RunContext, method: Method, weights: np.ndarray) -> dict[str, float]:
    """Accuracy on the test images of each domain, by its name; empty where there are not several."""
    data, names = run.data, run.data.source.domain_names or []
    if data.test_domains is None or len(names) < 2:
        return {}
    found = {}
    for number, name in enumerate(names):
        rows = np.flatnonzero(data.test_domains == number)
        if len(rows):
            handle = run.runtime.put(data.test_images[rows], data.test_labels[rows])
            found[name] = method.evaluate(run, weights, handle).accuracy
    return found


def gradient_cosine(run: RunContext, weights: np.ndarray) -> float:
    """Mean cosine of the clients' gradients at ``weights``, each on all its images, synthetic ones too, with the
    gradient on real images drawn evenly from all clients' (FIMI's measure of how IID the clients' data look).
    """
    real = run.data.partition.owned()
    if run.data.synthetic_from is not None:
        real = real[real < run.data.synthetic_from]
    rng = numpy_generator(run.config.seed, "gradient_cosine")
    rows = np.sort(rng.permutation(real)[:IID_SAMPLES])
    clients = np.flatnonzero(run.data.partition.sizes > 0).tolist()
    with run.phases.phase("evaluate"):
        return float(np.mean(run.runtime.gradient_cosines(weights, clients, rows)))


def client_accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the rows of one test come to: how many clients, their mean, and the mean of the worst tenth."""
    accuracies = [row["accuracy"] for row in rows]
    return {
        "clients": len(accuracies),
        "mean": float(np.mean(accuracies)),
        "worst_decile": worst_decile(accuracies),
    }
