"""Images per second of the generator pool, beside the same diffusers pipeline called in a plain loop.

    python experiments/benchmarks/generators.py
    python experiments/benchmarks/generators.py --steps 20 --batch 16 --blocks 2
    python experiments/benchmarks/generators.py --gpus 0.3 --precision bf16 --steps 20 --batch 256 --blocks 4

The class-conditional diffusion generator for 32 x 32 RGB with its default UNet, and random weights: the time of an
image does not depend on them. The plain loop is a process of one thread that calls the pipeline batch by batch; the
pool has one actor of one thread, then two, and makes blocks of the same size with the same sampler and steps. They run
in turns; the numbers are medians over the turns. The pool's actors keep freed memory for the next tensors, which a
process doesn't by itself: a plain loop that does as well says what the pool costs without that. Two plain loops at once
say what the machine has for two processes: cores that share their units do not do twice the work. With ``--gpus`` all
of them compute on one GPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
# A script's folder comes first where Python (and Ray, for its workers, by the script's name) looks for packages: there
# generators.py would hide the package of its name.
ROOT = Path(__file__).resolve().parents[2]
sys.path[0], sys.argv[0] = str(ROOT), str(ROOT / "benchmark")

SIZE, CHANNELS, CLASSES = 32, 3, 10


def plain_loop(folder: Path, settings: dict[str, Any], device: str, keep_memory: bool, pipe: Any) -> None:
    """Make as many batches as the pipe asks for, with the pipeline alone; answer with the seconds."""
    import torch

    from fl_ray.runtime.memory import keep_freed_memory
    from generators.diffusion import ClassConditionalPipeline
    from generators.pipelines import swap_scheduler

    torch.set_num_threads(1)
    if keep_memory:
        keep_freed_memory()
    pipeline = ClassConditionalPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.scheduler = pipeline.schedule(pipeline.scheduler)
    swap_scheduler(pipeline, "ddim")
    pipeline = pipeline.to(device)
    labels, noise = torch.zeros(settings["block_size"], dtype=torch.long), torch.Generator().manual_seed(0)
    while (batches := pipe.recv()) is not None:
        start = time.perf_counter()
        for _ in range(batches):
            with torch.autocast(device, torch.bfloat16, enabled=settings["precision"] == "bf16"):
                images = pipeline(labels, noise, settings["steps"], settings["guidance"])
            images.mul(255).round().to(torch.uint8).cpu().numpy()
        pipe.send(time.perf_counter() - start)


class PlainLoop:
    """The plain loop's process; with ``keep_memory`` its allocator is set as the pool's actors set theirs."""

    def __init__(self, folder: Path, settings: dict[str, Any], device: str, keep_memory: bool = False) -> None:
        import multiprocessing

        from fl_ray.runtime.memory import reuse_aligned_memory

        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (folder, settings, device, keep_memory, theirs)
        self.process = context.Process(target=plain_loop, args=arguments, daemon=True)
        with reuse_aligned_memory() if keep_memory else nullcontext():
            self.process.start()

    def begin(self, batches: int) -> None:
        self.pipe.send(batches)

    def seconds(self, batches: int) -> float:
        self.begin(batches)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


class TwoLoops:
    """Two plain loops, each with half the batches."""

    def __init__(self, folder: Path, settings: dict[str, Any], device: str) -> None:
        self.loops = [PlainLoop(folder, settings, device) for _ in range(2)]

    def seconds(self, batches: int) -> float:
        for loop in self.loops:
            loop.begin(batches // 2)
        return max(loop.pipe.recv() for loop in self.loops)

    def close(self) -> None:
        for loop in self.loops:
            loop.close()


class Pool:
    """A GeneratorPool that makes blocks which nobody has asked for before."""

    def __init__(self, generator: Any, folder: Path, actors: int, gpus: float) -> None:
        from fl_ray.runtime.memory import keep_freed_memory
        from generators.pool import GeneratorPool

        self.pool = GeneratorPool(
            generator,
            folder,
            actors,
            cpus=0,
            gpus=gpus,
            threads=1,
            timeout_s=180,
            device="cuda" if gpus else "cpu",
            set_up=keep_freed_memory,  # as in a run
        )
        self.asked = 0

    def _blocks(self, count: int) -> Iterator[Any]:
        from generators.base import Block

        for _ in range(count):
            yield Block(0, self.asked % CLASSES, self.asked // CLASSES)
            self.asked += 1

    def seconds(self, blocks: int) -> float:
        start = time.perf_counter()
        for _ in self.pool.make(self._blocks(blocks)):
            pass
        return time.perf_counter() - start

    def close(self) -> None:
        self.pool.close()


def store_random_weights(folder: Path) -> None:
    """A pipeline as pre-training stores it."""
    import torch
    from diffusers import DDPMScheduler

    from generators.diffusion import ClassConditionalPipeline
    from lightning_modules.diffusion import default_widths, make_unet

    torch.manual_seed(0)
    unet = make_unet(SIZE, CHANNELS, CLASSES, default_widths(SIZE))
    ClassConditionalPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="sampler steps")
    parser.add_argument("--batch", type=int, default=8, help="images made together")
    parser.add_argument("--blocks", type=int, default=6, help="batches of a turn, for each actor")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--gpus", type=float, default=0.0, help="of one GPU for each of the three actors, as 0.3")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    settings = {
        "steps": options.steps,
        "guidance": 2.0,
        "block_size": options.batch,
        "precision": options.precision,
    }
    device = "cuda" if options.gpus else "cpu"
    from fl_ray.config import RayConfig
    from fl_ray.runtime.connection import Connection
    from generators.diffusion import DiffusionGenerator

    connection = Connection(RayConfig(num_cpus=2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store_random_weights(folder)
        connection.wait()
        generator = DiffusionGenerator(sampler="ddim", **settings)
        workers: dict[str, PlainLoop | TwoLoops | Pool] = {
            "pipeline": PlainLoop(folder, settings, device),
            "pipeline_keeping_memory": PlainLoop(folder, settings, device, keep_memory=True),
            "two_pipelines": TwoLoops(folder, settings, device),
        }
        workers |= {f"pool{actors}": Pool(generator, folder, actors, options.gpus) for actors in (1, 2)}
        batches = {kind: options.blocks * (2 if kind in ("two_pipelines", "pool2") else 1) for kind in workers}
        for kind, worker in workers.items():
            worker.seconds(batches[kind] // options.blocks)  # not counted: the first batch of a process takes longer
        rates: dict[str, list[float]] = {kind: [] for kind in workers}
        for turn in range(options.turns):
            for kind, worker in workers.items():
                rates[kind].append(batches[kind] * options.batch / worker.seconds(batches[kind]))
            line = ", ".join(f"{kind} {found[-1]:.3f}" for kind, found in rates.items())
            print(f"turn {turn + 1}, images/s: {line}", flush=True)
        for worker in workers.values():
            worker.close()
    connection.close()
    found = {kind: statistics.median(rate) for kind, rate in rates.items()}
    result = {f"{kind}_images_s": rate for kind, rate in found.items()}
    result |= {f"ratio{actors}": found[f"pool{actors}"] / found["pipeline"] for actors in (1, 2)}
    of_keeping = found["pipeline_keeping_memory"]
    result |= {f"ratio{actors}_keeping_memory": found[f"pool{actors}"] / of_keeping for actors in (1, 2)}
    result["ratio2_to_two_pipelines"] = found["pool2"] / found["two_pipelines"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
