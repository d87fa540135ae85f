"""What stands before the first round: the run's parts put together, and a checkpoint's state put back."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from fl_ray.checkpoint import Checkpoint
from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData
from fl_ray.devices.cost import Ledger
from fl_ray.devices.fleet import draw_fleet
from fl_ray.errors import OutputError
from fl_ray.methods.base import Method
from fl_ray.model import ImageShape, WeightLayout, build_module, initial_weights
from fl_ray.model_store.start import open_store
from fl_ray.progress import Progress
from fl_ray.recipes import build
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.tasks import Job, JobData
from fl_ray.schedule import make_schedule
from fl_ray.synthesis import Synthesis
from fl_ray.updates import UpdateChain

__all__ = ["check_partition", "make_context", "resolve_path", "restore"]

_PATH_CLIENTS = 16  # that the training path is chosen with


def check_partition(folder: RunFolder, data: FederatedData, label: str | Path) -> None:
    """Refuse data that are not those of the folder's run.

    Args:
        label: what names the folder in the message.
    """
    stored, found = folder.partition_digest(), data.partition.digest()
    if stored not in (None, found):
        raise OutputError(
            f"{label}: the data or their partition are not those of the run (digest {stored} then, {found} now); set "
            "data.root or $FL_RAY_DATA as it was"
        )


def make_context(
    config: RunConfig,
    method: Method,
    data: FederatedData,
    folder: RunFolder,
    runtime: Runtime,
    progress: Progress,
    synthesis: Synthesis | None,
) -> tuple[RunContext, np.ndarray]:
    """The run's parts, with the backend opened; and the weights that it starts from."""
    given = data
    began = time.perf_counter()
    data, fleet = method.equip(config, given, draw_fleet(config.fleet, config.data.clients, config.seed), synthesis)
    equipped_s = time.perf_counter() - began
    shape = ImageShape.of(data.source)
    layout = WeightLayout(build_module(config.model, shape, config.training))
    # What isn't sent isn't compressed either.
    updates = tuple(config.updates) if method.exchanges_weights else ()
    job = Job(
        config.model,
        shape,
        config.training,
        config.seed,
        config.rounds,
        config.runtime.threads,
        updates,
        method.own_models,
    )
    arrays = JobData.of(data)
    context = RunContext(
        config=config,
        data=data,
        fleet=fleet,
        runtime=runtime,
        is_parameter=layout.is_parameter,
        folder=folder,
        progress=progress,
        sampler=build("sampling", config.sampling),
        schedule=make_schedule(config, method),
        upload_bytes=UpdateChain(updates, layout.is_parameter, config.seed).upload_bytes(),
        synthesis=synthesis,
        store=open_store(config, progress.message),
        ledger=synthesis.trained.spent() if synthesis is not None else Ledger(),
    )
    context.phases.seconds["synthesis"] += equipped_s  # of methods that plan, and make the devices' images, beforehand
    with context.phases.phase("start"):
        runtime.open(job, arrays, config.fleet, fleet, config.cohort_size)
    seen = runtime.shared()  # in Ray's shared memory: the driver needs no second copy
    data.images, data.labels = data.source.images, data.source.labels = seen.images, seen.labels
    if given is not data:  # with synthetic images behind the real ones
        real = len(given.images)
        given.images, given.labels = given.source.images, given.source.labels = seen.images[:real], seen.labels[:real]
    return context, initial_weights(config.model, shape, config.training, config.seed, context.notes)


def resolve_path(context: RunContext, method: Method, weights: np.ndarray) -> str | None:
    """Choose the training path; the reason, or None where there was nothing to choose."""
    config = context.config
    wanted = config.runtime.training_path
    trying = np.flatnonzero(context.data.partition.sizes > 0)[:_PATH_CLIENTS].tolist()
    if not method.trains_clients or method.own_models or wanted == "plain":
        return None
    key = repr((wanted, config.model, config.training, config.data.name, config.data.settings, config.data.classes))
    known = context.runtime.paths
    with context.phases.phase("start"):
        if key not in known:  # all runs of a comparison go the same way
            known[key] = context.runtime.resolve_path(wanted, trying, weights)
    context.path, reason = known[key]
    return reason


def restore(found: Checkpoint, context: RunContext, method: Method) -> np.ndarray:
    """Put a checkpoint's state back into a run's parts; the weights."""
    context.ledger, context.path = Ledger(**found.ledger), found.path
    context.faults.update(found.faults)
    context.notes |= found.notes.get("run", {})
    context.phases.seconds.update(found.phases)
    method.load_state(found.state.get("method", {}))
    context.sampler.load_state(found.state.get("sampler", {}))
    if found.state.get("schedule"):
        context.schedule.load_state(found.state["schedule"], context)
    made = found.notes.get("generator")
    synthesis = context.synthesis
    if made is not None and synthesis is not None and made != [*synthesis.keys(), synthesis.trained.weights]:
        context.progress.message(
            "the generator or its images are not those of the run so far; the device may be another, or the generator "
            "was trained anew"
        )
    return found.weights
