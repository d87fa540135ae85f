"""The driver killed with kill -9 at ten random moments of one run."""

from pathlib import Path

from tests.faults.driving import assert_one_tracked_run, assert_same_run, recipe, run, run_with_kills

ROUNDS, KILLS = 60, 10


def test_a_driver_killed_ten_times_gives_the_undisturbed_run(tmp_path: Path) -> None:
    path = recipe(tmp_path, rounds=ROUNDS)
    run("run", str(path), "--output", str(tmp_path / "whole"))
    met = run_with_kills(path, tmp_path / "cut", KILLS, seed=0)
    assert met == KILLS
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert_one_tracked_run(tmp_path, ROUNDS, runs=2)
