"""Errors inside clients: tried once more, then left out, counted by kind, and shown again by ``fl-ray replay``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_ray.cli import main
from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import OutputError, SettingError, TooFewClientsError
from fl_ray.experiment import Experiment, check
from fl_ray.preparation import make_context
from fl_ray.progress import Progress
from fl_ray.replay import replay
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.batched import BatchedTraining
from fl_ray.runtime.start import open_runtime
from fl_ray.runtime.tasks import RoundSettings, Task
from tests.fl_ray.own import Hooked

BLOCKS = {
    "data__clients": 5,
    "clients_per_round": 5,
    "data__partition__name": "label_blocks",
    "training__local_epochs": 2,
}
HOOKED = {"model__name": "tests.fl_ray.own:Hooked", **BLOCKS}
NINE = 4  # the client with the classes 8 and 9
Small = Callable[..., RunConfig]


class Heard(Progress):
    """Keeps what is told, and the weights after each round."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.said: list[str] = []
        self.weights: list[np.ndarray] = []
        self.experiment: Experiment | None = None
        self.on_round: Callable[[int], None] = lambda number: None

    def message(self, text: str) -> None:
        self.said.append(text)

    def round(self, row: dict[str, Any], rounds: int) -> None:
        if self.experiment is not None:
            self.weights.append(self.experiment._weights)
        self.on_round(row["round"])


def run(config: RunConfig, folder: Path, heard: Heard | None = None, resume: bool = False) -> Experiment:
    folder.mkdir(exist_ok=True)
    heard = heard or Heard()
    with open_runtime(config) as runtime:
        heard.experiment = Experiment(config, folder, runtime, heard, resume=resume)
        heard.experiment.run()
    return heard.experiment


def on_nine(monkeypatch: pytest.MonkeyPatch, path: str, times: float = float("inf")) -> Callable[[float], None]:
    """Make the training of the client with class 9 raise so many times; what arms it again."""
    left = [times]

    def strike() -> None:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("nine is not to be learned")

    if path == "plain":
        monkeypatch.setattr(Hooked, "trouble", staticmethod(lambda labels: strike() if (labels == 9).any() else None))
    else:
        whole = BatchedTraining.train

        def train(self: BatchedTraining, clients: Any, training: Any, epochs: int, *more: Any) -> Any:
            if epochs > 1 and any(key[3] == NINE for key in clients.keys):  # not while the path is chosen
                strike()
            return whole(self, clients, training, epochs, *more)

        monkeypatch.setattr(BatchedTraining, "train", train)
    return lambda number: left.__setitem__(0, number)


