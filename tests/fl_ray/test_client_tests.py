"""Every client's own test: in the history, in clients.csv, in reports and comparisons."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.report.comparison_report import comparison_report, comparison_table
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.start import open_runtime
from fl_ray.summary import aggregate, worst_decile

Run = Callable[..., tuple[Experiment, dict]]
TESTED = {"data__client_test_fraction": 0.3, "evaluate_clients_every": 2}


def test_worst_decile_by_hand() -> None:
    assert worst_decile([0.5, 0.1, 0.9]) == 0.1  # at least one client
    assert worst_decile([k / 20 for k in range(20)]) == pytest.approx(0.025)
    assert worst_decile([k / 20 for k in range(19)]) == 0.0


def test_clients_are_tested_every_so_many_rounds_and_at_the_end(run_small: Run) -> None:
    experiment, summary = run_small(**TESTED)
    history, rows = experiment.folder.history(), experiment.folder.clients()
    assert [np.isnan(row["client_accuracy"]) for row in history] == [True, False, True]
    assert {row["round"] for row in rows} == {2, 3}
    held_out = experiment.data.held_out.sizes
    second = [row for row in rows if row["round"] == 2]
    assert [(row["client"], row["samples"]) for row in second] == [(c, n) for c, n in enumerate(held_out) if n]
    assert history[1]["client_accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in second]))
    assert history[1]["client_accuracy_worst_decile"] == min(row["accuracy"] for row in second)
    last = [row["accuracy"] for row in rows if row["round"] == 3]
    assert summary["client_accuracy"] == {"clients": len(last), "mean": np.mean(last), "worst_decile": min(last)}
    report = (experiment.folder / "report.html").read_text()
    assert "images that it held out" in report
    assert (experiment.folder / "figures" / "clients.svg").read_text().startswith("<svg")


def test_without_held_out_images_there_is_nothing(run_small: Run) -> None:
    experiment, summary = run_small(rounds=1)
    assert "client_accuracy" not in summary
    assert not (experiment.folder / "clients.csv").exists()
    assert not (experiment.folder / "figures" / "clients.svg").exists()
    with pytest.raises(SettingError, match=r"client_test_fraction is 0.*raise it"):
        run_small(evaluate_clients_every=1)


def test_a_run_cut_after_its_last_test_has_it_in_the_summary(
    small: Callable[..., RunConfig],
    tmp_path: Path,
    run_cut_at_its_end: Callable[[RunConfig, Path, Runtime], None],
) -> None:
    config, folder = small(**TESTED, rounds=2), tmp_path / "cut"
    with open_runtime(config) as runtime:
        run_cut_at_its_end(config, folder, runtime)
        rows = RunFolder(folder).clients()
        summary = Experiment(config, folder, runtime, resume=True).run()
    assert RunFolder(folder).clients() == rows
    assert summary["client_accuracy"]["mean"] == pytest.approx(np.mean([row["accuracy"] for row in rows]))


def test_a_comparison_says_what_an_accuracy_is_of_and_whose_images_are_shown(
    small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """TU Delft's accuracy is no pair of a test accuracy; a result that an older run lacks is told as such."""
    pretrain = {"method": {"name": "genfl_pretrain", "images": 20, "protocol": "delft"}, "with_generator": True}
    rows = {"FedAvg": {}, "Delft": pretrain, "Delft again": pretrain}

    def run(runtime: Runtime, label: str, seed: int) -> RunFolder:
        folder = tmp_path / f"{label}{seed}"
        folder.mkdir()
        Experiment(small(seed=seed, rounds=1, **rows[label]), folder, runtime, label=label).run()
        return RunFolder(folder)

    with open_runtime(small(**pretrain)) as runtime:
        folders = [run(runtime, label, seed) for label in rows for seed in (0, 1)]
    old = folders[2] / "summary.json"
    old.write_text(json.dumps({k: v for k, v in json.loads(old.read_text()).items() if k != "clean_accuracy"}))
    (columns, cells), legend = comparison_report(tmp_path, folders)
    of = "Accuracy of Delft, Delft again: on the clients' own training images, every client alike."
    assert legend.endswith(f"{of} After pre-training: on the test part.")
    shown = [line[columns.index("test accuracy, clean [%]")] for line in cells]
    assert shown[0] == "–"
    assert shown[1].endswith(" (1 of 2)")
    assert "(" not in shown[2]
    page = (tmp_path / "report.html").read_text()
    assert "Test accuracy" not in page
    assert "real and synthetic images of Delft, Delft again" in page
    assert page.count("<img") == 1
    assert "Seed by seed" not in page
    assert of in (tmp_path / "comparison.md").read_text()
    comparison_report(tmp_path, folders, baseline="Delft")
    pairs = (tmp_path / "comparison.md").read_text().split("less Delft's")[-1]
    assert "| Delft again | 2 | +0.00 ± 0.00" in pairs
    assert "| FedAvg |" not in pairs


def test_a_comparison_has_the_numbers_and_the_figure(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    def run(runtime: Runtime, label: str, seed: int, **settings: object) -> RunFolder:
        folder = tmp_path / f"{label}{seed}"
        folder.mkdir()
        Experiment(small(seed=seed, rounds=1, **settings), folder, runtime, label=label).run()
        return RunFolder(folder)

    with open_runtime(small()) as runtime:
        folders = [run(runtime, "tested", seed, data__client_test_fraction=0.3) for seed in (0, 1)]
        folders.append(run(runtime, "untested", 0))
    (columns, cells), _ = comparison_report(tmp_path, folders)
    place = columns.index("own tests of clients [%]")
    found = [100 * folder.summary()["client_accuracy"]["mean"] for folder in folders[:2]]
    assert cells[0][place] == f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}"
    assert columns[place + 1] == "their worst tenth [%]"
    assert cells[1][place : place + 2] == ["–", "–"]
    assert all(len(line) == len(columns) for line in cells)
    figure = (tmp_path / "figures" / "clients.svg").read_text()
    assert "tested" in figure
    assert "untested" not in figure
    assert "client_accuracy_worst_decile_mean" in (tmp_path / "comparison.csv").read_text().splitlines()[0]
    plain, _ = comparison_table([aggregate("untested", [folders[2].summary()], [])], [])
    assert not any("clients" in column for column in plain)
