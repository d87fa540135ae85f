"""Studies on Ray Tune: trials, pruning, failures, placement, MLflow, reports; and a kill -9 in the middle of one."""

import contextlib
import csv
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlflow
import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from fl_ray.config import TrackingConfig
from fl_ray.errors import PlacementError
from fl_ray.experiment import Experiment
from fl_ray.progress import Progress
from fl_ray.report.study_report import study_report
from fl_ray.run_folder import RunFolder, at_work
from fl_ray.runtime.start import open_runtime
from fl_ray.studies.metrics import measure
from fl_ray.studies.objectives import RunObjective
from fl_ray.studies.run_study import begin_study, journal_of, resume_study, run_study
from fl_ray.studies.settings import Study, load_study
from fl_ray.studies.tracking import begin_study_run, end_study
from fl_ray.studies.trials import Trial, all_trials, best_trials
from tests.conftest import Call, small_recipe
from tests.faults.driving import COMMAND
from tests.fl_ray.studies.own import study_file


def begun(folder: Path, **changes: object) -> tuple[Study, Path]:
    output = folder / "study"
    return begin_study(load_study(study_file(folder, **changes), {}), output), output


def actors() -> list[str]:
    """The processes of trials and of client actors; other tests' have other parents."""
    titles: list[str] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            titles.append(" ".join(process.cmdline()))
    return [title for title in titles if title.startswith(("ray::HostActor", "ray::_Trial"))]


