"""A merge of a study in a process of its own: `python -m arm_ray.runtime.study.cell DIRECTORY`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from arm_ray.config import parse_merge_config
from arm_ray.errors import ArmRayError
from arm_ray.runtime.merge.run import merge
from arm_ray.storage.atomic import write_text
from arm_ray.storage.regular import json_in

REQUEST_NAME, ERROR_NAME = "request.json", "error.txt"
# Of prctl(2): a signal when the parent ends.
_PDEATHSIG = 1


def main(directory: Path) -> int:
    """Do the merge that is asked for in a directory; returns the exit code, 1 of a failure."""
    _end_with_the_study()
    signal.signal(signal.SIGTERM, _interrupt)
    request = json_in(directory / REQUEST_NAME)
    try:
        merge(
            parse_merge_config(request["merge"], source=str(directory)),
            address=request["address"],
            console=Console(width=100),
            reserved=request["reserved"],
            # That of the study tells of all its merges.
            writes_report=False,
        )
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # told by the study, whose other cells go on
        write_text(directory / ERROR_NAME, error_text(error))
        return 1
    return 0


def error_text(error: Exception) -> str:
    """An error of any kind as a text to keep."""
    return str(error) if isinstance(error, ArmRayError) else f"{type(error).__name__}: {error}"


def _end_with_the_study() -> None:
    """Have this process interrupted when the study is killed: nobody else would end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            sys.exit(130)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
