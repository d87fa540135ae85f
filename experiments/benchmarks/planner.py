"""Seconds, memory and gap of FIMI's planner by size, and its closed forms beside cvxpy in the same outer search.

    python experiments/benchmarks/planner.py
    python experiments/benchmarks/planner.py --sizes 20 100 --repeats 3

``dual`` with its check of feasibility, as ``fl-ray plan`` does it, on random cells of each size, each size in a process
of its own (peak memory is that process's). Then, at 20 devices, populations of the same cross-entropy search (same
seed, so the same candidates) with the closed forms and with cvxpy's inner problems, built once, in turns: seconds per
candidate, ratio of medians; and how much longer 6,000 candidates with cvxpy would take than ``dual``, reckoned from the
seconds of one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# A script's folder comes first where Python looks for packages: there generators.py would hide the package of its name.
ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

COMPARED = 20  # devices of the cell that cvxpy is tried on
POPULATION, ELITE, SEARCH = 100, 10, 6000


def plan_size(devices: int, repeats: int) -> dict[str, float]:
    """Median seconds over random cells with a plan, the largest gap, and this process's peak memory."""
    from fl_ray.allocation import inner
    from fl_ray.allocation.cell import random_cell
    from fl_ray.allocation.dual import feasibility, solve_dual

    seconds, gaps, seed = [], [], 0
    while len(seconds) < repeats:
        cell = random_cell(devices, seed)
        seed += 1
        start = time.perf_counter()
        if feasibility(cell).feasible:
            found = solve_dual(cell)
            energy = float(inner.evaluate(cell, found.rho).energy_j)
            seconds.append(time.perf_counter() - start)
            gaps.append(abs(energy - found.lower_bound_j) / energy)
        elif seed > 20 * repeats:
            raise SystemExit(f"{devices} devices: of {seed} random cells only {len(seconds)} have a plan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
    return {"dual_s": statistics.median(seconds), "peak_mb": peak, "gap": max(gaps)}


def in_a_process(devices: int, repeats: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--only", str(devices), "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def beside_cvxpy(turns: int, candidates: int) -> dict[str, float]:
    """Both ways for the same populations; energies must agree.

    Args:
        turns: populations. ``candidates``: of each, how many cvxpy solves; the closed forms take all at once.
    """
    import numpy as np

    from fl_ray.allocation import inner
    from fl_ray.allocation.cell import random_cell
    from fl_ray.allocation.dual import central_split
    from fl_ray.allocation.reference import ReferenceInner
    from tuning.cross_entropy import CrossEntropy

    warnings.filterwarnings("ignore", message="Solution may be inaccurate")
    cell = random_cell(COMPARED, 0)
    reference, start = ReferenceInner(cell), central_split(cell)
    reference.energy(start)  # not counted: cvxpy compiles the problems once
    inner.evaluate(cell, start)
    search = CrossEntropy(COMPARED, population=POPULATION, elite=ELITE)
    search.center = start
    closed, by_cvxpy = [], []
    for _ in range(turns):
        asked = search.ask()
        begin = time.perf_counter()
        found = inner.evaluate(cell, asked)
        closed.append((time.perf_counter() - begin) / len(asked))
        feasible = np.flatnonzero(np.isfinite(found.energy_j))[:candidates]
        for place in feasible if len(feasible) else range(candidates):
            begin = time.perf_counter()
            energy = reference.energy(asked[place])
            by_cvxpy.append(time.perf_counter() - begin)
            if not np.isclose(energy, found.energy_j[place], rtol=1e-6):
                raise SystemExit(f"cvxpy {energy} J, closed forms {found.energy_j[place]} J")
        search.tell(found.energy_j, found.violation)
    ours, theirs = statistics.median(closed), statistics.median(by_cvxpy)
    return {
        "ce_closed_s_per_candidate": ours,
        "ce_cvxpy_s_per_candidate": theirs,
        "ce_speedup": theirs / ours,
        "dual_vs_ce_cvxpy": SEARCH * theirs / plan_size(COMPARED, 5)["dual_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100, 1000, 10000], metavar="I", help="devices")
    parser.add_argument("--repeats", type=int, default=5, help="cells of each size")
    parser.add_argument("--turns", type=int, default=12, help="populations that cvxpy and the closed forms both do")
    parser.add_argument("--candidates", type=int, default=10, help="of each population, that cvxpy solves")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(plan_size(options.only, options.repeats)))
        return
    result: dict[str, Any] = {}
    print(f"{'devices':>8} {'dual [s]':>10} {'peak [MB]':>10} {'gap':>9}", flush=True)
    for size in options.sizes:
        found = result[str(size)] = in_a_process(size, options.repeats)
        print(f"{size:>8} {found['dual_s']:>10.3f} {found['peak_mb']:>10.0f} {found['gap']:>9.1e}", flush=True)
    result |= beside_cvxpy(options.turns, options.candidates)
    ours, theirs = result["ce_closed_s_per_candidate"], result["ce_cvxpy_s_per_candidate"]
    print(f"{COMPARED} devices, a candidate: closed forms {1e3 * ours:.3f} ms, cvxpy {1e3 * theirs:.1f} ms")
    print(
        f"closed forms {result['ce_speedup']:.0f} times as fast; dual {result['dual_vs_ce_cvxpy']:.0f} times", end=" "
    )
    print(f"as fast as {SEARCH} candidates with cvxpy")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
