"""Typed settings of a run. ``fl_ray.recipes`` makes them from YAML; here stands what they are and what they allow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fl_ray.allocation.settings import AllocationConfig
from fl_ray.errors import require

__all__ = [
    "AvailabilityConfig",
    "CheckpointConfig",
    "ClockConfig",
    "Component",
    "DataConfig",
    "FleetConfig",
    "GeneratorConfig",
    "PoolConfig",
    "RayConfig",
    "RunConfig",
    "RuntimeConfig",
    "StoppingConfig",
    "TierConfig",
    "TraceConfig",
    "TrackingConfig",
    "TrainingConfig",
]

Range = float | list[float]


@dataclass
class Component:
    """A named part (method, model, data set, partitioner, generator) with the settings its constructor takes."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """``data``: the set, its split into client, public and test parts, and how the client part is spread."""

    name: str = "digits"
    root: str | None = None
    """Folder of the files; default $FL_RAY_DATA, else the cache folder."""
    download: bool = False
    clients: int = 10
    split_seed: int = 0
    """Fixes the client, public and test parts; independent of ``seed``, so that one generator serves all seeds."""
    public_fraction: float = 0.1
    """Share of the training images that the server may use (generator, public_only)."""
    public_domains: list[str] | None = None
    """Domains that the public images come from (``public_fraction`` is then a share of theirs); default: all."""
    reserve_fraction: float = 0.0
    """Share of the training images that nobody trains on: what the control ``generator.name: real`` gives out."""
    test_fraction: float = 0.2
    """Share kept for testing, for sets that come without a test part."""
    client_test_fraction: float = 0.0
    """Share of each client's images kept for testing on that client."""
    max_samples: int | None = None
    """Use at most so many of the training images (drawn by ``split_seed``), for small machines."""
    classes: list[int] | int | None = None
    """Use these classes alone (by label, renumbered in this order), or the first so many; default: all."""
    settings: dict[str, Any] = field(default_factory=dict)
    partition: Component = field(default_factory=lambda: Component("iid"))

    def __post_init__(self) -> None:
        require(self.clients >= 1, "data.clients", self.clients, "at least 1")
        require(self.split_seed >= 0, "data.split_seed", self.split_seed, "at least 0")
        for name in ("public_fraction", "reserve_fraction", "test_fraction", "client_test_fraction"):
            require(0 <= getattr(self, name) < 1, f"data.{name}", getattr(self, name), "in [0, 1)")
        taken = self.public_fraction + self.reserve_fraction
        require(taken < 1, "data.public_fraction + data.reserve_fraction", f"{taken:g}", "below 1")
        require(self.max_samples is None or self.max_samples > 0, "data.max_samples", self.max_samples, "positive")
        if self.classes is not None:
            kept = range(self.classes) if isinstance(self.classes, int) else self.classes
            good = len(kept) >= 2 and min(kept) >= 0 and len(set(kept)) == len(kept)
            require(good, "data.classes", self.classes, "at least 2, or a list of at least two different labels")


