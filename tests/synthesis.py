"""The images of a recipe's generator, for tests."""

from __future__ import annotations

from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.progress import Progress
from fl_ray.synthesis import Synthesis
from fl_ray.trained_generator import TrainedGenerator

__all__ = ["synthesis_of"]


def synthesis_of(
    config: RunConfig,
    on_ray: bool = False,
    threads: int = 1,
    device: str | None = None,
    data: FederatedData | None = None,
    progress: Progress | None = None,
) -> Synthesis:
    """In this process, unless asked otherwise; ``data`` where they are there already."""
    data = data or prepare(config.data, config.seed)
    return Synthesis(
        TrainedGenerator(config.generator, data, progress or Progress(False)), on_ray, threads, device=device
    )
