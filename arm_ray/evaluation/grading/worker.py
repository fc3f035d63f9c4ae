"""The process that grades: reads items from stdin, writes verdicts to stdout, as lines of JSON.

Started by `pool.GraderPool` as ``python -m arm_ray.evaluation.grading.worker``. It imports
SymPy and math-verify and nothing of Ray or torch. What it may use is limited by the system, so
that a formula cannot take the machine with it: address space, and CPU time for each item.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from arm_ray.evaluation.grading.extraction import Extraction, extract_answer
from arm_ray.evaluation.grading.limits import LimitExceededError, time_limit

# No gold answer comes near this length; what is longer costs time and cannot be right.
LONGEST_ANSWER = 20_000

# Limits of each mode, and the most that each may take of an item's limit. The toolkit's own is 3 s.
SECONDS = {"strict": 5.0, "qwen_compat": 3.0}
SHARES = {"strict": 0.5, "qwen_compat": 0.3}

NOTHING = Extraction(None, "none")

Judge = Callable[..., bool]


def main(arguments: list[str], load: Callable[[], Mapping[str, Judge]] | None = None) -> None:
    """Grades until stdin ends or the parent is gone.

    Args:
        arguments: The parent's process id, the limit on the address space in bytes, the limit of
            each item in seconds.
        load: Makes the judge of each mode; by default the real ones.
    """
    parent, memory, limit_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    # What libraries print must not come between the verdicts.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.ERROR)
    judges = (load or load_judges)()
    _write(results, {"ready": True})
    for line in sys.stdin:
        _write(results, {"started": True})
        _allow_cpu_seconds(limit_s + 5)
        grade_item(json.loads(line), judges, limit_s, lambda message: _write(results, message))


def grade_item(
    item: dict[str, Any],
    judges: Mapping[str, Judge],
    limit_s: float,
    send: Callable[[dict[str, Any]], None],
) -> None:
    """Grades one item in each mode asked for.

    Args:
        item: ``completion``, ``gold``, ``benchmark`` and ``modes``.
        judges: The judge of each mode.
        limit_s: Limit of the item in seconds, for all modes together.
        send: Takes a message as soon as a mode is judged, because what is known by then must
            not be lost if the next one has to be killed. The last message has ``done``.
    """
    timed_out = False
    for mode in item["modes"]:
        found, verdict = NOTHING, False
        try:
            with time_limit(min(SECONDS[mode], SHARES[mode] * limit_s)):
                found = extract_answer(item["completion"], mode)
                if len(found.answer or "") <= LONGEST_ANSWER:
                    verdict = judges[mode](
                        item["completion"], item["gold"], benchmark=item["benchmark"]
                    )
        except LimitExceededError:
            timed_out = True
        except Exception:  # noqa: S110
            pass  # an answer that the judge cannot take is wrong, whatever it raised
        send({mode: bool(verdict), f"{mode}_answer": found.answer, f"{mode}_how": found.how})
    send({"timed_out": timed_out, "done": True})


def load_judges() -> dict[str, Judge]:
    """The judges of both modes, warmed up."""
    from arm_ray.evaluation.grading import qwen_compat, strict

    judges: dict[str, Judge] = {"strict": strict.judge, "qwen_compat": qwen_compat.judge}
    # The first formulas are slow, while grammars build their tables: not at an item's expense.
    for answer, gold in ((r"\frac{x+2}{7}+\sqrt{2}", r"\frac{x}{7}"), ("(1,2)", "(2,x)")):
        for judge in judges.values():
            judge(rf"\boxed{{{answer}}}", gold)
    return judges


def _write(results: TextIO, message: dict[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()


def _allow_cpu_seconds(seconds: float) -> None:
    # Of use when the parent is gone and this process is stuck in C, where no thread of it runs:
    # the system then ends it.
    used = time.process_time()
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(used + seconds)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
