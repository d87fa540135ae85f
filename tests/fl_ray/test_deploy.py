"""The files under deploy/ as Ray reads them: its launcher's schema, and its KubeRay autoscaler."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from fl_ray.studies.settings import load_study

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def test_the_launchers_file_keeps_rays_schema() -> None:
    content = read("cluster.yaml")
    validate_config(prepare_config(copy.deepcopy(content)))
    types = content["available_node_types"]
    assert content["head_node_type"] in types
    assert all("bandwidth" in each["resources"] for each in types.values())


def test_what_breaks_the_schema_is_seen() -> None:
    content = read("cluster.yaml")
    content["available_node_types"]["clients"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(content))


def test_rays_autoscaler_reads_the_clusters_node_groups() -> None:
    manifest = read("kuberay/raycluster.yaml")
    manifest["metadata"]["namespace"] = "default"
    found = _derive_autoscaling_config_from_ray_cr(manifest)
    validate_config(found)
    groups = {name: each["resources"] for name, each in found["available_node_types"].items()}
    assert groups["clients"]["bandwidth"] == 100
    assert groups["clients"]["CPU"] == 16
    assert groups["generators"]["GPU"] == 1
    assert found["available_node_types"]["clients"]["max_workers"] == 6


def test_the_jobs_manifest_runs_a_study_that_is_there_on_a_cluster_that_ray_can_read() -> None:
    manifest = read("kuberay/rayjob.yaml")
    assert manifest["kind"] == "RayJob"
    command = manifest["spec"]["entrypoint"].split()
    assert command[:4] == ["python", "-m", "fl_ray", "tune"]
    assert load_study(ROOT / command[4], {"ray.address": "auto"}).trials > 0
    cluster = {"metadata": {"name": "job", "namespace": "default"}, "spec": manifest["spec"]["rayClusterSpec"]}
    found = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(found)
    assert found["available_node_types"]["clients"]["resources"]["bandwidth"] == 100


def test_manifests_name_rays_version_and_mount_what_they_declare() -> None:
    for path in (DEPLOY / "kuberay").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        (version,) = set(re.findall(r'rayVersion: "([\d.]+)"', text))
        assert version == ray.__version__
        content = yaml.safe_load(text)
        spec = content["spec"].get("rayClusterSpec", content["spec"])
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            declared = {volume["name"] for volume in pod.get("volumes", [])}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} <= declared
                assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_image_installs_what_a_node_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert "'.[cluster,text]'" in text
    assert text.rstrip().splitlines()[-1].startswith("RUN")
