"""Roots of monotone functions, many at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["find_roots"]

Function = Callable[[np.ndarray], np.ndarray]


def find_roots(
    function: Function, low: np.ndarray, high: np.ndarray, relative: float = 4e-16, steps: int = 200
) -> np.ndarray:
    """A root of each of many scalar functions, within its own bracket (Chandrupatla, Adv. Eng. Softw. 28, 1997).

    Args:
        function: the functions' values at an array of arguments, of the same shape; each must be monotone.
        low, high: float64 arrays [...]; where the function has one sign over a whole bracket, the end of it with the
            smaller absolute value is the answer.
        relative: width of the final brackets, relative to the argument.
        steps: at most so many calls.
    """
    a, b = (np.array(end, dtype=np.float64) for end in np.broadcast_arrays(high, low))
    fa, fb = function(a), function(b)
    one_sign = np.sign(fa) * np.sign(fb) > 0
    c, fc = a.copy(), fa.copy()
    share = np.full(a.shape, 0.5)
    best = np.where(np.abs(fa) < np.abs(fb), a, b)
    done = one_sign | (fa == 0) | (fb == 0)
    for _ in range(steps):
        if done.all():
            break
        x = np.where(done, best, a + share * (b - a))
        fx = function(x)
        same = np.sign(fx) == np.sign(fa)
        c, fc = np.where(same, a, b), np.where(same, fa, fb)
        b, fb = np.where(same, b, a), np.where(same, fb, fa)
        a, fa = x, fx
        best = np.where(done, best, np.where(np.abs(fa) < np.abs(fb), a, b))
        width = np.abs(b - a)
        slack = 2 * relative * np.abs(best)
        done |= (width <= 2 * slack) | (fa == 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            tolerance = slack / width
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            inverse_quadratic = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
            step = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        share = np.where(inverse_quadratic & np.isfinite(step), step, 0.5)
        share = np.clip(share, np.minimum(tolerance, 0.5), np.maximum(1 - tolerance, 0.5))
    return best
