"""Torchvision's weights as files: the networks that start from them compute what torchvision's do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torchvision import models

from fl_ray.config import Component, TrainingConfig
from fl_ray.model import ImageShape, build_module

SCRIPT = Path(__file__).parents[2] / "experiments" / "fedlmg" / "torchvision_weights.py"


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0"])
def test_a_renamed_network_is_the_same(network: str) -> None:
    spec = importlib.util.spec_from_file_location("torchvision_weights", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    theirs = models.get_model(network).eval()
    shape = ImageShape(3, 64, 1000, (0.5,) * 3, (0.5,) * 3)
    ours = build_module(Component("torchvision", {"network": network}), shape, TrainingConfig()).eval()
    ours.load_state_dict(script.renamed(theirs.state_dict()))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))
