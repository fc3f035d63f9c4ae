"""Tells Ray's metrics and the trackers what the event log of a run says, while it runs.

None of them can hold a run up or end it: a tracker works in a thread of its own, and one that fails
is left out after a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arm_ray.config import TrackingConfig
from arm_ray.events import IterationFinished, read_events
from arm_ray.identity import flat
from arm_ray.lazy import ray_is_joined
from arm_ray.model.imports import import_tensorboard
from arm_ray.report.scalars import Metric, Record, points
from arm_ray.report.trackers import Ending, TrackedRun, Tracker, make_trackers
from arm_ray.runtime.session.reporter import Reporter

# How long the end of a run waits for the trackers, together.
_CLOSE_S = 30.0
_STOP_S = 5.0
# Ray drops a gauge that nobody has set for two of its intervals, of 10 s each.
_REFRESH_S = 5.0


class RayMetrics:
    """A run's numbers as metrics of the driver, which Ray exports on the node that it is on.

    Ray has to be up. Gauges are kept until `close`, however long nothing happens. Values of a
    histogram's sum are but estimates in Ray, so there is none.

    Args:
        run: The label `run`.
        history: What happened in the run before: an iteration is counted once.
    """

    def __init__(self, run: str, history: Sequence[Record]) -> None:
        self._run = run
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        done = [r["iteration"] for r in history if r.get("event") == IterationFinished.name]
        self._counted = max(done, default=0)
        threading.Thread(target=self._refresh, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Let the gauges go; Ray forgets them after a while."""
        self._closed.set()

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            with self._lock:
                for (metric, labels), value in self._gauges.items():
                    self._of(metric).set(value, self._tags(metric, labels))

    def write(self, record: Record) -> None:
        """Set and count what an event says."""
        is_repeated = (
            record.get("event") == IterationFinished.name and record["iteration"] <= self._counted
        )
        given = points(record)
        with self._lock:
            for point in given:
                if "shard" in point.metric.labels:
                    # There may be fewer shards than before.
                    self._forget(point.metric)
            for point in given:
                metric, tags = point.metric, self._tags(point.metric, point.labels)
                if metric.kind == "gauge":
                    self._gauges[metric, point.labels] = point.value
                    self._of(metric).set(point.value, tags)
                elif point.value > 0 and not is_repeated:
                    self._of(metric).inc(point.value, tags)

    def _forget(self, metric: Metric) -> None:
        for key in [key for key in self._gauges if key[0] == metric]:
            del self._gauges[key]

    def _tags(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        return {"run": self._run, **dict(zip(metric.labels, labels, strict=True))}

    def _of(self, metric: Metric) -> Any:
        if metric.name not in self._made:
            from ray.util.metrics import Counter, Gauge

            cls = Gauge if metric.kind == "gauge" else Counter
            keys = ("run", *metric.labels)
            self._made[metric.name] = cls(metric.ray_name, metric.description, keys)
        return self._made[metric.name]


class _Feeder:
    """Gives a tracker its events, in a thread."""

    def __init__(
        self, tracker: Tracker, history: Sequence[Record], failed: Callable[[str], None]
    ) -> None:
        self._tracker, self._history, self._failed = tracker, history, failed
        self._queue: queue.Queue[Record | None] = queue.Queue()
        self._ending: Ending = "stopped"
        self._is_over = False
        self._thread = threading.Thread(target=self._work, name=tracker.name, daemon=True)
        self._thread.start()

    def take(self, record: Record) -> None:
        """Have an event written; returns at once."""
        if not self._is_over:
            self._queue.put(record)

    def end(self, ending: Ending) -> None:
        """Have the tracker closed once all is written; returns at once."""
        self._ending = ending
        self._queue.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for that; one that takes longer is given up."""
        self._thread.join(timeout=max(0.0, seconds))
        if self._thread.is_alive() and not self._is_over:
            self._is_over = True
            self._failed(f"{self._tracker.name} has not taken everything within its time")

    def _work(self) -> None:
        try:
            self._tracker.open(self._history)
            while (record := self._queue.get()) is not None:
                self._tracker.write(record)
            self._tracker.close(self._ending)
        except BaseException as error:  # a tracker's own errors are of any type, SystemExit too
            if not self._is_over:
                self._is_over = True
                text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                self._failed(f"{self._tracker.name} failed and is left out: {text}")


class Telemetry:
    """All that listens to one run.

    Args:
        metrics: Of Ray; None where it is not up.
        trackers: The others.
        history: What happened in the run before.
        failed: Called with a sentence when one of them is left out.
    """

    def __init__(
        self,
        metrics: RayMetrics | None,
        trackers: Sequence[Tracker],
        history: Sequence[Record],
        failed: Callable[[str], None],
    ) -> None:
        self._metrics = self._opened = metrics
        self._failed = failed
        self._feeders = [_Feeder(tracker, history, failed) for tracker in trackers]

    def take(self, record: Record) -> None:
        """Pass an event on; raises nothing and does not wait."""
        for feeder in self._feeders:
            feeder.take(record)
        if self._metrics is not None:
            try:
                self._metrics.write(record)
            except Exception as error:
                self._metrics = None
                self._failed(f"Ray's metrics failed and are left out: {error}")

    def close(self, ending: Ending) -> None:
        """Have all of it written, for so long as an ending allows."""
        for feeder in self._feeders:
            feeder.end(ending)
        end = time.monotonic() + (_STOP_S if ending == "stopped" else _CLOSE_S)
        for feeder in self._feeders:
            feeder.wait(end - time.monotonic())
        if self._opened is not None:
            self._opened.close()


@contextlib.contextmanager
def telemetry(
    reporter: Reporter,
    settings: TrackingConfig | None,
    directory: Path,
    run: str,
    *,
    identity: object = None,
    parameters: Mapping[str, Any] | None = None,
    history: Sequence[Record] | None = None,
) -> Iterator[Telemetry]:
    """Have Ray's metrics, where Ray is up, and the trackers follow an event log.

    Args:
        reporter: It has the log; told when one of them is left out.
        settings: Which trackers; None: only Ray's metrics, for what is a part of another run.
        directory: Where they keep what they need: the run's.
        run: Name of the run: the label of its metrics.
        identity: What decides the numbers: where it is another than before, the curves in MLflow
            and Weights & Biases are those of another run.
        parameters: The configuration.
        history: What happened in the run before; None: what is in the log.
    """
    events = reporter.events
    assert events is not None
    if history is None:
        history = read_events(events.path) if events.path.is_file() else []
    trackers: list[Tracker] = []
    if settings is not None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        keys = dict(flat(parameters or {}))
        tracked = TrackedRun(directory, run, digest.hexdigest()[:16], keys)
        # Here, where no thread of another tracker looks for packages meanwhile. What is wrong with
        # it is told by its own thread, which ends nothing.
        with contextlib.suppress(Exception):
            import_tensorboard()
        trackers = make_trackers(settings, tracked)

    metrics = RayMetrics(run, history) if ray_is_joined() else None
    listening = Telemetry(metrics, trackers, history, reporter.warn)
    events.subscribe(listening.take)
    ending: Ending = "stopped"
    try:
        yield listening
        ending = "finished"
    except Exception:
        ending = "failed"
        raise
    finally:
        listening.close(ending)
        events.unsubscribe(listening.take)
