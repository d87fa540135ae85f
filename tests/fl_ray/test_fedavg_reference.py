"""Our FedAvg against a plain torch loop that shares nothing with it but the keys of its random draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.experiment import Experiment
from fl_ray.randomness import numpy_generator, seeded_torch, torch_generator

SEED, ROUNDS, COHORT, BATCH, EPOCHS, LR = 4, 3, 3, 8, 2, 0.1


def plain_fedavg(config: RunConfig) -> tuple[dict[str, torch.Tensor], float]:
    data = prepare(config.data, SEED)
    mean, std = data.source.mean[0], data.source.std[0]
    x = (torch.from_numpy(data.images).float() / 255 - mean) / std
    y = torch.from_numpy(data.labels)
    with seeded_torch(SEED, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for number in range(ROUNDS):
        clients = numpy_generator(SEED, "cohort", number).choice(6, COHORT, replace=False, shuffle=False)
        total = sum(len(data.partition.of(client)) for client in clients)
        average = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
        for client in clients:
            net.load_state_dict(state)
            optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
            rows = torch.from_numpy(data.partition.of(client))
            orders = torch_generator(SEED, "client/order", number, int(client))
            for _ in range(EPOCHS):
                for batch in rows[torch.randperm(len(rows), generator=orders)].split(BATCH):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                    optimizer.step()
            for name, value in net.state_dict().items():
                average[name] += len(rows) / total * value.double()
        state = {name: value.float() for name, value in average.items()}
    net.load_state_dict(state)
    test = (torch.from_numpy(data.test_images).float() / 255 - mean) / std
    correct = (net(test).argmax(1) == torch.from_numpy(data.test_labels)).double().mean()
    return state, float(correct)


def test_fedavg_equals_a_plain_loop(
    small: Callable[..., RunConfig], run_small: Callable[..., tuple[Experiment, dict]]
) -> None:
    settings = {"seed": SEED, "training__local_epochs": EPOCHS, "training__momentum": 0.9}
    expected, accuracy = plain_fedavg(small(**settings))
    experiment, summary = run_small(**settings)
    from safetensors.torch import load_file

    found = load_file(experiment.folder / "model.safetensors")
    for name, value in expected.items():
        assert torch.allclose(found[f"network.{name}"], value, rtol=0, atol=2e-6), name
    assert summary["final_accuracy"] == pytest.approx(accuracy)


def test_server_optimizers_by_hand() -> None:
    from types import SimpleNamespace

    from fl_ray.methods.fedavg import FedAvg

    run = SimpleNamespace(is_parameter=np.array([True, True, False]))
    result = SimpleNamespace(included=[1], update=np.array([1.0, -2.0, 4.0]))
    start = np.zeros(3, dtype=np.float32)
    momentum = FedAvg(server_optimizer="momentum", server_lr=0.5, beta1=0.5)
    once = momentum.aggregate(run, 0, start, result)
    assert once.tolist() == [0.5, -1.0, 4.0]  # the buffer takes the plain average
    assert momentum.aggregate(run, 1, once, result).tolist() == [0.5 + 0.75, -1.0 - 1.5, 8.0]
    adam = FedAvg(server_optimizer="adam", server_lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)
    found = adam.aggregate(run, 0, start, result)
    assert found[0] == pytest.approx(0.1 * 0.1 / (np.sqrt(0.01) + 1e-3))
    assert found[1] == pytest.approx(-0.1 * 0.2 / (np.sqrt(0.04) + 1e-3))
    nobody = SimpleNamespace(included=[], update=np.ones(3))
    assert adam.aggregate(run, 1, found, nobody) is found
