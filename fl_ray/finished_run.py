"""A finished run opened again, to look at what its clients sent and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file

from fl_ray.config import Component, RunConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.errors import OutputError, SettingError
from fl_ray.experiment import check
from fl_ray.federated_generator import recipe_synthesis
from fl_ray.methods.base import Method
from fl_ray.methods.fedlmg import FedLMG
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.preparation import check_partition, make_context
from fl_ray.progress import Progress
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.start import open_runtime
from fl_ray.synthesis import Synthesis
from fl_ray.tracking_store import add_to_run

__all__ = ["FinishedRun"]


@dataclass
class FinishedRun:
    """A run's folder with its data and its method; nothing is published or computed on Ray.

    Attributes:
        config: the run's, but for where it is computed.
        sampled_on: the device on which its images were made, where that was not this process's.
    """

    folder: RunFolder
    config: RunConfig
    method: Method
    data: FederatedData
    sampled_on: str | None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open it, on the data that it had.

        Raises:
            OutputError: no finished run's folder, or other data.
        """
        folder = RunFolder(path)
        if not folder.finished():
            raise OutputError(f"{path}: no finished run; give one run's folder (of a comparison: runs/LABEL/SEED)")
        config = folder.config()
        config = replace(config, tracking=replace(config.tracking, enabled=False), model_store=None)
        by_actors = config.generator is not None and config.runtime.backend == "ray" and config.generator.pool.gpus == 0
        config = replace(config, runtime=replace(config.runtime, backend="in_process"))
        method, data = check(config), prepare(config.data, config.seed)
        check_partition(folder, data, path)
        return cls(folder, config, method, data, "cpu" if by_actors else None)

    def model_of(self, client: int) -> Component:
        """What a client has trained."""
        return self.method.model_of(self.config, client)

    def load(self, file: Path, component: Component) -> torch.nn.Module:
        """A classifier of the run, in evaluation mode.

        Raises:
            SettingError: it is no classifier.
        """
        module = build_module(component, ImageShape.of(self.data.source), self.config.training)
        if hasattr(module, "evaluation"):
            raise SettingError(f"model {component.name} is no classifier, so there is nothing to look at")
        module.load_state_dict(load_file(file))
        return module.eval()

    def uploads(self) -> dict[int, torch.nn.Module]:
        """The classifiers that clients have sent whole, by client; empty where the method has none."""
        files = sorted((self.folder / "uploads").glob("client_*.safetensors"))
        numbers = [int(file.stem.removeprefix("client_")) for file in files]
        return {number: self.load(file, self.model_of(number)) for number, file in zip(numbers, files, strict=True)}

    def guided_images(
        self, uploads: dict[int, torch.nn.Module], progress: Progress
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Images that each client's upload has guided, and their classes: from the generator's cache. What is not there
        is made again, and told.

        Raises:
            SettingError: nothing was guided in this run.
            OutputError: the generator would be another than the run's.
        """
        config, method = self.config, self.method
        if not isinstance(method, FedLMG) or not uploads:
            raise SettingError(
                f"method {config.method.name} has no images that clients have guided; what a recipe's generator makes "
                f"is measured by fl-ray quality RECIPE, as {self.folder.path / 'config.yaml'} is one"
            )
        method.uploads = {client: WeightLayout(module).read().numpy() for client, module in uploads.items()}
        with open_runtime(config, progress) as runtime:
            synthesis = recipe_synthesis(config, self.data, runtime, progress, self.sampled_on)
            self._check_generator(synthesis)
            context, _ = make_context(config, method, self.data, self.folder, runtime, progress, synthesis)
            try:
                found = method.guided_samples(context)
            finally:
                synthesis.close()
        again = context.notes["guided_synthesis"]["images_made"]
        if again:
            progress.message(
                f"{again} of the guided images were not in the cache and have been made again: where the device or the "
                "libraries differ, these are not to the bit the run's"
            )
        return found

    def _check_generator(self, synthesis: Synthesis) -> None:
        made = self.folder.summary()["synthesis"]
        then = made["key"]
        now = synthesis.trained.key
        if then != now:
            raise OutputError(
                f"{self.folder.path}: the generator is not the run's (key {then} then, {now} now): it was "
                "trained on another kind of device, on other images or by another version of fl_ray; look at the run "
                "where it was made, or run it again"
            )
        weights = synthesis.trained.weights
        if made["weights"] != weights:
            raise OutputError(
                f"{self.folder.path}: the generator has been trained anew since the run, and has come out with other "
                f"weights (SHA-256 {made['weights'][:12]} then, {weights[:12]} now); run it again"
            )

    def log(self, found: Mapping[str, float], files: Sequence[Path], progress: Progress) -> None:
        """Add what was found to the run's own MLflow run, where it has one."""
        known = self.folder / "tracking.json"
        if not known.exists():
            return
        stored = json.loads(known.read_text(encoding="utf-8"))
        try:
            add_to_run(stored["uri"], stored["run_id"], found, files)
        except SettingError as error:
            progress.message(f"the run in MLflow did not take what was found ({error}); it is in {files[0].parent}")
