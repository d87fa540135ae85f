"""Errors: one root, few leaves. Each message names the setting, its value and the way out."""

__all__ = [
    "DataMissingError",
    "FlRayError",
    "InfeasibleError",
    "LostActorsError",
    "OutputError",
    "PlacementError",
    "SettingError",
    "TooFewClientsError",
    "require",
]


class FlRayError(Exception):
    """Root of all errors that fl_ray raises on purpose; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class SettingError(FlRayError, ValueError):
    """A setting of the recipe or the command line can't be used."""

    exit_code = 2


class DataMissingError(FlRayError, FileNotFoundError):
    """A data set's files are not where they were looked for."""

    exit_code = 2


class InfeasibleError(FlRayError, ValueError):
    """The limits of ``allocation`` leave no plan."""

    exit_code = 2


class OutputError(FlRayError, OSError):
    """The output folder is in use, or can't be written."""

    exit_code = 2


class PlacementError(FlRayError, RuntimeError):
    """Ray can't place what the run asks for."""

    exit_code = 2


class TooFewClientsError(FlRayError, RuntimeError):
    """Fewer updates came in than the method needs, or, twice, than ``runtime.min_clients``."""


class LostActorsError(FlRayError, RuntimeError):
    """Actors died again and again on the same work."""


def require(condition: bool, setting: str, value: object, need: str) -> None:
    """Refuse a setting's value that is not as it must be."""
    if not condition:
        raise SettingError(f"{setting} is {value}, but it must be {need}")
