"""Methods against plain torch loops (which share with ours the keys of draws alone), formulas and cases by hand."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError, TooFewClientsError
from fl_ray.experiment import Experiment
from fl_ray.methods.feddyn import FedDyn
from fl_ray.methods.fednova import FedNova
from fl_ray.methods.fedprox import FedProx
from fl_ray.methods.robust import CoordinateMedian, Krum, TrimmedMean
from fl_ray.methods.scaffold import Scaffold
from fl_ray.randomness import numpy_generator, seeded_torch, torch_generator
from fl_ray.runtime.base import Phases, RoundResult
from fl_ray.runtime.in_process import InProcessRuntime
from fl_ray.runtime.local_training import Correction, batches_of, count_batches
from fl_ray.runtime.tasks import ClientRecord, RoundSettings, Task

Run = Callable[..., tuple[Experiment, dict]]
Small = Callable[..., RunConfig]

SEED, ROUNDS, CLIENTS, COHORT, BATCH, EPOCHS, LR = 4, 3, 6, 3, 8, 2, 0.1
BASE = {"seed": SEED, "training__local_epochs": EPOCHS}


class Plain:
    """The digits' clients, and a loop that trains one with autograd on any corrected loss; weights are flat."""

    def __init__(self, config: RunConfig) -> None:
        data = prepare(config.data, SEED)
        self.x = (torch.from_numpy(data.images).float() / 255 - data.source.mean[0]) / data.source.std[0]
        self.y = torch.from_numpy(data.labels)
        self.rows = [torch.from_numpy(data.partition.of(client)) for client in range(CLIENTS)]
        with seeded_torch(SEED, "init"):
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.start = parameters_to_vector(self.net.parameters()).detach().clone()

    def cohort(self, number: int) -> list[int]:
        return sorted(numpy_generator(SEED, "cohort", number).choice(CLIENTS, COHORT, False, shuffle=False).tolist())

    def train(
        self,
        client: int,
        number: int,
        start: Tensor,
        extra: Callable[[Tensor], Tensor | float] = lambda w: 0.0,
        lr: float = LR,
        momentum: float = 0.0,
    ) -> tuple[Tensor, int]:
        """The client's new weights and its number of steps."""
        vector_to_parameters(start.clone(), self.net.parameters())
        optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=momentum)
        orders, rows, steps = torch_generator(SEED, "client/order", number, client), self.rows[client], 0
        for _ in range(EPOCHS):
            for batch in rows[torch.randperm(len(rows), generator=orders)].split(BATCH):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(self.x[batch]), self.y[batch])
                (loss + extra(parameters_to_vector(self.net.parameters()))).backward()
                optimizer.step()
                steps += 1
        return parameters_to_vector(self.net.parameters()).detach().clone(), steps


def assert_near(experiment: Experiment, expected: Tensor, tolerance: float = 5e-6) -> None:
    assert np.abs(experiment._weights - expected.numpy()).max() < tolerance


def test_fedprox_equals_a_plain_loop(small: Small, run_small: Run) -> None:
    mu, plain = 0.5, Plain(small(**BASE))
    w = plain.start
    for number in range(ROUNDS):
        cohort = plain.cohort(number)
        total = sum(len(plain.rows[client]) for client in cohort)
        new = torch.zeros_like(w)
        for client in cohort:
            pulled = plain.train(client, number, w, lambda v, w=w: mu / 2 * ((v - w) ** 2).sum())[0]
            new += len(plain.rows[client]) / total * pulled
        w = new
    experiment, _ = run_small(**BASE, method__name="fedprox", method__mu=mu)
    assert_near(experiment, w)
    fedavg, _ = run_small(**BASE)
    assert np.abs(experiment._weights - fedavg._weights).max() > 1e-3


def test_fedprox_with_mu_0_is_fedavg(run_small: Run) -> None:
    fedavg, _ = run_small(**BASE)
    fedprox, _ = run_small(**BASE, method__name="fedprox", method__mu=0.0)
    assert (fedavg._weights == fedprox._weights).all()


