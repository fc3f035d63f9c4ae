"""A grader process with judges that do the worst: hang where no signal arrives, and die."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from arm_ray.evaluation.grading.worker import main


def strict(completion: str, gold: str, **_: Any) -> bool:
    if gold == "die":
        os._exit(3)
    return gold in completion


def qwen_compat(completion: str, gold: str, **_: Any) -> bool:
    if "hang" in gold:
        # As in one long call of C: no signal is handled, no other thread runs.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        sys.setswitchinterval(10**6)
        while True:
            pass
    return gold in completion


if __name__ == "__main__":
    main(sys.argv[1:], lambda: {"strict": strict, "qwen_compat": qwen_compat})
