"""Torchvision's weights, trained on ImageNet, as files for ``start`` of models ``torchvision``; needs the network.

    python experiments/fedlmg/torchvision_weights.py resnet18 mobilenet_v2 --output weights

A file holds all of a network, its head for ImageNet's 1,000 classes too: that is begun afresh for other classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchvision import models

INSIDE = "network.network."  # where ``fl_ray`` has torchvision's network in its module


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of torchvision's with the names that ``model: {name: torchvision}`` has."""
    return {f"{INSIDE}{name}": tensor.contiguous() for name, tensor in state.items()}


def main() -> None:
    """Write a file for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=models.list_models(module=models), metavar="NETWORK")
    parser.add_argument("--output", type=Path, default=Path("weights"), help="a folder")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for network in given.networks:
        path = given.output / f"{network}.safetensors"
        save_file(renamed(models.get_model(network, weights="DEFAULT").state_dict()), path, {"format": "pt"})
        print(f"{path}: {models.get_model_weights(network).DEFAULT}")


if __name__ == "__main__":
    main()
