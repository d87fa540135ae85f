"""What a run leaves when its rounds are over: models, sample images, and the end of its MLflow run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

__all__ = [
    "client_grid",
    "columns_of_classes",
    "end_tracking",
    "is_one_model",
    "log_model",
    "sample_grid",
    "write_models",
    "write_samples",
]

Images = tuple[np.ndarray, np.ndarray]  # uint8 [N, C, H, W] and their classes, int64 [N]
_SAMPLE_COLUMNS = 8
_CLIENT_COLUMNS = 10
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
    made = method.guided_samples(run)
    if made is not None:
        picture = client_grid(run.data, made)
    else:
        available, shown = run.synthesis.available(), np.full(run.data.num_classes, _SAMPLE_COLUMNS)
        counts = shown if available is None else np.minimum(available, shown)
        picture = sample_grid(run.data, *run.synthesis.images(counts, run.config.seed))
    (run.folder / "samples.png").write_bytes(picture)


def sample_grid(data: FederatedData, images: np.ndarray, labels: np.ndarray) -> bytes:
    """A PNG of public images, where there are any, beside the first generated ones of each class."""
    public = data.public_images, data.public_labels
    return columns_of_classes(
        data.source.classes, range(data.num_classes), public, (images, labels), of="real (public part)"
    )


def columns_of_classes(names: Sequence[str], shown: Iterable[int], real: Images, made: Images, of: str) -> bytes:
    """A PNG of the first real images of some classes beside the first generated ones; white where there are none.

    Args:
        names: of all classes.
        shown: which of them.
        of: what the real ones are.
    """
    from fl_ray.report.figures import samples_png

    labels = list(shown)
    sides = [_rows(side, labels) for side in (real, made)]
    if not len(real[0]):
        sides[0] = sides[0][:, :0]
    return samples_png(*sides, [names[label] for label in labels], of)


def _rows(side: Images, labels: Sequence[int]) -> np.ndarray:
    """The first images of each class, uint8 [classes, columns, C, H, W]."""
    images, own = side
    found = [images[own == label][:_SAMPLE_COLUMNS] for label in labels]
    sheet = np.full((len(found), _SAMPLE_COLUMNS, *images.shape[1:]), 255, dtype=np.uint8)
    for row, given in zip(sheet, found, strict=True):
        row[: len(given)] = given
    return sheet


def client_grid(data: FederatedData, made: Mapping[int, Images]) -> bytes:
    """A PNG with a row for each client: its first image of each of its first classes, beside what it has guided."""
    from fl_ray.report.figures import samples_png

    columns = min(_CLIENT_COLUMNS, data.num_classes)
    shape = len(made), columns, *data.images.shape[1:]
    sides = np.full((2, *shape), 255, dtype=np.uint8)
    for place, (client, guided) in enumerate(made.items()):
        rows = data.partition.of(client)
        known = np.unique(data.labels[rows])[:columns]
        for side, (images, labels) in zip(sides, ((data.images[rows], data.labels[rows]), guided), strict=True):
            for column, label in enumerate(known):
                side[place, column] = images[labels == label][0]
    return samples_png(*sides, [data.client_name(client) for client in made], "real (the client's own)")


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
