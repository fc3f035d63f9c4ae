"""What a merge tells Prometheus, TensorBoard, MLflow and Weights & Biases is what it wrote down."""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from arm_ray.config import (
    TrackingConfig,
    WandbConfig,
    config_difference,
    parse_merge_config,
    state_settings,
)
from arm_ray.errors import ConfigError
from arm_ray.events import EventLog, ModelScored, Warned, read_events
from arm_ray.report import trackers
from arm_ray.report.scalars import Record, points
from arm_ray.report.trackers import TensorBoard, check_installed
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.session import telemetry as telemetry_module
from arm_ray.runtime.session.telemetry import telemetry
from tests.builders.boards import Curves, tensorboard
from tests.builders.merge_case import MergeCase
from tests.doubles import in_process
from tests.doubles.said import reporter_into

RUN = "told everywhere"
# Name and labels -> value.
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Unreachable(TensorBoard):
    """A tracker whose server goes away after the first point."""

    name = "Unreachable"

    def open(self, history: Any) -> None:
        pass

    def write(self, record: Record) -> None:
        if points(record):
            raise ConnectionError("the server is away")


@dataclass
class Told:
    """A merge that was halted once, and what it said."""

    output: Path
    said: str
    mlflow_store: str
    scraped: Series

    @property
    def expected(self) -> Curves:
        """Curves by the events, point by point."""
        found: Curves = {}
        for record in read_events(self.output / "events.jsonl"):
            for point in points(record):
                if point.metric.tag:
                    found.setdefault(point.tag, {})[point.step] = point.value
        return found


def series(events: Path) -> Series:
    """What the driver's metrics should be, by the events: counters that never counted are none."""
    expected: Series = {}
    for record in read_events(events):
        for point in points(record):
            labels = tuple(zip(point.metric.labels, point.labels, strict=True))
            key = (point.metric.prometheus_name, labels)
            before = expected.get(key, 0.0) if point.metric.kind == "counter" else 0.0
            expected[key] = before + point.value
    return {key: v for key, v in expected.items() if v or not key[0].endswith("_total")}


