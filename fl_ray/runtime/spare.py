"""What clients' actors leave of a cluster: to the generator's pool, and to the server's actor."""

from __future__ import annotations

from fl_ray.config import RunConfig

__all__ = ["server_gpus", "spare"]


def server_gpus(config: RunConfig) -> float:
    """The share of a GPU of the server's actor; 0 where none is started, or it computes on a CPU."""
    if config.runtime.gpus_per_actor == 0:
        return 0.0
    from fl_ray.methods.base import Method
    from fl_ray.registry import resolve_name

    counts = resolve_name("method", config.method.name).server_samples is not Method.server_samples
    return config.runtime.gpus_per_actor if counts or config.generator is not None else 0.0


def spare(config: RunConfig) -> dict[str, float]:
    """Resources of all of them, as far as the recipe asks for any."""
    found = {"GPU": server_gpus(config)}
    if config.generator is not None:
        pool = config.generator.pool
        found = {"CPU": pool.actors * pool.cpus, "GPU": pool.actors * pool.gpus + found["GPU"]}
    return {name: amount for name, amount in found.items() if amount > 0}
