"""Say what the demo will show and how long it will take here, before anything is installed.

::

    python3.11 examples/smollm2/outlook.py

Only the standard library is needed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Minutes with set-up on two cores, as docs/supported-machines.md has them.
WITH_UNITS, WITHOUT = 7, 10


def main() -> None:
    """Run from the command line."""
    sys.path.insert(0, str(ROOT))
    from arm_ray.hardware import BFLOAT16, cpu_units

    dtype, why = cpu_units().choose(BFLOAT16)
    minutes = WITH_UNITS if dtype == BFLOAT16 else WITHOUT
    print(
        "This demo makes a small real model (SmolLM2-135M), fine-tunes it on word problems, merges"
        "\nearly checkpoints of that training in three ways (Task Arithmetic, ARM, and a guided"
        "\nstep), and scores the base, the checkpoints and the merges on 200 problems that nothing"
        "\nelse has seen.\n"
        f"This machine: {os.cpu_count()} cores; it will compute in {dtype} ({why}).\n"
        f"With set-up it takes up to {minutes} minutes on 2 cores, less on more; what is done is "
        "kept, and skipped\nwhen you run it again."
    )


if __name__ == "__main__":
    main()