def test_scaffold_equals_a_plain_loop(small: Small, run_small: Run) -> None:
    """With a step that halves each round and a server step below 1."""
    server_lr, plain = 0.7, Plain(small(**BASE))
    x, c = plain.start, torch.zeros_like(plain.start)
    own = [torch.zeros_like(x) for _ in range(CLIENTS)]
    for number in range(ROUNDS):
        lr, cohort = LR * 0.5**number, plain.cohort(number)
        moved, shifted = torch.zeros_like(x), torch.zeros_like(x)
        for client in cohort:
            y, steps = plain.train(client, number, x, lambda v, d=c - own[client]: (v * d).sum(), lr)
            new = own[client] - c + (x - y) / (steps * lr)
            moved, shifted = moved + (y - x) / COHORT, shifted + (new - own[client]) / COHORT
            own[client] = new
        x, c = x + server_lr * moved, c + COHORT / CLIENTS * shifted
    schedule = {"training__lr_schedule": "step", "training__lr_step_rounds": 1, "training__lr_gamma": 0.5}
    experiment, summary = run_small(**BASE, **schedule, method__name="scaffold", method__server_lr=server_lr)
    assert_near(experiment, x)
    state = experiment.method.state()
    assert np.abs(state.pop("c") - c.numpy()).max() < 1e-4
    assert sorted(state) == [f"client/{client}" for client in range(CLIENTS) if own[client].any()]
    for name, found in state.items():
        assert np.abs(found - own[int(name.removeprefix("client/"))].numpy()).max() < 1e-4
    other = run_small(**BASE)[1]
    assert summary["bytes_up"] == 2 * other["bytes_up"]  # the variates travel, too


def test_feddyn_equals_a_plain_loop(small: Small, run_small: Run) -> None:
    alpha, plain = 0.3, Plain(small(**BASE))
    theta, h = plain.start, torch.zeros_like(plain.start)
    gradient = [torch.zeros_like(theta) for _ in range(CLIENTS)]
    for number in range(ROUNDS):
        cohort, trained = plain.cohort(number), []
        for client in cohort:
            own = gradient[client]
            new, _ = plain.train(
                client, number, theta, lambda v, g=own, w=theta: alpha / 2 * ((v - w) ** 2).sum() - (g * v).sum()
            )
            gradient[client] = own - alpha * (new - theta)
            trained.append(new)
        h = h - alpha / CLIENTS * sum(new - theta for new in trained)
        theta = sum(trained) / COHORT - h / alpha
    experiment, _ = run_small(**BASE, method__name="feddyn", method__alpha=alpha)
    assert_near(experiment, theta, 2e-5)
    state = experiment.method.state()
    for client in range(CLIENTS):
        if gradient[client].any():
            assert np.abs(state[f"client/{client}"] - gradient[client].numpy()).max() < 1e-5
    assert np.abs(state["h"] - torch.stack(gradient).mean(0).numpy()).max() < 1e-5  # h is the clients' mean


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_equals_a_plain_loop(small: Small, run_small: Run, momentum: float) -> None:
    settings = {**BASE, "training__momentum": momentum, "training__lr": 0.05}
    plain = Plain(small(**settings))
    x, seen = plain.start, set()
    for number in range(ROUNDS):
        cohort = plain.cohort(number)
        total = sum(len(plain.rows[client]) for client in cohort)
        direction, tau_eff = torch.zeros_like(x), 0.0
        for client in cohort:
            y, tau = plain.train(client, number, x, lr=0.05, momentum=momentum)
            norm = (tau - momentum * (1 - momentum**tau) / (1 - momentum)) / (1 - momentum)
            p = len(plain.rows[client]) / total
            direction, tau_eff = direction + p * (x - y) / norm, tau_eff + p * norm
            seen.add(tau)
        x = x - tau_eff * direction
    assert len(seen) > 2
    experiment, _ = run_small(**settings, method__name="fednova")
    assert_near(experiment, x)


