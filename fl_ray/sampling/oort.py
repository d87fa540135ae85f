"""Oort (Lai et al., OSDI 2021, arXiv 2010.06081): clients whose data still teach the model much, and that are fast."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from fl_ray.randomness import numpy_generator
from fl_ray.sampling.base import ClientSampler, candidates, weighted_draw

if TYPE_CHECKING:
    from fl_ray.context import RunContext
    from fl_ray.runtime.base import RoundResult
    from fl_ray.schedule import RoundPlan

__all__ = ["Oort"]

_POOL = 0.95  # the paper's c: who scores at least so much of the last clear winner's score can be chosen


class Oort(ClientSampler):
    """A part of each cohort is new clients, drawn uniformly; the others are drawn by score among the best scored:

    (U_i / max U + sqrt(0.1 ln R / L_i)) * min(1, T / t_i)^alpha

    with R this choice, L_i that of client i's last update, t_i its latency [s] and T the preferred one. U_i is the
    statistical utility. The paper's is |B_i| sqrt(mean of squared losses); ours is an approximation, |B_i| * mean loss,
    since clients report one mean over their samples and epochs. Dividing by the largest keeps the second term in sight,
    as the paper's code does by scaling to [0, 1]. Clients without samples are never chosen, and of one whose update did
    not arrive nothing is learnt.

    Args:
        exploration: share of new clients in the first round; multiplied by exploration_decay each round, down to
            exploration_least.
        alpha: exponent of the penalty on slow clients; 0: none.
        clip_quantile: utilities above this quantile of all are lowered to it.
        preferred_quantile: T is this quantile of the latencies seen.
        pacer_rounds: the paper's W; when the utility of W rounds is below that of the W before, preferred_quantile
            rises by pacer_step. 0: never.
        blacklist_after: a client that was chosen so many times is chosen no more, while there are enough others; null:
            never.
    """

    def __init__(
        self,
        exploration: float = 0.9,
        exploration_decay: float = 0.98,
        exploration_least: float = 0.2,
        alpha: float = 2.0,
        clip_quantile: float = 0.95,
        preferred_quantile: float = 0.3,
        pacer_rounds: int = 0,
        pacer_step: float = 0.05,
        blacklist_after: int | None = None,
    ) -> None:
        inside = {
            "exploration": exploration,
            "exploration_decay": exploration_decay,
            "exploration_least": exploration_least,
            "clip_quantile": clip_quantile,
            "preferred_quantile": preferred_quantile,
            "pacer_step": pacer_step,
        }
        for name, value in inside.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, but it must be in [0, 1]")
        for name, least in {"alpha": alpha, "pacer_rounds": pacer_rounds}.items():
            if least < 0:
                raise ValueError(f"{name} is {least}, but it must be at least 0")
        if blacklist_after is not None and blacklist_after < 1:
            raise ValueError(f"blacklist_after is {blacklist_after}, but it must be at least 1")
        self.exploration, self.decay, self.least = exploration, exploration_decay, exploration_least
        self.alpha, self.clip_quantile, self.blacklist_after = alpha, clip_quantile, blacklist_after
        self.pacer_rounds, self.pacer_step = pacer_rounds, pacer_step
        self._preferred = preferred_quantile
        self._recent: list[float] = []  # summed utility of the last rounds, for the pacer
        self._turn = 0
        self._utility = np.empty(0)  # [clients], as the following; NaN: not known
        self._latency_s = np.empty(0)
        self._last = np.empty(0, dtype=np.int64)
        self._times = np.empty(0, dtype=np.int64)

    def choose(
        self, run: RunContext, turn: int, size: int, weights: np.ndarray, excluded: Collection[int] = ()
    ) -> np.ndarray:
        self._prepare(run.config.data.clients)
        self._turn = turn
        rng = numpy_generator(run.config.seed, "cohort", turn)
        among = candidates(run, excluded)
        sizes = run.data.partition.sizes
        among = np.flatnonzero(sizes > 0) if among is None else among[sizes[among] > 0]
        if self.blacklist_after is not None:
            allowed = among[self._times[among] < self.blacklist_after]
            among = allowed if len(allowed) >= size else among
        new = np.isnan(self._utility[among])
        known, unknown = among[~new], among[new]
        # An asynchronous run chooses one at a time: a part of a round, and explored by chance.
        share = max(self.least, self.exploration * self.decay ** (turn * size / run.config.cohort_size))
        explored = int(share * size + rng.random())
        explored = min(max(explored, size - len(known)), len(unknown))
        exploited = min(size - explored, len(known))
        chosen = [rng.choice(unknown, explored, replace=False, shuffle=False)]
        if exploited:
            scores = np.maximum(self.scores(known, turn), 1e-12)
            pool = np.flatnonzero(scores >= _POOL * np.partition(scores, -exploited)[-exploited])
            chosen.append(known[pool[weighted_draw(rng, scores[pool], exploited)]])
        return np.sort(np.concatenate(chosen))

    def scores(self, known: np.ndarray, turn: int) -> np.ndarray:
        """The scores at a choice of clients that were observed before, [known]."""
        utility = self._utility[known]
        utility = np.minimum(utility, np.quantile(utility, self.clip_quantile))
        uncertainty = np.sqrt(0.1 * np.log(turn + 1) / (self._last[known] + 1))
        preferred = np.nanquantile(self._latency_s, self._preferred)
        penalty = np.minimum(1.0, preferred / self._latency_s[known]) ** self.alpha
        return (utility / max(utility.max(), 1e-300) + uncertainty) * penalty

    def observe(self, run: RunContext, round_number: int, plan: RoundPlan, result: RoundResult) -> None:
        self._prepare(run.config.data.clients)
        np.add.at(self._times, plan.cohort, 1)
        seen: dict[int, float] = {}
        for record in result.included:  # a fast client may be in an asynchronous round twice: its larger loss counts
            seen[record.client] = max(record.samples * record.train_loss, seen.get(record.client, 0.0))
        for client, utility in seen.items():
            self._utility[client], self._last[client] = utility, self._turn
        arrived = plan.arrived[np.isin(plan.cohort[plan.arrived], list(seen))]
        self._latency_s[plan.cohort[arrived]] = plan.cost.latency_s[arrived]
        if self.pacer_rounds:
            self._pace(sum(seen.values()))

    def _pace(self, utility: float) -> None:
        rounds = self.pacer_rounds
        self._recent.append(utility)
        if len(self._recent) == 2 * rounds:
            if sum(self._recent[:rounds]) > sum(self._recent[rounds:]):
                self._preferred = min(1.0, self._preferred + self.pacer_step)
            self._recent = self._recent[rounds:]

    def _prepare(self, clients: int) -> None:
        if len(self._utility) == 0:
            self._utility, self._latency_s = np.full(clients, np.nan), np.full(clients, np.nan)
            self._last, self._times = np.zeros(clients, dtype=np.int64), np.zeros(clients, dtype=np.int64)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "utility": self._utility.copy(),
            "latency_s": self._latency_s.copy(),
            "last": self._last.copy(),
            "times": self._times.copy(),
            "pacer": np.array([self._preferred, *self._recent]),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        if state:
            self._utility, self._latency_s = state["utility"], state["latency_s"]
            self._last, self._times = state["last"], state["times"]
            self._preferred, *self._recent = state["pacer"].tolist()
