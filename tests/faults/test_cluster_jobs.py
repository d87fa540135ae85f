"""A real cluster by ``ray start``: jobs are submitted, followed, listed and stopped; a worker's raylet is killed."""

import contextlib
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from fl_ray.run_folder import RunFolder
from fl_ray.studies.trials import all_trials
from tests.fl_ray.studies.own import study_file
from tests.serving import free_port

BIN = Path(sys.executable).parent


class Terminal:
    """A command on a pseudo-terminal, as a user has it."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.screen, own = os.openpty()
        enter = partial(os.login_tty, own)
        self.process = subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=enter, pass_fds=[own])
        os.close(own)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """Until it is on the screen, after what was waited for before; what stands between them."""
        give_up = time.monotonic() + 200
        while text not in self.shown:
            assert time.monotonic() < give_up, self.shown
            assert self.process.poll() is None or select.select([self.screen], [], [], 0)[0], self.shown
            if select.select([self.screen], [], [], 1)[0]:
                with contextlib.suppress(OSError):  # nobody has the terminal any more
                    self.shown += os.read(self.screen, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def end(self) -> int:
        """Its exit code."""
        code = self.process.wait(60)
        os.close(self.screen)
        return code


class Cluster:
    """A head with one CPU, and a worker with other resources; a token of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        (folder / "token").write_text(secrets.token_hex(16), encoding="utf-8")
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, "PATH": f"{BIN}:{os.environ['PATH']}"}
        self.environment.pop("RAY_ADDRESS", None)
        self.sessions: list[str] = []
        head = ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
        self.head = self.start(*head, "--num-cpus=1", "--resources", '{"bandwidth": 1}')
        self.worker = self.start_worker()

    def start_worker(self) -> subprocess.Popen[bytes]:
        address = f"--address=127.0.0.1:{self.port}"
        return self.start(address, "--num-cpus=3", "--resources", '{"bandwidth": 10}')

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        # Two nodes on one machine need agents on ports of their own, and folders: a node takes a job's packages away
        # once nothing of it runs there. Sockets have short paths, so these lie outside of pytest's.
        self.sessions.append(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        own = ["--dashboard-agent-listen-port", str(free_port()), "--temp-dir", self.sessions[-1]]
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *own, *words]
        log = self.folder / f"ray{len(list(self.folder.glob('ray*.log')))}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=self.environment)
        give_up = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text(encoding="utf-8", errors="replace"):
            assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")
            assert time.monotonic() < give_up
            time.sleep(0.2)
        return process

    def whole(self) -> None:
        """Start the worker again where a test has killed it."""
        if self.worker.poll() is not None:
            self.worker = self.start_worker()

    def kill_worker(self) -> None:
        """Kill -9 of the worker's raylet."""
        for child in psutil.Process(self.worker.pid).children(recursive=True):
            if child.name() == "raylet":
                child.kill()
        self.worker.wait(60)

    def command(self, *words: str) -> list[str]:
        """``fl-ray`` with the cluster's address."""
        return [sys.executable, "-m", "fl_ray", *words, "--address", f"http://127.0.0.1:{self.dashboard}"]

    def call(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``fl-ray`` with the cluster's address and token, to its end."""
        return subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def end(self) -> None:
        for process in (self.worker, self.head):
            process.terminate()
            process.wait(60)
        for folder in self.sessions:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("jobs"))
    yield started
    started.end()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The cluster, with its worker."""
    running.whole()
    return running


def recipe(folder: Path, **changes: object) -> None:
    content = {
        "name": "job",
        "data": {"name": "digits", "clients": 6, "max_samples": 900},
        "model": {"name": "small_cnn"},
        "training": {"local_epochs": 3},
        "runtime": {"actors": "pooled", "training_path": "plain"},
        "rounds": 30,
        "tracking": {"enabled": False},
        **changes,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_the_token_is_asked_for_and_the_message_says_where_it_is_looked_for(cluster: Cluster) -> None:
    found = cluster.call("jobs", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN="wrong")
    assert found.returncode == 2
    assert "RAY_AUTH_TOKEN" in found.stderr
    assert "~/.ray/auth_token" in found.stderr


def wait_for_rounds(cluster: Cluster, job: str, rounds: int, *folders: Path) -> None:
    """Until each run has so many."""
    give_up = time.monotonic() + 200
    while any(len(RunFolder(folder).history()) < rounds for folder in folders):
        assert time.monotonic() < give_up, cluster.call("logs", job).stdout
        time.sleep(0.1)


def test_a_recipe_ends_well_though_the_workers_raylet_dies(cluster: Cluster) -> None:
    recipe(cluster.folder)
    output = cluster.folder / "out"
    done = cluster.call("submit", "job.yaml", "--output", str(output))
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    wait_for_rounds(cluster, job, 4, output)
    cluster.kill_worker()
    followed = cluster.call("logs", job, "--follow")
    assert followed.returncode == 0, followed.stdout
    assert RunFolder(output).finished()
    assert len(RunFolder(output).history()) == 30
    listed = cluster.call("jobs").stdout
    assert job in listed
    assert "succeeded" in listed


def test_a_four_trial_study_ends_well_though_the_workers_raylet_dies(cluster: Cluster) -> None:
    """Two trials are at work, and one at most on the head, which has one CPU: it then takes over the worker's."""
    settings = {"tracking": {"enabled": False}, "training.batch_size": 2, "rounds": 20, "checkpoint.every": 1}
    study_file(cluster.folder, settings=settings)
    output = cluster.folder / "study"
    done = cluster.call("submit", "study.yaml", "--output", str(output))
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    wait_for_rounds(cluster, job, 3, *(output / "trials" / number / "seed0" for number in ("0000", "0001")))
    cluster.kill_worker()
    followed = cluster.call("logs", job, "--follow")
    assert followed.returncode == 0, followed.stdout
    assert "its process died; it goes on elsewhere" in followed.stdout
    assert [trial.state for trial in all_trials(output)] == ["finished"] * 4
    assert all(len(RunFolder(output / "trials" / f"{n:04d}" / "seed0").history()) == 20 for n in range(4))


