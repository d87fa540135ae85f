"""A generator that the clients train together, through the ordinary round loop, before the run's own rounds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from fl_ray import checkpoint
from fl_ray.config import Component, RunConfig, StoppingConfig, TrainingConfig
from fl_ray.data.parts import FederatedData, digest
from fl_ray.devices.cost import Ledger
from fl_ray.input_files import trace_files
from fl_ray.methods.base import Method
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.model_store.start import open_store, reach_store
from fl_ray.preparation import make_context, restore
from fl_ray.progress import Progress
from fl_ray.recipes import build, to_dict
from fl_ray.registry import code_hash
from fl_ray.run_folder import RunFolder, write_json
from fl_ray.runtime.base import Runtime
from fl_ray.server import checkpoint_of, rounds
from fl_ray.synthesis import Synthesis
from fl_ray.trained_generator import TrainedGenerator
from generators.base import FederatedTraining, settings_digest
from generators.cache import COST_FILE

__all__ = ["ClientsTrainGenerator", "make_synthesis", "recipe_synthesis"]

_RESULTS = ("model", "method", "training", "rounds", "clients_per_round", "sampling", "clock", "fleet", "seed")
_EVERY = 5  # rounds between checkpoints


def make_synthesis(
    config: RunConfig, method: Method, data: FederatedData, runtime: Runtime, progress: Progress
) -> Synthesis | None:
    """The run's synthetic images, with the generator trained; None where the method needs none."""
    if not method.uses_generator:
        return None
    synthesis = recipe_synthesis(config, data, runtime, progress)
    synthesis.trained.prepare()  # before the clients' actors have work, so that it has the machine nearly to itself
    return synthesis


def recipe_synthesis(
    config: RunConfig, data: FederatedData, runtime: Runtime, progress: Progress, device: str | None = None
) -> Synthesis:
    """Images of the recipe's generator, whatever its method; nothing is trained yet.

    Args:
        device: see ``Synthesis``.

    Raises:
        OutputError: the model store does not answer, or can't be written.
    """
    reach_store(config)
    spec = build("generator", Component(config.generator.name, config.generator.settings)).federated()
    clients = ClientsTrainGenerator(config, spec, data, runtime, progress) if spec is not None else None
    on_ray = config.runtime.backend == "ray"
    store = open_store(config, progress.message)
    threads = config.runtime.threads
    trained = TrainedGenerator(config.generator, data, progress, clients, store)
    return Synthesis(trained, on_ray, threads, device, runtime.wait)


@dataclass
class ClientsTrainGenerator:
    """FedAvg of a generator's LightningModule over the run's clients, for a ``TrainedGenerator``.

    The module sees images scaled to [0, 1]. Its rounds are on the run's virtual clock, before the run's own, and have
    the run's keys: cohorts, dropouts, and each client's share of its images and their order, are those of the run's own
    rounds of the same number.
    """

    config: RunConfig
    spec: FederatedTraining
    data: FederatedData
    runtime: Runtime
    progress: Progress

    def stage(self) -> RunConfig:
        """The recipe of these rounds: the run's clients, devices and seed, with the generator's model and training."""
        spec = self.spec
        training = TrainingConfig(
            spec.optimizer,
            spec.lr,
            batch_size=spec.batch_size,
            local_epochs=spec.local_epochs,
            sample_fraction=spec.sample_fraction,
        )
        return replace(
            self.config,
            model=Component(spec.model, spec.settings),
            method=Component("fedavg"),
            generator=None,
            training=training,
            rounds=spec.rounds,
            updates=[],
            # The kept weights must not depend on how fast a path is on this machine: the digest does not know it.
            runtime=replace(self.config.runtime, training_path="plain"),
            early_stopping=StoppingConfig(),
            evaluate_every=spec.rounds,
            evaluate_clients_every=0,
        )

    def digest(self) -> str:
        """Of the settings, the clients' images and who owns which."""
        settings = to_dict(self.stage())
        owned = np.sort(self.data.partition.owned())
        images = digest(self.data.images[owned], self.data.labels[owned])
        decides = {name: settings[name] for name in _RESULTS}
        decides |= {
            f"runtime.{name}": settings["runtime"][name] for name in ("threads", "gpus_per_actor", "min_clients")
        }
        traces, code = trace_files(self.config), code_hash("model", self.spec.model)
        decides |= {"trace": traces} if traces else {}
        decides |= {"code": code} if code is not None else {}
        return settings_digest(decides, images, self.data.partition.digest())

    def train(self, draft: Path) -> pl.LightningModule:
        """Run the rounds; checkpoints of an interrupted call in ``draft`` are taken up."""
        config = self.stage()
        channels = self.data.images.shape[1]
        plain = replace(self.data.source, mean=[0.0] * channels, std=[1.0] * channels)
        data = replace(self.data, source=plain)
        method = build("method", config.method)
        context, weights = make_context(config, method, data, RunFolder(draft), self.runtime, self.progress, None)
        kept, done = draft / "checkpoints", 0
        found = checkpoint.latest(kept)
        if found is not None:
            weights, done = restore(found, context, method), found.rounds_done
        self.progress.message(f"{config.data.clients} clients train the generator, {config.rounds} rounds")
        state: checkpoint.Checkpoint | None = None
        try:
            for report in rounds(context, method, weights, done):
                weights, row = report.weights, report.row
                self.progress.steps("generator round", row["round"], config.rounds, f"loss {row['train_loss']:.2f}")
                if row["round"] < config.rounds:  # taken now: an interrupt comes when the method has moved on
                    state = checkpoint_of(row["round"], weights, context, method, wall_s=0.0)
                    if row["round"] % _EVERY == 0:
                        checkpoint.save(kept, state)
        finally:  # whatever ended the rounds, none that is finished is lost
            if state is not None:
                checkpoint.save(kept, state)
        write_json(draft / COST_FILE, {"ledger": context.ledger.state(), "last_round": row})
        shutil.rmtree(kept, ignore_errors=True)
        module = build_module(config.model, ImageShape.of(plain), config.training)
        WeightLayout(module).write(torch.from_numpy(np.array(weights)))
        return module

    def spent(self, folder: Path) -> Ledger:
        """What the kept training has cost the devices."""
        return Ledger(**json.loads((folder / COST_FILE).read_text(encoding="utf-8"))["ledger"])
