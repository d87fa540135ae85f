"""Which clients take part in a round; one file per sampler."""

from fl_ray.sampling.base import ClientSampler, candidates, weighted_draw
from fl_ray.sampling.uniform import Uniform

__all__ = ["ClientSampler", "Uniform", "candidates", "weighted_draw"]
