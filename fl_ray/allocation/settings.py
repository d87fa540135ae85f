"""The recipe's section ``allocation``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fl_ray.errors import SettingError, require
from fl_ray.registry import nearest

__all__ = ["AllocationConfig", "Search"]

Search = Literal["dual", "ce", "gradient", "random", "tpe", "cmaes", "gp", "nsga2", "nelder_mead"]


@dataclass
class AllocationConfig:
    """``allocation``: the limits of FIMI's plan (``fl_ray.allocation``), what it reckons with, and how it is found."""

    t_max_s: float = 60.0
    """Longest time of a round: computing and upload of every device, Tmax."""
    error_max: float = 0.25
    """Largest global error on the learning curve, Delta_max."""
    d_gen_max: float = 5000.0
    """Most synthetic samples of a device."""
    quality: float = 1.0
    """What a synthetic sample is worth on the learning curve, in (0, 1]; it costs as much as a real one."""
    curve: str | dict[str, float] | None = None
    """The file that ``fl-ray learning-curve`` wrote, or {alpha, beta, gamma}; default: 5, 0.4, 0.05 (not fitted)."""
    upload_bits: float | None = None
    """Default: those of a client's update, the model in fp32 or what ``updates`` make of it."""
    synthesis: bool = True
    """Whether devices may get synthetic samples; without it the limit on the error is dropped."""
    optimise: bool = True
    """Whether f, b and p are planned for least energy; without it the planned amounts stay, and every device runs at
    f_max and p_max on an even part of the band (its time may then be above t_max_s)."""
    search: Search = "dual"
    evaluations: int = 6000
    """Candidates that a search other than ``dual`` may look at."""
    population: int = 100
    elite: int = 10
    std: float = 0.15
    smoothing: float = 0.0
    """Of ``ce``: candidates at a time, those that the next are drawn like, first deviation, share of the old."""
    feasible_start: bool = True
    """Start a search from a feasible time split; ``ce`` else starts at 0.5."""
    compare: list[str | dict[str, Any]] = field(default_factory=list)
    """Searches that ``fl-ray plan`` tries beside each other, over all --seeds: a name, or {search, evaluations} for one
    that gets fewer or more candidates than ``evaluations``."""

    def __post_init__(self) -> None:
        for name in ("t_max_s", "error_max", "std"):
            require(getattr(self, name) > 0, f"allocation.{name}", getattr(self, name), "positive")
        require(self.d_gen_max >= 0, "allocation.d_gen_max", self.d_gen_max, "at least 0")
        require(0 < self.quality <= 1, "allocation.quality", self.quality, "in (0, 1]")
        bits = self.upload_bits
        require(bits is None or bits > 0, "allocation.upload_bits", bits, "positive")
        require(self.evaluations >= 1, "allocation.evaluations", self.evaluations, "at least 1")
        elite = 2 <= self.elite <= self.population
        require(elite, "allocation.elite", self.elite, f"in 2..allocation.population ({self.population})")
        require(0 <= self.smoothing < 1, "allocation.smoothing", self.smoothing, "in [0, 1)")
        self.compared()

    def compared(self) -> dict[str, int]:
        """The candidates that each search of ``compare`` may look at; ``dual`` looks at none."""
        found: dict[str, int] = {}
        for item in self.compare:
            wanted = {"search": item} if isinstance(item, str) else item
            good = "search" in wanted and set(wanted) <= {"search", "evaluations"}
            require(good, "allocation.compare", item, "a search, or a mapping with search and evaluations")
            name, evaluations = wanted["search"], wanted.get("evaluations", self.evaluations)
            if name not in get_args(Search):
                raise SettingError(
                    f"allocation.compare: unknown search {name!r}.{nearest(str(name), get_args(Search))}"
                )
            require(name not in found, "allocation.compare", self.compare, f"a list with {name} once")
            whole = isinstance(evaluations, int) and evaluations >= 1
            require(whole, f"allocation.compare, evaluations of {name},", evaluations, "a whole number of at least 1")
            none = name != "dual" or "evaluations" not in wanted
            require(
                none, "allocation.compare, evaluations of dual,", evaluations, "left out: it looks at no candidates"
            )
            found[name] = evaluations if name != "dual" else 0
        return found
