"""Early stopping and the best weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fl_ray.config import RunConfig, StoppingConfig
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.model import ImageShape, build_module
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.start import open_runtime
from fl_ray.stopping import BestModel
from tests.fl_ray.test_runs import StopAfter

Run = Callable[..., tuple[Experiment, dict]]
STILL = {"training__lr": 1e-9, "rounds": 20, "checkpoint__every": 1}  # an accuracy that never rises


def stalls_at(accuracies: list[float], **settings: float) -> int | None:
    best = BestModel(StoppingConfig(**settings))
    for number, accuracy in enumerate(accuracies, 1):
        best.see(number, accuracy, np.zeros(1))
        if best.stalled:
            return number
    return None


def test_patience_and_min_delta_by_hand() -> None:
    nan = float("nan")
    assert stalls_at([0.1, 0.2, 0.2, 0.2]) is None  # off by default
    assert stalls_at([0.1, 0.2, 0.2, 0.15, 0.3], patience=2) == 4
    assert stalls_at([0.1, 0.2, 0.1, 0.3, 0.3], patience=2) is None
    assert stalls_at([0.1, nan, nan, 0.1, nan, 0.1], patience=2) == 6  # rounds without a test don't count
    assert stalls_at([0.5, 0.52, 0.54, 0.56], patience=2, min_delta=0.03) is None  # 0.54 is over 0.5 + 0.03
    assert stalls_at([0.5, 0.51, 0.52, 0.56], patience=2, min_delta=0.03) == 3
    assert stalls_at([0.0, 0.0], patience=1) == 2


def test_the_best_is_kept_even_where_its_rise_does_not_count() -> None:
    best = BestModel(StoppingConfig(patience=5, min_delta=0.1))
    for number, accuracy in enumerate([0.5, 0.55, 0.52], 1):
        best.see(number, accuracy, np.full(1, number))
    assert (best.round, best.accuracy, best.weights.tolist()) == (2, 0.55, [2])
    other = BestModel(StoppingConfig(patience=5, min_delta=0.1))
    other.load_state(best.state())
    assert vars(other) | {"_config": None} == vars(best) | {"_config": None}


@pytest.mark.parametrize(("every", "rounds"), [(1, 3), (2, 6)])
def test_a_run_stops_after_patience_evaluations(run_small: Run, every: int, rounds: int) -> None:
    experiment, summary = run_small(**STILL, early_stopping__patience=2, evaluate_every=every)
    assert summary["rounds"] == summary["stopped_early"] == rounds
    assert summary["status"] == "finished"
    assert summary["best_round"] == every
    assert "stopped early" in (experiment.folder / "report.html").read_text()


def test_a_run_that_does_not_stop_says_so(run_small: Run) -> None:
    _, summary = run_small(early_stopping__patience=2, rounds=2)
    assert summary["stopped_early"] is None


def test_a_resumed_run_keeps_the_count(small: Callable[..., RunConfig], run_small: Run, tmp_path: Path) -> None:
    settings = {**STILL, "early_stopping__patience": 4}
    _, whole = run_small(**settings)
    config, folder = small(**settings), tmp_path / "cut"
    folder.mkdir()
    with open_runtime(config) as runtime:
        with pytest.raises(KeyboardInterrupt):
            Experiment(config, folder, runtime, StopAfter(4)).run()
        again = Experiment(config, folder, runtime, resume=True).run()
    for name in ("rounds", "stopped_early", "best_round", "best_accuracy", "final_loss", "bytes_up"):
        assert again[name] == whole[name], name
    assert whole["stopped_early"] == 5


def test_a_run_that_had_stopped_is_finished_not_gone_on_with(
    small: Callable[..., RunConfig],
    tmp_path: Path,
    run_cut_at_its_end: Callable[[RunConfig, Path, Runtime], None],
) -> None:
    config, folder = small(**STILL, early_stopping__patience=2), tmp_path / "cut"
    with open_runtime(config) as runtime:
        run_cut_at_its_end(config, folder, runtime)
        resumed = Experiment(config, folder, runtime, resume=True)
        summary = resumed.run()
    assert (summary["status"], summary["rounds"], summary["stopped_early"]) == ("finished", 3, 3)
    assert (folder / "best_model.safetensors").exists()


def test_the_best_model_is_that_of_the_best_round(run_small: Run) -> None:
    experiment, summary = run_small(training__lr=2.0, rounds=6)  # too large a step: the accuracy goes up and down
    accuracies = [row["test_accuracy"] for row in experiment.folder.history()]
    assert summary["best_round"] == 1 + int(np.argmax(accuracies)) < 6
    data, config = experiment.data, experiment.config
    shape = ImageShape.of(data.source)
    x = shape.normalise(data.test_images, torch.device("cpu"))
    for name, accuracy in (("best_model", max(accuracies)), ("model", accuracies[-1])):
        module = build_module(config.model, shape, config.training).eval()
        module.load_state_dict(load_file(experiment.folder / f"{name}.safetensors"))
        with torch.no_grad():
            right = module(x).argmax(dim=1).numpy() == data.test_labels
        assert right.mean() == pytest.approx(accuracy)
    assert "best round" in (experiment.folder / "report.html").read_text()


def test_no_best_model_where_every_client_has_its_own(run_small: Run) -> None:
    experiment, summary = run_small(method__name="local_only", rounds=2)
    assert not (experiment.folder / "best_model.safetensors").exists()
    assert summary["best_round"] in (1, 2)


def test_bad_settings(small: Callable[..., RunConfig]) -> None:
    with pytest.raises(SettingError, match=r"early_stopping\.patience is -1"):
        small(early_stopping__patience=-1)
    with pytest.raises(SettingError, match=r"early_stopping\.min_delta is -0\.1"):
        small(early_stopping__min_delta=-0.1)
