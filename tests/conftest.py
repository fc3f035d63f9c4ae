"""Fixtures of all tests, and which tests start processes."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.builders import figures
from tests.builders.merge_case import MergeCase
from tests.builders.paths import ROOT
from tests.doubles import in_process, stores
from tests.doubles.plain_engine import PlainEngineActor

# Fixtures that start Ray, a server, or trainers.
PROCESSES = {"local_ray", "object_store", "shards"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes (see the tiers in CONTRIBUTING.md), and run long files first.

    So that at the end no worker is left with a long one. Within a file the order stays.
    """
    ranks: dict[Path, int] = {}
    for item in items:
        if PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.processes)
        marked = [item.get_closest_marker(name) is not None for name in ("minutes", "processes")]
        rank = (*marked, True).index(True)
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what was counted to the process that prints."""
    sent_home = getattr(session.config, "workeroutput", None)
    if sent_home is not None:
        sent_home["guarantees"] = figures.LINES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what another process has counted."""
    figures.LINES.extend(getattr(node, "workeroutput", {}).get("guarantees", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was counted."""
    for line in figures.LINES:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no page at their end, which takes a second; `report_pages` has them written."""
    if "report_pages" not in request.fixturenames:
        monkeypatch.setattr("arm_ray.runtime.session.page._written", lambda run: run)


@pytest.fixture
def report_pages() -> None:
    """Runs write their reports, as they do for users."""


@pytest.fixture
def case(tmp_path: Path) -> MergeCase:
    """An empty `MergeCase`."""
    return MergeCase(tmp_path)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests that need one, with slots for four shards."""
    # Workers are new processes: they find the package, and tests that define tasks, by this path.
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=6,
        resources={"somewhere": 6.0},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Workers keep the environment that Ray began with: they are told now where the object store
        # of the tests will listen.
        runtime_env={"env_vars": {"PYTHONPATH": paths, **stores.ENVIRONMENT}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def shards_in_process(
    request: pytest.FixtureRequest, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer shards are no actors, unless the test is marked so (see `tests.doubles.in_process`)."""
    if request.node.get_closest_marker("actors") is None:
        monkeypatch.setattr(
            "arm_ray.runtime.merge.controller.placed_shards", in_process.placed_shards
        )


@pytest.fixture(params=["in process", pytest.param("ray train", marks=pytest.mark.minutes)])
def trainers(
    request: pytest.FixtureRequest, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Where training runs: in this process (`tests.doubles.in_process`), or on Ray Train."""
    if request.param == "in process":
        monkeypatch.setattr("arm_ray.runtime.train.workers.on_ray_train", in_process.on_ray_train)
    return str(request.param)


@pytest.fixture(params=["plain", pytest.param("vllm", marks=pytest.mark.minutes)])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What models are scored by: vLLM's engines, or plain ones (`tests.doubles.plain_engine`).

    Plain ones are no actors, unless the test is marked so (see `tests.doubles.in_process`).
    """
    if request.param == "plain":
        if request.node.get_closest_marker("actors") is None:
            gang = "arm_ray.runtime.scoring.evaluator.EvaluatorGang"
            monkeypatch.setattr(gang, in_process.PlainEvaluators)
        monkeypatch.setattr("arm_ray.runtime.scoring.evaluator.EngineActor", PlainEngineActor)
    return str(request.param)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.builders.trainer_shards` writes, by two processes."""
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("shards")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.builders.trainer_shards", str(root)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:]
    return root


@pytest.fixture(scope="session")
def object_store() -> Iterator[None]:
    """A local S3 server; see `bucket`."""
    with stores.s3_server():
        yield


@pytest.fixture
def bucket(object_store: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of a new bucket on a local S3 server, with the environment to reach it."""
    for name, value in stores.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # The default scratch directory is below it.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    stores.make_bucket(name)
    return f"s3://{name}"
