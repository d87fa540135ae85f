"""The acceptance filter: by hand, and what a run with it trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.methods.acceptance import accepted
from fl_ray.methods.fedlmg import FedLMG
from tests.fl_ray.test_one_shot import GUIDED

Run = Callable[..., tuple[Experiment, dict[str, Any]]]


def test_by_hand() -> None:
    odds = np.array(
        [
            [0.7, 0.2, 0.1],  # client 0, class 0: right, cross-entropy 0.36
            [0.6, 0.3, 0.1],  # right, but 0.51 is above 0.5
            [0.1, 0.5, 0.4],  # client 0, class 1: right, but 0.69
            [0.3, 0.2, 0.5],  # wrong, and worse
            [0.1, 0.1, 0.8],  # client 1, class 0: wrong
            [0.1, 0.2, 0.7],  # wrong as much: the first is kept
        ]
    )
    labels, guided_by = np.array([0, 0, 1, 1, 0, 0]), np.array([0, 0, 0, 0, 1, 1])
    found = accepted(np.log(odds), labels, guided_by, 0.5)
    assert found.passed.tolist() == [True, False, False, False, False, False]
    assert found.rows.tolist() == [0, 2, 4]
    assert found.note(guided_by, 2) == {"made": [4, 2], "passed": [1, 0], "kept_as_best": 2}
    assert accepted(np.log(odds), labels, guided_by, 0.7).rows.tolist() == [0, 1, 2, 4]


def test_a_run_trains_on_what_is_accepted(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    train = FedLMG.train

    def watched(self: FedLMG, run: Any, weights: np.ndarray, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        seen.append((images, targets))
        return train(self, run, weights, images, targets)

    monkeypatch.setattr(FedLMG, "train", watched)
    _, whole = run_small(**GUIDED)
    assert "accepted" not in whole
    for most in (0.5, 1e-9):
        experiment, summary = run_small(**GUIDED, method__accept=most)
        note, data = summary["accepted"], prepare(experiment.config.data, 0)
        jobs = int((data.counts() > 0).sum())
        assert sum(note["made"]) == sum(whole["synthetic_images"]) == 3 * jobs
        assert sum(summary["synthetic_images"]) == sum(note["passed"]) + note["kept_as_best"] == len(seen[-1][0])
        assert summary["samples_trained"] < whole["samples_trained"]
        assert summary["guided_accuracy"] == whole["guided_accuracy"]  # of all images that were made
        if most < 0.5:  # nothing passes: one image of each class of each client
            assert note["passed"] == [0, 0, 0]
            assert summary["synthetic_images"] == (data.counts() > 0).sum(axis=0).tolist()
    everything, kept = seen[0][0], seen[1][0]
    assert len(kept) < len(everything)
    assert {image.tobytes() for image in kept} < {image.tobytes() for image in everything}


def test_bad_settings(run_small: Run) -> None:
    with pytest.raises(SettingError, match=r"accept is 0\.0, but it must be positive, as 0\.5"):
        run_small(**GUIDED, method__accept=0)
