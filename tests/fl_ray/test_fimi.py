"""FIMI's method and its baselines: what devices get, what it costs on the clock, and the gradients' cosine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fl_ray.client_tests import IID_SAMPLES
from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.devices.fleet import draw_fleet, redraw_channels
from fl_ray.errors import InfeasibleError, SettingError
from fl_ray.experiment import Experiment
from fl_ray.methods.fimi import FIMI, heuristic_amounts
from fl_ray.model import ImageShape, build_module
from fl_ray.planning import recipe_cell

Run = Callable[..., tuple[Experiment, dict[str, Any]]]
FIMI_SETTINGS: dict[str, Any] = {
    "method": {"name": "fimi"},
    "generator": {"name": "noise", "block_size": 20},
    "data.partition": {"name": "dirichlet", "alpha": 0.4, "min_samples": 10},
    "clients_per_round": None,
    "fleet": {
        "bandwidth_hz": 6e6,
        "tiers": [{"shadowing_db": 3, "distance_m": [50, 200], "cycles_per_sample": [4e7, 1.2e8]}],
    },
    "allocation": {"t_max_s": 20, "error_max": 0.7, "d_gen_max": 300},
}


@pytest.fixture
def fimi(run_small: Run) -> Run:
    def run(**overrides: Any) -> tuple[Experiment, dict[str, Any]]:
        return run_small(**FIMI_SETTINGS | overrides)

    return run


def test_a_round_costs_what_the_plan_says(fimi: Run) -> None:
    experiment, summary = fimi()
    stored = json.loads((experiment.folder / "plan.json").read_text())
    history = experiment.folder.history()
    amounts = np.array([device["class_amounts"] for device in stored["devices"]])
    assert summary["plan"]["synthetic_samples"] == amounts.sum() > 50
    assert stored["gap"] <= 1e-6
    # Whole images in place of the continuous optimum cost a little more.
    assert stored["energy_j"] < history[0]["energy_j"] < 1.02 * stored["energy_j"]
    assert history[2]["energy_j"] == pytest.approx(3 * history[0]["energy_j"])
    # Tmax holds computing and upload; the model's down-link comes on top.
    assert 20 <= history[0]["virtual_time_s"] < 20.5
    assert summary["label_entropy_after"] > summary["label_entropy_before"]
    assert summary["plan"]["delivery_bytes"] == amounts.sum() * 64
    assert summary["plan"]["delivery_s"] > 0


def test_devices_train_on_local_and_synthetic_images(fimi: Run, small: Callable[..., RunConfig]) -> None:
    experiment, _ = fimi(rounds=1)
    config = small(**FIMI_SETTINGS)
    data, fleet = prepare(config.data, 0), draw_fleet(config.fleet, 6, 0)
    counts, real = data.counts(), len(data.images)

    class Given:
        """Images that tell their class and number."""

        def images(self, wanted: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
            made = np.concatenate([np.arange(count) + 1000 * label for label, count in enumerate(wanted)])
            return np.repeat(made, 64).reshape(-1, 1, 8, 8), np.repeat(np.arange(len(wanted)), wanted)

    method = FIMI()
    data.images = data.images.astype(np.int64)  # the numbers above are no pixels
    equipped, _ = method.equip(config, data, fleet, Given())
    amounts = method.plan.class_amounts
    assert (equipped.counts() == counts + amounts).all()
    everything = np.concatenate([data.partition.owned(), np.arange(real, real + amounts.sum())])
    assert (equipped.partition.owned() == np.sort(everything)).all()
    for client in range(6):
        rows = equipped.partition.of(client)
        assert set(rows[rows < real]) == set(data.partition.of(client))
        own = rows[rows >= real]
        assert (equipped.images[own, 0, 0, 0] // 1000 == equipped.labels[own]).all()  # an image has its class's label
    numbers = equipped.images[real:, 0, 0, 0]
    assert len(set(numbers.tolist())) == len(numbers)  # and is at one device
    assert equipped.synthetic_from == real
    assert len(data.partition.owned()) == counts.sum()  # the given data are as they were
    stored = json.loads((experiment.folder / "plan.json").read_text())
    assert [device["class_amounts"] for device in stored["devices"]] == amounts.tolist()


def test_a_plan_of_a_file_is_taken_and_one_for_others_refused(
    fimi: Run, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    first, _ = fimi(rounds=1)
    path = str(first.folder / "plan.json")
    again, _ = fimi(rounds=1, method__plan=path)
    assert again.folder.history()[0]["energy_j"] == first.folder.history()[0]["energy_j"]
    with pytest.raises(SettingError, match="made for another fleet, partition or limits"):
        fimi(method__plan=path, seed=1)
    with pytest.raises(SettingError, match="can't be read"):
        fimi(method__plan=str(tmp_path / "none.json"))


def test_resources_without_optimisation_cost_more_and_change_no_weights(fimi: Run) -> None:
    planned, _ = fimi(rounds=1)
    full, _ = fimi(rounds=1, allocation__optimise=False)
    assert full.folder.history()[0]["energy_j"] > 1.5 * planned.folder.history()[0]["energy_j"]
    assert (planned.folder / "model.safetensors").read_bytes() == (full.folder / "model.safetensors").read_bytes()


def test_tfl_is_fedavg_at_the_least_energy_for_its_own_data(fimi: Run) -> None:
    tfl, summary = fimi(method={"name": "tfl"}, generator=None, rounds=2)
    plain, _ = fimi(method={"name": "fedavg"}, generator=None, rounds=2)
    assert (tfl.folder / "model.safetensors").read_bytes() == (plain.folder / "model.safetensors").read_bytes()
    assert summary["plan"]["synthetic_samples"] == 0
    assert tfl.folder.history()[1]["energy_j"] < plain.folder.history()[1]["energy_j"]
    assert tfl.folder.history()[1]["energy_j"] == pytest.approx(2 * summary["plan"]["energy_j"])


def test_hdc_by_hand(small: Callable[..., RunConfig]) -> None:
    cell = recipe_cell(small(**FIMI_SETTINGS))
    counts = np.zeros((6, 10), dtype=np.int64)
    counts[:, 0], counts[:, 1] = 30, 10
    cell = replace(cell, class_counts=counts, cycles_per_sample=np.full(6, 4e7), d_gen_max=1000.0)
    amounts = heuristic_amounts(cell)
    assert amounts[0].tolist() == [0, 20, *[30] * 8]
    capped = heuristic_amounts(replace(cell, d_gen_max=90.0))
    assert capped[0].sum() == 90
    assert capped[0].tolist() == [0, 1, *[11] * 7, 12] or capped[0, 2:].min() >= 11
    # 1 GHz at 4e7 cycles a sample: 25 samples a second less the upload's time.
    slow = replace(cell, cycles_per_sample=np.full(6, 1e9))
    t_com = cell.upload_bits / (1e6 * np.log2(1 + cell.p_max_w * cell.gain / (cell.noise_w_hz * 1e6)))
    assert (heuristic_amounts(slow).sum(axis=1) == np.floor(np.maximum(0, 2 * (20 - t_com) - 40))).all()


@pytest.mark.parametrize("name", ["semi", "sst", "clsd"])
def test_baselines_with_a_server(fimi: Run, name: str) -> None:
    own, summary = fimi(method={"name": name, "images": 100}, rounds=2)
    assert summary["synthetic_images"] == [10] * 10
    tfl, _ = fimi(method={"name": "tfl"}, generator=None, rounds=2)
    row, reference = own.folder.history()[1], tfl.folder.history()[1]
    assert row["energy_j"] == (0 if name == "clsd" else reference["energy_j"])
    assert (own.folder / "model.safetensors").read_bytes() != (tfl.folder / "model.safetensors").read_bytes()
    server = 2 * 100 * draw_fleet(own.config.fleet, 6, 0).cycles_per_sample.mean() / 1e11
    if name == "sst":  # the clients wait for the server
        assert row["virtual_time_s"] == pytest.approx(reference["virtual_time_s"] + server)
    if name == "semi":
        assert row["virtual_time_s"] == reference["virtual_time_s"]
    if name == "clsd":
        assert row["virtual_time_s"] == pytest.approx(server)


def test_semi_counts_the_server_by_its_images(fimi: Run) -> None:
    """One round by hand: TFL's average, and one epoch at the server from the same start."""
    from safetensors.numpy import load_file

    semi, _ = fimi(method={"name": "semi", "images": 100}, rounds=1)
    tfl, _ = fimi(method={"name": "tfl"}, generator=None, rounds=1)
    alone, _ = fimi(method={"name": "clsd", "images": 100}, rounds=1)
    clients = recipe_cell(tfl.config).d_loc.sum()
    joined, averaged, server = (load_file(each.folder / "model.safetensors") for each in (semi, tfl, alone))
    for key in joined:
        expected = (clients * averaged[key] + 100 * server[key]) / (clients + 100)
        np.testing.assert_allclose(joined[key], expected, atol=1e-6)


