"""A small study file for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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
