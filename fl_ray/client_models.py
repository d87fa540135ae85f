"""What the clients of a one-shot method have trained, kept beside the generators and found by all that decides it.

All that clients do in the one round is fixed when it begins, so the rows of a comparison and the ablations of what a
server does would train the same clients again and again. A round that every client came through is kept. Energy, bytes
and virtual time are modelled and booked as ever; the wall seconds are those of the run that did the training. Where
the recipe names a ``model_store``, machines share what they keep.

As for generators (``fl_ray.trained_generator``), versions of libraries do not decide; the file names those that made
it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fl_ray.cache_folder import cache_errors, cache_root, make_writable
from fl_ray.config import GeneratorConfig
from fl_ray.data.parts import digest
from fl_ray.errors import OutputError
from fl_ray.model import ImageShape
from fl_ray.registry import code_hash
from fl_ray.run_folder import environment
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import ClientRecord, RoundSettings, Task
from generators.base import settings_digest
from generators.cache import write_whole

if TYPE_CHECKING:
    from fl_ray.context import RunContext
    from fl_ray.methods.base import Method
    from fl_ray.model_store.base import ModelStore

__all__ = ["FILE", "train_or_find"]

FILE = "classifiers.safetensors"
FORMAT = 1  # of what is kept; raised when the code that trains clients changes what comes of it


@dataclass(frozen=True)
class _Kept:
    """A round, and the wall seconds that its training took."""

    result: RoundResult
    seconds: float


def train_or_find(
    run: RunContext, method: Method, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings
) -> RoundResult:
    """What ``Runtime.train`` gives for the tasks, to the bit: from the cache, or trained now and kept.

    ``summary.json`` says which it was (``client_models``). Of two runs that ask at once, the second waits for the
    first.

    Raises:
        OutputError: the cache's folder can't be written.
    """
    with run.phases.phase("dispatch"):
        decided = json.dumps(_decided(run, method, tasks, weights, settings), sort_keys=True)
        key = settings_digest(decided)[:16]
    root = cache_root(run.config.generator)
    folder = make_writable(root / "client_models", run.config.generator) / key
    asked = time.perf_counter()
    with _locked(folder, run.config.generator, run.progress.message):
        waited = time.perf_counter() - asked
        with run.phases.phase("dispatch"):
            kept = _read(folder / FILE, decided, run.progress.message)
            if kept is None and run.store is not None and run.store.bring("client_models", key, folder):
                kept = _read(folder / FILE, decided, run.progress.message)
        found = kept is not None
        if kept is None:
            before = run.phases.seconds["train"]
            result = run.runtime.train(tasks, weights, settings, run.phases)
            if any(record.left_out is not None or record.raised is not None for record in result.records):
                return replace(result, earlier_s=-waited)
            kept = _Kept(result, run.phases.seconds["train"] - before)
            with run.phases.phase("dispatch"):
                _write(folder / FILE, kept, decided, run.progress.message)
        if run.store is not None and (folder / FILE).exists():
            with run.phases.phase("dispatch"):
                _publish(run.store, key, folder, not found, run.progress.message)
    run.notes["client_models"] = {"key": key, "from_cache": found, "train_seconds": kept.seconds}
    if not found:
        return replace(kept.result, earlier_s=-waited)
    run.phases.seconds["train"] += kept.seconds
    run.progress.message(f"the clients' models were trained before, in {kept.seconds:.1f} s: {folder}")
    return replace(kept.result, earlier_s=kept.seconds - waited)


def _decided(
    run: RunContext, method: Method, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings
) -> dict[str, Any]:
    """All that decides what comes of the tasks, as JSON values. Who takes part (by fleet, clock and dropouts) is in the
    tasks, the partition in the clients' images.
    """
    config, data = run.config, run.data
    common = _hash(weights)
    clients = []
    for task in tasks:
        rows, model = data.partition.of(task.client), method.model_of(config, task.client)
        clients.append(
            {
                "client": task.client,
                "share": task.share,
                "scale": task.scale,
                "turn": task.turn,
                "model": asdict(model),
                "code": code_hash("model", model.name),
                "start": common if task.start is None else _hash(run.runtime.held(task.start)),
                "offset": None if task.offset is None else _hash(task.offset),
                "images": digest(data.images[rows], data.labels[rows]),
            }
        )
    return {
        "format": FORMAT,
        "records": [each.name for each in fields(ClientRecord)],
        "clients": clients,
        "shape": asdict(ImageShape.of(data.source)),
        "training": asdict(config.training),
        "updates": [[asdict(update), code_hash("update", update.name)] for update in config.updates],
        "seed": config.seed,
        "rounds": config.rounds,
        "number": settings.number,
        "path": settings.path,
        "proximal": settings.proximal,
        "threads": config.runtime.threads,
        "device": run.runtime.device_kind(),
    }


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


@contextmanager
def _locked(folder: Path, config: GeneratorConfig | None, tell: Callable[[str], None]) -> Iterator[None]:
    """For the one run at a time that may look into a folder, and write it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    with cache_errors(config):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(f"waiting for another run that trains the same clients: {folder}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read(path: Path, decided: str, tell: Callable[[str], None]) -> _Kept | None:
    """The round that a file holds; None where there is none, or it is not as it was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            weights = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError):  # not one, or its names are no clients
        header, weights = {}, {}
    noted = header.get("round", "")
    if header.get("decided_by") != decided or header.get("sha256") != _seal(decided, noted, weights):
        tell(f"{path} is damaged, so its clients are trained again")
        return None
    content = json.loads(noted)
    records = [ClientRecord(**record) for record in content["records"]]
    return _Kept(RoundResult(None, weights, records), content["seconds"])


def _write(path: Path, kept: _Kept, decided: str, tell: Callable[[str], None]) -> None:
    """Keep a round. Where that fails the run goes on: it has what it needs."""
    weights = kept.result.weights
    noted = json.dumps({"seconds": kept.seconds, "records": [asdict(record) for record in kept.result.records]})
    header = {"round": noted, "decided_by": decided, "sha256": _seal(decided, noted, weights)}
    header["made_by"] = json.dumps(environment())
    tensors = {str(client): np.ascontiguousarray(values) for client, values in weights.items()}
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, save(tensors, header))
    except OSError as error:
        tell(f"the clients' models can't be kept in {path} ({error.strerror}); the next run trains them again")


def _publish(store: ModelStore, key: str, folder: Path, again: bool, tell: Callable[[str], None]) -> None:
    """Put a round into the store. Where that fails the run goes on, as above."""
    try:
        store.publish("client_models", key, folder, again)
    except OutputError as error:
        tell(f"{error}; the clients' models are kept in {folder} alone")


def _seal(decided: str, noted: str, weights: dict[int, np.ndarray]) -> str:
    """A hash of all that a run takes from a file."""
    made = hashlib.sha256(f"{decided}\n{noted}\n".encode())
    for client in sorted(weights):
        made.update(f"{client} {weights[client].dtype} {weights[client].shape}".encode())
        made.update(np.ascontiguousarray(weights[client]).tobytes())
    return made.hexdigest()
