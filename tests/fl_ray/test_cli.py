"""Each command end to end, as a user calls it: real processes, exit codes, messages, files."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import Call
from tests.serving import free_port

RECIPE = {
    "name": "small",
    "data": {"name": "digits", "clients": 6, "max_samples": 600, "partition": {"name": "dirichlet", "alpha": 0.5}},
    "model": {"name": "mlp", "hidden": [16]},
    "training": {"lr": 0.1, "batch_size": 8},
    "runtime": {"backend": "in_process"},
    "tracking": {"enabled": False},
    "rounds": 3,
    "clients_per_round": 3,
    "targets": [0.2],
    "compare": [
        {"label": "FedAvg"},
        {"label": "central", "method.name": "centralised"},
        {"label": "public", "method": {"name": "public_only"}},
    ],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    twice = {**RECIPE, "compare": [{"label": "a b"}, {"label": "a_b"}]}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(twice))
    return path


def fl_ray(folder: Path, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fl_ray", *words]
    root = str(Path(__file__).parent.parent.parent)
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": root}, **more
    )


def test_help_answers_within_a_second_and_version_is_said(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = fl_ray(tmp_path, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # seconds of the processor: other tests run beside this one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert found.returncode == 0
    for command in ("run", "compare", "replay", "pretrain", "generate", "partition", "report", "list"):
        assert command in found.stdout
    assert fl_ray(tmp_path, "--version").stdout.strip().endswith("0.1.0")
    assert "dotted name" in fl_ray(tmp_path, "run", "--help").stdout


def test_list_names_every_component_without_importing_torch(tmp_path: Path) -> None:
    found = fl_ray(tmp_path, "list")
    for name in ("genfl", "local_only", "digits", "image_folder", "dirichlet_client", "exquisite_v1", "diffusion"):
        assert name in found.stdout
    code = "import sys; from fl_ray.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).parent.parent.parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=60).returncode == 0


def test_run_leaves_its_folder_and_says_where(recipe: Path, tmp_path: Path, call: Call) -> None:
    found = fl_ray(tmp_path, "run", "small.yaml", "--seed", "3", "--rounds=2", "--output", "out")
    assert found.returncode == 0, found.stderr
    assert "report: out/report.html" in found.stdout
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["seed"], config["rounds"]) == (3, 2)
    assert {"git_revision", "packages", "fl_ray"} <= set(config["environment"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    again = call("run", "small.yaml", "--output", "out")
    assert again.returncode == 2
    assert "in use" in again.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    report = (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    assert call("report", "out").returncode == 0
    assert (tmp_path / "out" / "report.html").read_text() == report
    same = call("run", "out/config.yaml", "--output", "same")
    assert same.returncode == 0, same.stderr
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_print_config_shows_the_resolved_recipe(recipe: Path, tmp_path: Path, call: Call) -> None:
    found = call("run", "small.yaml", "--data.partition.alpha", "0.1", "--method.name", "genfl", "--print_config")
    printed = yaml.safe_load(found.stdout)
    assert printed["data"]["partition"] == {"name": "dirichlet", "min_samples": 1, "alpha": 0.1}
    assert printed["method"]["kappa2"] == 0.5
    assert not (tmp_path / "runs").exists()


def test_compare_resumes_run_by_run(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ("compare", "small.yaml", "--seeds", "0", "1", "--output", "cmp")
    first = fl_ray(tmp_path, *words)
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "cmp" / "comparison.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["label", "FedAvg", "central", "public"]
    assert "final accuracy" in first.stdout
    assert "±" in first.stdout
    report = (tmp_path / "cmp" / "report.html").read_text()
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    ended = [
        [
            json.loads((tmp_path / "cmp" / "runs" / label / f"seed{seed}" / "summary.json").read_text())
            for seed in (0, 1)
        ]
        for label in ("FedAvg", "central")
    ]
    apart = [100 * (own["final_accuracy"] - base["final_accuracy"]) for base, own in zip(*ended, strict=True)]
    mean, half = sum(apart) / 2, 12.706 * abs(apart[0] - apart[1]) / 2  # t of one degree of freedom, sd / sqrt(2)
    _, pairs = (tmp_path / "cmp" / "comparison.md").read_text().split("less FedAvg's", 1)
    line = next(line for line in pairs.splitlines() if line.startswith("| central | 2 |"))
    shown, shown_half = line.split("|")[3].split("±")
    assert float(shown) == pytest.approx(mean, abs=0.006)
    assert float(shown_half) == pytest.approx(half, abs=0.02)
    assert "Seed by seed" in report
    with (tmp_path / "cmp" / "seeds.csv").open(newline="", encoding="utf-8") as stream:
        seeds = {(row["label"], row["seed"]): float(row["final_accuracy"]) for row in csv.DictReader(stream)}
    assert len(seeds) == 6
    assert seeds["central", "1"] == pytest.approx(ended[1][1]["final_accuracy"])
    kept = tmp_path / "cmp" / "runs" / "FedAvg" / "seed0" / "summary.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "cmp" / "runs" / "central" / "seed1" / "summary.json").unlink()
    second = call(*words)
    assert second.returncode == 0, second.stderr
    assert "5 of 6 runs were finished" in second.stderr
    assert kept.stat().st_mtime_ns == before
    assert "final accuracy" in second.stdout
    other = call(*words, "--rounds", "2")
    assert other.returncode == 2
    assert "other settings" in other.stderr
    assert call("report", "cmp").returncode == 0
    one, two = (f"cmp/runs/{label}/seed0" for label in ("FedAvg", "central"))
    (tmp_path / "copy").mkdir()
    shutil.copytree(tmp_path / one, tmp_path / "copy" / "seed0")
    assert call("report", one, "copy/seed0", two, "--output", "again").returncode == 0
    assert (tmp_path / "again" / "comparison.csv").read_text().splitlines()[1].startswith("FedAvg,fedavg,0,1,")
    config = yaml.safe_load((tmp_path / "copy" / "seed0" / "config.yaml").read_text())
    (tmp_path / "copy" / "seed0" / "config.yaml").write_text(yaml.safe_dump(config | {"rounds": 77}))
    mixed = call("report", one, "copy/seed0", "--output", "mixed")
    assert mixed.returncode == 2
    assert "both 'FedAvg' with seed 0, but their settings differ" in mixed.stderr
    assert call("report", "cmp", "--baseline", "nobody").returncode == 2
    assert call("report", "cmp", "--baseline", "central").returncode == 0
    assert "less central's" in (tmp_path / "cmp" / "comparison.md").read_text()
    known = yaml.safe_load((tmp_path / "small.yaml").read_text())
    more = {**known, "compare": [{"label": "slower", "training.lr": 0.01}, *known["compare"]]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(more, sort_keys=False))
    third = call(*words)
    assert third.returncode == 0, third.stderr
    assert "6 of 8 runs were finished" in third.stderr
    assert kept.stat().st_mtime_ns == before
    rows = (tmp_path / "cmp" / "comparison.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["label", "slower", "FedAvg", "central", "public"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(known, sort_keys=False))
    fourth = call(*words)
    assert fourth.returncode == 2
    assert "entries may be added to a comparison, but none changed or left out" in fourth.stderr


def test_compare_runs_some_of_its_labels_at_a_time(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ("compare", "small.yaml", "--output", "cmp")

    def rows(*more: str) -> list[list[str]]:
        found = call(*words, *more)
        assert found.returncode == 0, found.stderr
        with (tmp_path / "cmp" / "comparison.csv").open(newline="", encoding="utf-8") as stream:
            return [[row["label"], row["seeds"]] for row in csv.DictReader(stream)]

    assert rows("--seeds", "0", "--labels", "public", "central") == [["central", "0"], ["public", "0"]]
    both = [["FedAvg", "0 1"], ["central", "0"], ["public", "0"]]
    assert rows("--labels", "FedAvg", "--seeds", "0", "1", "--baseline", "central") == both
    assert "3 settings, seeds 0 1" in (tmp_path / "cmp" / "report.html").read_text()
    assert rows("--seeds", "0") == both
    shown = call(*words, "--labels", "central", "--print_config").stdout
    assert [line for line in shown.splitlines() if line.startswith("#")] == ["# central"]


def test_compare_of_several_recipes_demands_the_same_data(recipe: Path, tmp_path: Path, call: Call) -> None:
    second = {**RECIPE, "name": "second", "method": {"name": "centralised"}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    found = call("compare", "small.yaml", "second.yaml", "--seeds", "0", "--output", "two")
    assert found.returncode == 0, found.stderr
    assert "small" in found.stdout
    assert "second" in found.stdout
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("two/runs/*/seed0/summary.json")]
    assert len({summary["partition"] for summary in summaries}) == 1
    second["data"] = {**RECIPE["data"], "clients": 7}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    refused = call("compare", "small.yaml", "second.yaml")
    assert refused.returncode == 2
    assert "differ in 'data'" in refused.stderr


def test_partition_shows_table_and_figure(recipe: Path, tmp_path: Path, call: Call) -> None:
    found = call("partition", "small.yaml", "--data.partition.name", "label_blocks", "--output", "part")
    assert found.returncode == 0, found.stderr
    assert "entropy" in found.stdout
    assert "EMD" in found.stdout
    assert (tmp_path / "part" / "figures" / "partition.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("run", "none.yaml"), "No such file"),
        (("run", "small.yaml", "--data.partition.alpha", "-1"), "alpha is -1"),
        (("run", "small.yaml", "--data.clients", "5000"), "use fewer clients"),
        (("run", "small.yaml", "--data.partition.min_samples", "90"), "min_samples"),
        (("run", "small.yaml", "--method.name", "fedavvg"), "Did you mean 'fedavg'"),
        (("run", "small.yaml", "--trainign.lr", "1"), "Did you mean 'training'"),
        (("run", "small.yaml", "--method.name", "genfl", "--method.kappa1", "2"), "kappa1"),
        (("run", "small.yaml", "--method.name", "genfl"), "needs a generator"),
        (("run", "small.yaml", "--data.name", "mnist", "--data.root", "nowhere"), "--data.download true"),
        (("run", "small.yaml", "--seed"), "--seed needs a value"),
        (("run",), "takes a recipe"),
        (("report", "nothing"), "nothing: there is no such folder"),
        (("run", "small.yaml", "--output", "/proc/nowhere"), "--output /proc/nowhere"),
        (("compare", "small.yaml", "--seeds", "1", "1"), "each seed once"),
        (("compare", "small.yaml", "--labels", "FedAv"), r"--labels FedAv: .*Did you mean 'FedAvg'\? Known: FedAvg"),
        (("compare", "--mlflow", "small", "--labels", "FedAvg"), "--labels goes with recipes"),
        (("run", "small.yaml", "--roundss", "3"), "Did you mean 'rounds'"),
        (("run", "small.yaml", "--training.optimizer", "sgdd"), "training.optimizer is sgdd.*Did you mean 'sgd'"),
        (("run", "small.yaml", "--data.partition.alpha", "abc"), "alpha is abc, but it must be of type float"),
        (("run", "small.yaml", "--model.hidden", "abc"), "model.hidden is abc.*list"),
        (("run", "small.yaml", "--model.name", "os.path:join"), "model os.path:join"),
        (("run", "small.yaml", "--tracking.enabled", "true", "--tracking.uri", "mysql:foo"), "tracking.uri mysql:foo"),
        (("run", "small.yaml", "--data.public_fraction", "0.99"), "data.public_fraction"),
        (("compare", "twice.yaml"), "share the folder 'a_b'"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_clear_message(
    recipe: Path, call: Call, words: Sequence[str], match: str
) -> None:
    found = call(*words)
    assert found.returncode == 2, found.stderr
    assert re.search(match, found.stderr), found.stderr
    assert found.stderr.startswith("fl-ray: ")
    assert len(found.stderr.splitlines()) == 1
    assert not list(recipe.parent.glob("runs/*/*"))  # what was refused leaves nothing that looks like a run


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--ray.num_cpus", "1", "--runtime.actors", "per_client"), "6 clients need CPU 6.*has CPU 1"),
        (("--ray.address", "127.0.0.1:1"), "ray.address"),
    ],
)
def test_a_cluster_that_is_too_small_or_not_there(
    recipe: Path, tmp_path: Path, words: Sequence[str], match: str
) -> None:
    found = fl_ray(tmp_path, "run", "small.yaml", "--runtime.backend", "ray", *words)
    assert found.returncode == 2, found.stderr
    assert re.search(match, found.stderr), found.stderr
    assert "Traceback" not in found.stderr


def test_a_running_cluster_is_joined_and_left_running(recipe: Path, tmp_path: Path) -> None:
    """``ray start --block`` ends what it started, and that alone, when it is terminated."""
    port = free_port()
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    more = ["--resources", '{"bandwidth": 5}', "--include-dashboard=false", "--disable-usage-stats"]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(start + more, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "head.log").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        address = f"127.0.0.1:{port}"
        words = ("run", "small.yaml", "--runtime.backend", "ray", "--ray.address", address, "--output", "out")
        found = fl_ray(tmp_path, *words)
        assert found.returncode == 0, found.stderr
        assert "starting 2 client actors" in found.stderr
        assert head.poll() is None
    finally:
        head.terminate()
        head.wait(60)


def test_debug_shows_the_traceback(recipe: Path, tmp_path: Path) -> None:
    assert "Traceback" in fl_ray(tmp_path, "run", "none.yaml", "--debug").stderr


def test_a_full_disk_is_a_failure_and_loses_no_round(recipe: Path, tmp_path: Path) -> None:
    """The file system refuses files over 9 kB: history and summary fit, the model does not."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    words = ("run", "small.yaml", "--model.hidden", "[60]", "--checkpoint.every", "0", "--output", "out")
    found = fl_ray(tmp_path, *words, preexec_fn=limit)
    assert found.returncode == 1
    assert "File too large" in found.stderr
    assert "Traceback" not in found.stderr
    assert len((tmp_path / "out" / "history.csv").read_text().splitlines()) == 1 + 3


def test_ctrl_c_leaves_a_usable_folder_and_no_ray_process(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fl_ray", "run", "small.yaml", "--output", "cut"]
    settings = ["--runtime.backend", "ray", "--rounds", "100000", "--checkpoint.every", "1000"]
    root = str(Path(__file__).parent.parent.parent)
    process = subprocess.Popen(
        command + settings,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    history = tmp_path / "cut" / "history.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (history.exists() and len(history.read_text().splitlines()) > 5):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to the whole group
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["rounds"] >= 5
    assert list((tmp_path / "cut" / "checkpoints").glob("*.safetensors"))
    assert fl_ray(tmp_path, "report", "cut").returncode == 0


def test_a_read_only_folder_is_bad_input(recipe: Path, tmp_path: Path, call: Call) -> None:
    if os.geteuid() == 0:
        # root may write anywhere but into a file system that is read-only or virtual
        found = call("run", "small.yaml", "--output", "/sys/kernel/out")
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        found = call("run", "small.yaml", "--output", "locked/out")
    assert found.returncode == 2, found.stderr
    assert "--output" in found.stderr