@pytest.mark.parametrize("path", ["plain", "batched"])
def test_a_client_that_raises_once_is_trained_again_to_the_same_bits(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    config = small(**HOOKED, runtime__training_path=path, rounds=2)
    undisturbed = run(config, tmp_path / "whole")
    on_nine(monkeypatch, path, times=1)
    heard = Heard()
    disturbed = run(config, tmp_path / "once", heard)
    assert (disturbed._weights == undisturbed._weights).all()
    summary = disturbed.folder.summary()
    assert (summary["clients_retried"], summary["updates_left_out"]) == (1, 0)
    (told,) = [text for text in heard.said if "trained once more" in text]
    assert "nine is not to be learned" in told
    assert "round 1" in told
    assert "raised once" in (disturbed.folder / "report.html").read_text()


@pytest.mark.parametrize("path", ["plain", "batched"])
def test_a_client_that_raises_twice_is_left_out_of_the_average(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    config = small(**HOOKED, runtime__training_path=path, rounds=1)
    with open_runtime(config) as runtime:
        data = prepare(config.data, config.seed)
        context, start = make_context(config, check(config), data, RunFolder(tmp_path), runtime, Progress(False), None)
        sizes = data.partition.sizes
        tasks = [Task(client, sizes[client] / sizes[:NINE].sum()) for client in range(NINE)]
        expected = start + runtime.train(tasks, start, RoundSettings(0, path), context.phases).update
    on_nine(monkeypatch, path)
    heard = Heard()
    found = run(config, tmp_path / "run", heard)
    assert found._weights == pytest.approx(expected, abs=1e-6)
    summary = found.folder.summary()
    assert summary["updates_left_out"] == summary["clients_left_out"]["raised"] == 1
    assert summary["clients_left_out"].keys() == {"dropped_out", "late", "not_finite", "raised", "one_sample"}
    (told,) = [text for text in heard.said if "left out" in text]
    assert f"client {NINE} is left out of the average: raised twice" in told
    assert told.endswith(f"fl-ray replay {tmp_path / 'run'} --round 1 --client {NINE}")
    assert "1 (raised: 1)" in (found.folder / "report.html").read_text()


def test_faults_are_counted_by_kind_and_on_through_a_resumed_run(small: Small, tmp_path: Path) -> None:
    settings = {**BLOCKS, "model__name": "tests.fl_ray.own:NanOnNine", "fleet__dropout": 0.4, "rounds": 6}
    config = small(**settings, checkpoint__every=2)
    whole = run(config, tmp_path / "whole").folder.summary()
    assert whole["clients_left_out"]["dropped_out"] > 0
    assert whole["clients_left_out"]["not_finite"] > 0
    assert whole["updates_left_out"] == sum(whole["clients_left_out"].values())
    heard = Heard()
    heard.on_round = _interrupt_after(4)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", heard)
    again = run(config, tmp_path / "cut", resume=True).folder.summary()
    assert again["clients_left_out"] == whole["clients_left_out"]


def _interrupt_after(rounds: int) -> Callable[[int], None]:
    def on_round(number: int) -> None:
        if number == rounds:
            raise KeyboardInterrupt

    return on_round


@pytest.mark.parametrize("path", ["plain", "batched"])
def test_when_all_raise_the_run_stops_and_can_go_on(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    config = small(**HOOKED, runtime__training_path=path, runtime__min_clients=5)
    arm = on_nine(monkeypatch, path, times=0)
    heard = Heard()
    heard.on_round = lambda number: arm(np.inf if number == 2 else 0)
    with pytest.raises(TooFewClientsError, match=rf"client {NINE}, round 3, .*replay .*run --round 3 --client {NINE}"):
        run(config, tmp_path / "run", heard)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("failed", 2)
    assert summary["clients_left_out"]["raised"] == 2  # the round was repeated once
    assert (tmp_path / "run" / "checkpoints" / "round_000002.safetensors").exists()
    (found,) = replay(tmp_path / "run", 3, NINE)  # the round that has no row
    assert str(found.error) == "nine is not to be learned"
    arm(0)
    again = run(config, tmp_path / "run", resume=True)
    assert (again._weights == run(config, tmp_path / "whole")._weights).all()


def test_replay_shows_the_traceback_and_writes_nothing(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arm = on_nine(monkeypatch, "plain", times=0)
    heard = Heard()
    heard.on_round = lambda number: arm(np.inf if number == 1 else 0)
    folder = run(small(**HOOKED), tmp_path / "run", heard).folder
    assert folder.summary()["clients_left_out"]["raised"] == 1
    assert not (folder / "checkpoints").exists()
    assert [path.name for path in (folder / "failures").iterdir()] == ["round_000001.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    arm(np.inf)
    words = ["replay", str(folder.path), "--round", "2", "--client", str(NINE)]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "Traceback (most recent call last)" in said.err
    assert "RuntimeError: nine is not to be learned" in said.err
    assert "own.py" in said.err  # down to the line of the user's own module
    assert "rounds again" not in said.err  # it began at the failure's checkpoint
    assert "samples by class" in said.out
    assert main([*words[:-1], "0"]) == 0
    assert "norm of the update" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    assert not (tmp_path / "mlflow.db").exists()


REPLAYS = {
    "plain": {},
    "batched": {"runtime__training_path": "batched", "updates": [{"name": "quantise", "bits": 4}]},
    "dropout_and_batch_norm": {"model__name": "tests.fl_ray.own:OwnModule", "evaluate_every": 2},
}


@pytest.mark.parametrize("settings", REPLAYS.values(), ids=REPLAYS)
def test_a_replayed_update_is_that_of_the_run_to_the_bit(small: Small, tmp_path: Path, settings: dict) -> None:
    heard = Heard()
    folder = run(small(**settings, clients_per_round=1, training__local_epochs=2), tmp_path / "run", heard).folder
    clients = [entry["clients"][0] for entry in folder.timeline()]
    for number in (2, 3):
        (found,) = replay(folder.path, number, clients[number - 1])
        assert not found.failed
        assert found.loss == folder.history()[number - 1]["train_loss"]
        assert ((heard.weights[number - 2] + found.update).astype(np.float32) == heard.weights[number - 1]).all()
        assert sum(found.labels.values()) == int(found.facts()["samples"])


def test_an_asynchronous_client_is_replayed_from_the_weights_that_it_had(small: Small, tmp_path: Path) -> None:
    heard = Heard()
    clock = {"clock__mode": "asynchronous", "clock__buffer_size": 1, "clock__concurrency": 3}
    config = small(**clock, rounds=5)
    folder = run(config, tmp_path / "run", heard).folder
    client = folder.timeline()[4]["clients"][0]
    (found,) = replay(folder.path, 5, client)
    moved = heard.weights[4].astype(np.float64) - heard.weights[3]
    scale = np.dot(moved, found.update) / np.dot(found.update, found.update)
    assert scale == pytest.approx((1 + round(scale**-2 - 1)) ** -0.5, abs=1e-4)  # (1 + staleness)^-1/2
    assert moved == pytest.approx(scale * found.update, abs=1e-6)


def test_replay_begins_at_a_checkpoint_and_makes_synthetic_images(small: Small, tmp_path: Path) -> None:
    genfl = {"method__name": "genfl", "with_generator": True, "method__images_per_round": 10}
    config = small(**genfl, rounds=4, checkpoint__every=1)
    finished = run(config, tmp_path / "whole").folder
    heard = Heard()
    heard.on_round = _interrupt_after(4)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", heard)
    client = finished.timeline()[3]["clients"][0]
    updates = []
    for name in ("whole", "cut"):
        heard = Heard()
        (found,) = replay(tmp_path / name, 4, client, heard)
        assert any("3 rounds again" in text for text in heard.said) == (name == "whole")
        assert not any("otherwise" in text for text in heard.said)
        updates.append(found.update)
    assert (updates[0] == updates[1]).all()


def test_a_client_that_dropped_out_is_replayed_all_the_same(small: Small, tmp_path: Path) -> None:
    folder = run(small(**BLOCKS, fleet__dropout=0.5), tmp_path / "run").folder
    found = [replay(folder.path, 1, client)[0] for client in range(5)]
    dropped = [one for one in found if one.dropped is not None]
    assert len(dropped) == 5 - folder.history()[0]["clients"] > 0
    assert "dropped out" in dropped[0].facts()["in the run"]
    assert not any(one.failed for one in found)


def test_a_round_that_comes_out_otherwise_is_told(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_nine(monkeypatch, "plain", times=2)  # left out of round 1; the error does not come back
    folder = run(small(**HOOKED), tmp_path / "run").folder
    heard = Heard()
    replay(folder.path, 3, 0, heard)
    assert next(text for text in heard.said if "otherwise" in text).startswith("round 1 came out otherwise")


def test_what_can_not_be_replayed_is_refused(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(small(clients_per_round=2, rounds=2), tmp_path / "run").folder.path
    cohort = RunFolder(folder).timeline()[1]["clients"]
    other = next(client for client in range(6) if client not in cohort)
    with pytest.raises(
        SettingError, match=f"--client is {other}, but round 2 had the clients {cohort[0]}, {cohort[1]}"
    ):
        replay(folder, 2, other)
    for number in (0, 3):
        with pytest.raises(SettingError, match=rf"--round is {number}, .* has rounds 1\.\.2"):
            replay(folder, number, 0)
    with pytest.raises(OutputError, match=r"no config\.yaml"):
        replay(tmp_path, 1, 0)
    central = run(small(method__name="centralised", rounds=1), tmp_path / "central").folder.path
    with pytest.raises(SettingError, match="trains no clients"):
        replay(central, 1, 0)
    assert main(["replay", str(folder), "--round", "1", "--client", "0", "--training.lr", "1"]) == 2
    assert "leave --training.lr out" in capsys.readouterr().err
    assert main(["run", "none.yaml", "--round", "1"]) == 2
    assert "Did you mean 'rounds'" in capsys.readouterr().err


def test_no_data_of_another_run(small: Small, tmp_path: Path) -> None:
    folder = run(small(rounds=1), tmp_path / "run").folder
    stored = json.loads((folder / "partition.json").read_text())
    (folder / "partition.json").write_text(json.dumps({**stored, "digest": "other"}))
    with pytest.raises(OutputError, match="not those of the run"):
        replay(folder.path, 1, 0)
