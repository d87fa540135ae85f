"""Rank correlations over labels of a group, against ranks by hand."""

from pathlib import Path

import pytest

from fl_ray.downstream import _gains, rank_correlations
from fl_ray.report.quality_report import downstream_report


def rows(gains: list[float | None], **measures: list[float | None]) -> list[dict]:
    plain = [{"group": None, "label": "FedAvg"}]
    return plain + [
        {
            "group": 0,
            "label": str(n),
            "gain_mean": gain,
            "late_gain_mean": -gain,
            **{name: values[n] for name, values in measures.items()},
        }
        for n, gain in enumerate(gains)
    ]


def test_against_ranks_by_hand() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)) where no ranks are tied."""
    found = {
        (entry["measure"], entry["gain"]): entry
        for entry in rank_correlations(
            rows([0.1, 0.3, -0.2, 0.4], fid=[5.0, 4.0, 90.0, 4.5], cas=[0.1, 0.2, 0.0, 0.9], recall=[1.0] * 4), []
        )
    }
    assert found.keys() == {(a, b) for a in ("fid", "cas", "recall") for b in ("gain_mean", "late_gain_mean")}
    assert found["cas", "late_gain_mean"]["spearman"] == pytest.approx(-1.0)
    found = {measure: entry for (measure, gain), entry in found.items() if gain == "gain_mean"}
    # gains rank 2 3 1 4, FID 3 1 4 2: d = -1 2 -3 2
    assert found["fid"]["spearman"] == pytest.approx(1 - 6 * (1 + 4 + 9 + 4) / (4 * 15))
    assert found["cas"]["spearman"] == pytest.approx(1.0)
    assert found["recall"]["spearman"] is None
    assert found["fid"]["levels"] == 4


def test_what_is_missing_is_left_out_and_few_give_nothing() -> None:
    assert rank_correlations(rows([0.1, 0.2], fid=[3.0, 2.0]), []) == []
    entry, _ = rank_correlations(rows([0.1, 0.2, 0.3], clip_score=[1.0, None, 3.0]), [])
    assert (entry["levels"], entry["spearman"]) == (2, None)
    saved = [{**row, "rounds_saved_to_0.5_mean": n} for n, row in enumerate(rows([0.1, 0.2, 0.3], fid=[3.0, 2.0, 1.0]))]
    by_gain = {entry["gain"]: round(entry["spearman"]) for entry in rank_correlations(saved, [0.5])}
    assert by_gain == {"gain_mean": -1, "late_gain_mean": 1, "rounds_saved_to_0.5_mean": -1}


def test_rounds_saved_say_of_how_many_seeds_they_are(tmp_path: Path) -> None:
    """Of those in which both reached the target, which may be fewer than either reached it in."""

    def seeds(*rounds: int | None) -> dict[int, dict]:
        return {
            seed: {"final_accuracy": 0.5, "late_accuracy": 0.5, "targets": {"0.5": number and {"rounds": number}}}
            for seed, number in enumerate(rounds)
        }

    gains = _gains(seeds(4, 6, None), seeds(9, None, 8), [0.5])
    saved = {name: value for name, value in gains.items() if name.startswith("rounds")}
    assert saved == {
        "rounds_saved_to_0.5_mean": 5,
        "rounds_saved_to_0.5_std": None,
        "rounds_saved_to_0.5_seeds": 1,
    }
    row = {
        "label": "a",
        "runs": 3,
        "reached_0.5": 2,
        "rounds_to_0.5_mean": 5,
        "rounds_to_0.5_std": 1,
        "group": 0,
        "fid": 3.0,
    }
    downstream_report(tmp_path, [{**row, **gains}], [0.5])
    line = (tmp_path / "downstream.md").read_text().splitlines()[2]
    assert "| 5.0 ± 1.0 (2 of 3) | 5.0 (1 of 3) |" in line
