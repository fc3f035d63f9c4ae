"""Grader processes: order, limits, death, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from arm_ray.errors import ConfigError, EvaluationError
from arm_ray.evaluation.grading.pool import GraderPool, GradingItem, Verdict
from tests.waiting import cpu_ticks, has_ended, is_met, wait_for

STUBBORN = "tests.evaluation.stubborn_worker"
RIGHT = GradingItem(r"\boxed{\frac{1}{2}}", "0.5")
WRONG = GradingItem(r"\boxed{2}", "7")

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool() as made:
        yield made


def pids(pool: GraderPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def is_gone(pid: int, within_s: float = 10.0) -> bool:
    return is_met(lambda: has_ended(pid), within_s)


def test_verdicts_come_in_order() -> None:
    items = [GradingItem(rf"\boxed{{{n}}}", "3") for n in range(20)]
    with GraderPool(workers=2) as pool:
        verdicts = pool.grade(items)
        assert pool.grade([]) == []
    assert [v.strict for v in verdicts] == [n == 3 for n in range(20)]
    assert [v.answer for v in verdicts] == [str(n) for n in range(20)]
    assert verdicts[3] == Verdict(True, True, "3", "boxed", False)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_hangs_or_dies_is_wrong_and_only_that(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arm_ray.evaluation.grading.pool._WORKER", STUBBORN)
    golds = ["5", "6", "hang", "5", "die", "die", "6", "5"]
    items = [GradingItem(r"\boxed{5}, or did it hang?", gold) for gold in golds]
    with GraderPool(workers=workers, limit_s=2.0) as pool:
        pool.grade(items[:2])
        start, before = time.monotonic(), pids(pool)
        verdicts = pool.grade(items)
        assert time.monotonic() - start < 30
        assert all(is_gone(pid) for pid in before) or workers == 2
        assert len(pids(pool)) == workers
    assert [v.qwen_compat for v in verdicts] == [gold == "5" for gold in golds]
    # What was judged before the process had to be killed is kept.
    assert [v.strict for v in verdicts] == [gold in ("5", "hang") for gold in golds]
    assert [v.timed_out for v in verdicts] == [gold in ("die", "hang") for gold in golds]
    assert [v.answer for v in verdicts] == [None if gold == "die" else "5" for gold in golds]


def test_what_takes_long_in_python_is_cut_off(pool: GraderPool) -> None:
    pool.grade([RIGHT])
    before = pids(pool)
    start = time.monotonic()
    (verdict,) = pool.grade([GradingItem(r"\boxed{10^{10^{10}}}", "5")])
    assert (verdict.strict, verdict.qwen_compat, verdict.timed_out) == (False, False, True)
    assert time.monotonic() - start < 11
    assert pids(pool) == before


def test_a_worker_that_dies_is_replaced(pool: GraderPool) -> None:
    pool.grade([RIGHT])
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGKILL)
    assert is_gone(pid)
    assert [v.strict for v in pool.grade([RIGHT, WRONG])] == [True, False]
    assert pids(pool) != [pid]


def test_memory_is_bounded() -> None:
    big = GradingItem(r"\boxed{(sum([1]*10**9),1)}", "(2,3)")
    with GraderPool(memory_bytes=768 * 2**20) as pool:
        verdicts = pool.grade([RIGHT, big, RIGHT])
    assert [v.qwen_compat for v in verdicts] == [True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "\0\\boxed{7\0}\ud800",
        "}{}}{",
        "\\boxed{",
        "\\boxed{" * 3000,
        "\\boxed{" + "{" * 3000 + "}" * 3000 + "}",
        "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
        "\\boxed{100000!}",
        "\\boxed{\\frac}",
        "\\boxed{\\sqrt[}",
        "\\boxed{∞ ≤ 五 ½}",
        "a" * 1_000_000,
        "1 " * 500_000,
        "\\boxed{" + "7 + " * 250_000,
        "answer is " * 100_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_no_text_is_too_much(pool: GraderPool, text: str) -> None:
    start = time.monotonic()
    (verdict,) = pool.grade([GradingItem(text, "5")])
    assert not verdict.strict
    assert not verdict.qwen_compat
    assert time.monotonic() - start < 15
    assert pool.grade([RIGHT])[0].strict


def test_gold_answers_may_be_odd_too(pool: GraderPool) -> None:
    golds = ["", "\0", "{", "\\frac", "\ud800", "(" * 2000]
    assert not any(v.strict for v in pool.grade([GradingItem("\\boxed{5}", g) for g in golds]))


def test_threads_take_turns(pool: GraderPool) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: pool.grade([RIGHT, WRONG]), range(8)))
    assert [[v.strict for v in result] for result in results] == [[True, False]] * 8


def test_closing_leaves_nothing() -> None:
    pool = GraderPool(workers=2)
    pool.grade([RIGHT] * 4)
    before = pids(pool)
    assert len(before) == 2
    pool.close()
    pool.close()
    assert all(is_gone(pid) for pid in before)
    with pytest.raises(EvaluationError, match="closed"):
        pool.grade([RIGHT])


@pytest.mark.parametrize("busy", [False, True])
def test_workers_go_when_the_parent_is_killed(busy: bool) -> None:
    code = (
        "import time\n"
        "from arm_ray.evaluation.grading import pool as module\n"
        f"module._WORKER = {STUBBORN!r}\n"
        "pool = module.GraderPool(limit_s=4)\n"
        "pool.grade([module.GradingItem('5', '5')])\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        f"pool.grade([module.GradingItem('5', 'hang')]) if {busy} else time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        begun = cpu_ticks(pid)
        if busy:
            wait_for(lambda: cpu_ticks(pid) > begun, "the worker is busy")
        parent.kill()
    # A busy one is stuck in C; the system ends it by the CPU time that it may use.
    assert is_gone(pid, within_s=40 if busy else 10)


def test_workers_import_neither_ray_nor_torch() -> None:
    code = (
        "import sys, arm_ray.evaluation.grading.worker, arm_ray.evaluation.grading.strict\n"
        "import arm_ray.evaluation.grading.qwen_compat\n"
        "print([m for m in ('ray', 'torch', 'transformers', 'vllm') if m in sys.modules])\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    code = (
        "import sys, arm_ray.evaluation.grading.pool\n"
        "print([m for m in ('ray', 'torch', 'sympy', 'math_verify') if m in sys.modules])\n"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("settings", [{"workers": 0}, {"limit_s": 0}, {"memory_bytes": 1}])
def test_settings_that_make_no_sense(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        GraderPool(**settings)  # type: ignore[arg-type]


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arm_ray.evaluation.grading.pool._WORKER", "arm_ray.nosuch")
    with GraderPool() as pool, pytest.raises(EvaluationError, match="No module named"):
        pool.grade([RIGHT])
