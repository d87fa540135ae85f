"""A cluster of three nodes (raylets) on this machine: placement, and a node that goes away in a round."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, threading, time
from pathlib import Path

import fl_ray
import ray
from ray.cluster_utils import Cluster

from fl_ray.config import RayConfig, RuntimeConfig
from fl_ray.experiment import Experiment
from fl_ray.recipes import load_recipe, make_config
from fl_ray.runtime.ray_backend import RayRuntime
from tests.faults.driving import assert_same_run

folder, strategy, remove = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "remove"
cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "resources": {"bandwidth": 10}})
others = [cluster.add_node(num_cpus=2, resources={"bandwidth": 10}) for _ in range(2)]
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
config = make_config(load_recipe(folder / "killed.yaml"))
told = []
layout = RuntimeConfig(actors="pooled", num_actors=3, placement_strategy=strategy)
runtime = RayRuntime(layout, RayConfig(), told.append)
output = folder / "cluster"
output.mkdir()
experiment = Experiment(config, output, runtime)

def cut():
    while len(experiment.folder.history()) < 3:
        time.sleep(0.02)
    time.sleep(0.15)
    cluster.remove_node(others[-1], allow_graceful=False)

if remove:
    threading.Thread(target=cut, daemon=True).start()
experiment.run()
nodes = ray.get([actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
                 for index, actor in enumerate(runtime._actors) if index in runtime._live()])
found = {"nodes": len(set(nodes)), "live": len(nodes), "lost": sum("is lost" in line for line in told)}
(folder / "found.json").write_text(json.dumps(found))
runtime.close()
ray.shutdown()
cluster.shutdown()
assert_same_run(folder / "whole", output)
"""


def on_three_nodes(folder: Path, strategy: str, remove: bool) -> dict:
    """Run the recipe there; it must equal the run in process. How many nodes and actors were there at the end."""
    from tests.faults.driving import recipe, run

    path = recipe(folder, rounds=12, tracking={"enabled": False})
    run("run", str(path), "--output", str(folder / "whole"), "--runtime.backend", "in_process")
    command = [sys.executable, "-c", SCRIPT, str(folder), strategy, "remove" if remove else "keep"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("strategy", "nodes"), [("STRICT_SPREAD", 3), ("PACK", 2)])
def test_actors_are_placed_over_the_nodes_as_the_strategy_says(tmp_path: Path, strategy: str, nodes: int) -> None:
    assert on_three_nodes(tmp_path, strategy, remove=False) == {"nodes": nodes, "live": 3, "lost": 0}


def test_a_node_removed_in_a_round_changes_no_result(tmp_path: Path) -> None:
    found = on_three_nodes(tmp_path, "SPREAD", remove=True)
    assert found["lost"] >= 1
    assert 1 <= found["live"] <= 3
