"""A classifier's head: its last linear layer, which can be trained alone, as a linear probe of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fl_ray.errors import SettingError

__all__ = ["frozen_but_head", "head_name", "need_head"]


def head_name(module: nn.Module, classes: int) -> str | None:
    """The name of the module's last linear layer, where that gives a number for each class; None where it does not."""
    linear = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return linear[-1][0] if linear and linear[-1][1].out_features == classes else None


def need_head(module: nn.Module, classes: int) -> str:
    """The same where there must be one.

    Raises:
        SettingError: there is none.
    """
    name = head_name(module, classes)
    if name is None:
        raise SettingError(
            f"train is head, but the model's last linear layer does not give the {classes} classes, so there is no "
            "head to train alone; set train to full"
        )
    return name


@contextmanager
def frozen_but_head(module: nn.Module, classes: int) -> Iterator[nn.Module]:
    """The head; meanwhile nothing else of the module takes a gradient."""
    head = module.get_submodule(need_head(module, classes))
    own = {id(parameter) for parameter in head.parameters()}
    frozen = [part for part in module.parameters() if part.requires_grad and id(part) not in own]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield head
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