def test_plans_follow_redrawn_channels(fimi: Run, small: Callable[..., RunConfig]) -> None:
    changed = {"tiers": [{"shadowing_db": 6, "distance_m": [200, 400], "cycles_per_sample": [4e7, 1.2e8]}]}
    settings = {"fleet": {"bandwidth_hz": 6e6} | changed, "model": {"name": "mlp", "hidden": [2000]}}
    again, _ = fimi(method__replan_every=2, rounds=4, **settings)
    spent = np.diff([0.0, *(row["energy_j"] for row in again.folder.history())])
    assert spent[0] == pytest.approx(spent[1])
    assert spent[2] == pytest.approx(spent[3])
    assert abs(spent[2] / spent[0] - 1) > 1e-3
    fleet = draw_fleet(small(**FIMI_SETTINGS).fleet, 6, 0)
    redrawn = redraw_channels(small(**FIMI_SETTINGS).fleet, fleet, 0, 1)
    assert (redrawn.gain != fleet.gain).all()
    assert (redrawn.distance_m == fleet.distance_m).all()


def test_limits_without_a_plan_are_refused_before_the_first_round(fimi: Run, run_small: Run, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"allocation.t_max_s of at least [\d.]+ s"):
        fimi(allocation__t_max_s=0.5)
    with pytest.raises(SettingError, match="clients_per_round is 3, but a plan splits the band over all 6"):
        run_small(**FIMI_SETTINGS | {"clients_per_round": 3})
    assert not any(path.name.startswith("run") and any(path.iterdir()) for path in tmp_path.iterdir())


