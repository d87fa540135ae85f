"""The cost model: latency and energy of a client's round (Yang et al., arXiv 1911.02417), and the ledger of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from fl_ray.config import FleetConfig
from fl_ray.devices.fleet import Fleet, noise_w_hz

__all__ = ["Ledger", "RoundCost", "round_cost", "server_time_s", "shannon_rate"]


@dataclass(frozen=True)
class RoundCost:
    """Each cohort member's latencies [s] and energies [J], arrays [cohort]."""

    t_down_s: np.ndarray
    t_cmp_s: np.ndarray
    t_up_s: np.ndarray
    e_cmp_j: np.ndarray
    e_up_j: np.ndarray

    @property
    def latency_s(self) -> np.ndarray:
        """Down-link, computing and uplink, one after another."""
        return self.t_down_s + self.t_cmp_s + self.t_up_s

    @property
    def energy_j(self) -> float:
        """Energy of all devices; receiving costs none in this model."""
        return float(self.e_cmp_j.sum() + self.e_up_j.sum())


def shannon_rate(bandwidth_hz: np.ndarray, power_w: np.ndarray, gain: np.ndarray, noise_w_hz: float) -> np.ndarray:
    """r = b log2(1 + p h / (N0 b)), bit/s."""
    return bandwidth_hz * np.log2(1 + power_w * gain / (noise_w_hz * bandwidth_hz))


def round_cost(
    config: FleetConfig,
    fleet: Fleet,
    cohort: np.ndarray,
    samples: np.ndarray,
    epochs: int,
    down_bytes: float | np.ndarray,
    up_bytes: float | np.ndarray,
    total_share: float | None = None,
) -> RoundCost:
    """What a round costs its cohort.

    Args:
        cohort: client numbers [cohort]; the band is split over them by their tiers' bandwidth shares (FDMA), for the
            down-link as for the uplink.
        samples: training samples of each, [cohort].
        epochs: local epochs (tau).
        down_bytes: to each client: weights, and synthetic data where a method delivers them.
        up_bytes: from each client.
        total_share: the sum of bandwidth shares that the band is split over; default: the cohort's.
    """
    share = fleet.bandwidth_share[cohort] / (
        fleet.bandwidth_share[cohort].sum() if total_share is None else total_share
    )
    band = config.bandwidth_hz * share
    noise = noise_w_hz(config)
    gain, power, frequency = fleet.gain[cohort], fleet.power_w[cohort], fleet.frequency_hz[cohort]
    cycles = epochs * fleet.cycles_per_sample[cohort] * samples
    rate_up = shannon_rate(band, power, gain, noise)
    # The base station splits its power like the band.
    down = share if fleet.down_share is None else fleet.down_share[cohort] / fleet.down_share[cohort].sum()
    rate_down = shannon_rate(config.bandwidth_hz * down, config.server_power_w * down, gain, noise)
    if fleet.rate_bps is not None:
        measured = fleet.rate_bps[cohort]
        rate_up, rate_down = (np.where(np.isnan(measured), rate, measured) for rate in (rate_up, rate_down))
    t_up, t_down = 8 * up_bytes / rate_up, 8 * down_bytes / rate_down
    return RoundCost(
        t_down_s=t_down * np.ones(len(cohort)),
        t_cmp_s=cycles / frequency,
        t_up_s=t_up * np.ones(len(cohort)),
        e_cmp_j=fleet.capacitance[cohort] * cycles * frequency**2,
        e_up_j=power * t_up,
    )


def server_time_s(config: FleetConfig, fleet: Fleet, samples: int) -> float:
    """Seconds of the server's training on ``samples`` (times epochs), at the fleet's mean cycles per sample."""
    return float(fleet.cycles_per_sample.mean()) * samples / config.server_frequency_hz


@dataclass
class Ledger:
    """The virtual clock and what has been spent so far. A synchronous round ends with its slowest part."""

    virtual_time_s: float = 0.0
    energy_j: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    samples_trained: int = 0
    """Samples times epochs, of clients and server."""

    def advance(self, to_s: float, energy_j: float = 0.0, bytes_up: int = 0, bytes_down: int = 0) -> None:
        """Move the clock to ``to_s`` (never back), and add what was spent on the way."""
        self.virtual_time_s = max(self.virtual_time_s, to_s)
        self.energy_j += energy_j
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down

    def state(self) -> dict[str, float]:
        """For a checkpoint; ``Ledger(**state)`` takes it back."""
        return asdict(self)
