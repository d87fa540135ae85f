"""Deadlines, faults and availability by hand; asynchronous runs against a plain simulation; resuming; wall time."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fl_ray import checkpoint
from fl_ray.config import ClockConfig, FleetConfig, RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import prepare
from fl_ray.devices.availability import Availability
from fl_ray.devices.fleet import Fleet, draw_fleet
from fl_ray.errors import SettingError, TooFewClientsError
from fl_ray.experiment import Experiment
from fl_ray.methods.fedavg import FedAvg
from fl_ray.randomness import numpy_generator, seeded_torch, torch_generator
from fl_ray.run_folder import HISTORY_COLUMNS
from fl_ray.runtime.base import RoundResult, merge
from fl_ray.runtime.start import open_runtime
from fl_ray.runtime.tasks import RoundSettings, Task
from fl_ray.sampling import Uniform
from fl_ray.schedule import Asynchronous, RoundPlan, Synchronous, make_schedule
from fl_ray.server import _book
from tests.fl_ray.test_runs import StopAfter

Run = Callable[..., tuple[Experiment, dict]]
Small = Callable[..., RunConfig]
WEIGHTS = np.zeros(1000, dtype=np.float32)
LINK_S = 0.032  # 1000 weights at 1 Mbit/s


def context(
    config: RunConfig, sizes: list[int], availability: Availability | None = None, rate_bps: float = 1e6
) -> RunContext:
    """A run whose clients take 10 ms a sample, 0.2 W when computing as when sending."""
    count = len(sizes)
    fleet = Fleet(
        tier=np.zeros(count, dtype=np.int16),
        frequency_hz=np.full(count, 1e9),
        cycles_per_sample=np.full(count, 1e7),
        capacitance=np.full(count, 2e-28),
        power_w=np.full(count, 0.2),
        gain=np.full(count, 1e-10),
        bandwidth_share=np.ones(count),
        distance_m=np.full(count, 100.0),
        rate_bps=np.full(count, rate_bps),
        availability=availability,
    )
    return RunContext(
        config=config,
        data=SimpleNamespace(partition=SimpleNamespace(sizes=np.array(sizes))),
        fleet=fleet,
        runtime=SimpleNamespace(hold=lambda weights: weights),
        is_parameter=np.ones(1000, dtype=bool),
        folder=None,
        progress=None,
        sampler=Uniform(),
        schedule=None,
        upload_bytes=4000,
    )


def three(small: Small, **settings: Any) -> RunConfig:
    return small(**{"data__clients": 3, "clients_per_round": 3, "training__local_epochs": 1} | settings)


def test_a_deadline_leaves_out_who_is_late(small: Small) -> None:
    run = context(three(small, clock={"mode": "deadline", "deadline_s": 2.5}), [100, 200, 300])
    plan = Synchronous().plan(run, FedAvg(), 0, WEIGHTS)
    assert plan.cost.latency_s == pytest.approx([1 + 2 * LINK_S, 2 + 2 * LINK_S, 3 + 2 * LINK_S])
    assert plan.until_s == pytest.approx([1 + 2 * LINK_S, 2 + 2 * LINK_S, 2.5])
    assert list(plan.left_out) == [2]
    assert plan.left_out[2].kind == "late"
    assert plan.ends_s == 2.5
    energy, sent = plan.spent()
    assert energy == pytest.approx(0.2 * (1 + 2 + 2.5 - LINK_S) + 2 * 0.2 * LINK_S)
    assert sent == 2
    tasks = plan.adapt(FedAvg().tasks(run, 0, plan.cohort[plan.arrived]))
    assert [task.client for task in tasks] == [0, 1]
    assert [task.share for task in tasks] == pytest.approx([1 / 3, 2 / 3])
    _book(run, FedAvg(), plan, RoundResult(None, {}, []))
    assert (run.ledger.bytes_up, run.ledger.bytes_down) == (2 * 4000, 3 * 4000)
    assert run.ledger.samples_trained == 300


def test_a_client_that_is_late_while_sending_spent_a_part_of_it(small: Small) -> None:
    run = context(three(small, clock={"mode": "deadline", "deadline_s": 3 + 1.5 * LINK_S}), [100, 200, 300])
    energy, sent = Synchronous().plan(run, FedAvg(), 0, WEIGHTS).spent()
    assert (energy, sent) == (pytest.approx(0.2 * (6 + 2.5 * LINK_S)), 2)


def test_a_deadline_that_nobody_misses_changes_nothing(small: Small) -> None:
    plain = Synchronous().plan(context(three(small), [100, 200, 300]), FedAvg(), 0, WEIGHTS)
    config = three(small, clock={"mode": "deadline", "deadline_s": 100.0})
    plan = Synchronous().plan(context(config, [100, 200, 300]), FedAvg(), 0, WEIGHTS)
    assert plan.ends_s == plain.ends_s == pytest.approx(3 + 2 * LINK_S)
    assert plan.left_out == {}
    assert plan.spent() == (pytest.approx(plan.cost.energy_j), 3)


def test_late_clients_are_waited_for_and_weighted_down(small: Small) -> None:
    config = three(small, clock={"mode": "deadline", "deadline_s": 2.5, "late": "weight_down"})
    run = context(config, [100, 200, 300])
    plan = Synchronous().plan(run, FedAvg(), 0, WEIGHTS)
    late = 3 + 2 * LINK_S
    assert plan.ends_s == pytest.approx(late)
    assert plan.left_out == {}
    assert plan.weight == pytest.approx([1, 1, 2.5 / late])
    tasks = plan.adapt(FedAvg().tasks(run, 0, plan.cohort))
    assert [task.share for task in tasks] == pytest.approx([1 / 6, 2 / 6, 3 / 6 * 2.5 / late])
    assert plan.spent() == (pytest.approx(plan.cost.energy_j), 3)


def test_shares_meet_their_clients_where_some_have_no_samples(small: Small) -> None:
    run = context(three(small), [100, 0, 300])
    plan = Synchronous().plan(run, FedAvg(), 0, WEIGHTS)
    tasks = plan.adapt(FedAvg().tasks(run, 0, plan.cohort))
    assert [(task.client, task.share) for task in tasks] == [(0, pytest.approx(0.25)), (2, pytest.approx(0.75))]
    assert tasks[1].latency_s == plan.until_s[2]


def test_dropout_has_its_probability_and_place_in_time(small: Small) -> None:
    run = context(three(small, fleet__dropout=0.3), [100, 200, 300])
    parts = []
    for number in range(1500):
        plan = Synchronous().plan(run, FedAvg(), number, WEIGHTS)
        out = list(plan.left_out)
        parts += (plan.until_s[out] / plan.cost.latency_s[out]).tolist()
        energy, sent = plan.spent()
        assert sent == 3 - len(out)
        assert (energy < plan.cost.energy_j) == (len(out) > 0)
        assert plan.ends_s - run.ledger.virtual_time_s == pytest.approx(plan.until_s.max())
    assert len(parts) / 4500 == pytest.approx(0.3, abs=0.03)
    assert np.mean(parts) == pytest.approx(0.5, abs=0.03)
    repeated = Synchronous().plan(run, FedAvg(), 4, WEIGHTS, attempt=1)
    assert (repeated.until_s != Synchronous().plan(run, FedAvg(), 4, WEIGHTS).until_s).any()


def test_dropped_updates_are_not_in_the_sum(small: Small, tmp_path: Path) -> None:
    config = small(rounds=1, clients_per_round=6, fleet__dropout=0.5, seed=2)
    drawn = numpy_generator(2, "dropout", 0, 0).random(6)
    there = np.flatnonzero(drawn >= 0.5)
    assert 0 < len(there) < 6
    with open_runtime(config) as runtime:
        experiment = Experiment(config, tmp_path, runtime)
        experiment.run()
        sizes = experiment.data.partition.sizes[there]
        tasks = [Task(int(client), float(n / sizes.sum())) for client, n in zip(there, sizes, strict=True)]
        from fl_ray.model import ImageShape, initial_weights

        start = initial_weights(config.model, ImageShape.of(experiment.data.source), config.training, 2)
        alone = merge([runtime.host.train(tasks, start, RoundSettings(0))], len(start), False)
    assert (experiment._weights == (start + alone.update).astype(np.float32)).all()
    row = experiment.folder.history()[0]
    assert row["clients"] == len(there)
    assert row["bytes_up"] == len(there) / 6 * row["bytes_down"]
    whole = 4 * len(start) * 6
    assert row["bytes_down"] == whole


def test_the_clock_waits_and_clients_go_away(small: Small) -> None:
    """Client 0 is there from 10 to 11.5 s, client 1 from 10 to 20, client 2 from 40 on; the period is 100 s."""
    windows = Availability.from_windows([[(10, 11.5)], [(10, 20)], [(40, 100)]], np.full(3, 100.0))
    run = context(three(small), [200, 100, 50], windows)
    plan = Synchronous().plan(run, FedAvg(), 0, WEIGHTS)
    assert run.ledger.virtual_time_s == 10
    assert plan.cohort.tolist() == [0, 1]
    assert list(plan.left_out) == [0]
    assert plan.until_s == pytest.approx([1.5, 1 + 2 * LINK_S])
    assert plan.ends_s == pytest.approx(11.5)
    assert plan.spent() == (pytest.approx(0.2 * (1.5 - LINK_S + 1 + LINK_S)), 1)
    run.ledger.advance(21.0)
    plan = Synchronous().plan(run, FedAvg(), 1, WEIGHTS)
    assert (run.ledger.virtual_time_s, plan.cohort.tolist(), plan.left_out) == (40, [2], {})
    repeated = Synchronous().plan(run, FedAvg(), 1, WEIGHTS, attempt=1)
    assert repeated.cohort.tolist() == [2]
    run.ledger.advance(99.8)  # goes away at the period's end
    assert Synchronous().plan(run, FedAvg(), 2, WEIGHTS).until_s == pytest.approx([0.2])


def test_clients_without_samples_are_not_waited_for(small: Small) -> None:
    windows = Availability.from_windows([[(0, 90)], [(10, 20)], [(40, 100)]], np.full(3, 100.0))
    run = context(three(small), [0, 100, 50], windows)
    assert Synchronous().plan(run, FedAvg(), 0, WEIGHTS).cohort.tolist() == [0, 1]
    assert run.ledger.virtual_time_s == 10


AWAY = {
    "data__clients": 12,
    "fleet__availability": {"period_s": 60.0, "fraction": 0.2},
    "fleet__tiers": [{"cycles_per_sample": 1e8, "frequency_hz": [0.5e9, 2e9]}],  # about 0.1 s a sample
    "rounds": 8,
}


def test_nobody_trains_while_away(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of, left_out = Synchronous.plan, []

    def told(self: Synchronous, run: RunContext, *args: Any, **more: Any) -> RoundPlan:
        plan = plan_of(self, run, *args, **more)
        now = run.ledger.virtual_time_s
        closes = run.fleet.availability.closes_s(plan.cohort, now)
        assert (closes > now).all()
        assert (now + plan.until_s <= closes + 1e-9).all()
        left_out.append(len(plan.left_out))
        return plan

    monkeypatch.setattr(Synchronous, "plan", told)
    _, summary = run_small(**AWAY)
    assert summary["status"] == "finished"
    assert sum(left_out) > 0
    if len(left_out) == AWAY["rounds"]:  # no round was repeated
        assert sum(left_out) == summary["updates_left_out"]


def test_nobody_trains_while_away_asynchronously(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, stopped = Asynchronous._launch, []

    def told(self: Asynchronous, run: RunContext, *args: Any) -> bool:
        launched = launch(self, run, *args)
        if launched:
            flight = max(self._heap, key=lambda flight: flight.turn)
            closes = run.fleet.availability.closes_s(np.array([flight.client]), flight.started_s)[0]
            assert closes > flight.started_s
            assert flight.at_s <= closes + 1e-9
            stopped.append(flight.stopped)
        return launched

    monkeypatch.setattr(Asynchronous, "_launch", told)
    _, summary = run_small(**AWAY, clock={"mode": "asynchronous", "concurrency": 3, "buffer_size": 3})
    assert summary["status"] == "finished"
    assert 0 < sum(stopped) < len(stopped)


def plain_fedbuff(config: RunConfig) -> dict[str, Any]:
    """FedBuff by an event list and plain torch; it shares the keys of draws, the fleet and the data."""
    seed, clock, data = config.seed, config.clock, prepare(config.data, config.seed)
    fleet, cell = draw_fleet(config.fleet, 6, seed), config.fleet
    mean, std = data.source.mean[0], data.source.std[0]
    x, y = (torch.from_numpy(data.images).float() / 255 - mean) / std, torch.from_numpy(data.labels)
    with seeded_torch(seed, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    bits, noise = 32 * sum(value.numel() for value in state.values()), 10 ** ((cell.noise_dbm_hz - 30) / 10)
    events: list[tuple[float, int, int, int, dict]] = []  # end, turn, client, version, weights that it started from
    log, ends, now, turn = [], [], 0.0, 0

    def launch(version: int) -> None:
        nonlocal turn
        free = [client for client in range(6) if client not in {event[2] for event in events}]
        client = int(numpy_generator(seed, "cohort", turn).choice(free, 1, replace=False, shuffle=False)[0])
        hertz = cell.bandwidth_hz / clock.concurrency
        gain, power = fleet.gain[client], fleet.power_w[client]
        up = hertz * np.log2(1 + power * gain / (noise * hertz))
        down = hertz * np.log2(1 + cell.server_power_w / clock.concurrency * gain / (noise * hertz))
        computing = len(data.partition.of(client)) * fleet.cycles_per_sample[client] / fleet.frequency_hz[client]
        events.append((now + bits / down + computing + bits / up, turn, client, version, state))
        turn += 1

    for version in range(config.rounds):
        while len(events) < clock.concurrency:
            launch(version)
        buffer = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
        for place in range(clock.buffer_size):
            event = min(events)
            events.remove(event)
            now, its_turn, client, its_version, start = event
            net.load_state_dict(start)
            optimizer = torch.optim.SGD(net.parameters(), lr=config.training.lr)
            rows = torch.from_numpy(data.partition.of(client))
            order = torch.randperm(len(rows), generator=torch_generator(seed, "client/order", its_turn, client))
            for batch in rows[order].split(config.training.batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
            scale = (1 + version - its_version) ** -clock.staleness_exponent / clock.buffer_size
            for name, value in net.state_dict().items():
                buffer[name] += scale * (value - start[name]).double()
            log.append((client, version - its_version))
            if place + 1 < clock.buffer_size:
                launch(version)
        state = {name: (value.double() + buffer[name]).float() for name, value in state.items()}
        ends.append(now)
    return {"state": state, "log": log, "ends": ends}


BUFFERED = {"clock": {"mode": "asynchronous", "concurrency": 4, "buffer_size": 2}, "rounds": 8, "seed": 3}


def test_asynchronous_equals_a_plain_simulation(run_small: Run, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[int, int]] = []
    planned = Asynchronous._planned

    def told(self: Asynchronous, run: RunContext, method: Any, landed: list, number: int, now: float) -> RoundPlan:
        log.extend((flight.client, number - flight.version) for flight in landed)
        return planned(self, run, method, landed, number, now)

    monkeypatch.setattr(Asynchronous, "_planned", told)
    expected = plain_fedbuff(small(**BUFFERED))
    experiment, summary = run_small(**BUFFERED)
    assert log == expected["log"]
    assert max(staleness for _, staleness in log) >= 2
    history = experiment.folder.history()
    assert [row["virtual_time_s"] for row in history] == pytest.approx(expected["ends"])
    assert [row["clients"] for row in history] == [2] * 8
    assert summary["bytes_up"] == summary["bytes_down"] == 16 * 4 * len(experiment._weights)
    found = load_file(experiment.folder / "model.safetensors")
    for name, value in expected["state"].items():
        assert torch.allclose(found[f"network.{name}"], value, rtol=0, atol=1e-5), name
    again, _ = run_small(**BUFFERED)
    assert (again._weights == experiment._weights).all()


def test_one_at_a_time_is_never_stale(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    planned = Asynchronous._planned

    def told(*args: Any) -> RoundPlan:
        scales.extend((made := planned(*args)).scale.tolist())
        return made

    monkeypatch.setattr(Asynchronous, "_planned", told)
    run_small(clock={"mode": "asynchronous", "concurrency": 1, "buffer_size": 1}, rounds=4)
    assert scales == [1.0] * 4


def asynchronous(small: Small, **clock: Any) -> RunConfig:
    return three(small, clock={"mode": "asynchronous", "concurrency": 2, "buffer_size": 2} | clock)


def test_asynchronous_clients_without_samples_do_not_fill_the_buffer(small: Small) -> None:
    run = context(asynchronous(small), [0, 100, 50])
    schedule, counts = Asynchronous(run.config), []
    for number in range(10):
        plan = schedule.plan(run, FedAvg(), number, WEIGHTS)
        run.ledger.advance(plan.ends_s)
        tasks = plan.adapt(FedAvg().tasks(run, number, plan.cohort[plan.arrived]))
        assert len(tasks) == 2
        assert [task.share for task in tasks] == [0.5, 0.5]
        assert 0 not in [task.client for task in tasks]
        assert plan.spent() == (pytest.approx(plan.cost.energy_j), len(plan.cohort))
        counts.append(len(plan.cohort))
    assert max(counts) > 2


def test_asynchronous_waits_for_clients_and_fills_free_places(small: Small) -> None:
    """One is there from 10 s, two more from 12 s on; work takes 3 s."""
    windows = Availability.from_windows([[(10, 90)], [(12, 90)], [(12, 90)]], np.full(3, 100.0))
    run = context(asynchronous(small, buffer_size=1), [300, 300, 300], windows)
    schedule = Asynchronous(run.config)
    plan = schedule.plan(run, FedAvg(), 0, WEIGHTS)
    assert plan.cohort.tolist() == [0]
    assert plan.ends_s == pytest.approx(13 + 2 * LINK_S)
    assert [flight.started_s for flight in schedule._heap] == [12]  # not only when the first is done
    run.ledger.advance(88.0)
    schedule._heap.clear()
    plan = schedule.plan(run, FedAvg(), 1, WEIGHTS)
    assert set(plan.left_out) == set(range(len(plan.cohort) - 1))  # nobody can finish until 90 s
    assert plan.ends_s == pytest.approx(113 + 2 * LINK_S)
    assert plan.cohort[-1] == 0


def test_asynchronous_ends_where_nobody_can_ever_finish(small: Small) -> None:
    windows = Availability.from_windows([[(0, 1)]] * 3, np.full(3, 100.0))
    run = context(asynchronous(small, buffer_size=1), [300, 300, 300], windows)
    plan = Asynchronous(run.config).plan(run, FedAvg(), 0, WEIGHTS)
    assert len(plan.arrived) == 0
    assert plan.spent()[1] == 0


def test_asynchronous_dropouts_are_replaced(small: Small) -> None:
    run = context(three(small, fleet__dropout=0.4, clock__mode="asynchronous", clock__buffer_size=2), [50] * 3)
    schedule, out, landed = Asynchronous(run.config), 0, 0
    for number in range(400):
        plan = schedule.plan(run, FedAvg(), number, WEIGHTS)
        run.ledger.advance(plan.ends_s)
        assert len(plan.arrived) == 2
        assert plan.spent()[1] == 2
        out, landed = out + len(plan.left_out), landed + len(plan.cohort)
    assert out / landed == pytest.approx(0.4, abs=0.05)


def test_what_can_not_be_asynchronous_is_refused(small: Small) -> None:
    with pytest.raises(SettingError, match="needs whole rounds"):
        make_schedule(small(clock__mode="asynchronous"), SimpleNamespace(asynchronous=False))
    with pytest.raises(SettingError, match=r"clock\.concurrency is 7, but data\.clients is 6"):
        make_schedule(small(clock__mode="asynchronous", clock__concurrency=7), FedAvg())
    assert isinstance(make_schedule(small(), FedAvg()), Synchronous)
    with pytest.raises(SettingError, match=r"clock\.deadline_s"):
        ClockConfig("deadline")
    assert FleetConfig(dropout=0.5).dropout == 0.5


FAULTS = {"fleet__dropout": 0.2, "fleet__availability": {"period_s": 4.0, "fraction": 0.6}}
RESUMED = {
    "asynchronous": BUFFERED | {"rounds": 6},
    "asynchronous_oort": BUFFERED | FAULTS | {"sampling__name": "oort", "rounds": 6},
    "deadline": FAULTS | {"clock": {"mode": "deadline", "deadline_s": 1.5}, "rounds": 5, "clients_per_round": 5},
    "oort": {"sampling": {"name": "oort", "pacer_rounds": 1, "exploration": 0.4}, "rounds": 6},
    "power_of_choice": {"sampling__name": "power_of_choice", "rounds": 4, "clients_per_round": 2},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    run_small: Run, small: Small, tmp_path: Path, name: str
) -> None:
    settings = RESUMED[name] | {"checkpoint__every": 2, "runtime__min_clients": 1}
    whole, _ = run_small(**settings)
    config, folder = small(**settings), tmp_path / "cut"
    folder.mkdir()
    with open_runtime(config) as runtime:
        with pytest.raises(KeyboardInterrupt):
            Experiment(config, folder, runtime, StopAfter(3)).run()
        if "asynchronous" in name:
            stored = checkpoint.latest(folder / "checkpoints").state["schedule"]
            assert len(stored["flights"]) > 0
            assert any(part.startswith("version/") for part in stored)
        resumed = Experiment(config, folder, runtime, resume=True)
        resumed.run()
    assert (resumed._weights == whole._weights).all()
    for row, same in zip(whole.folder.history(), resumed.folder.history(), strict=True):
        assert all(repr(row[column]) == repr(same[column]) for column in HISTORY_COLUMNS if column != "wall_s")


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_round_with_too_few_updates_is_repeated_once(
    run_small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """From round 3 on everybody drops out half-way: the time and energy of both tries are spent, then the run stops."""
    from fl_ray import schedule

    attempts: list[tuple[int, int, float]] = []
    kind = {"synchronous": Synchronous, "asynchronous": Asynchronous}[mode]
    plan_of, stops = kind.plan, schedule._stops

    def told(self: Any, run: RunContext, method: Any, number: int, weights: Any, attempt: int = 0) -> RoundPlan:
        attempts.append((number, attempt, run.ledger.virtual_time_s))
        half = lambda run, cohort, latency_s, *key: latency_s / 2  # noqa: E731
        monkeypatch.setattr(schedule, "_stops", half if number >= 2 else stops)
        return plan_of(self, run, method, number, weights, attempt)

    monkeypatch.setattr(kind, "plan", told)
    monkeypatch.setattr(schedule, "_PATIENCE", 5)
    with pytest.raises(TooFewClientsError, match=r"round 3: 0 updates came in, twice, but runtime\.min_clients is 1"):
        run_small(rounds=5, checkpoint__every=10, clock__mode=mode, clock__concurrency=1, clock__buffer_size=1)
    assert [(number, attempt) for number, attempt, _ in attempts] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert attempts[3][2] > attempts[2][2]
    folder = tmp_path / "run0"
    assert checkpoint.latest(folder / "checkpoints").rounds_done == 2


@pytest.mark.parametrize("late", ["nobody", "everyone"])
def test_realtime_rounds_take_their_virtual_time(run_small: Run, late: str) -> None:
    settings: dict[str, Any] = {"rounds": 3, "evaluate_every": 3, "runtime__emulate": "realtime"}
    plain, _ = run_small(rounds=3)
    lasts = plain.folder.history()[-1]["virtual_time_s"] / 3
    if late == "everyone":  # a round then ends with its deadline, and no update is waited for
        settings |= {"clock": {"mode": "deadline", "deadline_s": 0.9 * lasts}, "fleet__dropout": 0.3}
    settings["runtime__time_scale"] = 0.7 / lasts
    experiment, summary = run_small(**settings)
    history = experiment.folder.history()
    virtual = history[-1]["virtual_time_s"] * settings["runtime__time_scale"]
    assert sum(row["wall_s"] for row in history) == pytest.approx(virtual, rel=0.1)
    assert summary["wall_s"]["train"] == pytest.approx(virtual, rel=0.1)
