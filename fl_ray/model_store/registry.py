"""A store of trained models in MLflow's registry: a registered model for each kind, a version for each key.

The files are artifacts of a run of its own, in an experiment of its own; the version comes last.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_ray.errors import SettingError
from fl_ray.model_store.base import KINDS, MANIFEST, ModelStore, NotAsPublishedError, Published
from fl_ray.storage import as_output_error
from fl_ray.tracking_store import quiet_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["EXPERIMENT", "RegistryStore"]

EXPERIMENT = "fl_ray-model-store"
_FILES, _KEY = "files", "fl_ray_key"


class RegistryStore(ModelStore):
    """See ``ModelStore``.

    Args:
        uri: of the tracking store, whose registry it is.
    """

    def __init__(self, address: str, uri: str, tell: Callable[[str], None]) -> None:
        super().__init__(f"{address} ({uri})", tell)
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with as_output_error(f"model_store {self.address}"):
            self._client = quiet_client(uri)

    def reach(self) -> None:
        from mlflow.exceptions import MlflowException

        with as_output_error(f"model_store {self.address}", "start the server, or give another tracking.uri"):
            self._experiment()
            for kind in KINDS:
                try:
                    self._client.create_registered_model(_model(kind))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return self._client.create_experiment(EXPERIMENT)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was faster
                    raise
                found = self._client.get_experiment_by_name(EXPERIMENT)
        if found.lifecycle_stage != "active":
            raise SettingError(f"model_store {self.address}: its experiment {EXPERIMENT} is deleted; restore it")
        return found.experiment_id

    def _versions(self, kind: str, key: str) -> list[ModelVersion]:
        asked = f"name = '{_model(kind)}' and tags.{_KEY} = '{key}'"
        return sorted(self._client.search_model_versions(asked), key=lambda version: -int(version.version))

    def _has(self, kind: str, key: str) -> bool:
        return bool(self._versions(kind, key))

    def _published(self, kind: str, key: str) -> Iterator[Published]:
        for version in self._versions(kind, key):
            yield _Version(self._client, version.run_id)

    def _put(self, kind: str, key: str, folder: Path, files: Mapping[str, str], manifest: bytes) -> None:
        run = self._client.create_run(self._experiment(), run_name=f"{kind}/{key}", tags={_KEY: key}).info.run_id
        self._client.log_artifacts(run, str(folder), _FILES)
        with tempfile.TemporaryDirectory() as beside:
            written = Path(beside) / MANIFEST
            written.write_bytes(manifest)
            self._client.log_artifact(run, str(written))
        self._client.update_run(run, "FINISHED")
        tags = {_KEY: key}
        self._client.create_model_version(_model(kind), f"runs:/{run}/{_FILES}", run, tags, await_creation_for=0)


def _model(kind: str) -> str:
    return f"fl_ray-{kind}"


@dataclass(frozen=True)
class _Version(Published):
    client: MlflowClient
    run: str

    def manifest(self) -> bytes:
        with tempfile.TemporaryDirectory() as beside:
            return self._artifact(MANIFEST, Path(beside)).read_bytes()

    def get(self, name: str, sha256: str, to: Path) -> None:
        with tempfile.TemporaryDirectory(dir=to.parent) as beside:
            self._artifact(f"{_FILES}/{name}", Path(beside)).replace(to)

    def _artifact(self, name: str, folder: Path) -> Path:
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(self.run, name, str(folder)))
        except MlflowException as error:
            raise NotAsPublishedError(f"{name} is missing, or can't be had") from error
