"""`arm-ray attach` as the child of a trainer: it ends, as by SIGTERM, when its input does.

The other end of its standard input belongs to the trainer's process, and is closed when that ends,
in whatever way.

    python -m arm_ray.integrations.beside ATTACH.yaml [section.key=value …]
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from arm_ray.cli import main


def _end_with_input() -> None:
    # Past Python's buffer, whose lock this thread would still hold when the process ends.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    sys.exit(main(["attach", *sys.argv[1:]], is_own_process=True))
