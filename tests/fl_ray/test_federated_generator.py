"""A generator that clients train: the ordinary round loop, on the run's clock, kept, and gone on with after a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fl_ray.config import RayConfig, RunConfig, RuntimeConfig
from fl_ray.experiment import Experiment
from fl_ray.progress import Progress
from fl_ray.runtime.ray_backend import RayRuntime
from fl_ray.runtime.start import open_runtime
from generators.cache import COST_FILE, TRAINED_FILE

Run = Callable[..., tuple[Experiment, dict]]
GENFL = {"method__name": "genfl", "method__images_per_round": 10, "method__max_images": 10, "rounds": 1}
CVAE = {"hidden": [16], "batch_size": 16, "lr": 0.01, "binarise": False, "block_size": 10}
ROUNDS = 7  # one checkpoint, after round 5


def federated(cache: Path, **more: object) -> dict[str, object]:
    settings = {**CVAE, "name": "cvae", "training": "federated", "rounds": ROUNDS, "cache": str(cache)}
    return {**GENFL, **{f"generator__{name}": value for name, value in settings.items()}, **more}


def weights(cache: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The one generator in a cache, and what its training has cost."""
    (folder,) = cache.glob("generators/cvae-*/weights")
    files = {"weights.safetensors", "settings.json", COST_FILE, TRAINED_FILE}
    assert {path.name for path in folder.iterdir()} == files
    return load_file(folder / "weights.safetensors"), json.loads((folder / COST_FILE).read_text())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_what_fedavg_of_the_model_gives_and_costs(run_small: Run, tmp_path: Path) -> None:
    """The generator's rounds are those of an ordinary run of the model ``cvae``, to the bit; the run begins when and
    with what they end.
    """
    _, summary = run_small(**federated(tmp_path / "cache"))
    kept, cost = weights(tmp_path / "cache")
    network = {f"model__{name}": CVAE[name] for name in ("hidden", "binarise")}
    training = {"training__optimizer": "adam", "training__lr": 0.01, "training__batch_size": 16}
    plain, alone = run_small(model__name="cvae", rounds=ROUNDS, **network, **training, training__local_epochs=2)
    assert equal(load_file(plain.folder / "model.safetensors"), kept)
    losses = [row["test_loss"] for row in plain.folder.history()]
    assert losses[-1] < 0.9 * losses[0]
    assert cost["last_round"]["test_loss"] == losses[-1]
    # The same run with a generator that costs the devices nothing:
    _, free = run_small(**GENFL, generator__name="noise", generator__cache=str(tmp_path / "cache"))
    for name in ("virtual_time_s", "energy_j", "bytes_up", "bytes_down", "samples_trained"):
        assert cost["ledger"][name] == alone[name] > 0, name
        assert summary[name] == pytest.approx(free[name] + alone[name]), name


def test_it_is_found_again(run_small: Run, tmp_path: Path) -> None:
    settings = federated(tmp_path / "cache", generator__rounds=2)
    first, summary = run_small(**settings)
    again, repeated = run_small(**settings)
    assert summary["synthesis"]["train_seconds"] > 0
    assert repeated["synthesis"]["train_seconds"] == repeated["synthesis"]["images_made"] == 0
    assert repeated["energy_j"] == summary["energy_j"]
    assert equal(*(load_file(run.folder / "model.safetensors") for run in (first, again)))
    weights(tmp_path / "cache")  # one generator only
    run_small(**settings, seed=1)  # other clients' images, and another start
    assert len(list((tmp_path / "cache" / "generators").glob("cvae-*"))) == 2


def test_ray_gives_the_same_to_the_bit(run_small: Run, tmp_path: Path, ray_session: None) -> None:
    small = {"generator__rounds": 2, "generator__pool__actors": 1, "generator__pool__timeout_s": 120.0}
    oracle, _ = run_small(**federated(tmp_path / "here", **small))
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=2), RayConfig()) as runtime:
        found, _ = run_small(runtime, **federated(tmp_path / "ray", **small), runtime__backend="ray")
    (one, cost), (two, same_cost) = weights(tmp_path / "here"), weights(tmp_path / "ray")
    assert equal(one, two)
    assert cost["ledger"] == same_cost["ledger"]
    assert equal(*(load_file(run.folder / "model.safetensors") for run in (oracle, found)))


class CutAfter(Progress):
    """An interrupt after the generator's round ``last``; remembers the rounds."""

    def __init__(self, last: int) -> None:
        super().__init__(enabled=False)
        self.last, self.seen = last, []

    def steps(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what == "generator round":
            self.seen.append(done)
            if done == self.last:
                raise KeyboardInterrupt


def run_with(config: RunConfig, folder: Path, progress: Progress, resume: bool = False) -> Experiment:
    folder.mkdir(exist_ok=True)
    with open_runtime(config) as runtime:
        experiment = Experiment(config, folder, runtime, progress, resume=resume)
        experiment.run()
    return experiment


def test_an_interrupted_one_goes_on_from_its_checkpoint(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    whole = run_with(small(**federated(tmp_path / "whole")), tmp_path / "run", CutAfter(0))
    config, cut, rest = small(**federated(tmp_path / "cut")), CutAfter(6), CutAfter(0)
    with pytest.raises(KeyboardInterrupt):
        run_with(config, tmp_path / "cut_run", cut)
    assert not list((tmp_path / "cut").glob("generators/cvae-*/weights"))
    resumed = run_with(config, tmp_path / "cut_run", rest, resume=True)
    assert (cut.seen, rest.seen) == ([1, 2, 3, 4, 5, 6], [6, 7])
    (one, cost), (two, same_cost) = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert equal(one, two)
    assert cost["ledger"] == same_cost["ledger"]
    assert equal(*(load_file(run.folder / "model.safetensors") for run in (whole, resumed)))


def test_the_run_s_training_path_does_not_decide_the_generator_s(run_small: Run, tmp_path: Path) -> None:
    """A CVAE draws codes, so it can't be batched, while the run's own model is."""
    settings = federated(tmp_path / "cache", generator__rounds=1, runtime__training_path="batched")
    _, summary = run_small(**settings)
    assert summary["status"] == "finished"


def test_an_ordinary_run_of_the_model_says_how_well_it_reconstructs(run_small: Run) -> None:
    experiment, summary = run_small(model__name="cvae", training__optimizer="adam", training__lr=1e-3)
    rows = experiment.folder.history()
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]
    assert summary["best_round"] is None  # there is no accuracy to be best by
    assert not (experiment.folder / "best_model.safetensors").exists()
    assert np.isfinite(rows[-1]["train_loss"])


def test_images_are_unit_for_who_wants_them_so(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    """What the host hands to its module, against the data's bytes."""
    seen: dict[str, torch.Tensor] = {}
    for name in ("cvae", "mlp"):
        config = small(model__name=name, rounds=1)
        (tmp_path / name).mkdir()
        with open_runtime(config) as runtime:
            experiment = Experiment(config, tmp_path / name, runtime)
            experiment.run()
            seen[name] = runtime.host._test_block(0)[0]
    images = torch.from_numpy(experiment.data.test_images[: len(seen["mlp"])]).double() / 255
    assert torch.allclose(seen["cvae"].double(), images, atol=1e-6)
    assert torch.allclose(seen["mlp"].double(), (images - 0.305) / 0.376, atol=1e-5)
