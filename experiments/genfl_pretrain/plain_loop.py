"""FedAvg alone on MNIST (federated IID) as in TU Delft's code, with nothing of fl_ray but the network and the data.

    python experiments/genfl_pretrain/plain_loop.py --seeds 0 1 2 3 4 --rounds 1

Prints a row of a Markdown table for each round, to be held against ``mnist.yaml``'s "IID without" and against the
project's public logs. The network's first convolution has one input; of each of its weights the batch norm behind it
keeps little but the sign (unless w^2 times its input's variance is as small as its epsilon). The last column has the
weights whose sign a client has turned in the round: their values before it, and how many clients. A round takes two
minutes of a core.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fl_ray.data.datasets import mnist
from lightning_modules.exquisite import ExquisiteNetV1

CLIENTS, IMAGES, SHARE, BATCH = 10, 60_000, 0.9, 32


def train(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Two epochs on a client's images; the mean of the batches' losses."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5)
    losses = []
    for _ in range(2):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, running: bool = True) -> float:
    """On all of the clients' images, with running statistics or with those of a batch of 500; without dropout."""
    for part in model.modules():
        part.training = isinstance(part, nn.BatchNorm2d) and not running
    right = [(model(x[at : at + 500]).argmax(dim=1) == y[at : at + 500]).sum() for at in range(0, len(x), 500)]
    return float(sum(right)) / len(x)


def first_weights(state: dict[str, Tensor]) -> Tensor:
    """Of the convolution with one input, [12]."""
    return next(value for value in state.values() if value.ndim == 4).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = mnist(Path(os.environ["FL_RAY_DATA"]), download=False)
    x = (torch.from_numpy(data.images[:IMAGES]).float() / 255).round()
    y = torch.from_numpy(data.labels[:IMAGES]).long()
    print("| seed | round | training loss | accuracy [%] | with a batch's statistics [%] | first weights turned |")
    print("| ---: | ---: | ---: | ---: | ---: | --- |")
    for seed in options.seeds:
        torch.manual_seed(seed)
        shared = ExquisiteNetV1(1, 28, 10)
        owned = torch.randperm(IMAGES).chunk(CLIENTS)
        for number in range(1, options.rounds + 1):
            trained, losses = [], []
            for own in owned:
                rows = own[torch.randperm(len(own))[: int(SHARE * len(own))]]
                model = copy.deepcopy(shared)
                losses.append(train(model, x[rows], y[rows]))
                trained.append(model.state_dict())
            before = first_weights(shared.state_dict()).clone()
            turned = torch.stack([first_weights(state).sign() != before.sign() for state in trained]).sum(dim=0)
            told = ", ".join(f"{before[at]:.4f} by {turned[at]}" for at in turned.nonzero().flatten()) or "–"
            averages = {name: sum(state[name] for state in trained) / CLIENTS for name in trained[0]}
            shared.load_state_dict(averages)
            right, at_once = accuracy(shared, x, y), accuracy(copy.deepcopy(shared), x, y, running=False)
            loss = sum(losses) / CLIENTS
            print(f"| {seed} | {number} | {loss:.3f} | {100 * right:.1f} | {100 * at_once:.1f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
