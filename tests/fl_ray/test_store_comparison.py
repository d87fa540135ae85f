"""A comparison read from the tracking store: SQLite and a real server, intervals and tests against scipy's."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from fl_ray.errors import OutputError, SettingError
from fl_ray.pairs import compare_pairs, confidence_interval
from fl_ray.store_comparison import runs_of_experiment, series_of
from tests.conftest import Call, small_recipe
from tests.serving import free_port, mlflow_page


def test_the_interval_is_students() -> None:
    values = [0.7, 0.75, 0.72, 0.9]
    mean, half = confidence_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_the_paired_test_is_scipys_over_common_seeds() -> None:
    own, other = {0: 0.8, 1: 0.9, 2: 0.7, 5: 0.1}, {0: 0.75, 1: 0.8, 2: 0.72, 7: 0.9}
    found = compare_pairs(own, other)
    assert found["pairs"] == 3
    assert found["p"] == pytest.approx(stats.ttest_rel([0.8, 0.9, 0.7], [0.75, 0.8, 0.72]).pvalue)
    assert found["difference"] == pytest.approx(np.mean([0.05, 0.1, -0.02]))


@pytest.mark.parametrize("other", [{0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.4, 2: 0.4}])
def test_there_is_no_p_where_there_is_no_test(other: dict[int, float]) -> None:
    assert compare_pairs({0: 0.5, 1: 0.5, 2: 0.5}, other)["p"] is None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``mlflow server`` on a free port of this machine."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with mlflow_page(command, port, folder) as address:
        yield address


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "server":
        return request.getfixturevalue("server")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def recipe(folder: Path, uri: str) -> Path:
    entries = [{"label": "slow", "training.lr": 0.001}, {"label": "fast", "training.lr": 0.2}]
    content = small_recipe() | {"name": "stored", "rounds": 2, "tracking": {"uri": uri}, "compare": entries}
    path = folder / "stored.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_store_alone_gives_the_comparison(uri: str, tmp_path: Path, call: Call) -> None:
    done = call("compare", str(recipe(tmp_path, uri)), "--output", str(tmp_path / "runs"), "--seeds", "0", "1", "2")
    assert done.returncode == 0, done.stderr
    read = call("compare", "--mlflow", "stored", "--tracking.uri", uri, "--output", str(tmp_path / "read"))
    assert read.returncode == 0, read.stderr
    assert "difference to slow" in read.stdout
    runs, older = runs_of_experiment(uri, "stored")
    assert older == 0
    assert [(run.label, run.seed) for run in runs] == [(label, seed) for label in ("fast", "slow") for seed in range(3)]
    rows = (tmp_path / "read" / "comparison.md").read_text(encoding="utf-8").splitlines()
    fast = [run.metrics["final_accuracy"] for run in runs if run.label == "fast"]
    assert rows[2].startswith(f"| fast | 3 | {100 * np.mean(fast):.2f} ± ")
    for name in ("accuracy", "differences"):
        assert (tmp_path / "read" / "figures" / f"{name}.svg").stat().st_size > 1000
    curve = series_of(uri, runs[0].run_id)
    assert [row["round"] for row in curve] == [1, 2]
    assert curve[-1]["test_accuracy"] == runs[0].metrics["final_accuracy"]
    one, _ = runs_of_experiment(uri, "stored", "tags.label = 'slow' and params.seed = '1'")
    assert [(run.label, run.seed) for run in one] == [("slow", 1)]
    with pytest.raises(OutputError, match="no finished run"):
        runs_of_experiment(uri, "stored", "tags.label = 'none'")
    with pytest.raises(SettingError, match="no such experiment"):
        runs_of_experiment(uri, "storde")
    with pytest.raises(SettingError, match="--filter"):
        runs_of_experiment(uri, "stored", "this is no filter")
    bad = call(
        "compare", "--mlflow", "stored", "--tracking.uri", uri, "--baseline", "fats", "--output", str(tmp_path / "x")
    )
    assert bad.returncode == 2
    assert "Did you mean 'fast'" in bad.stderr


def test_the_newest_run_of_a_label_and_seed_counts(tmp_path: Path, call: Call) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for rounds in ("1", "2"):
        words = ["--output", f"runs{rounds}", "--seeds", "0", "1", "--rounds", rounds]
        assert call("compare", str(recipe(tmp_path, uri)), *words).returncode == 0
    runs, older = runs_of_experiment(uri, "stored")
    assert older == 4
    assert [(run.label, run.seed) for run in runs] == [(label, seed) for label in ("fast", "slow") for seed in (0, 1)]
    assert all(len(series_of(uri, run.run_id)) == 2 for run in runs)
    read = call("compare", "--mlflow", "stored", "--tracking.uri", uri, "--output", "read")
    assert "left out: 4 runs" in read.stdout
    assert "4 that have newer ones" in (tmp_path / "read" / "report.html").read_text(encoding="utf-8")


def test_what_does_not_go_together_is_refused(tmp_path: Path, call: Call) -> None:
    for words, said in (
        (["compare"], "takes recipes, or --mlflow"),
        (["compare", "a.yaml", "--filter", "x"], "goes with --mlflow"),
        (["compare", "--mlflow", "stored", "--rounds", "3"], "leave --rounds out"),
        (["compare", "--mlflow", "stored"], "no such file"),
        (["compare", "--mlflow", "stored", "--tracking.uri", "http://127.0.0.1:9"], "no server answers"),
    ):
        done = call(*words)
        assert done.returncode == 2, words
        assert said in done.stderr


def test_a_port_in_use_is_named(call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = call("ui", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "give another --port" in done.stderr
