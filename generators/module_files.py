"""A LightningModule or network on disk: its weights as safetensors, what its constructor takes as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["read_module", "write_module"]

_Module = TypeVar("_Module", bound=nn.Module)
_WEIGHTS, _SETTINGS = "weights.safetensors", "settings.json"


def write_module(folder: Path, module: nn.Module, settings: dict[str, Any]) -> None:
    """Keep ``module``, which a call with ``settings`` made."""
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / _WEIGHTS)
    (folder / _SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def read_module(folder: Path, make: Callable[..., _Module]) -> _Module:
    """The module that ``write_module`` has kept, made by ``make``, ready for sampling."""
    module = make(**json.loads((folder / _SETTINGS).read_text(encoding="utf-8")))
    module.load_state_dict(load_file(folder / _WEIGHTS))
    return module.eval()
