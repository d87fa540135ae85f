"""Is the cost model right here? The same local training measured and modelled, for time and, with a sensor, energy.

The model (``fl_ray.devices.cost``) says that a round's computing takes T = tau c D / f and E = eps tau c D f^2: both in
proportion to the samples, whatever the batch. Measured are seconds and, where there is a sensor, joules of training D
samples, for several D, batch sizes and thread counts. Without a sensor there is no energy: nothing is estimated from a
nameplate. A counter holds all that the package or GPU does meanwhile: let nothing else run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError
from fl_ray.model import ImageShape, initial_weights
from fl_ray.progress import Progress
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.tasks import Job, JobData

__all__ = ["EnergyCheck", "Fit", "Point", "Sensor", "check_energy", "fit_proportional"]


@dataclass(frozen=True)
class Point:
    """One amount of work: the medians over its repeats; ``energy_j`` None: no sensor."""

    threads: int
    batch_size: int
    samples: int
    seconds: float
    energy_j: float | None


@dataclass(frozen=True)
class Fit:
    """value = per_sample * samples, fitted to a thread count's and batch size's points by relative least squares.

    Attributes:
        worst: the largest relative error of a point.
        constant: what a line with a constant would have at no samples, in parts of the mean value: 0 where the model
            is right.
    """

    per_sample: float
    worst: float
    constant: float


@dataclass(frozen=True)
class EnergyCheck:
    """All points, and a fit of time and energy for each (threads, batch size).

    Attributes:
        sensors: what measured energy; empty: nothing did.
        clock_hz: of the CPU as the system reports it; None: unknown. With it, cycles per sample are per_sample * clock.
    """

    points: list[Point]
    time: dict[tuple[int, int], Fit]
    energy: dict[tuple[int, int], Fit]
    sensors: list[str]
    clock_hz: float | None
    device: str

    def to_dict(self) -> dict[str, Any]:
        def rows(fits: dict[tuple[int, int], Fit]) -> list[dict[str, Any]]:
            return [{"threads": threads, "batch_size": batch, **asdict(fit)} for (threads, batch), fit in fits.items()]

        return {
            "device": self.device,
            "sensors": self.sensors,
            "clock_hz": self.clock_hz,
            "points": [asdict(point) for point in self.points],
            "time_fits": rows(self.time),
            "energy_fits": rows(self.energy),
        }


class Sensor:
    """The energy counters of this machine: NVIDIA's GPUs by NVML (``nvidia-ml-py``, the extra ``energy``), CPU packages
    by RAPL through Linux's powercap. What can't be read is not there.

    Attributes:
        names: of the counters.
    """

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._counters: dict[str, Callable[[], float]] = {}
        self._wraps: dict[str, float] = {}
        self._add_gpus()
        for zone in sorted(powercap.glob("intel-rapl:[0-9]")):  # packages; their parts are zones below them
            counter = zone / "energy_uj"
            if os.access(counter, os.R_OK):
                name = f"CPU {(zone / 'name').read_text(encoding='utf-8').strip()}"
                if not name.startswith("CPU package"):  # psys, the whole platform, has the packages in it
                    continue
                self._counters[name] = lambda path=counter: int(path.read_text(encoding="utf-8")) / 1e6
                self._wraps[name] = int((zone / "max_energy_range_uj").read_text(encoding="utf-8")) / 1e6
        self.names = list(self._counters)

    def _add_gpus(self) -> None:
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # not on all GPUs
                self._counters[f"GPU {index}"] = lambda handle=handle: (
                    pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
                )
        except pynvml.NVMLError:  # no driver, or a GPU without the counter
            return

    def measure(self, work: Callable[[], object]) -> tuple[float, float | None]:
        """Seconds and joules of a call; None: there is no counter."""
        before, begun = {name: read() for name, read in self._counters.items()}, time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        spent = {name: read() - before[name] for name, read in self._counters.items()}
        # A counter begins again at 0 when it is full.
        total = sum(value if value >= 0 else value + self._wraps.get(name, 0.0) for name, value in spent.items())
        return seconds, float(total) if self.names else None


def fit_proportional(samples: Sequence[float], values: Sequence[float]) -> Fit:
    """Least squares of relative errors: min over a of sum_i (a s_i / v_i - 1)^2."""
    s, v = np.asarray(samples, dtype=np.float64), np.asarray(values, dtype=np.float64)
    ratio = s / v
    slope = ratio.sum() / (ratio**2).sum()
    constant = float(np.polyfit(s, v, 1)[1] / v.mean()) if len(np.unique(s)) > 1 else 0.0
    return Fit(float(slope), float(np.abs(slope * ratio - 1).max()), constant)


def check_energy(
    config: RunConfig,
    threads: Sequence[int],
    batch_sizes: Sequence[int],
    samples: Sequence[int],
    repeats: int,
    progress: Progress,
) -> EnergyCheck:
    """Measure the recipe's local training, ``training.local_epochs`` over each amount, in turns over all settings.

    Raises:
        SettingError: an option is not positive, or there are fewer images than the largest amount.
    """
    for name, values in {"threads": threads, "batch_sizes": batch_sizes, "samples": samples}.items():
        if min(values) < 1:
            raise SettingError(f"--{name} {' '.join(map(str, values))}: each must be at least 1")
    if repeats < 1:
        raise SettingError(f"--repeats is {repeats}, but it must be at least 1")
    data = prepare(config.data, config.seed)
    owned = data.partition.owned()
    if max(samples) > len(owned):
        raise SettingError(f"--samples {max(samples)}: the recipe's clients have {len(owned)} images; lower it")
    shape = ImageShape.of(data.source)
    arrays = JobData.of(data)
    device = torch.device("cuda" if config.runtime.gpus_per_actor > 0 and torch.cuda.is_available() else "cpu")
    sensor, before = Sensor(), torch.get_num_threads()
    weights = initial_weights(config.model, shape, config.training, config.seed)
    hosts = {}
    for batch in batch_sizes:
        training = replace(config.training, batch_size=batch)
        job = Job(config.model, shape, training, config.seed, config.rounds, threads[0])
        hosts[batch] = ClientHost(job, arrays, device)
    taken: dict[tuple[int, int, int], list[tuple[float, float | None]]] = {}
    settings = [(count, batch, amount) for count in threads for batch in batch_sizes for amount in samples]
    try:
        for turn in range(-1, repeats):  # the first turn warms up
            for number, (count, batch, amount) in enumerate(settings, 1):
                torch.set_num_threads(count)
                rows = owned[:amount]
                images, labels = data.images[rows], data.labels[rows]
                found = sensor.measure(
                    lambda host=hosts[batch], x=images, y=labels: host.train_on(
                        x, y, weights, 0, config.training.local_epochs
                    )
                )
                if turn >= 0:
                    taken.setdefault((count, batch, amount), []).append(found)
                done = (turn + 1) * len(settings) + number
                progress.steps("measuring", done, (repeats + 1) * len(settings))
    finally:
        torch.set_num_threads(before)
    points = [_point(key, values) for key, values in taken.items()]
    fits, energies = {}, {}
    for key in dict.fromkeys((point.threads, point.batch_size) for point in points):
        own = [point for point in points if (point.threads, point.batch_size) == key]
        amounts = [point.samples for point in own]
        fits[key] = fit_proportional(amounts, [point.seconds for point in own])
        if all(point.energy_j for point in own):
            energies[key] = fit_proportional(amounts, [point.energy_j for point in own])
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return EnergyCheck(points, fits, energies, sensor.names, _clock_hz(), name)


def _point(key: tuple[int, int, int], values: list[tuple[float, float | None]]) -> Point:
    energies = [energy for _, energy in values if energy is not None]
    return Point(*key, float(np.median([s for s, _ in values])), float(np.median(energies)) if energies else None)


def _clock_hz() -> float | None:
    import psutil

    found = psutil.cpu_freq()
    return found.current * 1e6 if found is not None and found.current else None


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