def groups() -> list[dict[str, object]]:
    """The placement groups that hold resources."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def statuses(folder: Path) -> Counter[str]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small-study")
    return Counter(run.info.status for run in client.search_runs([experiment.experiment_id]))


def test_the_command_ends_with_its_tables_figures_and_nested_runs(
    ray_session: None, tmp_path: Path, call: Call
) -> None:
    path = study_file(
        tmp_path, algorithm={"name": "cross_entropy", "population": 3, "elite": 2}, trials=6, seeds=[0, 1]
    )
    done = call("tune", str(path), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "final_accuracy" in done.stdout
    with (tmp_path / "out" / "trials.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["trial"] for row in rows] == list("012345")
    assert all(row["state"] == "finished" and 0 < float(row["final_accuracy"]) <= 1 for row in rows)
    for name in ("history", "importance", "parallel_final_accuracy", "front"):
        assert (tmp_path / "out" / "figures" / f"{name}.svg").stat().st_size > 1000
    assert "Study: small-study" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("small-study").experiment_id])
    by_kind = {kind: [run for run in runs if run.data.tags.get("kind") == kind] for kind in ("study", "trial")}
    (parent,), trials = by_kind["study"], by_kind["trial"]
    assert len(trials) == 6
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    seeds = [run for run in runs if run not in [parent, *trials]]
    assert Counter(run.data.tags["mlflow.parentRunId"] for run in seeds) == {run.info.run_id: 2 for run in trials}
    assert all(run.info.status == "FINISHED" for run in runs)
    best = max(rows, key=lambda row: float(row["final_accuracy"]))
    assert parent.data.metrics["best_final_accuracy"] == pytest.approx(float(best["final_accuracy"]))
    of_trial = next(run for run in trials if run.data.tags["trial"] == best["trial"])
    assert float(of_trial.data.params["training.lr"]) == pytest.approx(float(best["training.lr"]))
    again = call("tune", "--resume", str(tmp_path / "out"), "--trials", "7")
    assert again.returncode == 0, again.stderr
    assert len(all_trials(tmp_path / "out")) == 7


def test_pruned_trials_leave_no_actor_and_no_run_that_runs(ray_session: None, tmp_path: Path) -> None:
    space = {"training.lr": {"choice": [0.3, 1.0e-5, 2.0e-5]}}
    scheduler = {"name": "asha", "grace_period": 1, "reduction_factor": 2}
    settings = {"rounds": 5, "runtime.backend": "ray", "runtime.num_actors": 1, "runtime.actors": "pooled"}
    grid = {"space": space, "algorithm": "grid", "concurrency": 1}  # so that the good one comes first
    study, output = begun(tmp_path, **grid, scheduler=scheduler, settings=settings)
    trials = run_study(study, output, Progress(enabled=False))
    assert [trial.state for trial in trials] == ["finished", "pruned", "pruned"]
    assert statuses(tmp_path)["RUNNING"] == 1  # the study's own, which the command ends with its report
    give_up = time.monotonic() + 20
    while actors() or groups():
        assert time.monotonic() < give_up, (actors(), groups())
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def test_settings_that_are_proposed_again_are_not_run_again(tmp_path: Path) -> None:
    study, output = begun(tmp_path, seeds=[0, 1])
    objective, params = RunObjective(study, output, None), {"training.lr": 0.1, "training.local_epochs": 1}
    for number, chosen in enumerate((params, params, params | {"training.lr": 0.2})):
        for _ in objective.begin(number, chosen):
            pass
    objective.close()
    first, again, other = all_trials(output)
    assert again.metrics == first.metrics != other.metrics
    assert [(output / "trials" / f"{number:04d}" / "seed1").exists() for number in range(3)] == [True, False, True]
    study_report(study, output)
    ranked = (output / "study.md").read_text(encoding="utf-8").splitlines()[2:]
    assert sorted(line.split("|")[1].strip() for line in ranked) == ["0", "2"]


def test_what_a_cut_trial_has_left_does_not_count_in_steps_that_are_done_again(tmp_path: Path) -> None:
    study, output = begun(tmp_path, seeds=[0, 1])
    params = {"training.lr": 0.1, "training.local_epochs": 1}
    Trial(0, params, by_seed={"1": {"final_accuracy": 9.0, "final_loss": None}}).write(output)
    objective = RunObjective(study, output, None)
    steps = objective.begin(0, params)
    assert next(steps)["final_accuracy"] <= 1.0
    steps.close()
    objective.close()


def test_a_grid_that_is_resumed_goes_on_with_what_it_lacks(ray_session: None, tmp_path: Path) -> None:
    space = {"training.lr": {"choice": [0.1, 0.2, 0.3]}}
    study, output = begun(tmp_path, space=space, algorithm="grid", concurrency=1, trials=1, settings={"rounds": 1})
    assert len(run_study(study, output, Progress(enabled=False))) == 1
    trials = run_study(resume_study(output, 9), output, Progress(enabled=False))
    assert [trial.params["training.lr"] for trial in trials] == [0.1, 0.2, 0.3]


def test_a_store_that_is_away_at_the_end_leaves_a_trial_finished(tmp_path: Path) -> None:
    study, output = begun(tmp_path, settings={"rounds": 1})
    parent = begin_study_run(study, output)
    objective = RunObjective(study, output, parent)
    steps = objective.begin(0, {"training.lr": 0.1, "training.local_epochs": 1})
    next(steps)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        store.execute("ALTER TABLE tags RENAME TO gone")
    with pytest.raises(StopIteration):
        next(steps)
    objective.close()
    (trial,) = all_trials(output)
    assert (trial.state, trial.error) == ("finished", None)
    assert "tags" in trial.tracking_error
    assert "tags" in end_study(study, output, "FINISHED")


def test_a_failed_trial_is_recorded_and_the_study_goes_on(ray_session: None, tmp_path: Path) -> None:
    space = {"data.partition.min_samples": {"choice": [3, 99]}}  # 99 samples for each of six clients are not there
    study, output = begun(tmp_path, space=space, algorithm="grid", concurrency=1)
    trials = run_study(study, output, Progress(enabled=False))
    assert [(trial.state, trial.params["data.partition.min_samples"]) for trial in trials] == [
        ("finished", 3),
        ("failed", 99),
    ]
    assert "min_samples is 99" in trials[1].error
    assert "Traceback" in (output / "trials" / "0001" / "error.txt").read_text(encoding="utf-8")
    assert statuses(tmp_path)["FAILED"] >= 1
    assert statuses(tmp_path)["RUNNING"] == 1


def test_a_trial_whose_process_dies_is_begun_again(ray_session: None, tmp_path: Path) -> None:
    """It goes on at its checkpoint, to the metrics that it would have had, and is one run in MLflow."""
    mark = tmp_path / "died"
    method = {"name": "tests.fl_ray.studies.own:DiesOnce", "mark": str(mark)}
    settings = {"rounds": 7, "checkpoint.every": 2, "method": method}
    study, output = begun(tmp_path, space={"training.lr": {"choice": [0.1]}}, trials=1, settings=settings)
    (trial,) = run_study(study, output, Progress(enabled=False))
    assert mark.exists()
    assert trial.state == "finished"
    (stored,) = journal_of(study, output).trials
    assert sorted(stored.intermediate_values) == list(range(1, 8))
    assert statuses(tmp_path) == {"RUNNING": 1, "FINISHED": 2}  # the study's own run ends with its report
    config = replace(study.config(trial.params), tracking=TrackingConfig(enabled=False))
    whole = RunFolder(tmp_path / "whole")
    whole.path.mkdir()
    with open_runtime(config) as runtime:
        Experiment(config, whole.path, runtime).run()
    assert trial.metrics == measure(whole.history(), config)


def test_a_trials_actors_live_in_its_own_placement_group(ray_session: None, tmp_path: Path) -> None:
    """Two trials with a client actor each: there are two groups, of one bundle each, and no other takes a CPU."""
    settings = {"runtime": {"backend": "ray", "actors": "pooled", "num_actors": 1}, "rounds": 30}
    study, output = begun(tmp_path, trials=2, settings=settings)
    seen: list[tuple[int, int, float]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            hosts = sum("HostActor" in title for title in actors())
            seen.append((hosts, len(groups()), ray.available_resources().get("CPU", 0.0)))
            time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        trials = run_study(study, output, Progress(enabled=False))
    finally:
        stop.set()
        thread.join()
    assert [trial.state for trial in trials] == ["finished"] * 2
    assert max(hosts for hosts, _, _ in seen) == 2
    assert max(count for _, count, _ in seen) == 2
    assert min(free for _, _, free in seen) == ray.cluster_resources()["CPU"] - 2


def test_a_study_that_does_not_fit_says_so_at_once(ray_session: None, tmp_path: Path) -> None:
    study, output = begun(tmp_path, concurrency=3, settings={"runtime.threads": 2})
    with pytest.raises(PlacementError, match="concurrency is 3, but the cluster holds 2 trials"):
        run_study(study, output, Progress(enabled=False))
    assert not (output / "journal.log").exists()  # before the study is begun


def test_a_study_that_does_not_fit_leaves_its_folder_to_another(ray_session: None, tmp_path: Path, call: Call) -> None:
    path, words = study_file(tmp_path, concurrency=64, settings={"runtime.backend": "ray"}), ("--output", "out")
    refused = call("tune", str(path), *words)
    assert refused.returncode == 2, refused.stderr
    assert "concurrency is 64, but the cluster" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert call("tune", str(study_file(tmp_path, trials=1, concurrency=1)), *words).returncode == 0
    (tmp_path / "out" / "report.html").unlink()
    assert call("report", "out").returncode == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_a_study_is_refused_where_another_process_is_at_work(tmp_path: Path, call: Call) -> None:
    """Neither begun nor gone on with: two journals of one study would be one too many."""
    _, begun_before = begun(tmp_path)
    new = tmp_path / "new"
    for words, folder in (([str(study_file(tmp_path)), "--output"], new), (["--resume"], begun_before)):
        with at_work(folder):
            called = call("tune", *words, str(folder))
        assert called.returncode == 2
        assert f"{folder}: another process is at work" in called.stderr
    assert not new.exists()
    assert not all_trials(begun_before)


def test_targets_that_seeds_missed_are_told(tmp_path: Path) -> None:
    recipe = small_recipe() | {"rounds": 2, "targets": [0.05, 0.999]}
    recipe["tracking"] = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    study, output = begun(tmp_path, recipe=recipe, metric="rounds_to_0.999", mode="min", seeds=[0, 1])
    parent = begin_study_run(study, output)
    objective = RunObjective(study, output, parent)
    for _ in objective.begin(0, {"training.lr": 0.1, "training.local_epochs": 1}):
        pass
    objective.close()
    (trial,) = all_trials(output)
    names = [f"{name}_to_0.999" for name in ("rounds", "virtual_time_s", "energy_j")]
    assert trial.missed == {"0": names, "1": names}
    assert trial.metrics["rounds_to_0.999"] == 4
    logged = mlflow.MlflowClient(recipe["tracking"]["uri"]).get_run(trial.mlflow_run).data.metrics
    assert "rounds_to_0.999" not in logged
    assert "rounds_to_0.05" in logged
    study_report(study, output)
    assert "| 4 ± 0 (missed by 2 of 2) |" in (output / "study.md").read_text(encoding="utf-8")
    assert "rounds_to_0.999:2" in (output / "trials.csv").read_text(encoding="utf-8")


def test_metrics_of_part_of_a_run_cost_more_than_any_whole_one(tmp_path: Path) -> None:
    base = load_study(study_file(tmp_path), {}).base()
    rows = [
        {"round": n, "test_accuracy": 0.1 * n, "test_loss": 1.0, "virtual_time_s": 2.0 * n, "energy_j": 3.0 * n}
        | {"bytes_up": 10 * n, "bytes_down": 20 * n}
        for n in range(1, 5)
    ]
    so_far = measure(rows[:2], base)
    assert (so_far["final_accuracy"], so_far["rounds_to_0.5"]) == (0.2, 2 * 4)
    assert so_far["virtual_time_s_to_0.5"] == 2 * 8.0
    reached = measure([*rows, {**rows[-1], "round": 5, "test_accuracy": 0.6, "virtual_time_s": 10.0}], base)
    assert (reached["rounds_to_0.5"], reached["virtual_time_s_to_0.5"]) == (5, 10.0)


def test_the_pareto_front_is_what_no_other_trial_beats_in_everything() -> None:
    points = [(0.9, 10.0), (0.8, 5.0), (0.7, 6.0), (0.95, 30.0), (0.9, 12.0)]
    trials = [
        Trial(n, {}, "finished", {"final_accuracy": accuracy, "energy_j": energy})
        for n, (accuracy, energy) in enumerate(points)
    ]
    trials.append(Trial(9, {}, "pruned", {"final_accuracy": 1.0, "energy_j": 0.0}))
    front = best_trials(("max", "min"), ("final_accuracy", "energy_j"), trials)
    assert [trial.number for trial in front] == [3, 0, 1]
    assert [trial.number for trial in best_trials(("min",), ("energy_j",), trials)] == [1]


def test_a_study_killed_in_the_middle_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    def study(folder: Path) -> list[str]:
        folder.mkdir()
        settings = {"rounds": 12, "checkpoint.every": 1, "ray.num_cpus": 2}
        algorithm = {"name": "cross_entropy", "population": 2, "elite": 2}
        path = study_file(folder, trials=4, concurrency=1, algorithm=algorithm, settings=settings)
        return [*COMMAND, "tune", str(path), "--output", str(folder / "out")]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run(study(tmp_path / "whole"), **quiet, timeout=300).returncode == 0
    process = subprocess.Popen(study(tmp_path / "cut"), **quiet)
    history = tmp_path / "cut" / "out" / "trials" / "0002" / "seed0" / "history.csv"
    give_up = time.monotonic() + 200
    while not history.exists() or len(history.read_text(encoding="utf-8").splitlines()) < 4:
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Trial.read(tmp_path / "cut" / "out", 2).state == "running"
    resume = [*COMMAND, "tune", "--resume", str(tmp_path / "cut" / "out")]
    assert subprocess.run(resume, **quiet, timeout=300).returncode == 0
    whole, cut = all_trials(tmp_path / "whole" / "out"), all_trials(tmp_path / "cut" / "out")
    assert [trial.params for trial in cut] == [trial.params for trial in whole]
    assert [trial.metrics for trial in cut] == [trial.metrics for trial in whole]
    assert all(trial.state == "finished" for trial in cut)
    assert statuses(tmp_path / "cut") == statuses(tmp_path / "whole") == {"FINISHED": 1 + 4 + 4}
