"""The planner's benchmark runs, and its last line says what it should. (The generators' is in tests/faults: longer.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "planner.py"


def test_the_planners_benchmark(tmp_path: Path) -> None:
    words = ["--sizes", "20", "--repeats", "1", "--turns", "2", "--candidates", "3"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {
        "20",
        "ce_closed_s_per_candidate",
        "ce_cvxpy_s_per_candidate",
        "ce_speedup",
        "dual_vs_ce_cvxpy",
    }
    assert set(found["20"]) == {"dual_s", "peak_mb", "gap"}
    assert found["20"]["gap"] <= 1e-6
    assert found["ce_speedup"] > 5
