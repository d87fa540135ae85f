"""The learning curve's fit: known curves come back, the band holds them, and what can't be fitted is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fl_ray.allocation.learning_curve import LearningCurve, fit_curve
from fl_ray.errors import SettingError

AMOUNTS = np.array([50, 100, 200, 400, 800, 1600], dtype=float)


@pytest.mark.parametrize("known", [(5, 0.4, 0.05), (0.9, 0.15, 0.0), (30, 1.2, 0.3), (2, 0.6, 0.02)])
def test_a_curve_without_noise_comes_back(known: tuple[float, float, float]) -> None:
    fit = fit_curve(AMOUNTS, LearningCurve(*known).error(AMOUNTS))
    assert list(fit.curve.to_dict().values()) == pytest.approx(known, rel=1e-4, abs=1e-5)
    assert fit.rmse < 1e-7


def test_the_band_covers_the_true_curve_about_as_often_as_it_says() -> None:
    true, rng = LearningCurve(5, 0.4, 0.05), np.random.default_rng(0)
    amounts = np.repeat(AMOUNTS, 3)
    covered = []
    for _ in range(40):
        fit = fit_curve(amounts, true.error(amounts) + rng.normal(0, 0.01, len(amounts)))
        low, high = fit.band(AMOUNTS)
        covered.append((low <= true.error(AMOUNTS)) & (true.error(AMOUNTS) <= high))
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_fit_is_the_least_of_squares() -> None:
    rng = np.random.default_rng(1)
    errors = LearningCurve().error(AMOUNTS) + rng.normal(0, 0.02, len(AMOUNTS))
    fit = fit_curve(AMOUNTS, errors)
    least = float((fit.residuals**2).sum())
    for _ in range(300):
        alpha, beta, gamma = np.array(list(fit.curve.to_dict().values())) * rng.uniform(0.8, 1.25, 3)
        assert ((errors - LearningCurve(alpha, beta, gamma).error(AMOUNTS)) ** 2).sum() >= least * (1 - 1e-9)


def test_three_points_are_met_and_have_no_band() -> None:
    fit = fit_curve(AMOUNTS[:3], LearningCurve().error(AMOUNTS[:3]))
    assert fit.rmse < 1e-7
    assert np.isinf(fit.band(AMOUNTS)).all()
    assert fit.to_dict()["covariance_log_alpha_log_beta_gamma"] is None


@pytest.mark.parametrize(
    ("samples", "errors", "match"),
    [
        ([10, 20, 20], [0.5, 0.4, 0.4], "2 different amounts"),
        ([10, 20, 40], [0.3, 0.4, 0.5], "does not fall"),
        ([10, 20, 40], [0.4, 0.4, 0.4], "does not fall"),
        ([10, 20, 40], [0.5, np.nan, 0.3], "finite"),
        ([0, 20, 40], [0.5, 0.4, 0.3], "positive"),
    ],
)
def test_points_without_a_curve_are_refused(samples: list[float], errors: list[float], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        fit_curve(np.array(samples), np.array(errors))


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"beta": -1}, {"gamma": -0.1}, {"alpha": np.nan}, {"gamma": np.inf}])
def test_values_that_are_no_curve_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        LearningCurve(**bad)
