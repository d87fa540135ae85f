"""Seconds per federated round, beside a bare eager loop in two processes: pfl-research's CIFAR-10 setting.

    python experiments/benchmarks/rounds.py --kind cnn
    python experiments/benchmarks/rounds.py --kind mlp --rounds 100
    python experiments/benchmarks/rounds.py --kind mlp --clients 1000000

1,000 clients x 50 samples, cohort 50, one local epoch, batch 10, SGD 0.1, server lr 1, no evaluation, random images.
fl_ray does it as a user would (Ray backend, two pooled actors of one thread, tracking on); the bare loop keeps its data
and a model in each of two processes and sends sums of updates. They run in turns; medians are over all rounds but each
turn's first two. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# A script's folder comes first where Python (and Ray, for its workers, by the script's name) looks for packages: there
# generators.py would hide the package of its name.
ROOT = Path(__file__).resolve().parents[2]
sys.path[0], sys.argv[0] = str(ROOT), str(ROOT / "benchmark")

COHORT, SAMPLES, BATCH, LR = 50, 50, 10, 0.1
WARM_UP = 2  # rounds of a turn that are not counted
KINDS: dict[str, dict[str, Any]] = {
    "cnn": {"model": {"name": "dropout_cnn"}, "channels": 3, "size": 32, "rounds": 12},
    "mlp": {"model": {"name": "mlp", "hidden": [64]}, "channels": 1, "size": 8, "rounds": 200},
}


def recipe(kind: str, clients: int, rounds: int, folder: Path) -> dict[str, Any]:
    """What a user would write."""
    shape = {"channels": KINDS[kind]["channels"], "size": KINDS[kind]["size"]}
    pool = min(clients, 1000) * SAMPLES
    partition = {"name": "iid"} if clients <= 1000 else {"name": "resampled", "samples": SAMPLES}
    return {
        "name": f"rounds-{kind}",
        "data": {
            "name": "random",
            "samples": pool,
            "test_samples": 500,
            **shape,
            "clients": clients,
            "public_fraction": 0.0,
            "partition": partition,
        },
        "model": KINDS[kind]["model"],
        "method": {"name": "fedavg"},
        "training": {"optimizer": "sgd", "lr": LR, "batch_size": BATCH, "local_epochs": 1},
        "runtime": {"backend": "ray", "actors": "pooled", "num_actors": 2},
        "ray": {"num_cpus": 2},
        "rounds": rounds,
        "clients_per_round": COHORT,
        "evaluate_every": 10**9,  # after the last round only, which is not counted
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }


def since_process_start() -> float:
    """Seconds since this process began, imports and all."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def pss_mb(root: int, without: set[int]) -> float:
    """Proportional set size of a process and everything below it but some, MB."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # it ended meanwhile
    total, members = 0, {root}
    grown = True
    while grown:
        below = {pid for pid, parent in parents.items() if parent in members} - members
        members |= below
        grown = bool(below)
    for pid in members - without:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total * 1024 / 1e6


class Watch:
    """What fl_ray tells its progress to: takes the moment of the first finished round, and memory.

    Memory is taken in rounds that are not counted: reading it takes time.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds, self.peak = rounds, 0.0
        self.startup: float | None = None
        self.others: set[int] = set()  # processes that are not fl_ray's

    def round(self, row: dict[str, Any], rounds: int) -> None:
        if self.startup is None:
            self.startup = since_process_start()
        if row["round"] in (WARM_UP - 1, self.rounds):
            threading.Timer(0.3, self.look).start()  # while the clients of the next round train

    def look(self) -> None:
        """Take the memory of now."""
        self.peak = max(self.peak, pss_mb(os.getpid(), self.others))

    def message(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def steps(self, what: str, done: int, total: int, detail: str = "") -> None: ...

    def stop(self) -> None: ...


def bare_network(kind: str) -> Any:
    """The network as pfl-research's benchmark has it, in plain torch."""
    from torch import nn

    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def bare_worker(kind: str, weights: Any, total: Any, pipe: Any) -> None:
    """Half of the bare loop: trains the clients that it is told, and leaves the sum of their updates."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    net = bare_network(kind)
    parameters = list(net.parameters())
    shape = (KINDS[kind]["channels"], KINDS[kind]["size"], KINDS[kind]["size"])
    x = (torch.randint(0, 256, (1000 * SAMPLES // 2, *shape)).float() / 255 - 0.5) / 0.29
    y = torch.randint(0, 10, (1000 * SAMPLES // 2,))
    while (clients := pipe.recv()) is not None:
        total.zero_()
        for client in clients:
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(weights.clone(), parameters)
            optimizer = torch.optim.SGD(parameters, lr=LR)
            rows = client % 500 * SAMPLES + torch.randperm(SAMPLES)
            for batch in rows.split(BATCH):
                optimizer.zero_grad()
                cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
            total += torch.nn.utils.parameters_to_vector(parameters).detach() - weights
        pipe.send(None)


class BareLoop:
    """Two processes of one thread; the driver averages what they leave in shared memory."""

    def __init__(self, kind: str) -> None:
        import torch
        import torch.multiprocessing as mp

        context = mp.get_context("spawn")
        self.weights = torch.nn.utils.parameters_to_vector(bare_network(kind).parameters()).detach().share_memory_()
        self.first = self.weights.clone()
        self.totals = [torch.zeros_like(self.weights).share_memory_() for _ in range(2)]
        pairs = [context.Pipe() for _ in range(2)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=bare_worker, args=(kind, self.weights, total, theirs), daemon=True)
            for total, (_, theirs) in zip(self.totals, pairs, strict=True)
        ]
        for process in self.processes:
            process.start()

    def rounds(self, count: int) -> list[float]:
        """Seconds of each round."""
        import numpy as np

        self.weights.copy_(self.first)  # as every run of fl_ray begins anew
        rng, seconds = np.random.default_rng(0), []
        for _ in range(count):
            start = time.perf_counter()
            cohort = rng.choice(1000, COHORT, replace=False).tolist()
            for pipe, share in zip(self.pipes, (cohort[::2], cohort[1::2]), strict=True):
                pipe.send(share)
            for pipe in self.pipes:
                pipe.recv()
            self.weights += sum(self.totals) / COHORT
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def summation_ms(size: int) -> float:
    """What adding one client's update exactly costs, beyond a plain float sum."""
    import torch

    from fl_ray.aggregation import ExactSum

    update, plain, exact = torch.randn(1, size), torch.zeros(size), ExactSum(size)
    found = []
    for add in (lambda: exact.add(update, [0.02]), lambda: plain.add_(update[0], alpha=0.02)):
        times = []
        for _ in range(30):
            start = time.perf_counter()
            add()
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times))
    return 1000 * (found[0] - found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=sorted(KINDS), default="cnn")
    parser.add_argument("--rounds", type=int, default=None, help="of each turn")
    parser.add_argument("--clients", type=int, default=1000, help="population")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    rounds = options.rounds or KINDS[options.kind]["rounds"]
    with tempfile.TemporaryDirectory() as name:
        folder, watch = Path(name), Watch(rounds + 1)
        from fl_ray.recipes import make_config
        from fl_ray.runtime.start import connect_ahead, open_runtime

        content = recipe(options.kind, options.clients, rounds + 1, folder)
        connect_ahead(content)
        config = make_config(content)
        ours, bare, phases, summary = [], [], [], {}
        runtime = open_runtime(config, watch)
        from fl_ray.experiment import Experiment  # while Ray starts, as the command line does

        with runtime:
            loop = None
            for turn in range(options.turns):
                output = folder / f"run{turn}"
                output.mkdir()
                experiment = Experiment(config, output, runtime, watch)
                summary = experiment.run()
                walls = [row["wall_s"] for row in experiment.folder.history()]
                ours += walls[WARM_UP:-1]  # the last one holds the evaluation
                phases.append({name: seconds / len(walls) for name, seconds in summary["wall_s"].items()})
                loop = loop or BareLoop(options.kind)
                watch.others = {process.pid for process in loop.processes}
                bare += loop.rounds(rounds)[WARM_UP:]
                print(f"turn {turn + 1}: ours {statistics.median(ours):.4f} s, bare {statistics.median(bare):.4f} s")
            loop.close()
    ours_s, bare_s = statistics.median(ours), statistics.median(bare)
    cost = {name: statistics.median(phase[name] for phase in phases) for name in ("dispatch", "aggregate", "log")}
    size = summary["parameters"]
    print(f"{options.kind}, {options.clients} clients, {size} parameters, {len(ours)} rounds counted")
    print(f"per round: dispatch {cost['dispatch'] * 1e3:.2f} ms, sums of the actors {cost['aggregate'] * 1e3:.2f} ms,")
    print(f"  history, tracking and checkpoints {cost['log'] * 1e3:.2f} ms")
    print(f"exact summation: {summation_ms(size):.2f} ms a client more than a float sum")
    result = {
        "kind": options.kind,
        "clients": options.clients,
        "training_path": experiment.config.runtime.training_path,
        "ours_s": ours_s,
        "bare_s": bare_s,
        "speedup": bare_s / ours_s,
        "startup_s": watch.startup,
        "pss_mb": watch.peak,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
