"""What a run leaves when its rounds are over: models, sample images, and the end of its MLflow run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData
from fl_ray.methods.base import Method
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.run_folder import RunFolder
from fl_ray.tracking import Tracker

__all__ = ["end_tracking", "is_one_model", "log_model", "sample_grid", "write_models", "write_samples"]

_SAMPLE_COLUMNS = 8
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "stopped": "KILLED", "failed": "FAILED"}  # ours: MLflow's


def write_models(run: RunContext, method: Method, weights: np.ndarray, best: np.ndarray | None) -> None:
    """model.safetensors, best_model.safetensors where there is one best model, and what clients have uploaded."""
    from safetensors.torch import save_file

    config, shape = run.config, ImageShape.of(run.data.source)
    layout = WeightLayout(build_module(config.model, shape, config.training))
    tensors: dict[str, torch.Tensor] = {}
    for prefix, values in method.models(weights).items():
        tensors |= {f"{prefix}{name}": tensor for name, tensor in layout.named(values).items()}
    save_file(tensors, run.folder / "model.safetensors", {"format": "pt"})
    for client, values in method.uploaded().items():
        own = WeightLayout(build_module(method.model_of(config, client), shape, config.training))
        path = run.folder / "uploads" / f"client_{client:04d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(own.named(values), path, {"format": "pt"})
    if best is not None and is_one_model(method, best):
        save_file(layout.named(best), run.folder / "best_model.safetensors", {"format": "pt"})


def is_one_model(method: Method, weights: np.ndarray) -> bool:
    """Whether the method ends with one model, not one of each client."""
    return set(method.models(weights)) == {""}


def write_samples(run: RunContext, method: Method) -> None:
    """samples.png: real images beside generated ones."""
    made = method.sample_images(run)
    if made is None:
        available, shown = run.synthesis.available(), np.full(run.data.num_classes, _SAMPLE_COLUMNS)
        made = run.synthesis.images(shown if available is None else np.minimum(available, shown), run.config.seed)
    (run.folder / "samples.png").write_bytes(sample_grid(run.data, *made))


def sample_grid(data: FederatedData, images: np.ndarray, labels: np.ndarray) -> bytes:
    """A PNG of public images beside the first generated ones of each class; white where there are none."""
    from fl_ray.report.figures import samples_png

    shape = data.num_classes, _SAMPLE_COLUMNS, *images.shape[1:]
    sides = np.full((2, *shape), 255, dtype=np.uint8)
    for side, (found, of) in zip(sides, ((data.public_images, data.public_labels), (images, labels)), strict=True):
        for label in range(data.num_classes):
            own = found[of == label][:_SAMPLE_COLUMNS]
            side[label, : len(own)] = own
    return samples_png(*sides, data.source.classes)


def end_tracking(
    tracker: Tracker, folder: RunFolder, summary: dict[str, Any], model: Callable[[], None] | None
) -> None:
    """Hand MLflow the summary's numbers and the folder's files; waits until all is written."""
    metrics = {name: summary[name] for name in ("final_accuracy", "best_accuracy") if summary[name] is not None}
    for target, hit in summary["targets"].items():
        if hit is not None:
            metrics |= {f"{name}_to_{target}": value for name, value in hit.items()}
    names = ("summary.json", "config.yaml", "report.html", "samples.png", "model.safetensors")
    files = [path for path in (folder / name for name in names) if path.exists()]
    files += sorted((folder / "figures").glob("*.svg"))
    tracker.finish(_STATUS[summary["status"]], metrics, files, model)


def log_model(config: RunConfig, data: FederatedData, weights: np.ndarray) -> None:
    """The model as MLflow keeps it: exported by torch, so that loading it unpickles nothing of ours.

    What is no classifier is left out: it has more than one input.
    """
    from fl_ray import tracking

    shape = ImageShape.of(data.source)
    module = build_module(config.model, shape, config.training)
    if hasattr(module, "evaluation"):
        return
    WeightLayout(module).write(torch.from_numpy(np.array(weights)))
    example = shape.normalise(data.test_images[:2], torch.device("cpu")).numpy()
    tracking.log_model(module, example, config.tracking.registered_model)
