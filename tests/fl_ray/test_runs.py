"""Whole runs in process: own components, failures inside clients, resuming, folders, tracking."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fl_ray import checkpoint
from fl_ray.config import RunConfig
from fl_ray.errors import OutputError, SettingError, TooFewClientsError
from fl_ray.experiment import Experiment
from fl_ray.run_folder import HISTORY_COLUMNS, new_folder
from fl_ray.runtime.local_training import lr_factor
from fl_ray.runtime.start import open_runtime

Run = Callable[..., tuple[Experiment, dict]]


@pytest.mark.parametrize("name", ["OwnModule", "OwnNetwork"])
def test_own_model_by_import_path(run_small: Run, name: str) -> None:
    settings = {"model__hidden": 12} if name == "OwnModule" else {}
    experiment, summary = run_small(model__name=f"tests.fl_ray.own:{name}", rounds=4, **settings)
    stored = load_file(experiment.folder / "model.safetensors")
    if name == "OwnModule":
        assert stored["layers.1.weight"].shape == (12, 64)
        assert stored["layers.2.num_batches_tracked"].dtype == torch.int64
    assert summary["best_accuracy"] > 0.15


def test_own_method_and_generator_by_import_path(run_small: Run, ray_session: None) -> None:
    half, _ = run_small(rounds=1, method__name="tests.fl_ray.own:HalfStep")
    whole, _ = run_small(rounds=1)
    from fl_ray.data.parts import prepare
    from fl_ray.model import ImageShape, initial_weights

    shape = ImageShape.of(prepare(half.config.data, 0).source)
    start = initial_weights(half.config.model, shape, half.config.training, 0)
    assert half._weights == pytest.approx((start + whole._weights) / 2, abs=1e-6)
    settings = {
        "method__name": "genfl",
        "method__images_per_round": 20,
        "generator": {"name": "tests.generators.own:FlatGenerator", "offset": 3},
        "data__clients": 4,
    }
    local, _ = run_small(**settings)
    on_ray, summary = run_small(**settings, runtime__backend="ray", runtime__actors="pooled", runtime__num_actors=1)
    assert (local._weights == on_ray._weights).all()
    assert sum(summary["synthetic_images"]) == 60


def test_nan_in_an_update_is_left_out_and_counted(run_small: Run) -> None:
    blocks = {"data__clients": 5, "clients_per_round": 5, "data__partition__name": "label_blocks"}
    experiment, summary = run_small(model__name="tests.fl_ray.own:NanOnNine", **blocks)
    assert summary["updates_left_out"] == 3  # the client with classes 8 and 9, in each of three rounds
    assert [row["clients"] for row in experiment.folder.history()] == [4, 4, 4]
    assert all(bool(value.isfinite().all()) for value in load_file(experiment.folder / "model.safetensors").values())


def test_the_average_without_a_left_out_client_is_that_of_the_others(run_small: Run) -> None:
    """Five clients with one left out must equal the same average computed from the four alone."""
    from fl_ray.runtime.base import merge
    from fl_ray.runtime.tasks import ClientRecord, LeftOut, PartialResult

    records = [
        ClientRecord(0, 10, 1.0, 0.25, 0, 1),
        ClientRecord(1, 10, 1.0, 0.25, 0, 1),
        ClientRecord(2, 20, float("nan"), 0.5, 0, 1, LeftOut("not_finite", "not finite")),
    ]
    from fl_ray.aggregation import ExactSum

    total = ExactSum(2)
    total.add(torch.tensor([[1.0, 0.0]]), [0.25])
    total.add(torch.tensor([[3.0, 4.0]]), [0.25])
    result = merge([PartialResult(total.total, {}, records)], 2, False)
    assert result.update.tolist() == [2.0, 2.0]
    assert result.train_loss == 1.0


def test_an_error_in_a_client_names_client_round_and_stage(run_small: Run) -> None:
    blocks = {"data__clients": 5, "clients_per_round": 5, "data__partition__name": "label_blocks"}
    with pytest.raises(TooFewClientsError, match=r"client 4, round 1, local training on .* KeyError: 'nine'"):
        run_small(model__name="tests.fl_ray.own:RaisesOnNine", **blocks, runtime__min_clients=5)


def test_a_failed_run_says_so_in_its_folder(run_small: Run, tmp_path: Path) -> None:
    blocks = {"data__clients": 5, "clients_per_round": 5, "data__partition__name": "label_blocks"}
    with pytest.raises(TooFewClientsError):
        run_small(model__name="tests.fl_ray.own:RaisesOnNine", **blocks, runtime__min_clients=5)
    summary = json.loads((tmp_path / "run0" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert (tmp_path / "run0" / "report.html").exists()


class StopAfter:
    """A progress that interrupts like Ctrl-C after so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def round(self, row: dict, rounds: int) -> None:
        if row["round"] == self.rounds:
            raise KeyboardInterrupt

    def message(self, text: str) -> None: ...

    def steps(self, what: str, done: int, total: int, detail: str = "") -> None: ...

    def stop(self) -> None: ...


