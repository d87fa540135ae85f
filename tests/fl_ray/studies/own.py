"""A small study file for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def study_file(folder: Path, **changes: Any) -> Path:
    """A study of seconds; changes are its keys, ``recipe`` and ``space`` whole."""
    content = {
        "name": "small-study",
        "recipe": {
            "name": "small",
            "data": {
                "name": "digits",
                "clients": 6,
                "public_fraction": 0.2,
                "max_samples": 600,
                "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 3},
            },
            "model": {"name": "mlp", "hidden": [16]},
            "training": {"batch_size": 8, "lr": 0.1},
            "runtime": {"backend": "in_process", "training_path": "plain"},
            "rounds": 4,
            "targets": [0.5],
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        },
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