@dataclass
class TrainingConfig:
    """``training``: what a client does in one round. A LightningModule of your own keeps its own optimiser."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    local_epochs: int = 1
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"
    """Over rounds: ``cosine`` falls from 1 towards 0, ``step`` multiplies by lr_gamma every lr_step_rounds."""
    lr_step_rounds: int = 10
    lr_gamma: float = 0.5
    clip_norm: float | None = None
    """Largest norm of a batch's gradient; larger ones are scaled down to it."""
    sample_fraction: float = 1.0
    """A client trains on this share of its images in a round, drawn anew each time."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "training.lr", self.lr, "positive")
        require(self.momentum >= 0, "training.momentum", self.momentum, "at least 0")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "at least 0")
        require(self.batch_size >= 1, "training.batch_size", self.batch_size, "at least 1")
        require(self.local_epochs >= 1, "training.local_epochs", self.local_epochs, "at least 1")
        require(self.lr_step_rounds >= 1, "training.lr_step_rounds", self.lr_step_rounds, "at least 1")
        require(self.lr_gamma > 0, "training.lr_gamma", self.lr_gamma, "positive")
        require(self.clip_norm is None or self.clip_norm > 0, "training.clip_norm", self.clip_norm, "positive")
        require(0 < self.sample_fraction <= 1, "training.sample_fraction", self.sample_fraction, "in (0, 1]")

    def samples_of(self, sizes: np.ndarray) -> np.ndarray:
        """How many images clients that own ``sizes`` of them train on in an epoch; at least 1 where there is one."""
        if self.sample_fraction == 1.0:
            return sizes
        return np.maximum((self.sample_fraction * sizes).astype(np.int64), np.minimum(sizes, 1))


@dataclass
class TierConfig:
    """One kind of device. A number is the same for all its devices; a pair [low, high] is drawn from uniformly.

    Defaults are the cell of FIMI's setting (our reconstruction, docs of ``fl_ray.devices``).
    """

    name: str = "device"
    fraction: float = 1.0
    """Relative share of the clients that are of this tier."""
    cpus: float = 1.0
    """Ray CPUs of an actor's bundle."""
    bandwidth: float = 1.0
    """Units of Ray's custom resource ``bandwidth`` in a bundle, and the share of the band in the cost model."""
    frequency_hz: Range = field(default_factory=lambda: [0.3e9, 2.0e9])
    cycles_per_sample: Range = field(default_factory=lambda: [4e6, 1.2e7])
    capacitance: Range = 2e-28
    """Effective switched capacitance, J s^2 / cycle^3."""
    power_w: Range = 0.2
    distance_m: Range = field(default_factory=lambda: [50.0, 500.0])
    """From the base station; a pair is drawn uniformly in area."""
    shadowing_db: float = 8.0
    """Standard deviation of the log-normal shadowing."""

    def __post_init__(self) -> None:
        for name in ("fraction", "cpus", "bandwidth"):
            require(getattr(self, name) > 0, f"fleet.tiers.{self.name}.{name}", getattr(self, name), "positive")
        require(self.shadowing_db >= 0, f"fleet.tiers.{self.name}.shadowing_db", self.shadowing_db, "at least 0")
        for name in ("frequency_hz", "cycles_per_sample", "capacitance", "power_w", "distance_m"):
            value = getattr(self, name)
            pair = value if isinstance(value, list) else [value, value]
            good = len(pair) == 2 and 0 < pair[0] <= pair[1]
            require(good, f"fleet.tiers.{self.name}.{name}", value, "a positive number or a pair [low, high]")


@dataclass
class AvailabilityConfig:
    """``fleet.availability``: every device can take part for a part of each period, from a moment of its own on."""

    period_s: float = 86400.0
    fraction: float = 0.5

    def __post_init__(self) -> None:
        require(self.period_s > 0, "fleet.availability.period_s", self.period_s, "positive")
        require(0 < self.fraction <= 1, "fleet.availability.fraction", self.fraction, "in (0, 1]")


@dataclass
class TraceConfig:
    """``fleet.trace``: devices as FedScale's files describe them; what they don't say comes from the tiers."""

    capacity: str | None = None
    """File of device capacities: milliseconds per sample and kbit/s of each device."""
    availability: str | None = None
    """File of the times at which devices are available."""
    training_factor: float = 3.0
    """Training takes so many times the capacity file's time per sample, which is that of inference (FedScale's 3)."""

    def __post_init__(self) -> None:
        some = self.capacity is not None or self.availability is not None
        require(some, "fleet.trace", "empty", "a mapping with capacity, availability or both")
        require(self.training_factor > 0, "fleet.trace.training_factor", self.training_factor, "positive")


@dataclass
class FleetConfig:
    """``fleet``: the devices and the cell they share."""

    tiers: list[TierConfig] = field(default_factory=lambda: [TierConfig()])
    bandwidth_hz: float = 20e6
    """The band B, split over the clients of a round by their tiers' ``bandwidth``."""
    noise_dbm_hz: float = -174.0
    server_power_w: float = 1.0
    """Transmit power of the base station, for the down-link."""
    server_frequency_hz: float = 1e11
    """Cycles per second of the server, for the time of its own training; ``cycles_per_sample`` is its tiers' mean."""
    dropout: float = 0.0
    """Probability that a client of a round drops out before it is done (emulated; its energy so far is spent)."""
    availability: AvailabilityConfig | None = None
    trace: TraceConfig | None = None

    def __post_init__(self) -> None:
        require(len(self.tiers) > 0, "fleet.tiers", self.tiers, "a list of at least one tier")
        names = [tier.name for tier in self.tiers]
        require(len(set(names)) == len(names), "fleet.tiers", names, "named differently each")
        for name in ("bandwidth_hz", "server_power_w", "server_frequency_hz"):
            require(getattr(self, name) > 0, f"fleet.{name}", getattr(self, name), "positive")
        require(0 <= self.dropout < 1, "fleet.dropout", self.dropout, "in [0, 1)")
        traced = self.trace is not None and self.trace.availability is not None
        require(
            not (traced and self.availability is not None), "fleet.availability", "given", "left out beside a trace's"
        )


