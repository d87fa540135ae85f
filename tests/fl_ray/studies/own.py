"""A small study file for tests, and a method whose process dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fl_ray.context import RunContext
from fl_ray.methods.fedavg import FedAvg
from fl_ray.runtime.base import RoundResult
from tests.conftest import small_recipe


def study_file(folder: Path, **changes: Any) -> Path:
    """A study of seconds; changes are its keys, ``recipe`` and ``space`` whole."""
    store = {"uri": f"sqlite:///{folder / 'mlflow.db'}"}
    content = {
        "name": "small-study",
        "recipe": small_recipe() | {"rounds": 4, "targets": [0.5], "tracking": store},
        "space": {
            "training.lr": {"loguniform": [0.001, 0.5]},
            "training.local_epochs": {"int": [1, 3]},
        },
        "trials": 4,
        "concurrency": 2,
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


class DiesOnce(FedAvg):
    """FedAvg whose process is killed in the fourth round.

    Args:
        mark: a file that is there once it has been.
    """

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = Path(mark)

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        if round_number == 4 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().aggregate(run, round_number, weights, result)
