"""The command line with plain engines in the place of vLLM's: `python -m tests.chaos.driver …`.

With `TELLING_ENGINE` in the environment an engine ends with an error that tells what is in it.
"""

from __future__ import annotations

import os
import sys

from arm_ray import cli
from arm_ray.jobs import sft
from arm_ray.runtime.scoring import evaluator
from tests.doubles.plain_engine import PlainEngineActor, TellingEngineActor


def main() -> int:
    is_telling = "TELLING_ENGINE" in os.environ
    evaluator.EngineActor = TellingEngineActor if is_telling else PlainEngineActor  # type: ignore[misc]
    command, *rest = sys.argv[1:]
    if command == "sft":
        return sft.main(rest)
    return cli.main([command, *rest], is_own_process=True)


if __name__ == "__main__":
    sys.exit(main())
