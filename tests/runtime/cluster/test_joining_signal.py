"""What SIGTERM does in a process that has Ray is what it did before."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from arm_ray.runtime.cluster.joining import ray_session


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ours(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def rays(signum: int, _frame: Any) -> None:
    raise SystemExit(signum)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_it_is_kept(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, rays))
    signal.signal(signal.SIGTERM, ours)
    with ray_session(None, 1), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_while_ray_starts(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, rays)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    signal.signal(signal.SIGTERM, ours)
    with pytest.raises(KeyboardInterrupt), ray_session(None, 1):
        raise AssertionError("it has not started")
    assert signal.getsignal(signal.SIGTERM) is ours


def test_one_that_nobody_has_set_is_rays(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, rays))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with ray_session(None, 1):
        assert signal.getsignal(signal.SIGTERM) is rays
