"""fl_ray: run, search and compare federated learning helped by generative models, on PyTorch Lightning and Ray."""

import os
import sys

from fl_ray.version import __version__

__all__ = ["__version__"]

# Ray's default since 2.60. Ray reads it when it is imported, and a client that joins a cluster by an explicit address
# sends its token only if the mode was said by then; said later, it would only confuse a Ray that is at work.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
