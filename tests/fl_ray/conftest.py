"""Fixtures of the runtime's tests."""

import pytest

from tests.fl_ray.own import Hooked


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each training step of ``Hooked``."""
    done: list[int] = []
    monkeypatch.setattr(Hooked, "trouble", staticmethod(lambda labels: done.append(len(labels))))
    return done
