"""What a model was made of, and on what: the part of `arm_ray.json` that is no digest."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from typing import Any

import torch

import arm_ray
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.config import MergeConfig
from arm_ray.events import read_events
from arm_ray.hardware import cpu_model
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.secrets import all_hidden
from arm_ray.storage.yaml_text import load_yaml

# Whose versions decide bits.
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "ray")


def environment(device: str | None) -> dict[str, Any]:
    """The software and the machine that a merge runs on.

    Args:
        device: Of the layer shards; None: not known yet.
    """
    return {
        "arm_ray": arm_ray.__version__,
        "python": platform.python_version(),
        "packages": {name: _known(partial(metadata.version, name)) for name in _PACKAGES},
        "machine": {
            "cpu": cpu_model(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "gpu": _known(torch.cuda.get_device_name) if torch.cuda.is_available() else None,
        },
        "device": device,
    }


def _known(ask: Callable[[], str]) -> str | None:
    """A fact, or None: no merge fails at its end because a package or a driver does not tell."""
    try:
        return ask()
    except Exception:  # a distribution of another name, a GPU that is another process's
        return None


def made_of(
    config: MergeConfig, checkpoints: Mapping[str, Checkpoint], run: RunDirectory, selected: str
) -> dict[str, Any]:
    """What a model was made of.

    Args:
        config: The configuration of the merge.
        checkpoints: `base`, `candidate-1`, … -> checkpoint.
        run: The run directory.
        selected: Name of the state or checkpoint that became the model.
    """
    started = [e for e in read_events(run.events.path) if e["event"] == "run_started"]
    content = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": run.id,
        "selected": selected,
        "environment": environment(started[-1]["device"] if started else None),
        # The cheap digests by which a run notices that an input has changed: of tables, sizes and
        # times, not of all bytes.
        "inputs": {
            name: {"path": str(given.path), "fingerprint": given.fingerprint}
            for name, given in checkpoints.items()
        },
        "calibration": run.inputs.get("calibration"),
        "config": load_yaml(config.to_yaml()),
    }
    found: dict[str, Any] = all_hidden(content)
    return found
