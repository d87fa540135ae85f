"""Samplers by hand, by their frequencies and against losses computed independently."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.recipes import build, make_config
from fl_ray.registry import REGISTRY
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import ClientRecord, Evaluation
from fl_ray.sampling import ClientSampler, Uniform, candidates
from fl_ray.sampling.oort import Oort
from fl_ray.sampling.power_of_choice import PowerOfChoice
from fl_ray.sampling.size_weighted import SizeWeighted

Run = Callable[..., tuple[Experiment, dict]]
WEIGHTS = np.zeros(1, dtype=np.float32)


class Losses:
    """A runtime that knows a loss of every client and who was asked."""

    def __init__(self, losses: np.ndarray) -> None:
        self.losses, self.asked = losses, []

    def evaluate_clients(self, models: dict, clients: list[int], part: str) -> list[Evaluation]:
        assert part == "partition"
        self.asked.append(clients)
        return [Evaluation(0, 4 * float(self.losses[client]), 4) for client in clients]


def a_run(sizes: list[int] | np.ndarray, cohort: int = 3, available: np.ndarray | None = None, **more: Any) -> Any:
    sizes = np.asarray(sizes)
    config = SimpleNamespace(seed=1, cohort_size=cohort, data=SimpleNamespace(clients=len(sizes)))
    data = SimpleNamespace(partition=SimpleNamespace(sizes=sizes))
    return SimpleNamespace(config=config, data=data, available=lambda: available, **more)


def observe(sampler: ClientSampler, run: Any, turn: int, told: dict[int, tuple[float, float]]) -> None:
    """A round of clients with (mean loss, latency)."""
    sizes, clients = run.data.partition.sizes, np.array(sorted(told))
    records = [ClientRecord(c, int(sizes[c]), told[c][0], 0.1, 0, 1) for c in clients.tolist()]
    latency = np.array([told[c][1] for c in clients.tolist()])
    cost = SimpleNamespace(latency_s=latency)
    plan = SimpleNamespace(cohort=clients, arrived=np.arange(len(clients)), cost=cost)
    sampler._turn = turn
    sampler.observe(run, turn, plan, RoundResult(None, {}, records))


@pytest.mark.parametrize("name", REGISTRY["sampling"])
def test_every_sampler_keeps_the_rules(name: str) -> None:
    """Ascending, different, available, not excluded, at most as many as asked; the same draw by the same key."""
    rng = np.random.default_rng(0)
    for size in (1, 3, 8):
        available = rng.random(20) < 0.5
        available[:4] = True
        run = a_run(rng.integers(1, 50, 20), size, available, runtime=Losses(rng.random(20)))
        sampler = build("sampling", make_config({"sampling": {"name": name}}).sampling)
        excluded = {0, 2, 19}
        allowed = np.flatnonzero(available & ~np.isin(np.arange(20), list(excluded)))
        for turn in range(20):
            chosen = sampler.choose(run, turn, size, WEIGHTS, excluded)
            assert (np.diff(chosen) > 0).all()
            assert np.isin(chosen, allowed).all()
            assert len(chosen) == min(size, len(allowed))
            assert (sampler.choose(run, turn, size, WEIGHTS, excluded) == chosen).all()
            observe(sampler, run, turn, {int(client): (float(rng.random()), 1.0) for client in chosen})
        nobody = a_run(np.ones(20, dtype=int), size, np.zeros(20, dtype=bool))
        assert len(sampler.choose(nobody, 0, size, WEIGHTS)) == 0


def test_candidates_and_uniform() -> None:
    assert candidates(a_run([1] * 4)) is None
    assert candidates(a_run([1] * 4), [1]).tolist() == [0, 2, 3]
    available = np.array([True, False, True, False])
    assert candidates(a_run([1] * 4, available=available), [0]).tolist() == [2]
    assert available.tolist() == [True, False, True, False]  # the fleet's own mask is left as it is
    counts = np.zeros(5)
    for turn in range(2000):
        counts[Uniform().choose(a_run([1] * 5), turn, 2, WEIGHTS)] += 1
    assert counts / 2000 == pytest.approx([0.4] * 5, abs=0.04)


def test_size_weighted_frequencies() -> None:
    """Of two drawn one after another: P(i) = p_i + sum over j of p_j p_i / (1 - p_j)."""
    sizes = np.array([1, 2, 3, 4, 0])
    sampler, run = SizeWeighted(), a_run(sizes)
    ones, twos = np.zeros(5), np.zeros(5)
    turns = 6000
    for turn in range(turns):
        ones[sampler.choose(run, turn, 1, WEIGHTS)] += 1
        twos[sampler.choose(run, turn + turns, 2, WEIGHTS)] += 1
    p = sizes / sizes.sum()
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)]
    assert ones / turns == pytest.approx(p, abs=4 * 0.5 / np.sqrt(turns))
    assert twos / turns == pytest.approx(p + second, abs=4 * 0.5 / np.sqrt(turns))
    assert twos[4] == 0
    assert SizeWeighted.equal_shares


def test_size_weighted_takes_a_million_clients() -> None:
    run = a_run(np.random.default_rng(0).integers(1, 100, 1_000_000))
    begun = time.perf_counter()
    chosen = SizeWeighted().choose(run, 0, 1000, WEIGHTS)
    assert time.perf_counter() - begun < 2
    assert len(np.unique(chosen)) == 1000
    assert run.data.partition.sizes[chosen].mean() > 55  # the mean size, weighted by itself, is 66


def test_power_of_choice_takes_the_highest_losses_of_its_candidates() -> None:
    losses = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0])
    everyone = a_run([1] * 6, runtime=Losses(losses))
    assert PowerOfChoice(d=6).choose(everyone, 0, 2, WEIGHTS).tolist() == [0, 5]
    run = a_run([1, 2, 3, 4, 5, 0], runtime=Losses(losses))
    sampler = PowerOfChoice(d=3)
    for turn in range(50):
        chosen = sampler.choose(run, turn, 2, WEIGHTS)
        asked = run.runtime.asked[-1]
        assert len(asked) == 3
        assert 5 not in asked  # it has no samples
        assert sorted(sorted(asked, key=lambda client: -losses[client])[:2]) == chosen.tolist()
    same, diverged = np.ones(6), np.array([np.nan, 1, 2, 1, 1, 1])
    assert PowerOfChoice(d=6).choose(a_run([1] * 6, runtime=Losses(same)), 0, 2, WEIGHTS).tolist() == [0, 1]
    assert PowerOfChoice(d=6).choose(a_run([1] * 6, runtime=Losses(diverged)), 0, 2, WEIGHTS).tolist() == [1, 2]
    with pytest.raises(SettingError, match=r"sampling\.d is 1, but 2 clients"):
        PowerOfChoice(d=1).choose(run, 0, 2, WEIGHTS)
    with pytest.raises(SettingError, match="d is 0"):
        build("sampling", make_config({"sampling": {"name": "power_of_choice", "d": 0}}).sampling)


def test_power_of_choice_in_a_run(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every client a candidate, round 2's are those with the largest loss of the model of round 1."""
    chosen: list[np.ndarray] = []
    choose = PowerOfChoice.choose

    def told(self: PowerOfChoice, *args: Any) -> np.ndarray:
        chosen.append(choose(self, *args))
        return chosen[-1]

    monkeypatch.setattr(PowerOfChoice, "choose", told)
    settings = {"sampling": {"name": "power_of_choice", "d": 6}, "clients_per_round": 2}
    once, _ = run_small(**settings, rounds=1)
    run_small(**settings, rounds=2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    named = load_file(once.folder / "model.safetensors")
    net.load_state_dict({name.removeprefix("network."): value for name, value in named.items()})
    data = once.data
    x = (torch.from_numpy(data.images).float() / 255 - data.source.mean[0]) / data.source.std[0]
    rows = [data.partition.of(client) for client in range(6)]
    losses = [float(nn.functional.cross_entropy(net(x[own]), torch.from_numpy(data.labels[own]))) for own in rows]
    assert chosen[-1].tolist() == sorted(np.argsort(losses)[-2:].tolist())
    assert (chosen[0] == chosen[1]).all()


def exploiting(**settings: Any) -> Oort:
    return Oort(exploration=0.0, exploration_least=0.0, clip_quantile=1.0, **settings)


def test_oort_scores_by_hand() -> None:
    run = a_run([10, 20, 40, 5], 2)
    sampler = exploiting(preferred_quantile=0.5)
    sampler.choose(run, 0, 2, WEIGHTS)
    observe(sampler, run, 0, {0: (2.0, 1.0), 1: (2.0, 2.0)})
    observe(sampler, run, 3, {2: (2.0, 8.0)})
    r = np.sqrt(0.1 * np.log(10))
    expected = [20 / 80 + r / np.sqrt(1), 40 / 80 + r / np.sqrt(1), (1.0 + r / np.sqrt(4)) * (2 / 8) ** 2]
    assert sampler.scores(np.array([0, 1, 2]), 9) == pytest.approx(expected)
    clipped = Oort(clip_quantile=0.5, alpha=0.0)
    clipped._prepare(4)
    observe(clipped, run, 0, {0: (2.0, 1.0), 1: (2.0, 2.0), 2: (2.0, 8.0)})
    assert clipped.scores(np.array([0, 1, 2]), 0) == pytest.approx([0.5, 1.0, 1.0])  # ln 1 = 0


def test_oort_exploits_useful_and_fast_clients() -> None:
    run = a_run([10] * 8, 2)
    useful, fast = exploiting(), exploiting()
    for sampler in (useful, fast):
        sampler.choose(run, 0, 2, WEIGHTS)
    observe(useful, run, 0, {client: (1.0 + client, 1.0) for client in range(8)})
    assert {tuple(useful.choose(run, turn, 1, WEIGHTS)) for turn in range(20)} == {(7,)}
    observe(fast, run, 0, {client: (1.0, 1.0 if client < 4 else 3.0) for client in range(8)})
    counts = np.zeros(8)
    for turn in range(200):
        counts[fast.choose(run, turn, 2, WEIGHTS)] += 1
    assert counts[4:].sum() == 0
    assert counts[:4].min() > 60
    long_ago = exploiting()
    long_ago._prepare(8)
    observe(long_ago, run, 100, {client: (1.0, 1.0) for client in range(1, 8)})
    observe(long_ago, run, 0, {0: (1.0, 1.0)})
    assert long_ago.choose(run, 101, 1, WEIGHTS).tolist() == [0]


def test_oort_explores_less_and_less() -> None:
    run = a_run([10] * 1000, 10)
    sampler = Oort(exploration=0.8, exploration_decay=0.9, exploration_least=0.1)
    sampler.choose(run, 0, 10, WEIGHTS)
    observe(sampler, run, 0, {client: (1.0, 1.0) for client in range(500)})
    for turn, share in ((0, 0.8), (5, 0.8 * 0.9**5), (60, 0.1)):
        new = [(sampler.choose(run, turn, 10, WEIGHTS) >= 500).sum() for _ in range(3)]
        assert len(set(new)) == 1
        assert new[0] == pytest.approx(10 * share, abs=1)
    single = [sampler.choose(run, 50 + turn, 1, WEIGHTS)[0] >= 500 for turn in range(400)]  # as an asynchronous run
    expected = [max(0.1, 0.8 * 0.9 ** ((50 + turn) / 10)) for turn in range(400)]
    assert np.mean(single) == pytest.approx(np.mean(expected), abs=0.06)
    fresh = Oort(exploration=0.0, exploration_least=0.0)
    assert len(fresh.choose(run, 0, 10, WEIGHTS)) == 10  # nobody is known: all are new


def test_oort_blacklist_and_pacer() -> None:
    run = a_run([10] * 6, 2)
    sampler = exploiting(blacklist_after=2, pacer_rounds=2, pacer_step=0.1)
    sampler.choose(run, 0, 2, WEIGHTS)
    for turn, loss in enumerate([3.0, 3.0, 2.0, 1.0]):
        observe(sampler, run, turn, {0: (loss, 1.0), 1: (0.1, 1.0)})
    assert sampler._preferred == pytest.approx(0.4)
    for turn, loss in enumerate([5.0, 5.0]):
        observe(sampler, run, turn, {2: (loss, 1.0), 3: (0.1, 1.0)})
    assert sampler._preferred == pytest.approx(0.4)
    assert sampler.choose(run, 9, 2, WEIGHTS).tolist() == [4, 5]
    assert len(sampler.choose(run, 9, 3, WEIGHTS)) == 3  # too few others: the list does not count


def test_oort_learns_nothing_of_an_update_that_did_not_arrive() -> None:
    run = a_run([10] * 4, 2)
    sampler = Oort()
    sampler.choose(run, 0, 2, WEIGHTS)
    records = [ClientRecord(1, 10, 2.0, 0.5, 0, 1), ClientRecord(2, 0, float("nan"), 0.0, 0, 1, "it dropped out")]
    cost = SimpleNamespace(latency_s=np.array([1.0, 2.0]))
    plan = SimpleNamespace(cohort=np.array([1, 2]), arrived=np.array([0]), cost=cost)
    sampler.observe(run, 0, plan, RoundResult(None, {}, records))
    assert np.isnan(sampler._utility).tolist() == [True, False, True, True]
    assert np.isnan(sampler._latency_s).tolist() == [True, False, True, True]
    assert sampler._times.tolist() == [0, 1, 1, 0]


def test_oort_state_goes_round() -> None:
    run = a_run([10] * 30, 3)
    sampler, other = Oort(pacer_rounds=2), Oort(pacer_rounds=2)
    rng = np.random.default_rng(0)
    for turn in range(5):
        chosen = sampler.choose(run, turn, 3, WEIGHTS)
        observe(sampler, run, turn, {int(client): (float(rng.random()), float(rng.random())) for client in chosen})
    kept = sampler.state()
    other.load_state({name: value.copy() for name, value in kept.items()})
    chosen = sampler.choose(run, 5, 3, WEIGHTS)
    assert (other.choose(run, 5, 3, WEIGHTS) == chosen).all()
    observe(sampler, run, 5, {int(client): (7.0, 7.0) for client in chosen})
    assert all((value == other.state()[name])[~np.isnan(value)].all() for name, value in kept.items())
    other.load_state({})  # a checkpoint without any


def test_every_sampler_trains(run_small: Run, tmp_path: Path) -> None:
    for name in REGISTRY["sampling"]:
        experiment, summary = run_small(sampling={"name": name}, rounds=4)
        assert summary["best_accuracy"] > 0.2, name
        assert [row["clients"] for row in experiment.folder.history()] == [3] * 4