def test_the_gradients_cosine_against_autograd(run_small: Run) -> None:
    experiment, _ = run_small(gradient_cosine_every=2, rounds=3, training__local_epochs=2)
    rows = experiment.folder.history()
    assert np.isnan([rows[0]["gradient_cosine"], rows[2]["gradient_cosine"]]).all()
    from safetensors.torch import load_file

    short, _ = run_small(rounds=2, gradient_cosine_every=2, training__local_epochs=2)
    data = prepare(short.config.data, 0)
    module = build_module(short.config.model, ImageShape.of(data.source), short.config.training)
    module.load_state_dict(load_file(short.folder / "model.safetensors"))

    def gradient(rows: np.ndarray) -> np.ndarray:
        x = ImageShape.of(data.source).normalise(data.images[rows], torch.device("cpu"))
        loss = functional.cross_entropy(module(x), torch.from_numpy(data.labels[rows]))
        return np.concatenate([part.numpy().ravel() for part in torch.autograd.grad(loss, list(module.parameters()))])

    owned = data.partition.owned()
    assert len(owned) < IID_SAMPLES  # so the gradient on IID data is that of all
    pooled = gradient(owned)
    own = [gradient(data.partition.of(client)) for client in range(6)]
    expected = np.mean([one @ pooled / np.linalg.norm(one) / np.linalg.norm(pooled) for one in own])
    assert short.folder.history()[1]["gradient_cosine"] == pytest.approx(expected, abs=1e-5)
    assert rows[1]["gradient_cosine"] == short.folder.history()[1]["gradient_cosine"]


def test_the_same_in_actors(fimi: Run, ray_session: None) -> None:
    """Pooled and one actor per client, whose bundles carry the plan's shares of the band."""
    few = {"data__clients": 3, "rounds": 2, "gradient_cosine_every": 1}
    here, _ = fimi(**few)
    for layout in ({"actors": "pooled", "num_actors": 1}, {"actors": "per_client"}):
        settings = {f"runtime__{name}": value for name, value in layout.items()}
        there, _ = fimi(runtime__backend="ray", **settings, **few)
        for ours, theirs in zip(here.folder.history(), there.folder.history(), strict=True):
            assert repr(ours | {"wall_s": 0}) == repr(theirs | {"wall_s": 0})  # NaN is not NaN


def test_an_interrupted_run_goes_on_as_planned(
    fimi: Run,
    small: Callable[..., RunConfig],
    run_cut_at_its_end: Callable[..., None],
    tmp_path: Path,
) -> None:
    from fl_ray.runtime.start import open_runtime

    whole, _ = fimi(rounds=3, method__replan_every=1)
    config = small(**FIMI_SETTINGS, rounds=3, method__replan_every=1, checkpoint__every=1)
    with open_runtime(config) as runtime:
        run_cut_at_its_end(config, tmp_path / "cut", runtime)
        Experiment(config, tmp_path / "cut", runtime, resume=True).run()
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    rows = Experiment(config, tmp_path / "cut", None).folder.history()
    assert [row["energy_j"] for row in rows] == [row["energy_j"] for row in whole.folder.history()]
