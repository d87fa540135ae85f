"""One client's training of a round once more, in this process: to see why it failed, or what it did.

The round's start is the newest checkpoint before it that the run left, or else its initial weights; the rounds between
are run again, which gives the same to the bit on every backend. Nothing is written into the run's folder, nothing is
tracked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from fl_ray import checkpoint
from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import prepare
from fl_ray.errors import FlRayError, SettingError
from fl_ray.experiment import check
from fl_ray.federated_generator import make_synthesis
from fl_ray.methods.base import Method
from fl_ray.preparation import check_partition, make_context, restore
from fl_ray.progress import Progress
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.start import open_runtime
from fl_ray.runtime.tasks import LeftOut, RoundSettings, Task
from fl_ray.server import begin, rounds

__all__ = ["Replayed", "replay"]

_SHOWN = 50  # clients of a cohort that a message names
_COMPARED = ("clients", "train_loss", "virtual_time_s")  # of a round that is run again with what history.csv says


@dataclass(frozen=True)
class Replayed:
    """What a client's training did.

    Attributes:
        round: counted from 1.
        labels: its training samples by class.
        update: float64 [size], what it adds to the weights that it started from, as the server reads it; None: it
            raised, or was left out.
        dropped: why the run did not take its update, though it trained: an emulated fault of the device.
        left_out: why the update can't be used.
        error: what its training raised.
    """

    client: int
    round: int
    labels: dict[str, int]
    loss: float = float("nan")
    update: np.ndarray | None = None
    dropped: LeftOut | None = None
    left_out: LeftOut | None = None
    error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self.update is None

    def facts(self) -> dict[str, str]:
        """What a reader wants to know, by name."""
        facts = {"samples": str(sum(self.labels.values()))}
        facts["samples by class"] = ", ".join(f"{name}: {count}" for name, count in self.labels.items() if count)
        if self.dropped is not None:
            facts["in the run"] = f"{self.dropped}, so its update was not used"
        if self.error is not None:
            return facts | {"raised": type(self.error).__name__}
        facts["mean loss"] = f"{self.loss:.6g}"
        if self.update is None:
            return facts | {"left out": str(self.left_out)}
        return facts | {"norm of the update": f"{np.linalg.norm(self.update):.6g}"}


def replay(path: Path, number: int, client: int, progress: Progress | None = None) -> list[Replayed]:
    """Train ``client`` as in round ``number`` (from 1) of the run in ``path``; once for each time that it did (in an
    asynchronous run, twice where its updates came in twice).

    Raises:
        OutputError: no run's folder, or the data are not those of the run.
        SettingError: the run has no such round, or the client was not in it.
    """
    folder, progress = RunFolder(path), progress or Progress(enabled=False)
    config = _quiet(folder.config())
    if not 0 <= client < config.data.clients:
        raise SettingError(f"--client is {client}, but the run's clients are 0 to {config.data.clients - 1}")
    _check_round(folder, config, number)
    method = check(config)
    if not method.trains_clients:
        raise SettingError(f"method {config.method.name} trains no clients, so there is nothing to replay")
    data = prepare(config.data, config.seed)
    check_partition(folder, data, path)
    with open_runtime(config, progress) as runtime:
        synthesis = make_synthesis(config, method, data, runtime, progress)
        context, weights = make_context(config, method, data, folder, runtime, progress, synthesis)
        try:
            weights = _start_of(context, method, weights, number)
            return _train(context, method, weights, number, client)
        finally:
            progress.stop()
            if context.synthesis is not None:
                context.synthesis.close()


def _quiet(config: RunConfig) -> RunConfig:
    """The run's settings without what a replay has no use for; none of these changes what clients compute."""
    runtime = replace(config.runtime, backend="in_process", emulate="virtual")
    tracking = replace(config.tracking, enabled=False)
    return replace(config, runtime=runtime, tracking=tracking, model_store=None, evaluate_every=config.rounds)


def _check_round(folder: RunFolder, config: RunConfig, number: int) -> None:
    done = len(folder.history())
    last = done if folder.finished() else min(done + 1, config.rounds)  # one that failed has no row
    if not 1 <= number <= last:
        raise SettingError(f"--round is {number}, but the run in {folder.path} has rounds 1..{last}; name one of these")


def _start_of(context: RunContext, method: Method, weights: np.ndarray, number: int) -> np.ndarray:
    """Bring the run's parts to the start of a round; its weights."""
    path = context.config.runtime.training_path
    context.path = "batched" if path == "batched" else "plain"  # auto: the run had not chosen yet
    kept = [checkpoint.latest(context.folder / name, number - 1) for name in ("checkpoints", "failures")]
    found = max((one for one in kept if one is not None), key=lambda one: one.rounds_done, default=None)
    done = 0
    if found is not None:
        done, weights = found.rounds_done, restore(found, context, method)
    method.setup(context)
    if found is None or found.starting:
        for begun in begin(context, method, weights):
            weights = begun
    told = {row["round"]: row for row in context.folder.history()}
    again = number - 1 - done
    if again:
        context.progress.message(f"running {again} rounds again, from {f'round {done + 1}' if done else 'the start'}")
    for report in islice(rounds(context, method, weights, done), again):
        weights, row = report.weights, report.row
        context.progress.steps("round", row["round"], number - 1)
        then = told.get(row["round"])
        if then is not None and any(repr(float(row[column])) != repr(float(then[column])) for column in _COMPARED):
            context.progress.message(
                f"round {row['round']} came out otherwise than in the run (history.csv), as after an error that passed "
                "or on another kind of processor; what follows may differ, too"
            )
            told = {}  # and so will all that come
    return weights


def _train(context: RunContext, method: Method, weights: np.ndarray, number: int, client: int) -> list[Replayed]:
    method.begin_round(context, number - 1)
    plan = context.schedule.plan(context, method, number - 1, weights)
    places = np.flatnonzero(plan.cohort == client).tolist()
    if not places:
        shown = ", ".join(map(str, plan.cohort[:_SHOWN].tolist()))
        more = f" and {len(plan.cohort) - _SHOWN} more" if len(plan.cohort) > _SHOWN else ""
        raise SettingError(f"--client is {client}, but round {number} had the clients {shown}{more}; name one of these")
    method.before_training(context, number - 1, weights, plan.cohort)
    everybody = replace(plan, left_out={})  # also those whose update did not arrive
    tasks = everybody.adapt(method.tasks(context, number - 1, plan.cohort))
    own = [task for task in tasks if task.client == client]
    if not own:
        raise SettingError(f"--client is {client}, but it has no samples to train on")
    labels = dict(zip(context.data.source.classes, context.data.counts(np.array([client]))[0].tolist(), strict=True))
    blank = Replayed(client, number, labels)
    return [
        replace(_trained(context, method, weights, task, blank), dropped=plan.left_out.get(place))
        for task, place in zip(own, places, strict=True)
    ]


def _trained(context: RunContext, method: Method, weights: np.ndarray, task: Task, blank: Replayed) -> Replayed:
    own = bool(method.own_models)  # whose sizes differ from that of the round's sum
    settings = RoundSettings(blank.round - 1, context.path, own, method.proximal, strict=True)
    alone = [replace(task, share=1.0, scale=1.0)]
    try:
        result = context.runtime.train(alone, weights, settings, context.phases)
    except FlRayError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the training raises is what is asked for
        return replace(blank, error=error)
    record = result.records[0]
    if record.left_out is not None:
        return replace(blank, loss=record.train_loss, left_out=record.left_out)
    update = result.weights[task.client].astype(np.float64) - task.start if own else result.update
    return replace(blank, loss=record.train_loss, update=update)
