"""What the libraries below say in processes of ours: nothing but errors, unless it is asked for.

Each is told in its own way (a variable, a logger's filter by level), before it is imported. What
somebody has set in the environment holds. Imports nothing heavy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

# In the environment: the libraries may speak. Actors and child processes are told by it too.
VERBOSE = "ARM_RAY_VERBOSE"
_ON = ("1", "true", "yes")
_QUIET: Mapping[str, str] = {
    # transformers' own bars ("Loading weights", "Writing model shards") go by this one as well.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# It sets its level anew when it is imported; a filter stays.
_LOGGERS = ("DeepSpeed",)


def is_verbose() -> bool:
    """Whether the libraries may speak."""
    return os.environ.get(VERBOSE, "").lower() in _ON


def quiet_environment() -> dict[str, str]:
    """Variables that have the libraries of a process say nothing but errors; empty: they may."""
    return {} if is_verbose() else {k: os.environ.get(k, v) for k, v in _QUIET.items()}


def verbose_environment() -> dict[str, str]:
    """Variables that pass `is_verbose` on to actors elsewhere."""
    return {VERBOSE: "1"} if is_verbose() else {}


def silence() -> None:
    """Have the libraries of this process, and of those that it starts, say errors alone.

    Only in a process of our own, and before they are imported.
    """
    if is_verbose():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
