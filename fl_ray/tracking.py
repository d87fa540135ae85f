"""MLflow tracking: one writer thread per run, off the round's path."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData, digest
from fl_ray.recipes import flattened, to_dict
from fl_ray.tracking_store import prepare_store

__all__ = ["Tracker", "log_model"]

FLUSH_S = 2.0
FLUSH_ROWS = 50
_PARAM_LENGTH = 500


def log_model(module: torch.nn.Module, example: np.ndarray, registered_as: str | None) -> None:
    """Log a model into the thread's active run, exported by torch (no pickle); its input is normalised images.

    Args:
        example: float32 [N, C, H, W] with N > 1, so that the exported batch size stays free.
        registered_as: the model of the registry that it becomes a version of; None: of none.
    """
    import mlflow
    from mlflow.models import infer_signature

    module.eval()
    with torch.no_grad():
        answer = module(torch.from_numpy(example)).numpy()
    mlflow.pytorch.log_model(
        module,
        name="model",
        signature=infer_signature(example, answer),
        input_example=example,
        registered_model_name=registered_as,
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
    )


class Tracker:
    """One MLflow run. Everything is done by one thread, in order; ``finish`` waits for it.

    Args:
        uri: of the store.
        run_id: of a run to go on with; metrics up to the last step that it has are not logged again.
        tags: beside method, data and partition.
    """

    def __init__(
        self, config: RunConfig, uri: str, run_name: str, tags: Mapping[str, str], run_id: str | None = None
    ) -> None:
        import mlflow

        experiment = prepare_store(config, uri)
        client = mlflow.MlflowClient(uri)
        mlflow.set_tracking_uri(uri)
        self.error: str | None = None
        self._last_step = 0
        if run_id is None:
            common = {"method": config.method.name, "data": config.data.name, "partition": config.data.partition.name}
            common["seed"] = str(config.seed)
            self.run_id = client.create_run(experiment, run_name=run_name, tags={**common, **tags}).info.run_id
        else:
            self.run_id = run_id
            history = client.get_metric_history(run_id, "virtual_time_s")
            self._last_step = max((metric.step for metric in history), default=0)
        self._status = "FAILED"
        self._rows: list[dict[str, Any]] = []
        self._queue: queue.Queue[Callable[[], None] | dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        if run_id is None:
            resolved = {key: value for key, value in to_dict(config).items() if key != "compare"}
            params = {key: str(value)[:_PARAM_LENGTH] for key, value in flattened(resolved)}
            self._queue.put(lambda: mlflow.log_params(params))

    def round(self, row: Mapping[str, Any]) -> None:
        """Log a row of the history, at some later moment."""
        if row["round"] > self._last_step:
            self._queue.put({**row, "logged_at": time.time()})

    def inputs(self, data: FederatedData, name: str) -> None:
        """Log the three parts as data-set inputs: shapes and digests, not the images."""
        shape = data.images.shape[1:]
        parts = {
            "clients": (len(data.partition.owned()), data.partition.digest()),
            "public": (len(data.public), data.public_digest()[:12]),
            "test": (len(data.test_labels), digest(data.test_images, data.test_labels)[:12]),
        }

        def log() -> None:
            import mlflow

            for context, (count, part_digest) in parts.items():
                images = np.broadcast_to(np.uint8(0), (count, *shape))
                labels = np.broadcast_to(np.float64(0), (count,))
                mlflow.log_input(mlflow.data.from_numpy(images, None, labels, name, part_digest), context=context)

        self._queue.put(log)

    def finish(
        self, status: str, metrics: Mapping[str, float], files: list[Path], model: Callable[[], None] | None = None
    ) -> None:
        """Log the rest and wait until all is written.

        Args:
            status: MLflow's ``FINISHED``, ``KILLED`` or ``FAILED``.
            metrics: final values.
            files: artifacts.
            model: logs the model, given that this run is the active one.
        """
        import mlflow

        self._queue.put(lambda: mlflow.log_metrics(dict(metrics)))
        for file in files:
            self._queue.put(lambda file=file: mlflow.log_artifact(str(file)))
        if model is not None:
            self._queue.put(model)
        self._status = status
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        import mlflow

        self._safely(lambda: mlflow.start_run(run_id=self.run_id))  # active in this thread alone
        while True:
            try:
                item = self._queue.get(timeout=FLUSH_S)
            except queue.Empty:
                self._safely(self._log_rows)
                continue
            if isinstance(item, dict):
                self._rows.append(item)
                if len(self._rows) >= FLUSH_ROWS:
                    self._safely(self._log_rows)
                continue
            self._safely(self._log_rows)
            if item is None:
                self._safely(lambda: mlflow.end_run(self._status))
                return
            self._safely(item)

    def _log_rows(self) -> None:
        import mlflow
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), int(row["logged_at"] * 1000), row["round"])
            for row in self._rows
            for name, value in row.items()
            if name not in ("round", "logged_at") and np.isfinite(value)
        ]
        if metrics:
            mlflow.MlflowClient().log_batch(self.run_id, metrics=metrics)
        self._rows = []  # not before: rows that the store did not take are tried again

    def _safely(self, work: Callable[[], object]) -> None:
        """A store that fails must not take the run with it: the first error is kept, and told at the end."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - store plugins and torch.export raise anything; see ``error``
            self.error = self.error or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
