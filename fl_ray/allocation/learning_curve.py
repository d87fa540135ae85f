"""The learning curve: error against data per device, and its fit to measured points."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import least_squares

from fl_ray.errors import SettingError

__all__ = ["CurveFit", "LearningCurve", "fit_curve"]


@dataclass(frozen=True)
class LearningCurve:
    """error(D) = alpha D^-beta + gamma, D samples per device.

    FIMI has such a curve; its form and the defaults are ours and stand until a curve is fitted (``fl-ray
    learning-curve``).

    Raises:
        SettingError: alpha or beta is not positive, or gamma negative.
    """

    alpha: float = 5.0
    beta: float = 0.4
    gamma: float = 0.05

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SettingError(f"allocation.curve.{name} is {getattr(self, name)}, but it must be positive")
        if not 0 <= self.gamma < np.inf:
            raise SettingError(f"allocation.curve.gamma is {self.gamma}, but it must be at least 0")

    def error(self, samples: np.ndarray) -> np.ndarray:
        """Error at ``samples`` [...] > 0."""
        return self.alpha * np.asarray(samples, dtype=np.float64) ** -self.beta + self.gamma

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve with what it stands on.

    Attributes:
        samples, errors: the points, [points].
        covariance: of (log alpha, log beta, gamma) [3, 3], from the residuals; infinite where three points or fewer
            leave none.
    """

    curve: LearningCurve
    samples: np.ndarray
    errors: np.ndarray
    covariance: np.ndarray

    @property
    def residuals(self) -> np.ndarray:
        """Measured less fitted error at each point."""
        return self.errors - self.curve.error(self.samples)

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean(self.residuals**2)))

    def band(self, samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of the curve's value at ``samples``: first-order propagation with Student's t."""
        from scipy.stats import t as student

        freedom = len(self.samples) - 3
        mean, slopes = self.curve.error(samples), _slopes(self.curve, np.asarray(samples, dtype=np.float64))
        if freedom < 1:
            return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
        spread = np.sqrt(np.einsum("...i,ij,...j->...", slopes, self.covariance, slopes))
        half = student.ppf((1 + level) / 2, freedom) * spread
        return mean - half, mean + half

    def to_dict(self) -> dict[str, object]:
        return {
            **self.curve.to_dict(),
            "samples": self.samples.tolist(),
            "errors": self.errors.tolist(),
            "residuals": self.residuals.tolist(),
            "rmse": self.rmse,
            "covariance_log_alpha_log_beta_gamma": self.covariance.tolist()
            if np.isfinite(self.covariance).all()
            else None,
        }


def _slopes(curve: LearningCurve, samples: np.ndarray) -> np.ndarray:
    """d error / d (log alpha, log beta, gamma), [..., 3]."""
    power = curve.alpha * samples**-curve.beta
    return np.stack([power, -curve.beta * np.log(samples) * power, np.ones_like(power)], axis=-1)


def fit_curve(samples: np.ndarray, errors: np.ndarray) -> CurveFit:
    """Non-linear least squares of alpha D^-beta + gamma, alpha and beta positive, 0 <= gamma.

    Repeated amounts (seeds) are points of their own. Started from several gammas: the residual has more than one
    valley where the points are few.

    Args:
        samples: data per device [points], > 0.
        errors: 1 - test accuracy at each [points].

    Raises:
        SettingError: fewer than three different amounts, or errors that do not fall with the data.
    """
    samples, errors = np.asarray(samples, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if not (np.isfinite(samples).all() and np.isfinite(errors).all() and (samples > 0).all()):
        raise SettingError("learning curve: amounts must be positive and errors finite")
    if len(np.unique(samples)) < 3:
        raise SettingError(
            f"learning curve: {len(np.unique(samples))} different amounts, but three unknowns; train at three or more"
        )
    if np.ptp(errors) == 0 or np.corrcoef(np.log(samples), errors)[0, 1] >= 0:
        raise SettingError(
            "learning curve: the error does not fall with more data; train longer, or at amounts further apart"
        )

    def residual(unknown: np.ndarray) -> np.ndarray:
        return np.exp(unknown[0] - np.exp(unknown[1]) * np.log(samples)) + unknown[2] - errors

    best = None
    for floor in np.linspace(0, 0.95, 8) * errors.min():
        line = np.polyfit(np.log(samples), np.log(np.maximum(errors - floor, 1e-6)), 1)
        start = [line[1], np.log(max(-line[0], 1e-3)), floor]
        found = least_squares(
            residual, start, bounds=([-50, -12, 0], [50, 3, max(errors.min(), 1e-9)]), xtol=1e-14, ftol=1e-14
        )
        if best is None or found.cost < best.cost:
            best = found
    gamma = float(best.x[2]) if best.x[2] > 1e-12 else 0.0
    curve = LearningCurve(float(np.exp(best.x[0])), float(np.exp(best.x[1])), gamma)
    freedom = len(samples) - 3
    slopes = _slopes(curve, samples)
    scale = 2 * best.cost / freedom if freedom > 0 else np.inf
    with np.errstate(invalid="ignore"):
        covariance = scale * np.linalg.pinv(slopes.T @ slopes)
    return CurveFit(curve, samples, errors, covariance)
