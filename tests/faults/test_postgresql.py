"""The tracking store in PostgreSQL: behind ``mlflow server``, and without it. The database is the test's own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fl_ray.store_comparison import runs_of_experiment
from tests.conftest import Call, small_recipe
from tests.serving import free_port, mlflow_page

# Debian keeps the server's programs out of the path, in a folder for each version.
FOUND = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), reverse=True)]
INITDB = next((path for path in FOUND if path is not None), None)
pytestmark = pytest.mark.skipif(INITDB is None, reason="no PostgreSQL on this machine: apt-get install postgresql")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a fresh PostgreSQL on a free port of this machine."""
    port, root = free_port(), os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="fl-ray-postgresql-"))  # pytest's own folders are closed to other users
    owner = {"user": "nobody", "group": "nogroup", "extra_groups": []} if root else {}  # PostgreSQL never runs as root
    if root:
        shutil.chown(folder, "nobody", "nogroup")
    programs, data = Path(str(INITDB)).resolve().parent, str(folder / "data")
    trusted = ["--username", "mlflow", "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
    made = subprocess.run(
        [str(programs / "initdb"), "-D", data, *trusted], cwd=folder, capture_output=True, text=True, **owner
    )
    assert made.returncode == 0, made.stderr
    options = ["-h", "127.0.0.1", "-p", str(port), "-c", "unix_socket_directories=", "-F"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(programs / "postgres"), "-D", data, *options], cwd=folder, stdout=log, stderr=log, **owner
        )
    try:
        ask = [str(programs / "pg_isready"), "--quiet", "-h", "127.0.0.1", "-p", str(port)]
        give_up = time.monotonic() + 60
        while subprocess.run(ask).returncode != 0:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.2)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # does not wait for who is connected
        process.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``mlflow server`` that keeps its runs there."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    with mlflow_page(command, port, folder) as address:
        yield address


def test_a_comparison_is_logged_to_postgresql_and_read_back(
    server: str, database: str, tmp_path: Path, call: Call
) -> None:
    entries = [{"label": "slow", "training.lr": 0.001}, {"label": "fast", "training.lr": 0.2}]
    content = small_recipe() | {"name": "stored", "rounds": 2, "tracking": {"uri": server}, "compare": entries}
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = call("compare", "stored.yaml", "--output", "runs", "--seeds", "0", "1", "2")
    assert done.returncode == 0, done.stderr
    expected = [(label, seed) for label in ("fast", "slow") for seed in range(3)]
    for name, uri in {"served": server, "direct": database}.items():
        assert [(run.label, run.seed) for run in runs_of_experiment(uri, "stored")[0]] == expected
        read = call("compare", "--mlflow", "stored", "--tracking.uri", uri, "--output", name)
        assert read.returncode == 0, read.stderr
        assert "difference to slow" in read.stdout
    tables = [(tmp_path / name / "comparison.md").read_text(encoding="utf-8") for name in ("served", "direct")]
    assert tables[0] == tables[1]
    one, _ = runs_of_experiment(database, "stored", "tags.label = 'slow' and params.seed = '1'")
    assert [(run.label, run.seed) for run in one] == [("slow", 1)]
