"""Opening the store of trained models that a recipe names."""

from __future__ import annotations

from collections.abc import Callable

from fl_ray.config import RunConfig
from fl_ray.model_store.base import ModelStore
from fl_ray.tracking_store import tracking_uri

__all__ = ["open_store", "reach_store"]

_reached: set[tuple[str, str]] = set()


def open_store(config: RunConfig, tell: Callable[[str], None] = lambda text: None) -> ModelStore | None:
    """The store of ``model_store``; None where the recipe has none.

    Raises:
        OutputError: the address's protocol is unknown or not installed.
    """
    if config.model_store is None:
        return None
    if config.model_store == "mlflow":
        from fl_ray.model_store.registry import RegistryStore

        return RegistryStore(config.model_store, tracking_uri(config), tell)
    from fl_ray.model_store.files import FileStore

    return FileStore(config.model_store.rstrip("/"), tell)


def reach_store(config: RunConfig) -> None:
    """See, once in a process, that the store answers and can be written: before hours of training, not after.

    Raises:
        OutputError: it does not.
    """
    store = open_store(config)
    which = str(config.model_store), tracking_uri(config)
    if store is not None and which not in _reached:
        store.reach()
        _reached.add(which)
