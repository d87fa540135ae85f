"""The check of the cost model: fits by hand, real training measured, no energy without a sensor."""

import json
from pathlib import Path

import numpy as np
import pytest

from fl_ray.energy_check import Sensor, fit_proportional
from tests.conftest import Call

RECIPE = str(Path(__file__).parent.parent.parent / "experiments" / "genfl" / "digits.yaml")


def test_fits_by_hand() -> None:
    exact = fit_proportional([100, 200, 400], [0.5, 1.0, 2.0])
    assert exact.per_sample == pytest.approx(0.005)
    assert exact.worst == pytest.approx(0, abs=1e-12)
    assert exact.constant == pytest.approx(0, abs=1e-12)
    # 1 s + 10 ms a sample: relative least squares over a grid of slopes finds the same slope.
    samples, seconds = np.array([100.0, 200, 400]), np.array([2.0, 3, 5])
    found = fit_proportional(samples, seconds)
    slopes = np.linspace(0.005, 0.025, 200_001)
    losses = ((slopes[:, None] * samples / seconds - 1) ** 2).sum(axis=1)
    assert found.per_sample == pytest.approx(slopes[losses.argmin()], rel=1e-4)
    assert found.worst == pytest.approx(np.abs(found.per_sample * samples / seconds - 1).max())
    assert found.constant == pytest.approx(1 / (10 / 3))


def test_training_is_measured_and_energy_only_by_a_sensor(call: Call, tmp_path: Path) -> None:
    options = ["--threads", "1", "--batch_sizes", "4", "64", "--samples", "100", "400", "--repeats", "2"]
    done = call("energy-check", RECIPE, "--output", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "energy_check.json").read_text())
    seconds = {(point["batch_size"], point["samples"]): point["seconds"] for point in found["points"]}
    assert seconds[4, 400] > 1.5 * seconds[4, 100]  # four times the work, over any constant
    assert seconds[4, 400] > 1.5 * seconds[64, 400]  # 16 times as many steps
    measured = [point["energy_j"] for point in found["points"]]
    if Sensor().names:
        assert min(measured) > 0
    else:
        assert measured == [None] * 4
        assert found["energy_fits"] == found["sensors"] == []
        assert "energy: not measured" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "100000"], "--samples 100000: the recipe's clients have"),
        (["--threads", "0"], "--threads 0: each must be at least 1"),
        (["--repeats", "0"], "--repeats is 0, but it must be at least 1"),
    ],
)
def test_bad_options(call: Call, options: list[str], message: str) -> None:
    done = call("energy-check", RECIPE, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_rapl_counters_add_up_over_their_end(tmp_path: Path) -> None:
    """Files as Linux's powercap has them, with a counter that begins again."""
    for number, value in enumerate((4_000_000, 9_000_000)):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"package-{number}\n")
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text("10000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which holds its energy already
    sensor = Sensor(tmp_path)

    def work() -> None:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("5500000\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2000000\n")

    seconds, energy = sensor.measure(work)
    assert sensor.names[-2:] == ["CPU package-0", "CPU package-1"]
    assert energy == pytest.approx(1.5 + 3.0, abs=1e-9) or len(sensor.names) > 2
    assert 0 < seconds < 5
