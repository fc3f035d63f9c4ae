"""The reward of the example: the right number, and a little for any number."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def right_number(completion: str, row: dict[str, Any]) -> float:
    """1 where the last number of the first line is the solution's, 0.1 for another one, else 0.

    Args:
        completion: What the model wrote.
        row: The prompt's row, with the solution in `completion`.
    """
    found = _NUMBER.findall(completion.strip().split("\n")[0])
    if not found:
        return 0.0
    return 1.0 if float(found[-1]) == float(_NUMBER.findall(row["completion"])[-1]) else 0.1