def test_the_exit_code_is_the_jobs_and_a_job_can_be_stopped(cluster: Cluster) -> None:
    recipe(cluster.folder, data={"name": "mnist", "root": "nowhere"}, tracking={})
    failed = cluster.call("submit", "job.yaml", "--output", str(cluster.folder / "failed"), "--wait")
    assert failed.returncode == 2, failed.stdout
    assert "nowhere" in failed.stdout
    assert "what the job logs to MLflow goes with the job's own folder" in failed.stderr
    recipe(cluster.folder, rounds=100000)
    begun = cluster.call("submit", "job.yaml", "--output", str(cluster.folder / "long"))
    job = begun.stdout.split()[1].rstrip(":")
    wait_for_rounds(cluster, job, 1, cluster.folder / "long")
    assert "stopped" in cluster.call("stop", job).stdout
    wait_for_interrupt(cluster, job, cluster.folder / "long")


def wait_for_interrupt(cluster: Cluster, job: str, output: Path) -> None:
    give_up = time.monotonic() + 60
    while (RunFolder(output).summary() or {}).get("status") != "interrupted":
        assert time.monotonic() < give_up, cluster.call("logs", job).stdout
        time.sleep(0.2)


def test_ctrl_c_asks_whether_to_leave_or_to_stop_the_job(cluster: Cluster) -> None:
    recipe(cluster.folder, rounds=100000)
    output = cluster.folder / "asked"
    words = ["submit", "job.yaml", "--output", str(output), "--wait"]
    waiting = Terminal(cluster.command(*words), cluster.folder, cluster.environment)
    waiting.wait_for("job ")
    job = waiting.wait_for(": ")
    wait_for_rounds(cluster, job, 1, output)
    waiting.type("\x03")
    waiting.wait_for("Stop it? [y/N]")
    waiting.type("n\n")
    waiting.wait_for(f"job {job} goes on")
    assert waiting.end() == 130
    wait_for_rounds(cluster, job, len(RunFolder(output).history()) + 1, output)

    following = Terminal(cluster.command("logs", job, "--follow"), cluster.folder, cluster.environment)
    following.wait_for("round ")
    following.type("\x03")
    following.wait_for("Stop it? [y/N]")
    following.type("y\n")
    following.wait_for(f"job {job} is stopped")
    assert following.end() == 130
    wait_for_interrupt(cluster, job, output)


def test_a_study_at_an_address_is_refused_on_several_nodes(cluster: Cluster) -> None:
    study_file(cluster.folder, settings={"tracking": {"enabled": False}})
    refused = cluster.call("submit", "study.yaml", "--output", f"file://{cluster.folder / 'far'}", "--wait")
    assert refused.returncode == 2, refused.stdout
    assert "run on all 2 nodes of the cluster; give a folder that all of them see" in refused.stdout


def test_what_can_not_be_packed_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text("{name: far}", encoding="utf-8")
    for words, said in (
        (["submit", str(tmp_path / "far.yaml"), "--output", "/x"], "outside of the working folder"),
        (["submit", "job.yaml", "--output", "x"], "a job's own folder goes when the job ends"),
        (["submit", "job.yaml", "--output", "/x", "--rouns", "3"], "rouns"),
        (["submit", "job.yaml", "--output", "/x", "--training.lrr", "3"], "lrr"),
        (["submit", "job.yaml", "--output", "/x", "--requirements", "nowhere.txt"], "no such file"),
        (["submit", "job.yaml"], "--output is missing"),
        (["submit", "job.yaml", "--output", "x", "--env", "FOO"], "must be NAME=VALUE"),
    ):
        found = cluster.call(*words)
        assert found.returncode == 2
        assert said in found.stderr
