"""What a user sees while a command works: a live bar on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

__all__ = ["Progress"]

PLAIN_EVERY_S = 20.0
PLAIN_AFTER_S = 3.0  # shorter works than this end without a line


class Progress:
    """Rounds, steps and messages on standard error; tables and results go to standard output instead.

    ``label`` stands before every line: the run's name.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.label = ""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Bars | None = None
        self._task: tuple[str, Any] | None = None
        self._told: dict[tuple[str, str], float] = {}  # when a line of each work was last printed, or it began

    def message(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self._console.print(f"{self._prefix()}{text}", markup=False)

    def round(self, row: dict[str, Any], rounds: int) -> None:
        """A finished round, a row of the history."""
        accuracy = row["test_accuracy"]
        shown = "" if math.isnan(accuracy) else f"accuracy {accuracy:.3f}, "
        detail = f"{shown}virtual time {row['virtual_time_s']:.1f} s, energy {row['energy_j']:.1f} J"
        self.steps("round", row["round"], rounds, detail)

    def steps(self, what: str, done: int, total: int, detail: str = "") -> None:
        """A step of a longer work; the last one stays on the screen."""
        if not self.enabled:
            return
        if self._console.is_terminal and done < total:
            self._show(what, done, total, detail)
            return
        self.stop()
        now, work = time.monotonic(), (self.label, what)
        self._told.setdefault(work, now)
        ended = done == total and (what == "round" or now - self._told[work] > PLAIN_AFTER_S)
        if ended or now - self._told[work] > PLAIN_EVERY_S:
            self.message(f"{what} {done}/{total}" + (f", {detail}" if detail else ""))
            self._told[work] = now
        if done == total:
            del self._told[work]

    def _prefix(self) -> str:
        return f"[{self.label}] " if self.label else ""

    def _show(self, what: str, done: int, total: int, detail: str) -> None:
        name = f"{self._prefix()}{what}"
        if self._bars is None or self._task is None or self._task[0] != name:
            self.stop()
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[detail]}"))
            self._bars = Bars(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._task = (name, self._bars.add_task(name, total=total, detail=""))
            self._bars.start()
        self._bars.update(self._task[1], completed=done, detail=f"{done}/{total} {detail}")

    def stop(self) -> None:
        """Take a live bar away."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None
