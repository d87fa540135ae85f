"""FedProx (Li et al., arXiv 1812.06127, algorithm 2): federated averaging with a proximal term in every client's loss.

Each client of the cohort minimises h_k(w; w_t) = F_k(w) + mu/2 ||w - w_t||^2 (equation 2), so its gradients are
grad F_k(w) + mu (w - w_t). The server averages as FedAvg does.

Stated by the paper: this term. Not taken over: clients drawn with probability p_k and averaged plainly (here the cohort
is drawn by ``sampling`` and weighted by samples, the usual form), and stragglers that do fewer epochs.
"""

from __future__ import annotations

from fl_ray.methods.fedavg import FedAvg

__all__ = ["FedProx"]


class FedProx(FedAvg):
    """FedProx. With clock.mode asynchronous, the term pulls to the version that a client started from.

    Args:
        mu: of the term mu/2 ||w - w_t||^2; 0 is FedAvg. The paper tries 0.001, 0.01, 0.1 and 1.
    """

    def __init__(self, mu: float = 0.01) -> None:
        super().__init__()
        if not mu >= 0:
            raise ValueError(f"mu is {mu}, but it must be at least 0")
        self.proximal = mu
