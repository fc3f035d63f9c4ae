"""How a user names a checkpoint: a path or hub id, perhaps with the format before it."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["hf", "zero", "universal", "fsdp", "dcp", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
FormatOrAuto = Literal["auto"] | Format


def split_source(given: str) -> tuple[FormatOrAuto, str]:
    """Take `FORMAT:PATH` apart.

    Args:
        given: Such as `zero:/runs/x/checkpoint-40`, or a path or hub id without a format. A
            directory whose own name begins like that is named as `./zero:…`.

    Returns:
        The format, `auto` where none is named, and the path or hub id.
    """
    for name in FORMATS:
        # `hf://…` is a URL of the hub, and `hf:` a format.
        if given.startswith(f"{name}:") and not given.startswith(f"{name}://"):
            return name, given[len(name) + 1 :]
    return "auto", given