@pytest.mark.parametrize("method", ["fedavg", "genfl", "local_only", "scaffold", "feddyn"])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    run_small: Run, small: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    settings = {"method__name": method, "with_generator": method == "genfl", "rounds": 5, "checkpoint__every": 2}
    if method == "fedavg":
        settings |= {"method__server_optimizer": "adam", "method__server_lr": 0.05}
    if method == "genfl":
        settings |= {"method__images_per_round": 10, "method__max_images": 35}
    whole, summary = run_small(**settings)
    config = small(**settings)
    folder = tmp_path / "cut"
    folder.mkdir()
    with open_runtime(config) as runtime:
        with pytest.raises(KeyboardInterrupt):
            Experiment(config, folder, runtime, StopAfter(3)).run()
        assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
        resumed = Experiment(config, folder, runtime, resume=True)
        again = resumed.run()
    expected = load_file(whole.folder / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name
    for row, same in zip(whole.folder.history(), resumed.folder.history(), strict=True):
        assert all(repr(row[column]) == repr(same[column]) for column in HISTORY_COLUMNS if column != "wall_s")
    assert again["final_accuracy"] == summary["final_accuracy"]
    assert again["bytes_up"] == summary["bytes_up"]


def test_checkpoints_keep_two_and_pass_over_a_damaged_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        weights = np.full(4, number, dtype=np.float32)
        state = checkpoint.Checkpoint(number, weights, {"method": {"m": weights * 2.0}}, {"energy_j": 0.1}, {"late": 1})
        checkpoint.save(tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000002.safetensors", "round_000003.safetensors"]
    found = checkpoint.latest(tmp_path)
    assert (found.rounds_done, found.faults, found.ledger) == (3, {"late": 1}, {"energy_j": 0.1})
    assert found.state["method"]["m"].tolist() == [6.0] * 4
    (tmp_path / "round_000003.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.latest(tmp_path).rounds_done == 2


def test_a_history_that_was_cut_is_read_to_its_last_whole_line(run_small: Run) -> None:
    experiment, _ = run_small()
    path = experiment.folder / "history.csv"
    whole = experiment.folder.history()
    text = path.read_text()
    for cut in (3, 40):
        path.write_text(text[:-cut])
        assert repr(experiment.folder.history()) == repr(whole[:-1])


def test_a_client_with_one_sample_and_batch_norm_is_left_out(run_small: Run) -> None:
    """36 samples dealt in turn to 30 clients: six have two, the others one."""
    settings = {
        "data": {"name": "tests.fl_ray.own:stripes", "samples": 40, "clients": 30, "public_fraction": 0.0},
        "data__test_fraction": 0.1,
        "data__partition": {"name": "tests.fl_ray.own:EvenOdd", "min_samples": 1},
        "model__name": "tests.fl_ray.own:OwnModule",
        "clients_per_round": 30,
    }
    experiment, summary = run_small(**settings, rounds=1)
    assert summary["updates_left_out"] == 24
    assert experiment.folder.history()[0]["clients"] == 6


def test_clients_without_samples_do_not_train(run_small: Run) -> None:
    settings = {"data__partition": {"name": "dirichlet", "alpha": 0.01, "min_samples": 0}, "data__clients": 30}
    experiment, _ = run_small(**settings, clients_per_round=30, rounds=1)
    partition = experiment.data.partition
    assert (partition.sizes == 0).any()
    assert experiment.folder.history()[0]["clients"] == (partition.sizes > 0).sum()


def test_a_diverged_augmented_model_is_left_out_and_counted(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_ray.runtime.host import ClientHost

    def diverged(self: ClientHost, *arguments: object) -> tuple[np.ndarray, float]:
        return np.full(self.layout.size, np.nan, dtype=np.float32), float("nan")

    fedavg, _ = run_small()
    monkeypatch.setattr(ClientHost, "train_on", diverged)
    genfl, summary = run_small(method__name="genfl", with_generator=True)
    assert summary["augmented_left_out"] == 3
    assert (genfl._weights == fedavg._weights).all()


def test_a_refused_run_leaves_no_folder(run_small: Run, tmp_path: Path) -> None:
    with pytest.raises(SettingError):
        run_small(data__clients=5000)
    assert not list(tmp_path.iterdir())


def test_folders_in_use_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result").write_text("mine")
    with pytest.raises(OutputError, match="in use"):
        new_folder(tmp_path / "old")
    with pytest.raises(OutputError, match="can be written"):
        new_folder(tmp_path / "old" / "result")
    assert (tmp_path / "old" / "result").read_text() == "mine"


def test_learning_rate_schedules(small: Callable[..., RunConfig]) -> None:
    constant, cosine = small().training, small(training__lr_schedule="cosine").training
    step = small(training__lr_schedule="step", training__lr_step_rounds=2, training__lr_gamma=0.1).training
    assert [lr_factor(constant, t, 4) for t in range(4)] == [1.0] * 4
    assert [lr_factor(step, t, 4) for t in range(4)] == pytest.approx([1, 1, 0.1, 0.1])
    assert [lr_factor(cosine, t, 4) for t in range(4)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_gradient_clipping_bounds_the_step(run_small: Run) -> None:
    """With SGD at lr 1, one batch and a norm of 1e-3, weights can't move further than 1e-3."""
    settings = {"rounds": 1, "clients_per_round": 1, "training__batch_size": 1000, "training__lr": 1.0}
    clipped, _ = run_small(**settings, training__clip_norm=1e-3)
    from fl_ray.data.parts import prepare
    from fl_ray.model import ImageShape, initial_weights

    config = clipped.config
    shape = ImageShape.of(prepare(config.data, 0).source)
    start = initial_weights(config.model, shape, config.training, 0)
    moved = np.linalg.norm(clipped._weights - start)
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_a_model_with_its_own_schedule_is_told(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fl_ray import own

    def with_schedule(self: own.OwnModule) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}

    monkeypatch.setattr(own.OwnModule, "configure_optimizers", with_schedule)
    with pytest.raises(SettingError, match=r"training\.lr_schedule"):
        run_small(model__name="tests.fl_ray.own:OwnModule")


def test_public_only_without_public_images(run_small: Run) -> None:
    with pytest.raises(SettingError, match="public_fraction is 0"):
        run_small(method__name="public_only", data__public_fraction=0.0)
    with pytest.raises(SettingError, match=r"data.reserve_fraction is 0.*raise it"):
        run_small(method__name="public_only", method__part="reserve")
