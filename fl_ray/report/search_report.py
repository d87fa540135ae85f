"""What a comparison of searches leaves: searches.json, .csv and .md, a figure and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.comparison import write_comparison_csv
from fl_ray.config import RunConfig
from fl_ray.report import page as html
from fl_ray.report.comparison_report import markdown_table
from fl_ray.report.figures import save_svg
from fl_ray.report.plan_figures import searches_figure
from fl_ray.run_folder import write_json
from fl_ray.search_comparison import SearchComparison, SearchRun

__all__ = ["write_searches"]

Titled = tuple[list[str], list[list[str]], str]

_CHECKPOINTS = (30, 100, 300, 1000, 3000, 10000)
_NOTE = (
    "Gap: the energy of the best plan so far above the dual's lower bound, relative to it; median [quartiles] over the "
    "cells. In brackets behind it: in how many cells there was a plan at all (inf: none in half of them); a dash: the "
    "search was not given so many candidates. A search that converged earlier keeps its gap. The dual looks at no "
    "candidates; its seconds hold the check of feasibility."
)


def write_searches(found: SearchComparison, config: RunConfig, output: Path) -> list[Titled]:
    """Everything into the folder ``output``; columns, rows and title of its two tables."""
    checkpoints = _checkpoints(found)
    cells = len(next(iter(found.runs.values())))
    where = f"{config.name}, {cells} cells" + (f" ({len(found.infeasible)} without a plan)" if found.infeasible else "")
    gaps = (["gap after", *map(str, checkpoints), "all"], _gap_rows(found, checkpoints), f"gap: {where}")
    columns = ["search", "candidates given", "looked at", "s per 100 candidates", "s per cell"]
    times = (columns, _time_rows(found), f"time: {where}")
    write_json(output / "searches.json", _content(found, checkpoints))
    write_comparison_csv(_flat_rows(found, checkpoints), output / "searches.csv")
    text = "".join(f"{markdown_table(*table[:2])}\n" for table in (gaps, times))
    (output / "searches.md").write_text(f"{text}{_NOTE}\n", encoding="utf-8")
    sections = [html.section("Gap", html.table(*gaps[:2]), _figure(found, output), f'<p class="note">{_NOTE}</p>')]
    sections.append(html.section("Time", html.table(*times[:2])))
    if found.infeasible:
        reasons = [[str(seed), reason] for seed, reason in found.infeasible.items()]
        sections.append(html.section("Cells without a plan", html.table(["seed", "why"], reasons)))
    (output / "searches.html").write_text(html.page(f"Searches: {config.name}", where, sections), encoding="utf-8")
    return [gaps, times]


def _checkpoints(found: SearchComparison) -> list[int]:
    most = max(run.given for runs in found.runs.values() for run in runs)
    return [number for number in _CHECKPOINTS if number <= most]


def _spread(values: Sequence[float], digits: str) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], method="nearest")
    return f"{middle:{digits}}" + (f" [{low:{digits}}, {high:{digits}}]" if len(values) > 1 else "")


def _gap_text(gaps: Sequence[float]) -> str:
    there = int(np.isfinite(gaps).sum())
    return _spread(gaps, ".2g") + (f" ({there} of {len(gaps)})" if there < len(gaps) else "")


def _gap_rows(found: SearchComparison, checkpoints: Sequence[int]) -> list[list[str]]:
    rows = []
    for name, runs in found.runs.items():
        given = runs[0].given
        line = [_gap_text([run.gap_at(at) for run in runs]) if at <= given else "–" for at in checkpoints]
        rows.append([name, *line, _gap_text([run.gap_at(given) for run in runs])])
    return rows


def _time_rows(found: SearchComparison) -> list[list[str]]:
    rows = []
    for name, runs in found.runs.items():
        looked_at = _spread([run.looked_at for run in runs], ".0f") if runs[0].given else "–"
        per_100 = _spread([100 * run.seconds / run.looked_at for run in runs], ".3g") if runs[0].given else "–"
        seconds = _spread([run.seconds for run in runs], ".3g")
        rows.append([name, str(runs[0].given or "–"), looked_at, per_100, seconds])
    return rows


def _final(run: SearchRun) -> float | None:
    gap = run.gap_at(run.given)
    return gap if np.isfinite(gap) else None


def _flat_rows(found: SearchComparison, checkpoints: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for runs in found.runs.values():
        for run in runs:
            own = {name: getattr(run, name) for name in ("search", "seed", "given", "looked_at", "seconds")}
            at = {f"gap_after_{number}": run.gap_at(number) for number in checkpoints if number <= run.given}
            rows.append({**own, "gap": _final(run), **at})
    return rows


def _content(found: SearchComparison, checkpoints: Sequence[int]) -> dict[str, Any]:
    searches = {}
    for name, runs in found.runs.items():
        given, gaps = runs[0].given, [run.gap_at(runs[0].given) for run in runs]
        at = {str(n): [run.gap_at(n) for run in runs] for n in checkpoints if n <= given}
        searches[name] = {
            "given": given,
            "seeds": [run.seed for run in runs],
            "cells_with_a_plan": int(np.isfinite(gaps).sum()),
            "gap": gaps,
            "gap_median": float(np.quantile(gaps, 0.5, method="nearest")),
            "gap_after": at,
            "looked_at": [run.looked_at for run in runs],
            "seconds": [run.seconds for run in runs],
        }
    return {"searches": searches, "infeasible": found.infeasible}


def _figure(found: SearchComparison, output: Path) -> str:
    curves = {name: [run.gaps() for run in runs] for name, runs in found.runs.items() if runs[0].given}
    if not curves:
        return ""
    drawn = save_svg(output, "searches", searches_figure(curves))
    return html.figure(drawn, "Gap of the best plan so far: median over the cells, shaded between the quartiles.")
