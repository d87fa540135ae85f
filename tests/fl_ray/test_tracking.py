"""MLflow: what a run leaves in a store, that its model loads and predicts, that resuming doubles nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.runtime.start import open_runtime
from fl_ray.tracking import Tracker
from fl_ray.tracking_store import prepare_store
from tests.fl_ray.test_runs import StopAfter

Run = Callable[..., tuple[Experiment, dict]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # artifacts lie beside the working folder's store
    return f"sqlite:///{tmp_path / 'store.db'}"


def test_a_run_is_tracked_whole(run_small: Run, store: str) -> None:
    own = {"enabled": True, "uri": store, "registered_model": "ours"}
    experiment, summary = run_small(tracking=own, name="tracked")
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("tracked").experiment_id])
    assert found.info.run_id == json.loads((experiment.folder / "tracking.json").read_text())["run_id"]
    assert found.info.status == "FINISHED"
    assert found.data.params["data.partition.alpha"] == "0.5"
    assert {found.data.tags[name] for name in ("method", "data", "partition")} == {"fedavg", "digits", "dirichlet"}
    assert found.data.tags["seed"] == "0"
    assert found.data.metrics["final_accuracy"] == pytest.approx(summary["final_accuracy"])
    history = client.get_metric_history(found.info.run_id, "test_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [
        (row["round"], pytest.approx(row["test_accuracy"])) for row in experiment.folder.history()
    ]
    contexts = {tag.value for entry in found.inputs.dataset_inputs for tag in entry.tags}
    assert contexts == {"clients", "public", "test"}
    names = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"report.html", "summary.json", "config.yaml", "accuracy.svg", "model.safetensors"} <= names
    assert len(client.search_logged_models([found.info.experiment_id])) == 1
    (version,) = client.search_model_versions("name = 'ours'")
    assert version.run_id == found.info.run_id
    mlflow.set_tracking_uri(store)
    model = mlflow.pyfunc.load_model("models:/ours/1")
    assert model.metadata.signature is not None
    assert np.asarray(model.predict(np.zeros((5, 1, 8, 8), dtype=np.float32))).shape == (5, 10)


def test_a_resumed_run_is_one_run_without_doubled_steps(
    small: Callable[..., RunConfig], store: str, tmp_path: Path
) -> None:
    config = small(tracking__enabled=True, tracking__uri=store, rounds=4, checkpoint__every=2)
    folder = tmp_path / "cut"
    folder.mkdir()
    with open_runtime(config) as runtime:
        with pytest.raises(KeyboardInterrupt):
            Experiment(config, folder, runtime, StopAfter(3)).run()
        client = mlflow.MlflowClient(store)
        assert client.get_run(json.loads((folder / "tracking.json").read_text())["run_id"]).info.status == "KILLED"
        Experiment(config, folder, runtime, resume=True).run()
    (found,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert found.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "energy_j")] == [1, 2, 3, 4]


@pytest.mark.parametrize("uri", ["sqlite:////proc/no/store.db", "http://127.0.0.1:9", "nonsense://x", "mysql:foo"])
def test_a_store_that_can_not_be_used_is_named(small: Callable[..., RunConfig], uri: str) -> None:
    config = small(tracking__enabled=True, tracking__uri=uri)
    with pytest.raises(SettingError, match=r"tracking.uri.*--tracking.enabled false"):
        prepare_store(config)


def test_a_store_that_fails_later_does_not_take_the_run_with_it(
    run_small: Run, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Tracker) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Tracker, "_log_rows", full)
    experiment, summary = run_small(tracking__enabled=True, tracking__uri=store)
    assert summary["status"] == "finished"
    assert "disk full" in experiment.tracker.error
    assert mlflow.MlflowClient(store).get_run(experiment.tracker.run_id).info.status == "FINISHED"


def test_a_refused_run_is_not_left_running(run_small: Run, store: str) -> None:
    """public_only finds out in its setup, when tracking has begun, that there are no public images."""
    with pytest.raises(SettingError, match="public_fraction is 0"):
        run_small(tracking__enabled=True, tracking__uri=store, method__name="public_only", data__public_fraction=0.0)
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert found.info.status == "FAILED"


def test_a_model_that_can_not_be_exported_ends_its_run_all_the_same(
    run_small: Run, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexportable(*arguments: object) -> None:
        raise TypeError("no export")

    monkeypatch.setattr("fl_ray.tracking.log_model", unexportable)
    experiment, _ = run_small(tracking__enabled=True, tracking__uri=store)
    assert experiment.tracker.error == "TypeError: no export"
    assert mlflow.MlflowClient(store).get_run(experiment.tracker.run_id).info.status == "FINISHED"