def test_fednova_with_equal_steps_is_fedavg(run_small: Run) -> None:
    settings = {**BASE, "data__partition__name": "iid", "training__momentum": 0.5, "training__batch_size": 10}
    fedavg, _ = run_small(**settings)
    assert len({-(-size // 10) for size in fedavg.data.partition.sizes.tolist()}) == 1
    fednova, _ = run_small(**settings, method__name="fednova")
    assert np.abs(fedavg._weights - fednova._weights).max() < 1e-6


def record(client: int, share: float, left_out: str | None = None) -> ClientRecord:
    return ClientRecord(client, 10, 1.0, share, 0.0, 1.0, left_out)


def test_fednova_by_hand_without_one_that_was_left_out() -> None:
    """Steps 2 and 4, half each: tau_eff 3. Both clients' buffers grew by 6, and so does the average."""
    method = FedNova()
    method._sgd, method._momentum = SimpleNamespace(steps={0: 2, 1: 4, 2: 100}.get), 0.0
    records = [record(0, 0.25), record(1, 0.25), record(2, 0.5, "it dropped out")]
    result = RoundResult(np.array([1.0, 0.5 * 6 / 2 + 0.5 * 6 / 4]), {}, records)
    run = SimpleNamespace(is_parameter=np.array([True, False]))
    assert method.aggregate(run, 0, np.array([10, 1], dtype=np.float32), result).tolist() == [13.0, 7.0]


def test_corrections_are_gradients_of_the_local_objectives() -> None:
    """Central differences of what the papers add to the loss, in float64."""
    rng = np.random.default_rng(0)
    start, at, held = (rng.normal(size=5).astype(np.float32) for _ in range(3))
    run: Any = SimpleNamespace(
        data=SimpleNamespace(partition=SimpleNamespace(sizes=np.array([4, 4]))),
        sampler=SimpleNamespace(equal_shares=False),
        is_parameter=np.ones(5, dtype=bool),
    )
    feddyn, fedprox = FedDyn(alpha=0.3), FedProx(mu=0.7)
    feddyn.load_state({"h": np.zeros(5), "client/1": held})
    terms: list[tuple[Any, Callable[[np.ndarray], float]]] = [
        (feddyn, lambda w: -held @ w + 0.3 / 2 * ((w - start) ** 2).sum()),
        (fedprox, lambda w: 0.7 / 2 * ((w - start) ** 2).sum()),
    ]
    for method, term in terms:
        (task,) = method.tasks(run, 0, np.array([1]))
        parameter = nn.Parameter(torch.from_numpy(at.copy()))
        parameter.grad = torch.zeros(5)
        offset = [] if task.offset is None else [torch.from_numpy(task.offset)]
        Correction(method.proximal, [torch.from_numpy(start)], offset).add_to([parameter])
        steps = 1e-5 * np.eye(5)
        expected = [(term(at + step) - term(at - step)) / 2e-5 for step in steps]
        assert parameter.grad.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_both_training_paths_agree(run_small: Run, method: str) -> None:
    plain, _ = run_small(**BASE, method__name=method)
    batched, _ = run_small(**BASE, method__name=method, runtime__training_path="batched")
    assert np.abs(plain._weights - batched._weights).max() < 1e-5
    for name, value in plain.method.state().items():
        assert np.abs(batched.method.state()[name] - value).max() < 1e-4


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_clients_that_are_left_out_keep_their_state(run_small: Run, method: str) -> None:
    """By blocks of classes client 4 alone holds class 9, and its training goes wrong. Buffers have no state."""
    blocks = {"data__clients": 5, "clients_per_round": 5, "data__partition__name": "label_blocks"}
    experiment, summary = run_small(model__name="tests.fl_ray.own:NanOnNine", method__name=method, **blocks)
    state = experiment.method.state()
    assert summary["updates_left_out"] == 3
    assert sorted(name for name in state if "/" in name) == [f"client/{client}" for client in range(4)]
    from fl_ray.model import ImageShape, WeightLayout, build_module

    shape, config = ImageShape.of(experiment.data.source), experiment.config
    buffers = ~WeightLayout(build_module(config.model, shape, config.training)).is_parameter
    assert buffers.any()
    assert all(not value[buffers].any() and value.any() for value in state.values())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method__name": "scaffold", "training__momentum": 0.9}, r"training\.momentum is 0\.9"),
        ({"method__name": "scaffold", "training__optimizer": "adam"}, r"training\.optimizer is adam"),
        ({"method__name": "scaffold", "training__clip_norm": 1.0}, r"training\.clip_norm is 1\.0"),
        ({"method__name": "scaffold", "updates": [{"name": "top_k"}]}, r"updates is \['top_k'\]"),
        ({"method__name": "fednova", "training__optimizer": "adamw"}, r"training\.optimizer is adamw"),
        ({"method__name": "krum"}, r"clients_per_round is 3, but krum .* at least 5 clients"),
        ({"method__name": "krum", "clients_per_round": 5, "method__multi": 5}, r"method\.multi is 5, above the 4"),
        ({"method__name": "trimmed_mean"}, r"clients_per_round is 3, but method\.trim 0\.2 .* at least 5 clients"),
        ({"method__name": "trimmed_mean", "method__trim": 0.5}, r"trim is 0\.5"),
        ({"method__name": "fedprox", "method__mu": -1.0}, r"mu is -1"),
        ({"method__name": "feddyn", "method__alpha": 0.0}, r"alpha is 0"),
        ({"method__name": "scaffold", "clock__mode": "asynchronous"}, r"needs whole rounds"),
        ({"training__lr_gamma": 0.0}, r"training\.lr_gamma"),
    ],
)
def test_settings_that_break_a_method_are_refused(run_small: Run, settings: dict, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        run_small(**settings)


@given(st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_batches_are_counted_as_they_are_made(samples: int, size: int, normalises: bool) -> None:
    assert count_batches(samples, size, normalises) == len(batches_of(samples, size, 1, (0, "t", 0, 0), normalises))


def together(method: Any, rows: Sequence[Sequence[float]], is_parameter: Sequence[bool] | None = None) -> list[float]:
    """What a robust method makes of clients with these weights."""
    weights = {client: np.array(row, dtype=np.float32) for client, row in enumerate(rows)}
    result = RoundResult(None, weights, [record(client, 1 / len(rows)) for client in weights])
    flags = np.ones(len(rows[0]), dtype=bool) if is_parameter is None else np.array(is_parameter)
    run: Any = SimpleNamespace(is_parameter=flags)
    return method.aggregate(run, 0, np.zeros(len(rows[0]), dtype=np.float32), result).tolist()


def test_median_and_trimmed_mean_by_hand() -> None:
    five = [[1, 10], [2, -1e5], [3, 30], [4, 20], [1e5, 40]]
    assert together(CoordinateMedian(), five) == [3, 20]
    assert together(CoordinateMedian(), five[:4]) == [2.5, 15]
    assert together(CoordinateMedian(), five, [True, False]) == [3, 20]
    assert together(TrimmedMean(0.2), five) == [3, 20]  # of 2, 3, 4 and of 10, 20, 30
    assert together(TrimmedMean(0.2), [*five[:4], [6, 50]]) == [3, 20]
    assert together(TrimmedMean(0.4), five) == [3, 20]
    assert together(TrimmedMean(0.25), [[0], [1], [3], [100]]) == [2]
    assert together(TrimmedMean(0.0), [[0], [1], [3], [100]]) == [26]
    with pytest.raises(TooFewClientsError, match=r"round 1: 4 updates .* method\.trim 0\.2 .* runtime\.min_clients"):
        together(TrimmedMean(0.2), five[:4])


def test_krum_by_hand() -> None:
    """n = 5, f = 1: two nearest others. On the line at 0, 1, 3, 7, 100: 1+9, 1+4, 4+9, 16+36, 93^2+97^2."""
    line = [[0.0], [1.0], [3.0], [7.0], [100.0]]
    found = Krum(1).scores(np.array(line, dtype=np.float32))
    assert found.tolist() == [10, 5, 13, 52, 93**2 + 97**2]
    assert together(Krum(1), line) == [1]
    assert together(Krum(1, multi=2), line) == [0.5]
    assert together(Krum(1, multi=3), line) == pytest.approx([4 / 3])
    assert together(Krum(0), [[2.0], [0.0], [1.0]]) == [2]  # one nearest other: all score 1, the first wins
    # Distances leave the second entry, a buffer, alone; it is the median.
    counted = [[0.0, 1e4], [1.0, 2.0], [3.0, 5.0], [7.0, 6.0], [100.0, 7.0]]
    assert together(Krum(1), counted, [True, False]) == [1, 6]
    with pytest.raises(TooFewClientsError, match=r"4 updates came in, but krum .* at least 5"):
        together(Krum(1), line[:4])


class Poisoned(InProcessRuntime):
    """Client 0 sends its update times -20."""

    def train(self, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings, phases: Phases) -> RoundResult:
        result = super().train(tasks, weights, settings, phases)
        result.weights[0] = weights - 20 * (result.weights[0] - weights)
        return result


def test_robust_methods_withstand_a_byzantine_client_and_the_mean_does_not(run_small: Run) -> None:
    settings = {"clients_per_round": 6, "rounds": 8, "training__local_epochs": 2, "data__partition__name": "iid"}
    accuracy = {}
    for label, method in {
        "mean": {"method__name": "trimmed_mean", "method__trim": 0.0},
        "trimmed": {"method__name": "trimmed_mean"},
        "median": {"method__name": "coordinate_median"},
        "krum": {"method__name": "krum"},
        "multi": {"method__name": "krum", "method__multi": 3},
    }.items():
        with Poisoned() as runtime:
            accuracy[label] = run_small(runtime, **settings, **method)[1]["final_accuracy"]
    assert accuracy.pop("mean") < 0.3
    assert min(accuracy.values()) > 0.7, accuracy


def test_states_are_never_changed_in_place() -> None:
    """A checkpoint's shallow copy must not move with the next round."""
    run: Any = SimpleNamespace(
        data=SimpleNamespace(partition=SimpleNamespace(sizes=np.array([4, 4]))), is_parameter=np.ones(2, dtype=bool)
    )
    scaffold, feddyn = Scaffold(), FedDyn()
    scaffold._sgd = SimpleNamespace(steps=lambda client: 2, lr=lambda number: 0.5)
    start = np.zeros(2, dtype=np.float32)
    for method in (scaffold, feddyn):
        kept = []
        for number in range(2):
            result = RoundResult(None, {1: np.array([1.0, 2.0 + number], dtype=np.float32)}, [record(1, 1.0)])
            method.aggregate(run, number, start, result)
            kept.append((method.state(), {name: value.copy() for name, value in method.state().items()}))
        for state, copy in kept:
            assert state.keys() == copy.keys()
            assert all((state[name] == copy[name]).all() for name in state)
        assert not (kept[0][0]["client/1"] == kept[1][0]["client/1"]).all()