def scrape(expected: Series) -> Series:
    """Our series as Prometheus reads them; Ray brings them up to date every 10 s."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + 30.0
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found: Series = {}
        for line in lines:
            match = re.fullmatch(r"(ray_arm_ray_\w+)\{(.*)\} (\S+)", line)
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2])) if match else {}
            if match and labels.get("run") == RUN:
                ours = {k: v for k, v in labels.items() if k in ("shard", "model", "task")}
                found[match[1], tuple(sorted(ours.items()))] = float(match[3])
        if found == {key: pytest.approx(value) for key, value in expected.items()}:
            return found
        if time.monotonic() > end:
            return found
        time.sleep(0.5)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Told:
    root = tmp_path_factory.mktemp("told")
    case = MergeCase(root).make(count=1)
    tracking: dict[str, Any] = {"run": RUN}
    patch = pytest.MonkeyPatch()
    patch.setattr("arm_ray.runtime.merge.controller.placed_shards", in_process.placed_shards)
    store = (root / "mlruns").as_uri()
    if trackers._is_installed("mlflow"):
        # Its database store needs the whole of MLflow.
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        tracking["mlflow"] = {"experiment": "merges", "tracking_uri": store}
    if trackers._is_installed("wandb"):
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        tracking["wandb"] = {"mode": "offline"}
    original = trackers.make_trackers

    def with_one_that_fails(*arguments: Any) -> Any:
        return [*original(*arguments), Unreachable(root)]

    patch.setattr(telemetry_module, "make_trackers", with_one_that_fails)
    scraped: Series = {}
    close = telemetry_module.Telemetry.close

    def look_and_close(listening: telemetry_module.Telemetry, ending: Any) -> None:
        scraped.clear()
        events = root / "run" / "events.jsonl"
        scraped.update(scrape(series(events)) if (root / "run" / "model").is_dir() else {})
        close(listening, ending)

    patch.setattr(telemetry_module.Telemetry, "close", look_and_close)
    content = {**case.content(), "tracking": tracking}
    content["schedule"] |= {"max_iterations": 3}
    output = StringIO()
    for halt, shards in ((2, 1), (None, 2)):
        config = parse_merge_config(content, [f"runtime.layer_shards={shards}"])
        merge(config, stop_after=halt, console=Console(file=output, width=200))
    patch.undo()
    return Told(Path(config.output), output.getvalue(), store, scraped)


def test_prometheus_reads_what_the_events_say(told: Told) -> None:
    expected = series(told.output / "events.jsonl")
    assert told.scraped == {key: pytest.approx(value) for key, value in expected.items()}
    assert told.scraped["ray_arm_ray_iterations_total", ()] == 3
    shards = [dict(labels)["shard"] for name, labels in told.scraped if "utilisation" in name]
    assert sorted(shards) == ["0", "1"]


def assert_same(found: Curves, expected: Curves) -> None:
    assert found == {tag: pytest.approx(curve, rel=1e-6) for tag, curve in expected.items()}


def test_tensorboard_reads_every_point_once(told: Told) -> None:
    assert_same(tensorboard(told.output / "tensorboard"), told.expected)
    assert len(list((told.output / "tensorboard").iterdir())) == 1


def test_mlflow_has_one_run_with_every_point_once(told: Told) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient(tracking_uri=told.mlflow_store)
        experiment = client.get_experiment_by_name("merges")
        assert experiment is not None
        [run] = client.search_runs([experiment.experiment_id])
        assert (run.info.run_name, run.info.status) == (RUN, "FINISHED")
        assert run.data.params["schedule.max_iterations"] == "3"
        found: Curves = {}
        for tag in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, tag)
            found[tag] = {metric.step: metric.value for metric in history}
            assert len(history) == len(found[tag]), tag
    assert_same(found, told.expected)


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a run's file: LevelDB's log format, behind a header of 7 bytes."""
    content, position, record = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_has_one_run_with_every_point_once(told: Told) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    identifier = json.loads((told.output / "wandb.json").read_text())["run"]
    files = sorted((told.output / "wandb").glob(f"offline-run-*/run-{identifier}.wandb"))
    assert len(files) == 2
    found: Curves = {}
    for file in files:
        for data in wandb_records(file):
            record = WandbRecord.FromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for tag in told.expected.keys() & items.keys():
                curve = found.setdefault(tag, {})
                assert items["step"] not in curve, tag
                curve[items["step"]] = items[tag]
    assert_same(found, told.expected)


def test_a_tracker_that_fails_is_left_out_with_one_warning(told: Told) -> None:
    line = "Unreachable failed and is left out: ConnectionError: the server is away"
    events = read_events(told.output / "events.jsonl")
    # Of each of the two sessions.
    assert [e["message"] for e in events if e["event"] == Warned.name].count(line) == 2
    assert told.said.count(f"warning: {line}") == 2
    assert events[-1]["event"] == "run_finished"
    assert (told.output / "model").is_dir()


class Silent(Unreachable):
    """A tracker whose server takes a connection, and says nothing."""

    name = "Silent"

    def open(self, history: Any) -> None:
        self.asked = threading.Event()

    def write(self, record: Record) -> None:
        self.asked.wait()


