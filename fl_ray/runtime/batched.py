"""The batched training path: a host's clients trained as one program, their parameters stacked (``torch.func``).

Small models spend their time in Python and in kernel launches; here every step is paid once for all clients of a host.
Clients go in lockstep through their own batches: client i's k-th batch is in step k. At each step those whose batches
are equally large are computed together, and clients that are done drop out. A client's result does not depend on who
is computed beside it; ``ClientHost.resolve_path`` checks that to the bit before the path is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fl_ray.config import TrainingConfig
from fl_ray.runtime.local_training import (
    Correction,
    Key,
    batches_of,
    loss_of,
    only_optimizer,
    scale_lr,
)
from lightning_modules.classifier import Classifier

__all__ = ["BatchedClients", "BatchedTraining", "refusal"]

_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
_TRACE_AFTER = 50  # tracing takes as long as dozens of steps
_MAX_TRACES = 8
_OURS = ("torch.nn.", "lightning_modules.")


@dataclass(frozen=True)
class BatchedClients:
    """Clients to be trained together; lists of tensors are in the order of ``module.parameters()``.

    Attributes:
        x, y: inputs and labels of all of them, one after another, on the module's device.
        sizes: samples of each.
        keys: of each one's draws.
        start: parameters at the start, [clients, ...].
        offset: as in ``Correction``, [clients, ...]; empty: none.
    """

    x: Tensor
    y: Tensor
    sizes: Sequence[int]
    keys: Sequence[Key]
    start: Sequence[Tensor]
    offset: Sequence[Tensor] = ()


def refusal(module: pl.LightningModule) -> str | None:
    """Why a module's clients can't be trained as one program, or None."""
    for part in module.modules():
        name = type(part).__name__
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            return f"{name} keeps running statistics"
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return f"{name} can't train on a batch of one sample"
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{name} draws random numbers"
    if not all(parameter.requires_grad for parameter in module.parameters()):
        return "some of its parameters are frozen"
    kind = type(only_optimizer(module))
    if kind not in _ELEMENTWISE:
        return f"the optimiser {kind.__name__} is not known to work entry by entry"
    return None


class _TrainingStep(nn.Module):
    """``training_step`` as a forward pass, so that it can be called with parameters from outside."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.module.training_step((x, y), batch_idx))


