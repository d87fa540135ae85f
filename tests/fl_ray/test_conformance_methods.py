"""The other methods on two pooled actors: equal to in process, to the bit."""

from collections.abc import Iterator

import pytest

from fl_ray.config import RayConfig
from fl_ray.registry import REGISTRY
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.ray_backend import RayRuntime
from tests.fl_ray.test_conformance import LAYOUTS, OF_EACH_KIND, Run, assert_ray_equals_in_process


@pytest.fixture(scope="module")
def two_actors(ray_session: None) -> Iterator[Runtime]:
    with RayRuntime(LAYOUTS["pooled_2"], RayConfig()) as runtime:
        yield runtime


@pytest.mark.parametrize("method", [method for method in REGISTRY["method"] if method not in OF_EACH_KIND])
def test_ray_equals_in_process_to_the_bit(two_actors: Runtime, run_small: Run, method: str) -> None:
    assert_ray_equals_in_process(two_actors, run_small, method)
