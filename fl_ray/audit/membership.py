"""Membership inference: was an image among those that a classifier was trained on?

Two attacks. The loss threshold (Yeom et al., arXiv 1709.01604) takes a small loss for membership. Shadow models
(Shokri et al., arXiv 1610.05820, in the form of one attack model for all classes, as in arXiv 1806.01246) are
classifiers like the attacked one, trained on images of which it is known whether they were in; the attack learns so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

__all__ = ["Attack", "attack", "attack_features", "features", "shadow_scores"]

_BATCH = 500
FALSE_POSITIVES = 0.01  # at which the true-positive rate is told


@dataclass(frozen=True)
class Attack:
    """How well scores tell members from others.

    Attributes:
        auc: the probability that a member's score is above another's, ties as half: 0.5 is guessing.
        auc_error: its standard error (Hanley and McNeil, 1982).
        tpr: members found where at most 1 % of the others are taken for members.
        members, others: how many there were.
        curve: false- and true-positive rates [points, 2], from (0, 0) to (1, 1).
    """

    auc: float
    auc_error: float
    tpr: float
    members: int
    others: int
    curve: np.ndarray


def attack(members: np.ndarray, others: np.ndarray) -> Attack:
    """Hold the scores of members, float [M], against those of others, float [N].

    Raises:
        ValueError: one of them is empty.
    """
    if len(members) == 0 or len(others) == 0:
        raise ValueError(f"membership: {len(members)} members and {len(others)} others; both are needed")
    scores = np.concatenate([members, others])
    is_member = np.arange(len(scores)) < len(members)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each run of ties
    found = np.cumsum(is_member[order])[last] / len(members)
    wrong = np.cumsum(~is_member[order])[last] / len(others)
    curve = np.stack([np.append(0.0, wrong), np.append(0.0, found)], axis=1)
    auc = float(np.trapezoid(curve[:, 1], curve[:, 0]))
    tpr = float(curve[curve[:, 0] <= FALSE_POSITIVES, 1].max())
    return Attack(auc, _auc_error(auc, len(members), len(others)), tpr, len(members), len(others), curve)


def _auc_error(auc: float, members: int, others: int) -> float:
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (first - auc**2) + (others - 1) * (second - auc**2)
    return float(np.sqrt(max(variance, 0.0) / (members * others)))


@torch.no_grad()
def features(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """What an attacker sees of each image, float64 [N, 3]: minus its loss, its margin (the label's logit above the best
    other one), and minus the entropy of the probabilities. The first alone is the score of the loss threshold.
    """
    module.eval()
    found = []
    for start in range(0, len(x), _BATCH):
        logits = module(x[start : start + _BATCH]).double()
        labels = y[start : start + _BATCH]
        chances = logits.log_softmax(dim=1)
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        margin = logits.gather(1, labels[:, None])[:, 0] - others
        entropy = (chances.exp() * chances).sum(dim=1)
        found.append(torch.stack([-functional.cross_entropy(logits, labels, reduction="none"), margin, entropy], 1))
    return torch.cat(found).cpu().numpy()


def attack_features(shadows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The attack model's training set, of each shadow's features of images that were in and that were out."""
    inputs = np.concatenate([part for pair in shadows for part in pair])
    labels = np.concatenate([np.full(len(part), place == 0) for pair in shadows for place, part in enumerate(pair)])
    return inputs, labels


def shadow_scores(shadows: list[tuple[np.ndarray, np.ndarray]], *asked: np.ndarray) -> list[np.ndarray]:
    """Scores of features [N, 3] by a logistic regression on the shadows' (in, out) pairs of features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(*attack_features(shadows))
    return [model.decision_function(part) for part in asked]
