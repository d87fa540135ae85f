"""The MLflow store that runs log into. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["default_store", "prepare_store", "quiet_client", "tracking_uri"]


def default_store() -> str:
    """The SQLite file mlflow.db in the working folder."""
    return f"sqlite:///{Path('mlflow.db').resolve()}"


def tracking_uri(config: RunConfig) -> str:
    """The store's address: ``tracking.uri``, else ``default_store``."""
    return config.tracking.uri or default_store()


def quiet_client(uri: str) -> MlflowClient:
    """MLflow's client of a store; it tells of no migrations, and gives up soon."""
    import logging

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's own 7 wait for minutes
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # not before: MLflow's import sets its own level
    return mlflow.MlflowClient(uri)


def prepare_store(config: RunConfig, uri: str | None = None) -> str:
    """Make the store and the experiment if they are not there (once, before runs start); the experiment's id.

    Raises:
        SettingError: nothing answers at ``tracking.uri``, or it can't be written.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri, name = uri or tracking_uri(config), config.tracking.experiment or config.name
    try:
        client = quiet_client(uri)
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise SettingError(f"tracking.experiment {name!r} is deleted in {uri}; restore it or name another one")
        return found.experiment_id if found is not None else client.create_experiment(name)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if uri.startswith("http"):
            reason = "no server answers"
        raise SettingError(
            f"tracking.uri {uri}: the store can't be used ({reason}); start the server, give "
            "another --tracking.uri, or --tracking.enabled false"
        ) from error
