"""One run from a resolved recipe to its folder: data, fleet, method, rounds, summary, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_ray import checkpoint
from fl_ray.config import Component, RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.data.statistics import emd, label_entropy
from fl_ray.devices.cost import Ledger
from fl_ray.devices.fleet import draw_fleet
from fl_ray.errors import FlRayError, OutputError, SettingError
from fl_ray.methods.base import Method
from fl_ray.model import ImageShape, WeightLayout, build_module, initial_weights
from fl_ray.progress import Progress
from fl_ray.recipes import build
from fl_ray.run_folder import RunFolder, write_json
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.tasks import Evaluation, Job, JobData
from fl_ray.schedule import make_schedule
from fl_ray.server import RoundReport, checkpoint_of, rounds
from fl_ray.stopping import BestModel
from fl_ray.summary import outcome
from fl_ray.synthesis import Synthesis
from fl_ray.tracking import Tracker, prepare_store, tracking_uri
from fl_ray.updates import UpdateChain

__all__ = ["Experiment", "check"]

BAD_INPUT = 2  # exit code
TIMELINE_ROUNDS = 5
TIMELINE_CLIENTS = 40
SAMPLE_COLUMNS = 8
_STATISTICS_CLIENTS = 10_000  # that the mean entropy and EMD of a partition are taken over
_PATH_CLIENTS = 16  # that the training path is chosen with


def check(config: RunConfig) -> Method:
    """Everything that can be known to be wrong before data are read or actors started; the method.

    Raises:
        SettingError: a component refuses its settings, a generator is missing, or the tracking store can't be used.
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
    if method.uses_generator:
        if config.generator is None:
            raise SettingError(f"method {config.method.name} needs a generator; add a generator section")
        build("generator", Component(config.generator.name, config.generator.settings))
    if config.tracking.enabled:
        prepare_store(config)
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
        if resume and (self.folder / "run.json").exists():
            stored = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            self.label, self.tags = stored["label"], stored["tags"]
        self.tracker: Tracker | None = None
        self._left_out = 0
        self._best = BestModel(config.early_stopping)
        self._weights = np.empty(0, dtype=np.float32)
        self._started = time.perf_counter()
        self._wall_before = 0.0  # seconds of earlier legs of a resumed run

    def run(self) -> dict[str, Any]:
        """Do it all; the summary.

        A run that fails or is interrupted leaves its folder with what it had, and its status in summary.json. One that
        is refused before its first round (bad input) leaves no folder.
        """
        status, context = "failed", None
        try:
            context = self._prepare()
            self._train(context)
            self._finish(context)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except FlRayError as error:
            if error.exit_code == BAD_INPUT and not self.resume and not self.folder.history():
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
        if self.resume:
            stored = self.folder.partition_digest()
            if stored not in (None, self.data.partition.digest()):
                raise OutputError(
                    f"--resume {self.folder.path}: the data or their partition are not those of the run "
                    f"(digest {stored} then, {self.data.partition.digest()} now); give the same data.root"
                )
        else:
            self.folder.write_config(self.config)
            write_json(self.folder / "run.json", {"label": self.label, "tags": self.tags})
        self._write_partition(self.data)
        self._begin_tracking(self.data)
        return self._context(self.data)

    def _context(self, data: FederatedData) -> RunContext:
        config = self.config
        fleet = draw_fleet(config.fleet, config.data.clients, config.seed)
        shape = ImageShape.of(data.source)
        layout = WeightLayout(build_module(config.model, shape, config.training))
        on_ray = config.runtime.backend == "ray"
        synthesis = None
        if self.method.uses_generator:
            synthesis = Synthesis(config.generator, data, self.progress, on_ray, config.runtime.threads)
            # Before the clients' actors start, so that training the generator has the machine to itself.
            synthesis.prepare()
        training, updates = config.training, tuple(config.updates)
        job = Job(config.model, shape, training, config.seed, config.rounds, config.runtime.threads, updates)
        arrays = JobData(data.images, data.labels, data.partition, data.held_out, data.test_images, data.test_labels)
        context = RunContext(
            config=config,
            data=data,
            fleet=fleet,
            runtime=self.runtime,
            is_parameter=layout.is_parameter,
            progress=self.progress,
            sampler=build("sampling", config.sampling),
            schedule=make_schedule(config, self.method),
            upload_bytes=UpdateChain(updates, layout.is_parameter, config.seed).upload_bytes(),
            synthesis=synthesis,
        )
        with context.phases.phase("start"):
            self.runtime.open(job, arrays, config.fleet, fleet.tier, config.cohort_size)
        self._weights = initial_weights(config.model, shape, training, config.seed)
        return context

    def _resolve_path(self, context: RunContext) -> None:
        """Choose the training path and write it into config.yaml: a resumed run must take the same one."""
        wanted = self.config.runtime.training_path
        if not self.method.trains_clients or wanted == "plain":
            return
        trying = np.flatnonzero(context.data.partition.sizes[:_PATH_CLIENTS] > 0).tolist()
        key = repr((wanted, self.config.model, self.config.training))
        with context.phases.phase("start"):
            if key not in self.runtime.paths:  # all runs of a comparison go the same way
                self.runtime.paths[key] = self.runtime.resolve_path(wanted, trying, self._weights)
            path, reason = self.runtime.paths[key]
        context.path = path
        if wanted == "auto":
            self.progress.message(f"training path {path}: {reason}")
            runtime = replace(self.config.runtime, training_path=path)
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

    def _train(self, context: RunContext) -> None:
        done = 0
        found = checkpoint.latest(self.folder / "checkpoints") if self.resume else None
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
        timeline = [entry for entry in self.folder.timeline() if entry["round"] <= done]
        every, state = self.config.checkpoint.every, found
        try:
            for report in rounds(context, self.method, self._weights, done):
                self._weights = report.weights
                self._left_out += len(report.result.left_out)
                with context.phases.phase("log"):
                    self._log(report, timeline, context)
                    # Taken now: an interrupt comes in the middle of the next round, when the method has moved on.
                    state = self._checkpoint(report, context)
                    if every and report.row["round"] % every == 0:
                        checkpoint.save(self.folder / "checkpoints", state)
                if self._best.stalled:
                    context.notes["stopped_early"] = report.row["round"]
                    self.progress.message(
                        f"stopped after round {report.row['round']}: no rise of the test accuracy in "
                        f"{self.config.early_stopping.patience} evaluations"
                    )
                    break
        finally:
            if every and state is not None:  # whatever ended the rounds, none that is finished is lost
                checkpoint.save(self.folder / "checkpoints", state)

    def _checkpoint(self, report: RoundReport, context: RunContext) -> checkpoint.Checkpoint:
        state = checkpoint_of(report, context, self.method, self._left_out, self._wall())
        state.state["best"] = self._best.state()
        state.notes = {"tracking_run": self.tracker.run_id if self.tracker is not None else None}
        if context.synthesis is not None:
            state.notes["generator"] = context.synthesis.keys()
        return state

    def _restore(self, found: checkpoint.Checkpoint, context: RunContext) -> None:
        self._weights, self._left_out = found.weights, found.left_out
        context.ledger, context.path = Ledger(**found.ledger), found.path
        context.phases.seconds.update(found.phases)
        self._wall_before = found.wall_s
        self.method.load_state(found.state.get("method", {}))
        context.sampler.load_state(found.state.get("sampler", {}))
        if found.state.get("schedule"):
            context.schedule.load_state(found.state["schedule"], context)
        self._best.load_state(found.state["best"])
        self.progress.message(f"going on after round {found.rounds_done}")

    def _wall(self) -> float:
        return self._wall_before + time.perf_counter() - self._started

    def _log(self, report: RoundReport, timeline: list[dict[str, Any]], context: RunContext) -> None:
        row, number = report.row, report.row["round"]
        self._best.see(number, row["test_accuracy"], report.weights)
        every = self.config.evaluate_clients_every
        if every and number % every == 0:
            row |= self._test_clients(context, number)
        self.folder.add_history(row)
        if self.tracker is not None:
            self.tracker.round(row)
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
        emulated = report.plan.left_out if report.plan is not None else {}
        clients = {int(report.plan.cohort[place]) for place in emulated} if emulated else set()
        for record in report.result.records:
            if record.left_out is not None and record.client not in clients:
                self.progress.message(
                    f"round {report.row['round']}: client {record.client} is left out of the average: {record.left_out}"
                )
            elif record.raised is not None:
                self.progress.message(f"{record.raised}; it was trained once more, and that went well")

    def _test_clients(self, context: RunContext, number: int) -> dict[str, float]:
        """Every client's model on its own held-out images, into clients.csv; the row's columns."""
        clients = np.flatnonzero(context.data.held_out.sizes > 0).tolist()
        with context.phases.phase("evaluate"):
            models = self.method.client_models(context, self._weights)
            found = self.runtime.evaluate_clients(models, clients)
        pairs = [(client, entry) for client, entry in zip(clients, found, strict=True) if entry is not None]
        self.folder.add_clients(
            [
                {
                    "round": number,
                    "client": client,
                    "samples": entry.count,
                    "accuracy": entry.accuracy,
                    "loss": entry.loss,
                }
                for client, entry in pairs
            ]
        )
        context.notes["client_accuracy"] = accuracy = _client_accuracy([entry for _, entry in pairs])
        return {"client_accuracy": accuracy["mean"], "client_accuracy_worst_decile": accuracy["worst_decile"]}

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
        from safetensors.torch import save_file

        module = build_module(self.config.model, ImageShape.of(context.data.source), self.config.training)
        layout = WeightLayout(module)
        tensors: dict[str, torch.Tensor] = {}
        for prefix, weights in self.method.models(self._weights).items():
            tensors |= {f"{prefix}{name}": tensor for name, tensor in layout.named(weights).items()}
        save_file(tensors, self.folder / "model.safetensors", {"format": "pt"})
        if self._best.weights is not None:
            context.notes["best_round"] = self._best.round
            if set(self.method.models(self._best.weights)) == {""}:  # not where every client has a model of its own
                save_file(layout.named(self._best.weights), self.folder / "best_model.safetensors", {"format": "pt"})
        if len(context.data.held_out) and context.data.held_out.sizes.any():
            last = self.folder.history()[-1]["round"]
            if last not in self.folder.tested_rounds():
                self._test_clients(context, last)
        if context.synthesis is not None:
            context.notes["synthesis"] = context.synthesis.report()
            self._write_samples(context)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # a finished run has nothing to go on with

    def _write_samples(self, context: RunContext) -> None:
        from fl_ray.report.figures import samples_png

        data, columns = context.data, SAMPLE_COLUMNS
        made, _ = context.synthesis.images(np.full(data.num_classes, columns), self.config.seed)
        synthetic = made.reshape(data.num_classes, columns, *made.shape[1:])
        real = np.full_like(synthetic, 255)
        for label in range(data.num_classes):
            own = data.public_images[data.public_labels == label][:columns]
            real[label, : len(own)] = own
        (self.folder / "samples.png").write_bytes(samples_png(real, synthetic, data.source.classes))

    def _leave(self, context: RunContext | None, status: str) -> dict[str, Any]:
        from fl_ray.report.run_report import run_report

        config = self.config
        seconds = context.phases.seconds if context is not None else {}
        summary = {
            "name": config.name,
            "label": self.label,
            "method": config.method.name,
            "data": config.data.name,
            "seed": config.seed,
            "status": status,
            **outcome(self.folder.history(), config.targets),
            "samples_trained": context.ledger.samples_trained if context is not None else 0,
            "updates_left_out": self._left_out,
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
        report = [run_report(self.folder)] if (self.folder / "config.yaml").exists() else []
        if self.tracker is not None:
            self._end_tracking(summary, status, [self.folder / "summary.json", self.folder / "config.yaml", *report])
        return summary

    def _end_tracking(self, summary: dict[str, Any], status: str, files: list[Path]) -> None:
        mlflow_status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[status]
        metrics = {name: summary[name] for name in ("final_accuracy", "best_accuracy") if summary[name] is not None}
        for target, hit in summary["targets"].items():
            if hit is not None:
                metrics |= {f"{name}_to_{target}": value for name, value in hit.items()}
        files += sorted((self.folder / "figures").glob("*.svg"))
        files += [path for path in (self.folder / "samples.png", self.folder / "model.safetensors") if path.exists()]
        whole = status == "finished" and set(self.method.models(self._weights)) == {""}
        self.tracker.finish(mlflow_status, metrics, files, self._log_model if whole else None)
        if self.tracker.error is not None:
            self.progress.message(
                f"MLflow did not take everything ({self.tracker.error}); the run's folder is complete"
            )

    def _log_model(self) -> None:
        """The model as MLflow keeps it: exported by torch, so that loading it unpickles nothing of ours."""
        from fl_ray.tracking import log_model

        shape = ImageShape.of(self.data.source)
        module = build_module(self.config.model, shape, self.config.training)
        WeightLayout(module).write(torch.from_numpy(np.array(self._weights)))
        log_model(module, shape.normalise(self.data.test_images[:2], torch.device("cpu")).numpy())


_ROUND_PHASES = ("dispatch", "train", "aggregate", "evaluate", "log")
_PHASES = ("start", "synthesis", *_ROUND_PHASES)


def _client_accuracy(found: list[Evaluation]) -> dict[str, float]:
    accuracies = np.sort([entry.accuracy for entry in found])
    worst = accuracies[: max(1, len(accuracies) // 10)]
    return {"clients": len(found), "mean": float(accuracies.mean()), "worst_decile": float(worst.mean())}
