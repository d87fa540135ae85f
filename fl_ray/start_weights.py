"""Weights that a model starts from: ``start`` in its section of a recipe names a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fl_ray.errors import SettingError
from fl_ray.head import head_name

__all__ = ["load_start"]

_TOLD = 3  # names of tensors in a message


def load_start(module: nn.Module, file: str, name: str, classes: int) -> dict[str, Any]:
    """Give a module the weights of a file, as ``model.safetensors`` of a run of the same model.

    The head is taken where the file has one for as many classes, else it stays as it is; all other tensors must be
    there.

    Args:
        name: of the model, for messages.

    Returns:
        For summary.json: the file's hash, and whose head it is.

    Raises:
        SettingError: it is no such file, or its tensors are not those of the model.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise SettingError(
            f"model {name}: start is {file}, but there is no such file; give a safetensors file, or leave it out"
        )
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise SettingError(
            f"model {name}: start is {file}, which is no safetensors file ({error}); give one"
        ) from error
    own, head = module.state_dict(), head_name(module, classes)
    of_head = [key for key in own if head is not None and key.rpartition(".")[0] == head]
    has_head = bool(of_head) and all(key in found and found[key].shape == own[key].shape for key in of_head)
    rest, given = set(own) - set(of_head), set(found) - set(of_head)
    if rest != given:
        apart = {"it lacks": rest - given, "the model lacks": given - rest}
        told = "; ".join(f"{whose} {_some(keys)}" for whose, keys in apart.items() if keys)
        raise SettingError(
            f"model {name}: start is {file}, whose tensors are not those of the model ({told}); give a file of this "
            "model"
        )
    for key in sorted(rest):
        if found[key].shape != own[key].shape:
            raise SettingError(
                f"model {name}: start is {file}, whose {key} has the shape {list(found[key].shape)}, but the model's "
                f"has {list(own[key].shape)}; give a file of this model, with its settings, for images of this size"
            )
    module.load_state_dict({key: found[key] if key in rest or has_head else own[key] for key in own})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"sha256": digest, "head": "of the file" if has_head else "as drawn"}


def _some(names: Iterable[str]) -> str:
    told = sorted(names)
    return ", ".join(told[:_TOLD]) + (f" and {len(told) - _TOLD} more" if len(told) > _TOLD else "")