@dataclass
class RuntimeConfig:
    """``runtime``: how clients run. ``threads``, ``gpus_per_actor`` and ``training_path`` change a result's last bits;
    of the others, only ``min_clients`` can change a result."""

    backend: Literal["ray", "in_process"] = "ray"
    actors: Literal["per_client", "pooled", "auto"] = "auto"
    """``per_client``: one actor each; ``pooled``: actors that host clients of one tier; ``auto``: what fits."""
    num_actors: int | None = None
    """Pooled actors over all tiers; default: as many as the cluster has room for."""
    threads: int = 1
    """Torch threads of each actor (also of the in-process backend)."""
    gpus_per_actor: float = 0.0
    """Of each client actor, and of the server's; fractions share a GPU."""
    placement_timeout_s: float = 25.0
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How the actors' bundles are spread over the nodes of a cluster."""
    training_path: Literal["plain", "batched", "auto"] = "auto"
    """``batched`` trains an actor's clients as one program (small models without random layers); ``auto`` tries both
    before the first round. The run's config.yaml says which it was."""
    min_clients: int = 1
    """With fewer updates a round is repeated once, and then the run stops."""
    emulate: Literal["virtual", "realtime"] = "virtual"
    """``realtime``: clients take their modelled latency in wall time, too, multiplied by time_scale."""
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.threads >= 1, "runtime.threads", self.threads, "at least 1")
        whole = self.gpus_per_actor <= 1 or self.gpus_per_actor == int(self.gpus_per_actor)
        must = "at least 0, and whole where above 1"
        require(self.gpus_per_actor >= 0 and whole, "runtime.gpus_per_actor", self.gpus_per_actor, must)
        require(self.num_actors is None or self.num_actors >= 1, "runtime.num_actors", self.num_actors, "at least 1")
        require(self.placement_timeout_s > 0, "runtime.placement_timeout_s", self.placement_timeout_s, "positive")
        require(self.min_clients >= 1, "runtime.min_clients", self.min_clients, "at least 1")
        require(self.time_scale > 0, "runtime.time_scale", self.time_scale, "positive")


@dataclass
class RayConfig:
    """``ray``: start Ray here (``address`` null) or join a cluster (``auto`` or ``ray://...``)."""

    address: str | None = None
    num_cpus: int | None = None
    """Logical CPUs of a Ray started here; default: the machine's cores."""
    bandwidth: float = 100.0
    """Units of the custom resource ``bandwidth`` of a Ray started here."""


@dataclass
class PoolConfig:
    """``generator.pool``: the generator actors. They idle while clients train, so by default they reserve no CPU.

    ``gpus`` is of each; fractions share a GPU.
    """

    actors: int = 2
    cpus: float = 0.0
    gpus: float = 0.0
    timeout_s: float = 90.0
    """For Ray to start them."""

    def __post_init__(self) -> None:
        require(self.actors >= 1, "generator.pool.actors", self.actors, "at least 1")
        require(self.cpus >= 0, "generator.pool.cpus", self.cpus, "at least 0")
        whole = self.gpus <= 1 or self.gpus == int(self.gpus)
        require(self.gpus >= 0 and whole, "generator.pool.gpus", self.gpus, "at least 0, and whole where above 1")


@dataclass
class GeneratorConfig:
    """``generator``: which, its settings, where its weights and images are kept, and the pool that samples it.

    One-shot methods (``fedlmg``, ``feddf``, ``dense``, ``ensemble``) keep what their clients have trained in the same
    cache: a run that would train the same finds it there, and its summary.json says so.
    """

    name: str = "diffusion"
    cache: str | None = None
    """Folder; default $FL_RAY_CACHE, else ~/.cache/fl_ray."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrackingConfig:
    """``tracking``: MLflow. ``uri`` defaults to the SQLite file mlflow.db in the working folder."""

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    """Default: the recipe's name."""
    registered_model: str | None = None
    """The final model becomes a version of this one in MLflow's registry; default: it is kept with its run alone."""


@dataclass
class CheckpointConfig:
    """``checkpoint``: every so many rounds (0: never), and after every step of what a method does before them.

    The last two are kept until the run is finished, then none.
    """

    every: int = 10

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "at least 0")


