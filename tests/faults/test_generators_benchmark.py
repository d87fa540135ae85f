"""The benchmark of the generator pool runs; what it measures here, beside other tests, is no measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "generators.py"


def test_the_generators_benchmark(tmp_path: Path) -> None:
    words = ["--steps", "2", "--batch", "4", "--blocks", "4", "--turns", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    kinds = ("pipeline", "pipeline_keeping_memory", "two_pipelines", "pool1", "pool2")
    rates = {kind: found[f"{kind}_images_s"] for kind in kinds}
    assert min(rates.values()) > 0
    assert found["ratio1"] == pytest.approx(rates["pool1"] / rates["pipeline"])
    assert found["ratio2"] == pytest.approx(rates["pool2"] / rates["pipeline"])
    assert found["ratio1_keeping_memory"] == pytest.approx(rates["pool1"] / rates["pipeline_keeping_memory"])
    assert found["ratio2_keeping_memory"] == pytest.approx(rates["pool2"] / rates["pipeline_keeping_memory"])
    assert found["ratio2_to_two_pipelines"] == pytest.approx(rates["pool2"] / rates["two_pipelines"])
    assert found["ratio1"] > 0.5  # small blocks, and one turn beside other tests: the real figure is in the README
