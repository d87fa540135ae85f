"""Device traces in the format of FedScale (Lai et al., arXiv 2105.11367): capacities, and times of availability.

Both files map a device's name to its values, as a pickle (FedScale's) or as JSON (suffix .json):

- capacities: {"computation": ms per sample of inference, "communication": kbit/s};
- availability: {"active": [s, ...], "inactive": [s, ...], "finish_time": s, ...}: a device is there at t while
  active[k] <= t mod finish_time < inactive[k] for some k (FedScale counts the last instant in). Pairs that are never
  open are passed over, and the end of the period closes all.

Nothing in a pickle is called: whatever is not a plain container, number or text is refused.
"""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.devices.availability import Availability
from fl_ray.errors import SettingError

__all__ = ["assign", "read_availability", "read_capacity"]

_DAMAGES = (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError)


class _PlainUnpickler(pickle.Unpickler):
    """Only containers, numbers and text: every global is refused, so nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise SettingError(
            f"it holds {module}.{name}, but only plain numbers, text, lists and mappings are read from a pickle; "
            "write it as JSON"
        )


def _read(setting: str, path: str) -> dict[Any, dict[str, Any]]:
    label, file = f"{setting} {path}", Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            content = json.load(stream) if file.suffix == ".json" else _PlainUnpickler(stream).load()
    except OSError as error:
        raise SettingError(f"{label}: {error.strerror}; give a file in FedScale's format") from error
    except SettingError as error:
        raise SettingError(f"{label}: {error}") from error
    except _DAMAGES as error:
        kind = "JSON" if file.suffix == ".json" else "a pickle"
        raise SettingError(f"{label} is not {kind} ({error}); give FedScale's pickle, or JSON as *.json") from error
    if not isinstance(content, dict):
        raise SettingError(f"{label} holds {type(content).__name__}, but it must be a mapping by device")
    if not content:
        raise SettingError(f"{label} holds no devices; give a file with at least one")
    for device, values in content.items():
        if not isinstance(values, dict):
            raise SettingError(f"{label}: device {device!r} is {values!r}, but it must be a mapping")
    return content


def _value(label: str, device: Any, values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise SettingError(
            f"{label}: device {device!r} has no {key!r}; it has {', '.join(map(str, values)) or 'nothing'}"
        )
    return values[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(label: str, device: Any, values: dict[str, Any], key: str) -> float:
    value = _value(label, device, values, key)
    if not (_is_number(value) and value > 0):
        raise SettingError(f"{label}: {key} of device {device!r} is {value!r}, but it must be a positive number")
    return float(value)


def read_capacity(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per sample of inference, and link rate in bit/s, both [devices].

    Raises:
        SettingError: the file can't be read, holds more than plain values, or a device's are missing or not positive.
    """
    setting = "fleet.trace.capacity"
    label, content = f"{setting} {path}", _read(setting, path)
    seconds = [_positive(label, device, values, "computation") / 1000 for device, values in content.items()]
    rates = [_positive(label, device, values, "communication") * 1000 for device, values in content.items()]
    return np.array(seconds), np.array(rates)


def read_availability(path: str) -> Availability:
    """The windows of all devices.

    Raises:
        SettingError: the file can't be read, holds more than plain values, or a device's are missing or no times.
    """
    setting = "fleet.trace.availability"
    label, content = f"{setting} {path}", _read(setting, path)
    windows, periods = [], []
    for device, values in content.items():
        period = _positive(label, device, values, "finish_time")
        times = {key: _times(label, device, values, key) for key in ("active", "inactive")}
        if len(times["active"]) != len(times["inactive"]):
            raise SettingError(
                f"{label}: device {device!r} has {len(times['active'])} times in active, but "
                f"{len(times['inactive'])} in inactive; they must be pairs"
            )
        pairs = zip(times["active"], times["inactive"], strict=True)
        windows.append([(start, min(end, period)) for start, end in pairs])
        periods.append(period)
    return Availability.from_windows(windows, np.array(periods))


def _times(label: str, device: Any, values: dict[str, Any], key: str) -> list[float]:
    times = _value(label, device, values, key)
    if not isinstance(times, (list, tuple)) or not all(_is_number(time) and time >= 0 for time in times):
        raise SettingError(
            f"{label}: {key} of device {device!r} is {times!r}, but it must be a list of seconds from 0 on"
        )
    return [float(time) for time in times]


def assign(devices: int, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Which device each client is: different ones while there are enough, else with replacement."""
    if devices >= clients:
        return rng.permutation(devices)[:clients]
    return rng.integers(devices, size=clients)