class BatchedTraining:
    """Trains clients of one module together; the module's own weights are left as they are."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        step = _TrainingStep(module)
        names = [name for name, _ in step.named_parameters()]
        buffers = dict(step.named_buffers())

        def loss(parameters: list[Tensor], x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
            return functional_call(step, {**dict(zip(names, parameters, strict=True)), **buffers}, (x, y, batch_idx))

        self._gradients = vmap(grad_and_value(loss), in_dims=(0, 0, 0, None), randomness="error")
        # A trace replays tensor operations alone, so it is taken only of modules that are known to do nothing else.
        self._traceable = type(module) is Classifier and all(
            type(part).__module__.startswith(_OURS) for part in module.network.modules()
        )
        self._seen: dict[tuple[int, ...], int] = {}
        self._traces: dict[tuple[int, ...], Any] = {}

    def train(
        self, clients: BatchedClients, training: TrainingConfig, epochs: int, factor: float, proximal: float = 0.0
    ) -> tuple[list[Tensor], list[float]]:
        """Train every client from its own start.

        Returns:
            parameters [clients, ...], in the order of ``module.parameters()``, and each client's mean loss.
        """
        self.module.train()
        plans, first = [], 0
        for size, key in zip(clients.sizes, clients.keys, strict=True):
            plans.append([rows + first for rows in batches_of(size, training.batch_size, epochs, key)])
            first += size
        order = sorted(range(len(plans)), key=lambda index: -len(plans[index]))  # who is done first comes last
        plans = [plans[index] for index in order]
        starts = [tensor[order] for tensor in clients.start]
        offsets = [tensor[order] for tensor in clients.offset]
        stacked = [start.clone() for start in starts]
        optimizer = self._optimizer(stacked, factor)
        losses = torch.zeros(len(plans), dtype=torch.float64, device=clients.x.device)
        active, live = len(plans), stacked
        for step in range(len(plans[0])):
            going = sum(len(plan) > step for plan in plans)
            if going < active:
                active, live = going, _shrink(optimizer, live, going)
            rows = [plan[step] for plan in plans[:active]]
            gradients = self._step(live, rows, clients.x, clients.y, step, losses)
            for parameter, gradient in zip(live, gradients, strict=True):
                parameter.grad = gradient
            if offsets or proximal:
                correction = Correction(proximal, [s[:active] for s in starts], [o[:active] for o in offsets])
                correction.add_to(live)
            if training.clip_norm is not None:
                _clip(live, training.clip_norm)
            optimizer.step()
        back = sorted(range(len(order)), key=order.__getitem__)
        totals = losses[back].tolist()
        means = [total / (epochs * size) for total, size in zip(totals, clients.sizes, strict=True)]
        return [tensor[back] for tensor in stacked], means

    def _optimizer(self, stacked: list[Tensor], factor: float) -> torch.optim.Optimizer:
        """The module's own optimiser over the stacked parameters: it works entry by entry."""
        own = only_optimizer(self.module)
        place = {id(parameter): index for index, parameter in enumerate(self.module.parameters())}
        groups = []
        for group in own.param_groups:
            # One kernel per tensor: a fused one may round the ends of a tensor, which depend on who is stacked,
            # in another way than its middle.
            options = {name: value for name, value in group.items() if name != "params"}
            options |= {name: False for name in ("fused", "foreach") if name in group}
            groups.append({"params": [stacked[place[id(p)]] for p in group["params"]], **options})
        made = type(own)(groups)
        scale_lr(made, factor)
        return made

    def _step(
        self, live: list[Tensor], rows: list[Tensor], x: Tensor, y: Tensor, step: int, losses: Tensor
    ) -> list[Tensor]:
        """Gradients of all live clients' batches; their losses, times the batch's size, are added to ``losses``."""
        sizes = [len(batch) for batch in rows]
        if len(set(sizes)) == 1:
            taken = torch.stack(rows).to(x.device)
            gradients, loss = self._call(live, x[taken], y[taken], step)
            losses[: len(rows)] += loss.double() * sizes[0]
            return list(gradients)
        gradients = [torch.empty_like(parameter) for parameter in live]
        for size in sorted(set(sizes)):
            members = [index for index, own in enumerate(sizes) if own == size]
            taken = torch.stack([rows[index] for index in members]).to(x.device)
            where = torch.tensor(members, device=x.device)
            part, loss = self._call([parameter[where] for parameter in live], x[taken], y[taken], step)
            for gradient, values in zip(gradients, part, strict=True):
                gradient[where] = values
            losses[where] += loss.double() * size
        return gradients

    def _call(self, parameters: list[Tensor], x: Tensor, y: Tensor, step: int) -> tuple[Sequence[Tensor], Tensor]:
        if not self._traceable:
            return self._gradients(parameters, x, y, step)
        shape = tuple(x.shape)
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if shape not in self._traces and self._seen[shape] > _TRACE_AFTER and len(self._traces) < _MAX_TRACES:
            from torch.fx.experimental.proxy_tensor import make_fx

            self._traces[shape] = make_fx(lambda p, a, b: self._gradients(p, a, b, 0))(parameters, x, y)
        if shape in self._traces:
            return self._traces[shape](parameters, x, y)
        return self._gradients(parameters, x, y, step)


def _shrink(optimizer: torch.optim.Optimizer, live: list[Tensor], active: int) -> list[Tensor]:
    """Views of the first ``active`` clients in the optimiser's parameters and state; the others are done."""
    views = {id(parameter): parameter[:active] for parameter in live}
    for group in optimizer.param_groups:
        group["params"] = [views[id(parameter)] for parameter in group["params"]]
    for parameter in live:
        state = optimizer.state.pop(parameter, {})
        optimizer.state[views[id(parameter)]] = {
            name: value[:active] if isinstance(value, Tensor) and value.shape == parameter.shape else value
            for name, value in state.items()
        }
    return [views[id(parameter)] for parameter in live]


def _clip(live: list[Tensor], limit: float) -> None:
    """Scale each client's gradient down to norm ``limit``, as ``clip_grad_norm_`` does for one."""
    squares = [parameter.grad.reshape(len(parameter), -1).norm(dim=1) for parameter in live]
    factor = (limit / (torch.stack(squares).norm(dim=0) + 1e-6)).clamp(max=1.0)
    for parameter in live:
        parameter.grad.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)))
