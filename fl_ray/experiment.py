"""One run from a resolved recipe to its folder: data, fleet, method, rounds, summary, report."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray import checkpoint
from fl_ray.artifacts import end_tracking, is_one_model, log_model, write_models, write_samples
from fl_ray.client_tests import client_accuracy, domain_accuracy, evaluate_clients, gradient_cosine
from fl_ray.config import Component, RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.data.statistics import emd, label_entropy
from fl_ray.errors import FlRayError, SettingError
from fl_ray.federated_generator import make_synthesis
from fl_ray.input_files import check_inputs, input_files
from fl_ray.methods.base import Method
from fl_ray.model_store.start import reach_store
from fl_ray.preparation import check_partition, make_context, resolve_path, restore
from fl_ray.progress import Progress
from fl_ray.recipes import build
from fl_ray.run_folder import RunFolder, plain, write_json
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.tasks import FAULTS
from fl_ray.schedule import make_schedule
from fl_ray.server import REPLAYED, RoundReport, begin, checkpoint_of, rounds
from fl_ray.stopping import BestModel
from fl_ray.summary import CLIENT_RESULTS, outcome
from fl_ray.tracking import Tracker
from fl_ray.tracking_store import prepare_store, tracking_uri

__all__ = ["Experiment", "check"]

BAD_INPUT = 2  # exit code
TIMELINE_ROUNDS = 5
TIMELINE_CLIENTS = 40
_STATISTICS_CLIENTS = 10_000  # that the mean entropy and EMD of a partition are taken over
_FAILURES = 3  # rounds with a raising client whose start is kept for a replay


def check(config: RunConfig) -> Method:
    """Everything that can be known to be wrong before data are read or actors started; the method.

    Raises:
        SettingError: a component refuses its settings, a generator is missing, or the tracking store can't be used.
        OutputError: the model store does not answer, or can't be written.
    """
    method: Method = build("method", config.method)
    build("partition", config.data.partition)
    build("sampling", config.sampling)
    for update in config.updates:
        build("update", update)
    make_schedule(config, method)
    if config.evaluate_clients_every and config.data.client_test_fraction == 0:
        raise SettingError(
            f"evaluate_clients_every is {config.evaluate_clients_every}, but data.client_test_fraction is 0, so no "
            "client has images to be tested on; raise it"
        )
    generator = None
    if method.uses_generator:
        if config.generator is None:
            raise SettingError(f"method {config.method.name} needs a generator; add a generator section")
        generator = build("generator", Component(config.generator.name, config.generator.settings))
        if method.needs_classes and not generator.knows_classes:
            raise SettingError(
                f"generator {config.generator.name} knows no classes with these settings, but method "
                f"{config.method.name} needs images of them; take another one, or (diffusion) set guidance above 0"
            )
    method.check(config, generator)
    if config.tracking.enabled:
        prepare_store(config)
    reach_store(config)
    return method


class Experiment:
    """One run.

    Args:
        config: resolved recipe.
        folder: an empty folder, or with ``resume`` that of an interrupted run.
        runtime: an open backend.
        label: of the run within a comparison; default: the recipe's name.
        tags: more MLflow tags.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        runtime: Runtime,
        progress: Progress | None = None,
        label: str | None = None,
        tags: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.folder, self.runtime = config, RunFolder(folder), runtime
        self.progress = progress or Progress(enabled=False)
        self.label, self.tags, self.resume = label or config.name, dict(tags or {}), resume
        if resume and (begun := self.folder.begun()):
            self.label, self.tags = begun["label"], begun["tags"]
        self.tracker: Tracker | None = None
        self._best = BestModel(config.early_stopping)
        self._weights = np.empty(0, dtype=np.float32)
        self._started = time.perf_counter()
        self._wall_before = 0.0  # seconds of earlier legs of a resumed run

    def run(self) -> dict[str, Any]:
        """Do it all; the summary.

        A run that fails or is interrupted leaves its folder with what it had, and its status in summary.json. One that
        is refused before its first round (bad input) leaves no folder.
        """
        steps = self.steps()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def steps(self) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """The same, round by round: yields the history's rows and returns the summary. To close it is to stop the run
        there: the folder is left as by an interrupt, with the status ``stopped``.
        """
        status, context = "failed", None
        try:
            context = self._prepare()
            yield from self._train(context)
            self._finish(context)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except GeneratorExit:
            status = "stopped"
            raise
        except FlRayError as error:
            trained = context is not None and context.phases.seconds.get("train", 0.0) > 0
            if error.exit_code == BAD_INPUT and not self.resume and not trained:
                status = "refused"
            raise
        finally:
            self.progress.stop()
            if context is not None and context.synthesis is not None:
                context.synthesis.close()
            if status == "refused":
                if self.tracker is not None:
                    self.tracker.finish("FAILED", {}, [])
                shutil.rmtree(self.folder.path)
            else:
                summary = self._leave(context, status)
        return summary

    def _prepare(self) -> RunContext:
        self.method = check(self.config)
        self.data = prepare(self.config.data, self.config.seed)
        inputs, label = input_files(self.config), f"--resume {self.folder.path}"
        if self.resume:
            check_partition(self.folder, self.data, label)
            check_inputs(self.folder.begun().get("inputs", {}), inputs, label)
        else:
            self.folder.begin(self.config, self.label, self.tags, inputs)
        self._write_partition(self.data)
        self._begin_tracking(self.data)
        parts = self.config, self.method, self.data
        synthesis = make_synthesis(*parts, self.runtime, self.progress)
        context, self._weights = make_context(*parts, self.folder, self.runtime, self.progress, synthesis)
        return context

    def _resolve_path(self, context: RunContext) -> None:
        """Choose the training path and write it into config.yaml: a resumed run must take the same one."""
        reason = resolve_path(context, self.method, self._weights)
        if reason is not None and self.config.runtime.training_path == "auto":
            self.progress.message(f"training path {context.path}: {reason}")
            runtime = replace(self.config.runtime, training_path=context.path)
            self.config = context.config = replace(self.config, runtime=runtime)
            self.folder.write_config(self.config)

    def _begin_tracking(self, data: FederatedData) -> None:
        if not self.config.tracking.enabled:
            return
        known = self.folder / "tracking.json"
        stored = json.loads(known.read_text(encoding="utf-8")) if self.resume and known.exists() else None
        uri = stored["uri"] if stored else tracking_uri(self.config)
        run_name = f"{self.label}-seed{self.config.seed}"
        self.tracker = Tracker(self.config, uri, run_name, self.tags, stored["run_id"] if stored else None)
        write_json(known, {"uri": uri, "run_id": self.tracker.run_id})
        if stored is None:
            self.tracker.inputs(data, self.config.data.name)

    def _train(self, context: RunContext) -> Iterator[dict[str, Any]]:
        done = 0
        kept, every = self.folder / "checkpoints", self.config.checkpoint.every
        found = checkpoint.latest(kept) if self.resume else None
        if found is not None:
            done = found.rounds_done
            self._restore(found, context)
        else:
            self._resolve_path(context)
        self.folder.start_history(keep_rounds=done)
        if self.tracker is not None:
            for row in self.folder.history():  # a hard kill may have cut the tracker off behind the checkpoint
                self.tracker.round(row)
        self.method.setup(context)
        state = found
        if found is None or found.starting:
            for weights in begin(context, self.method, self._weights):
                self._weights = weights
                if every:
                    checkpoint.save(kept, replace(self._checkpoint(0, context), starting=True))
            state = self._checkpoint(0, context)
            if kept.exists():
                checkpoint.save(kept, state)
        timeline = [entry for entry in self.folder.timeline() if entry["round"] <= done]
        try:
            for report in [] if self._best.stalled else rounds(context, self.method, self._weights, done):
                self._weights = report.weights
                with context.phases.phase("log"):
                    self._log(report, timeline, context)
                    self._keep_failure(report, state)
                    # Taken now: an interrupt comes in the middle of the next round, when the method has moved on.
                    state = self._checkpoint(report.row["round"], context)
                    if every and report.row["round"] % every == 0:
                        checkpoint.save(kept, state)
                yield report.row
                if self._best.stalled:
                    self.progress.message(
                        f"stopped after round {report.row['round']}: no rise of the test accuracy in "
                        f"{self.config.early_stopping.patience} evaluations"
                    )
                    break
        finally:
            if every:  # whatever ended the rounds, none that is finished is lost
                checkpoint.save(kept, state)

    def _keep_failure(self, report: RoundReport, before: checkpoint.Checkpoint) -> None:
        """Keep the start of a round in which a client raised, so that ``fl-ray replay`` begins there."""
        raised = any(record.left_out.kind == "raised" for record in report.result.left_out)
        kept = self.folder / "failures"
        if raised and len(list(kept.glob("*.safetensors"))) < _FAILURES:
            checkpoint.save(kept, before, _FAILURES)

    def _checkpoint(self, rounds_done: int, context: RunContext) -> checkpoint.Checkpoint:
        state = checkpoint_of(rounds_done, self._weights, context, self.method, self._wall())
        state.state["best"] = self._best.state()
        tracked = self.tracker.run_id if self.tracker is not None else None
        state.notes = {"tracking_run": tracked, "run": plain(context.notes)}
        if context.synthesis is not None:
            state.notes["generator"] = [*context.synthesis.keys(), context.synthesis.trained.weights]
        return state

    def _restore(self, found: checkpoint.Checkpoint, context: RunContext) -> None:
        self._weights = restore(found, context, self.method)
        self._wall_before = found.wall_s
        self._best.load_state(found.state["best"])
        where = "with what comes before round 1" if found.starting else f"after round {found.rounds_done}"
        self.progress.message(f"going on {where}")

    def _wall(self) -> float:
        return self._wall_before + time.perf_counter() - self._started

    def _log(self, report: RoundReport, timeline: list[dict[str, Any]], context: RunContext) -> None:
        row, number = report.row, report.row["round"]
        self._best.see(number, row["test_accuracy"], report.weights)
        every = self.config.evaluate_clients_every
        if every and number % every == 0:
            found = self._test_clients(context, number)
            row |= {name: found[key] for name, key in CLIENT_RESULTS.items()}
        asked = self.config.gradient_cosine_every if self.method.trains_clients else 0
        if asked and number % asked == 0:
            row["gradient_cosine"] = gradient_cosine(context, report.weights)
        self.folder.add_history(row)
        if self.tracker is not None:
            self.tracker.round(row | context.metrics)
        self._tell_left_out(report)
        if report.plan is not None and number <= TIMELINE_ROUNDS:
            shown, plan = slice(0, TIMELINE_CLIENTS), report.plan
            parts = {name: values[shown] for name, values in asdict(plan.cost).items() if name.startswith("t_")}
            entry = {"round": number, "start_s": report.started_virtual_s, "clients": plan.cohort[shown]}
            timeline.append({**entry, **parts})
            write_json(self.folder / "timeline.json", timeline)
        self.progress.round(row, self.config.rounds)

    def _tell_left_out(self, report: RoundReport) -> None:
        """What went wrong in a round's clients; emulated faults are expected and only counted."""
        number = report.row["round"]
        for record in report.result.records:
            if record.left_out is not None and record.left_out.kind not in ("dropped_out", "late"):
                hint = ""
                if record.left_out.kind in REPLAYED:
                    hint = f". See what happened: {self.folder.replay_command(number, record.client)}"
                self.progress.message(
                    f"round {number}: client {record.client} is left out of the average: {record.left_out}{hint}"
                )
            elif record.raised is not None:
                self.progress.message(f"{record.raised}; it was trained once more, and that went well")

    def _test_clients(self, context: RunContext, number: int) -> dict[str, float]:
        """Every client's model on its own held-out images, into clients.csv; what it comes to."""
        rows = evaluate_clients(context, self.method, self._weights, number)
        self.folder.add_clients(rows)
        return client_accuracy(rows)

    def _write_partition(self, data: FederatedData) -> None:
        shown = data.counts(np.arange(min(len(data.partition), _STATISTICS_CLIENTS)))
        content = {
            "digest": data.partition.digest(),
            "classes": data.source.classes,
            "clients": len(data.partition),
            "mean_entropy_bits": float(label_entropy(shown).mean()),
            "mean_emd": float(emd(shown).mean()),
            "counts": shown[:200],
        }
        write_json(self.folder / "partition.json", content)

    def _finish(self, context: RunContext) -> None:
        write_models(context, self.method, self._weights, self._best.weights)
        last = self.folder.history()[-1]["round"]
        if context.data.held_out.sizes.any() and last not in self.folder.tested_rounds():
            self._test_clients(context, last)
        by_domain = domain_accuracy(context, self.method, self._weights)
        if by_domain:
            context.notes["domain_accuracy"] = by_domain
        if context.synthesis is not None:
            context.notes["synthesis"] = context.synthesis.report()
            write_samples(context, self.method)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # a finished run has nothing to go on with

    def _leave(self, context: RunContext | None, status: str) -> dict[str, Any]:
        from fl_ray.report.run_report import run_report

        config, history, tested = self.config, self.folder.history(), self.folder.last_client_test()
        seconds = context.phases.seconds if context is not None else {}
        faults = context.faults if context is not None else Counter()
        summary = {
            "name": config.name,
            "label": self.label,
            "method": config.method.name,
            "data": config.data.name,
            "seed": config.seed,
            "status": status,
            **outcome(history, config.targets),
            "best_round": self._best.round or None,
            "stopped_early": len(history) if self._best.stalled and len(history) < config.rounds else None,
            "samples_trained": context.ledger.samples_trained if context is not None else 0,
            "updates_left_out": sum(faults[kind] for kind in FAULTS),
            "clients_left_out": {kind: faults[kind] for kind in FAULTS},
            "clients_retried": faults["retried"],
            **({"client_accuracy": client_accuracy(tested)} if tested else {}),
            "partition": self.folder.partition_digest(),
            "parameters": int(context.is_parameter.sum()) if context is not None else None,
            "wall_s": {name: seconds.get(name, 0.0) for name in _PHASES},
            "wall_rounds_s": sum(seconds.get(name, 0.0) for name in _ROUND_PHASES),
            "wall_total_s": self._wall(),
            "process_peak_memory_mb": self.runtime.memory_mb() if status == "finished" else {},
            "synthesis": None,
            **(context.notes if context is not None else {}),
        }
        write_json(self.folder / "summary.json", summary)
        if (self.folder / "config.yaml").exists():
            run_report(self.folder)
        if self.tracker is not None:
            whole = status == "finished" and is_one_model(self.method, self._weights)
            model = (lambda: log_model(config, self.data, self._weights)) if whole else None
            end_tracking(self.tracker, self.folder, summary, model)
            if self.tracker.error is not None:
                self.progress.message(
                    f"MLflow did not take everything ({self.tracker.error}); the run's folder is complete"
                )
        return summary


_ROUND_PHASES = ("dispatch", "train", "aggregate", "evaluate", "log")
_PHASES = ("start", "synthesis", *_ROUND_PHASES)
