"""The pool: failing actors, what samplers raise, shares of GPUs, requests taken as they are needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from generators.base import Block, Sampler
from generators.pool import ActorsLostError, GeneratorPool, LocalPool
from tests.generators.own import RaisingGenerator, SlowGenerator

BLOCKS = [Block(0, label, number) for label in range(2) for number in range(6)]


def pool_of(generator: SlowGenerator, folder: Path, actors: int) -> GeneratorPool:
    return GeneratorPool(generator, folder, actors, cpus=0, gpus=0, threads=1, timeout_s=180)


def test_the_others_take_the_blocks_of_an_actor_that_is_gone(ray_session: None, tmp_path: Path) -> None:
    generator = SlowGenerator()
    expected = dict(LocalPool(generator, tmp_path).make(BLOCKS))
    pool = pool_of(generator, tmp_path, 2)
    first, second = pool._actors.values()
    made: dict[Block, np.ndarray] = {}
    for block, images in pool.make(BLOCKS):
        if len(made) == 2:
            ray.kill(first)  # without a restart
        made[block] = images
    assert made.keys() == expected.keys()
    assert all((made[block] == expected[block]).all() for block in BLOCKS)
    assert len(list(pool.make(BLOCKS[:3]))) == 3
    ray.kill(second)
    with pytest.raises(ActorsLostError, match=r"the last of the generator's actors is lost \(.*actor.*\)"):
        list(pool.make(BLOCKS))
    pool.close()


def test_what_a_sampler_raises_arrives_as_it_is(ray_session: None, tmp_path: Path) -> None:
    pool = pool_of(RaisingGenerator(label=1), tmp_path, 1)
    with pytest.raises(ValueError, match=r"^class 1 has run dry$") as raised:
        list(pool.make([Block(0, 0, 0), Block(0, 1, 0)]))
    assert type(raised.value) is ValueError
    assert len(list(pool.make(BLOCKS[:3]))) == 3  # the actor is still there
    pool.close()
    with pytest.raises(ValueError, match=r"^no weights here$"):
        pool_of(RaisingGenerator(loads=False), tmp_path, 1)
    full = pool_of(RaisingGenerator(room=False), tmp_path, 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
        list(full.make(BLOCKS[:1]))
    full.close()


def test_a_request_is_taken_as_it_is_needed(ray_session: None, tmp_path: Path) -> None:
    """A request without end: no more is asked for than the actors have in hand."""
    asked = 0

    def endless() -> object:
        nonlocal asked
        while True:
            asked += 1
            yield Block(0, 0, asked)

    pool = pool_of(SlowGenerator(), tmp_path, 2)
    made = pool.make(endless())
    for _ in range(5):
        next(made)
    assert asked <= 5 + 4
    made.close()
    pool.close()


SHARES = """
import ray
from pathlib import Path
from generators.pool import GeneratorPool
from tests.generators.own import SlowGenerator

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
pool = GeneratorPool(SlowGenerator(), Path("."), 2, cpus=0, gpus=0.5, threads=1, timeout_s=180)
print("free", ray.available_resources().get("GPU", 0.0))
try:
    GeneratorPool(SlowGenerator(), Path("."), 1, cpus=0, gpus=0.5, threads=1, timeout_s=2)
except TimeoutError as error:
    print(error)
pool.close()
"""


def test_actors_share_a_gpu(tmp_path: Path) -> None:
    """Ray counts GPUs that it is told of, so that placement can be seen without one."""
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", SHARES], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert "free 0.0" in done.stdout, done.stderr
    assert "0 of 1 generator actors started within 2 s" in done.stdout


def test_threads_are_those_that_are_asked_for_and_then_as_before(tmp_path: Path) -> None:
    class Counting(SlowGenerator):
        def load(self, folder: Path, device: torch.device) -> Sampler:
            return CountingSampler()

    class CountingSampler(Sampler):
        def sample(self, block: Block) -> np.ndarray:
            return np.full((1, 1, 1, 1), torch.get_num_threads(), dtype=np.uint8)

    before = torch.get_num_threads()
    (_, images), *_ = LocalPool(Counting(), tmp_path, threads=before + 1).make(BLOCKS[:2])
    assert images.item() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_share_of_a_gpu_that_torch_can_not_use_is_refused(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PyTorch finds no CUDA there; .* set generator\.pool\.gpus to 0"):
        GeneratorPool(SlowGenerator(), tmp_path, 1, cpus=0, gpus=0, threads=1, timeout_s=180, device="cuda")
