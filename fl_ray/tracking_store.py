"""The MLflow store that runs log into. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

__all__ = [
    "add_to_run",
    "default_store",
    "find_experiment",
    "is_missing_file",
    "prepare_store",
    "quiet_client",
    "tracking_uri",
]


def default_store() -> str:
    """The SQLite file mlflow.db in the working folder."""
    return f"sqlite:///{Path('mlflow.db').resolve()}"


def tracking_uri(config: RunConfig) -> str:
    """The store's address: ``tracking.uri``, else ``default_store``."""
    return config.tracking.uri or default_store()


def is_missing_file(uri: str) -> bool:
    """Whether it is an SQLite file that is not there: MLflow would make it."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def quiet_client(uri: str) -> MlflowClient:
    """MLflow's client of a store; it tells of no migrations, and gives up soon."""
    import logging

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's own 7 wait for minutes
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # not before: MLflow's import sets its own level
    return mlflow.MlflowClient(uri)


@contextmanager
def _usable(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if uri.startswith("http"):
            reason = "no server answers"
        elif isinstance(error, ImportError):
            reason += "; for PostgreSQL pip install psycopg2-binary and name it, as postgresql+psycopg2://..."
        raise SettingError(
            f"tracking.uri {uri}: the store can't be used ({reason}); start the server, give "
            "another --tracking.uri, or --tracking.enabled false"
        ) from error


def find_experiment(uri: str, name: str) -> tuple[MlflowClient, Experiment | None]:
    """A client of the store (made where it is an SQLite file that is not there), and the experiment, if it is there.

    Raises:
        SettingError: nothing answers at the address, or it can't be used.
    """
    with _usable(uri):
        client = quiet_client(uri)
        return client, client.get_experiment_by_name(name)


def prepare_store(config: RunConfig, uri: str | None = None) -> str:
    """Make the store and the experiment if they are not there (once, before runs start); the experiment's id.

    Raises:
        SettingError: nothing answers at ``tracking.uri``, or it can't be written.
    """
    uri, name = uri or tracking_uri(config), config.tracking.experiment or config.name
    client, found = find_experiment(uri, name)
    if found is None:
        with _usable(uri):
            return client.create_experiment(name)
    if found.lifecycle_stage != "active":
        raise SettingError(f"tracking.experiment {name!r} is deleted in {uri}; restore it or name another one")
    return found.experiment_id


def add_to_run(uri: str, run_id: str, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
    """Add metrics and files to a run that is over; its status and its times stay.

    Raises:
        SettingError: the store can't be used, or has no such run.
    """
    if is_missing_file(uri):
        raise SettingError(f"tracking.uri {uri}: there is no such file any more")
    with _usable(uri):
        client = quiet_client(uri)
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
        for file in files:
            client.log_artifact(run_id, str(file))
