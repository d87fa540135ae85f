"""Seconds and memory of an image, guided by a classifier against unguided.

    python experiments/benchmarks/guidance.py
    python experiments/benchmarks/guidance.py --batch 1 --images 10
    python experiments/benchmarks/guidance.py --device cuda --batch 100 --images 400

A block of images of experiments/fedlmg/digit_domains.yaml: its UNet (widths 16, 32, 64 at 32 x 32 RGB), 20 DDIM steps
with classifier-free guidance, M = 5, ResNet-18 at width 8 as the guide. Weights are random, since neither time nor
memory depends on them. Guided and unguided are made in a process of one thread each, in turns. Memory is the process's
peak above what it held with the models loaded and a first UNet step done; on a GPU, the allocator's. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # generators.py beside this file would hide the package of its name

SIZE, CHANNELS, CLASSES, STEPS, EDITS, ETA = 32, 3, 10, 20, 5, 0.1


def maker(pipe: Any, eta: float, batch: int, device: str) -> None:
    """Make as many blocks as the pipe asks for; answer with the seconds and the peak memory above the first, MiB."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler

    from fl_ray.runtime.memory import peak_memory_mb
    from generators.diffusion import ClassConditionalPipeline, PixelDenoiser
    from generators.guidance.losses import ClassifierGuide
    from generators.guidance.sampling import GuidanceSettings, GuidedSampler
    from lightning_modules.diffusion import make_unet
    from lightning_modules.networks import ResNet18

    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = make_unet(SIZE, CHANNELS, CLASSES, [16, 32, 64]).eval().to(device)
    trained = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline = ClassConditionalPipeline(unet, ClassConditionalPipeline.schedule(trained))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    classifier = ResNet18(CHANNELS, SIZE, CLASSES, width=8).to(device)
    guide = ClassifierGuide(classifier, 0.1, SIZE, CHANNELS, [0.5] * 3, [0.5] * 3)
    settings = GuidanceSettings(steps=STEPS, edits=EDITS if eta else 0, eta=eta, step_rule="rms")
    sampler = GuidedSampler(PixelDenoiser(pipeline, 1.5, torch.float32), guide, settings)
    noise = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device)
    labels = torch.arange(batch, device=device) % CLASSES

    def peak_mb() -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_memory_mb()

    with torch.no_grad():
        sampler.model.predict(noise[:1], torch.tensor(500, device=device), labels[:1])
    before = peak_mb()
    while (blocks := pipe.recv()) is not None:
        start = time.perf_counter()
        for _ in range(blocks):
            sampler(noise, labels, torch.Generator().manual_seed(0)).cpu()
        pipe.send((time.perf_counter() - start, peak_mb() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=10, help="images made together")
    parser.add_argument("--images", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for kind, eta in {"guided": ETA, "unguided": 0.0}.items():
        pipes[kind], theirs = context.Pipe()
        workers.append(context.Process(target=maker, args=(theirs, eta, options.batch, options.device), daemon=True))
        workers[-1].start()
    blocks = max(1, options.images // options.batch)
    seconds: dict[str, list[float]] = {kind: [] for kind in pipes}
    memory: dict[str, float] = {}
    for turn in range(options.turns + 1):
        for kind, pipe in pipes.items():
            pipe.send(blocks)
            taken, memory[kind] = pipe.recv()
            if turn:  # the first is not counted
                seconds[kind].append(taken / (blocks * options.batch))
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(None)
        worker.join()
    found = {f"{kind}_s_per_image": statistics.median(values) for kind, values in seconds.items()}
    found |= {f"{kind}_mb_per_image": value / options.batch for kind, value in memory.items()}
    found["seconds_ratio"] = found["guided_s_per_image"] / found["unguided_s_per_image"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
