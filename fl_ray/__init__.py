"""fl_ray: run, search and compare federated learning helped by generative models, on PyTorch Lightning and Ray."""

from fl_ray.version import __version__

__all__ = ["__version__"]
