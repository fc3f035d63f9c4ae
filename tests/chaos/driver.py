"""The command line with plain engines in the place of vLLM's: `python -m tests.chaos.driver …`."""

from __future__ import annotations

import sys

from arm_ray import cli
from arm_ray.jobs import sft
from arm_ray.runtime.scoring import evaluator
from tests.doubles.plain_engine import PlainEngineActor


def main() -> int:
    evaluator.EngineActor = PlainEngineActor  # type: ignore[misc]
    command, *rest = sys.argv[1:]
    if command == "sft":
        return sft.main(rest)
    return cli.main([command, *rest], is_own_process=True)


if __name__ == "__main__":
    sys.exit(main())
