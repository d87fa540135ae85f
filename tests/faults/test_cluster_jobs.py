"""A real cluster by ``ray start``: jobs are submitted, followed and listed; a worker's raylet is killed."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from fl_ray.run_folder import RunFolder

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A head with one CPU, and a worker with other resources; a token of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        (folder / "token").write_text(secrets.token_hex(16), encoding="utf-8")
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, "PATH": f"{BIN}:{os.environ['PATH']}"}
        self.environment.pop("RAY_ADDRESS", None)
        # Sockets have short paths, so the session's folder lies outside of pytest's.
        head = ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--temp-dir", "/tmp/fl-ray-jobs"]
        self.head = self.start(*head, "--num-cpus=1", "--resources", '{"bandwidth": 1}')
        self.worker = self.start(f"--address=127.0.0.1:{self.port}", "--num-cpus=3", "--resources", '{"bandwidth": 10}')

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        # Two nodes on one machine need agents on ports of their own.
        own = ["--dashboard-agent-listen-port", str(free_port())]
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

    def call(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``fl-ray`` with the cluster's address and token."""
        command = [sys.executable, "-m", "fl_ray", *words, "--address", f"http://127.0.0.1:{self.dashboard}"]
        return subprocess.run(
            command,
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("jobs"))
    yield started
    started.end()


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


def test_a_recipe_ends_well_though_the_workers_raylet_dies(cluster: Cluster) -> None:
    recipe(cluster.folder)
    output = cluster.folder / "out"
    done = cluster.call("submit", "job.yaml", "--output", str(output))
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    give_up = time.monotonic() + 200
    while len(RunFolder(output).history()) < 4:
        assert time.monotonic() < give_up, cluster.call("logs", job).stdout
        time.sleep(0.1)
    for child in psutil.Process(cluster.worker.pid).children(recursive=True):
        if child.name() == "raylet":
            os.kill(child.pid, signal.SIGKILL)
    cluster.worker.wait(60)
    followed = cluster.call("logs", job, "--follow")
    assert followed.returncode == 0, followed.stdout
    assert RunFolder(output).finished()
    assert len(RunFolder(output).history()) == 30
    listed = cluster.call("jobs").stdout
    assert job in listed
    assert "succeeded" in listed


def test_what_can_not_be_packed_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text("{name: far}", encoding="utf-8")
    for words, said in (
        (["submit", str(tmp_path / "far.yaml"), "--output", "x"], "outside of the working folder"),
        (["submit", "job.yaml"], "--output is missing"),
        (["submit", "job.yaml", "--output", "x", "--env", "FOO"], "must be NAME=VALUE"),
    ):
        found = cluster.call(*words)
        assert found.returncode == 2
        assert said in found.stderr