@dataclass
class ClockConfig:
    """``clock``: when a round ends, on the virtual clock.

    ``synchronous``: with its last client. ``deadline``: after ``deadline_s`` at the latest; who is late is left out, or
    waited for and weighted down by deadline / latency. ``asynchronous``: FedBuff (arXiv 2106.06639): ``concurrency``
    clients train at any time, and a round is the arrival of ``buffer_size`` updates, each multiplied by
    (1 + staleness)^-staleness_exponent. What clients that are still training at the end have spent is not booked.
    """

    mode: Literal["synchronous", "deadline", "asynchronous"] = "synchronous"
    deadline_s: float | None = None
    late: Literal["leave_out", "weight_down"] = "leave_out"
    concurrency: int | None = None
    """Default: the cohort's size."""
    buffer_size: int = 10
    staleness_exponent: float = 0.5

    def __post_init__(self) -> None:
        require(self.deadline_s is None or self.deadline_s > 0, "clock.deadline_s", self.deadline_s, "positive")
        needs = (self.mode == "deadline") == (self.deadline_s is not None)
        way = (
            "seconds, since clock.mode is deadline" if self.mode == "deadline" else "left out, or clock.mode: deadline"
        )
        require(needs, "clock.deadline_s", self.deadline_s, way)
        for name in ("concurrency", "buffer_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"clock.{name}", value, "at least 1")
        require(self.staleness_exponent >= 0, "clock.staleness_exponent", self.staleness_exponent, "at least 0")


@dataclass
class StoppingConfig:
    """``early_stopping``: the run ends when the test accuracy has not risen for so many evaluations (0: never)."""

    patience: int = 0
    min_delta: float = 0.0
    """Only a rise of more counts."""

    def __post_init__(self) -> None:
        require(self.patience >= 0, "early_stopping.patience", self.patience, "at least 0")
        require(self.min_delta >= 0, "early_stopping.min_delta", self.min_delta, "at least 0")


@dataclass
class RunConfig:
    """A whole recipe, resolved."""

    name: str = "run"
    data: DataConfig = field(default_factory=DataConfig)
    model: Component = field(default_factory=lambda: Component("mlp"))
    method: Component = field(default_factory=lambda: Component("fedavg"))
    generator: GeneratorConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    rounds: int = 10
    clients_per_round: int | None = None
    """Size of the cohort; default: all clients."""
    sampling: Component = field(default_factory=lambda: Component("uniform"))
    updates: list[Component] = field(default_factory=list)
    """Post-processors of every client's update, in order."""
    clock: ClockConfig = field(default_factory=ClockConfig)
    early_stopping: StoppingConfig = field(default_factory=StoppingConfig)
    evaluate_every: int = 1
    """Evaluate after every so many rounds, and after the last."""
    evaluate_clients_every: int = 0
    """Test every client on its own held-out images (data.client_test_fraction) after so many rounds; 0: at the end."""
    gradient_cosine_every: int = 0
    """Compare the clients' gradients with that on IID data after so many rounds; 0: never."""
    seed: int = 0
    model_store: str | None = None
    """Where machines share trained generators and one-shot clients: an fsspec address as ``s3://bucket/models``, or
    ``mlflow``, the registry of ``tracking.uri``. What the cache lacks is looked for there before it is trained, and is
    put there afterwards, as safetensors and JSON with their hashes."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    compare: list[dict[str, Any]] = field(default_factory=list)
    """Labelled overrides that ``fl-ray compare`` runs beside each other."""
    targets: list[float] = field(default_factory=list)
    """Accuracies in (0, 1]: the summary says at which round, virtual time and energy each was reached."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, "at least 1")
        for name in ("evaluate_clients_every", "gradient_cosine_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        asked = self.clock.buffer_size if self.clock.mode == "asynchronous" else self.cohort_size
        least = self.runtime.min_clients
        require(least <= asked, "runtime.min_clients", least, f"at most {asked}, the updates that a round can bring")
        paced = self.runtime.emulate == "realtime" and self.clock.mode == "asynchronous"
        require(not paced, "runtime.emulate", "realtime", "virtual with clock.mode asynchronous")
        known = self.model_store in (None, "mlflow") or "://" in self.model_store
        require(known, "model_store", self.model_store, "mlflow, or an address as s3://bucket/models")
        if self.clients_per_round is not None:
            good = 1 <= self.clients_per_round <= self.data.clients
            require(good, "clients_per_round", self.clients_per_round, f"in 1..{self.data.clients} (data.clients)")
        for target in self.targets:
            require(0 < target <= 1, "targets", target, "in (0, 1]")

    @property
    def cohort_size(self) -> int:
        """How many clients take part in a round."""
        return self.clients_per_round or self.data.clients
