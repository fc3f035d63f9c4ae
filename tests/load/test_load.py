"""Load: many merges, large inputs, and long runs leave memory, files and processes flat."""

from __future__ import annotations

import json
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.figures import guarantee
from tests.builders.merge_case import MergeCase
from tests.builders.merges import run
from tests.builders.models import WORDS
from tests.load.footprint import Footprint, footprint, growth

LINEAR, TWO = "method.operator=task_arithmetic", "runtime.layer_shards=2"
# Memory may grow by so much between the first merges and the last ones; the rest not at all.
FLAT = 0.02


def merged(case: MergeCase, overrides: Sequence[str]) -> list[Footprint]:
    """What is held after each of some merges, one after another, whose runs are removed."""
    case.make()
    held = []
    for override in overrides:
        shutil.rmtree(run(case.config(override)).run)
        held.append(footprint())
    return held


def assert_flat(held: list[Footprint], what: str) -> None:
    grown = growth(held)
    guarantee(f"{what}: {len(held)} of {len(held)}; {held[0]} -> {held[-1]}; {grown}")
    memory = grown.pop("memory_mb")
    assert memory <= FLAT, (memory, held)
    assert {name: part for name, part in grown.items() if part > 0.0} == {}, held


@pytest.mark.usefixtures("shards_in_process")
def test_merges_one_after_another_in_one_process(case: MergeCase) -> None:
    """A seeded part of the next one, without the time that actors take to start."""
    kinds = [LINEAR if number % 3 == 0 else TWO for number in range(30)]
    assert_flat(merged(case, kinds), "merges one after another in one process")


@pytest.mark.minutes
@pytest.mark.usefixtures("local_ray")
def test_fifty_merges_one_after_another_in_one_cluster(case: MergeCase) -> None:
    assert_flat(merged(case, [TWO] * 50), "merges one after another in one cluster")


@pytest.mark.minutes
@pytest.mark.usefixtures("local_ray")
def test_eight_merges_at_once(case: MergeCase) -> None:
    """In a cluster with room for six: two wait, and all give what one alone does."""
    case.make()
    alone = load_all(run(case.config("runtime.layer_shards=1", output="alone")).run / "model")
    configs = [
        case.config(f"runtime.layer_shards={1 + number % 2}", output=f"merge-{number}")
        for number in range(8)
    ]
    started = time.monotonic()
    threads = [threading.Thread(target=run, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for config in configs:
        assert_same_bits(alone, load_all(Path(config.output) / "model"))
    seconds = time.monotonic() - started
    guarantee(f"merges at once: {len(configs)} of {len(configs)} in {seconds:.0f} s")


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Called: no more open files than so many; afterwards as before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("shards_in_process")
@pytest.mark.parametrize(
    ("num_layers", "most_open"),
    [(40, 256), pytest.param(136, 1024, marks=pytest.mark.minutes)],
    ids=["three hundred", "a thousand"],
)
def test_checkpoints_of_many_weight_files(
    case: MergeCase, limit_files: Callable[[int], None], num_layers: int, most_open: int
) -> None:
    """More than may be open at once: read, and written, by an operator and by forward passes."""
    case.make(num_layers=num_layers, max_shard_size="1KB")
    [count, *_] = [len(list(path.glob("*.safetensors"))) for path in case.candidates]
    assert count > most_open - 30
    limit_files(most_open)
    once = ("keep_states=none", "runtime.max_weight_file_gb=1e-6")
    for method in ([LINEAR], ["method.operator=arm"]):
        schedule = "schedule={anchor_iterations: 1, max_iterations: 1, step: fixed}"
        config = case.config(*method, *once, schedule, output=method[0][-5:])
        written = list((run(config).run / "model").glob("*.safetensors"))
        assert len(written) > most_open
    guarantee(f"weight files of a checkpoint: {count}, of a process: {most_open} open")


@pytest.mark.minutes
@pytest.mark.usefixtures("shards_in_process")
def test_a_calibration_file_of_a_gigabyte(case: MergeCase) -> None:
    """Its rows are looked up, and not held: memory stays below two thirds of its size."""
    case.make()
    words = [" ".join(WORDS[(i * 7 + k) % len(WORDS)] for k in range(160)) for i in range(500)]
    with (case.root / "calibration.jsonl").open("w") as file:
        number = 0
        while file.tell() < 10**9:
            for text in words:
                file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
                number += 1
    before, started = footprint().memory_mb, time.monotonic()
    run(case.config())
    grown = footprint().memory_mb - before
    guarantee(
        f"calibration of 1 GB: {number} rows, {time.monotonic() - started:.1f} s, "
        f"{grown:.0f} MB more"
    )
    assert grown < 650