@pytest.fixture
def events(tmp_path: Path, local_ray: None) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def listen(events: EventLog, *, trackers: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write two events while these trackers listen; returns what people were told."""
    monkeypatch.setattr(telemetry_module, "make_trackers", lambda *_: trackers)
    monkeypatch.setattr(telemetry_module, "_CLOSE_S", 1.0)
    said: list[str] = []
    reporter = reporter_into(said, events)
    with telemetry(reporter, TrackingConfig(), events.path.parent, "other"):
        for iteration in (1, 2):
            events.write(scored(iteration))
    return said


def scored(iteration: int, value: float = 0.5) -> ModelScored:
    return ModelScored(f"state-{iteration:04d}", "/x", {"a": {"b": value}}, 1.0, 0.1, (1,), 4, 40)


def test_a_tracker_that_hangs_delays_nothing_but_the_end(
    events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = TensorBoard(events.path.parent / "board")
    began = time.monotonic()
    said = listen(events, trackers=[Silent(Path()), board], monkeypatch=monkeypatch)
    assert 1.0 <= time.monotonic() - began < 10.0
    assert said == ["warning: Silent has not taken everything within its time"]
    assert tensorboard(events.path.parent / "board")["scores/a/b/state"] == {1: 0.5, 2: 0.5}


def test_rays_metrics_that_fail_are_left_out(
    events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module.RayMetrics, "write", lambda *_: 1 / 0)
    said = listen(events, trackers=[], monkeypatch=monkeypatch)
    assert said == ["warning: Ray's metrics failed and are left out: division by zero"]
    assert [e["event"] for e in read_events(events.path)].count(Warned.name) == 1


def test_an_iteration_that_is_done_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    class Metric:
        def __init__(self, name: str, *_: Any) -> None:
            self._name = name

        def inc(self, value: float, _tags: Mapping[str, str]) -> None:
            calls.append((self._name, value))

        set = inc

    monkeypatch.setattr("ray.util.metrics.Gauge", Metric)
    monkeypatch.setattr("ray.util.metrics.Counter", Metric)
    done = [
        {"event": "iteration_finished", "iteration": t, "seconds": 1.0, "forward_seconds": 1.0,
         "rank_deficient": (), "bytes_written": 7}
        for t in (1, 2, 3)
    ]  # fmt: skip
    metrics = telemetry_module.RayMetrics("x", done[:2])
    for record in done[1:]:
        metrics.write(record)
    written = [value for name, value in calls if name == "arm_ray_written_bytes_total"]
    assert written == [7]
    assert [value for name, value in calls if name == "arm_ray_iteration"] == [2, 3]


def test_gauges_are_kept_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, str]] = []

    class Metric:
        def __init__(self, *_: Any) -> None:
            pass

        def set(self, value: float, tags: Mapping[str, str]) -> None:
            calls.append((value, tags.get("shard", "-")))

    monkeypatch.setattr("ray.util.metrics.Gauge", Metric)
    monkeypatch.setattr(telemetry_module, "_REFRESH_S", 0.05)
    metrics = telemetry_module.RayMetrics("x", [])
    for peaks in ((5, 6), (7,)):
        metrics.write({"event": "run_finished", "iterations": 1, "peak_shard_bytes": peaks})
    calls.clear()
    end = time.monotonic() + 10.0
    while len(calls) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    metrics.close()
    # Of the shard that is there no more, nothing.
    assert set(calls) == {(7.0, "0")}


def test_tensorboard_shows_the_last_of_what_was_done_twice(tmp_path: Path) -> None:
    def record(iteration: int, value: float, at: float) -> Record:
        scores = {"a": {"b": value}}
        return {"time": at, "event": "model_scored", "model": f"state-{iteration:04d}",
                "scores": scores, "seconds": 1.0, "reload_seconds": None}  # fmt: skip

    board = TensorBoard(tmp_path)
    board.open([record(1, 0.1, 10.0)])
    board.write(record(2, 0.2, 20.0))
    board.write(record(2, 0.3, 30.0))
    board.close("finished")
    assert_same(tensorboard(tmp_path), {"scores/a/b/state": {1: 0.1, 2: 0.3}})
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_an_extra_that_is_not_installed_is_told_before_anything_starts(
    name: str, case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = case.make(count=1).config(f"tracking.{name}={{}}")
    with pytest.raises(ConfigError, match=rf"pip install 'arm-ray\[{name}\]'"):
        merge(config, console=Console(quiet=True))
    assert not Path(config.output).exists()
    check_installed(TrackingConfig())


def test_nobody_logged_in_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="nobody is logged in"):
        check_installed(TrackingConfig(wandb=WandbConfig()))
    check_installed(TrackingConfig(wandb=WandbConfig(mode="offline")))


def test_who_is_told_has_no_influence_on_a_run_that_goes_on(case: MergeCase) -> None:
    case.make(count=1)
    plain, told = case.config(), case.config("tracking={run: other, mlflow: {}, wandb: {}}")
    assert config_difference(plain, told) == []
    assert state_settings(plain) == state_settings(told)
