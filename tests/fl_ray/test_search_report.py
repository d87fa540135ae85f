"""The report of compared searches: medians and quartiles by hand, also where some cells were left without a plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fl_ray.config import RunConfig
from fl_ray.report.search_report import write_searches
from fl_ray.search_comparison import SearchComparison, SearchRun


def run(seed: int, *steps: tuple[int, float], given: int = 100, looked_at: int = 100) -> SearchRun:
    return SearchRun("ce", seed, given, looked_at, steps, seconds=2.0 + seed)


def test_gaps_after_any_number_of_candidates() -> None:
    one = run(0, (3, 0.5), (40, 0.1), looked_at=60)
    assert [one.gap_at(number) for number in (2, 3, 39, 40, 100)] == [np.inf, 0.5, 0.5, 0.1, 0.1]
    assert one.gaps().tolist() == [np.inf] * 2 + [0.5] * 37 + [0.1] * 21


@pytest.mark.filterwarnings("error")
def test_cells_in_which_a_search_found_nothing_are_counted(tmp_path: Path) -> None:
    runs = [run(0, (20, 0.4), (90, 0.2)), run(1, (50, 0.3)), run(2), run(3, (1, 0.1)), run(4, (31, 0.5))]
    found = SearchComparison({"ce": runs, "dual": [SearchRun("dual", 0, 0, 0, ((0, 0.0),), 0.1)] * 5}, {7: "too far"})
    gaps, times = write_searches(found, RunConfig(name="few"), tmp_path)
    assert gaps[0] == ["gap after", "30", "100", "all"]
    assert gaps[1][0] == ["ce", "inf [0.4, inf] (2 of 5)", "0.3 [0.2, 0.5] (4 of 5)", "0.3 [0.2, 0.5] (4 of 5)"]
    assert gaps[1][1] == ["dual", "–", "–", "0 [0, 0]"]
    assert times[1][0] == ["ce", "100", "100 [100, 100]", "4 [3, 5]", "4 [3, 5]"]
    assert "few, 5 cells (1 without a plan)" in gaps[2]
    content = json.loads((tmp_path / "searches.json").read_text(encoding="utf-8"))
    assert content["searches"]["ce"]["cells_with_a_plan"] == 4
    assert content["searches"]["ce"]["gap"] == [0.2, 0.3, None, 0.1, 0.5]
    assert content["infeasible"] == {"7": "too far"}
    assert "too far" in (tmp_path / "searches.html").read_text(encoding="utf-8")
