"""Where trainers put their checkpoints; see `layouts` for when one of them is complete."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from arm_ray.errors import ConfigError

Layout = Literal[
    "auto",
    "hf",
    "trl",
    "openrlhf",
    "verl",
    "deepspeed",
    "peft",
    "prime-rl",
    "nemo-rl",
    "slime",
    "megatron",
    "torchtitan",
]
Kind = Literal["auto", "hf", "actor"]
VERL_TRACKER = "latest_checkpointed_iteration.txt"
ADAPTER = "adapter_config.json"
METRIC = "metric.json"
STABLE = "STABLE"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_GLOBAL_STEP = re.compile(r"global_step(\d+)")
_GLOBAL_STEP_HF = re.compile(r"global_step(\d+)_hf")
_VERL_STEP = re.compile(r"global_step_(\d+)")
_STEP = re.compile(r"step_(\d+)")
_UNFINISHED_STEP = re.compile(r"tmp_step_(\d+)")
_ITERATION = re.compile(r"iter_(\d+)")
_EXPORT = re.compile(r"(?!iter_\d+$).*?(\d+)")
# In a distributed checkpoint of Megatron, by its age.
_MEGATRON_FILES = ("common.pt", "metadata.json")
# In one of its older form: a folder for each rank.
_MEGATRON_RANKS = "mp_rank_*"
# torchtitan's folder of checkpoints in that of the run, by default.
_TITAN_FOLDER = "checkpoint"
_TITAN_STEP = re.compile(r"step-(\d+)")
_ENDS_IN_NUMBER = re.compile(r".*?(\d+)")
# Below a step of NeMo-RL: what it writes first, and where the policy's weights are, exported in one
# piece, exported, or in shards.
_TRAINING_INFO = "training_info.json"
_NEMO_WEIGHTS = ("policy/weights/model/consolidated", "policy/weights/model", "policy/weights")


def directories(path: Path, layout: Layout, kind: Kind) -> dict[int, Path]:
    """Step -> directory of its weights, of all that are there, complete or not.

    Args:
        path: The run's directory.
        layout: How the trainer lays checkpoints out.
        kind: Of the two kinds of OpenRLHF and of slime.
    """
    if layout == "hf":
        return numbered(path, _CHECKPOINT)
    if layout == "peft":
        named = numbered(path, _ENDS_IN_NUMBER)
        return {s: p for s, p in named.items() if any(p.glob("adapter_*"))}
    if layout == "deepspeed":
        return numbered(path, _GLOBAL_STEP)
    if layout == "verl":
        steps = numbered(path, _VERL_STEP)
        return {s: _verl_weights(p) for s, p in steps.items()}
    if layout == "prime-rl":
        weights = path / "weights"
        return numbered(weights if weights.is_dir() else path, _STEP)
    if layout == "nemo-rl":
        return {
            s: next((p / name for name in _NEMO_WEIGHTS if (p / name).is_dir()), p)
            for s, p in numbered(path, _STEP).items()
        }
    if layout == "megatron":
        return numbered(path, _ITERATION)
    if layout == "torchtitan":
        folder = path / _TITAN_FOLDER
        return numbered(folder if folder.is_dir() else path, _TITAN_STEP)
    if layout == "slime":
        return _exports(path) if kind == "hf" else numbered(path, _ITERATION)
    return openrlhf_exports(path) if kind == "hf" else openrlhf_shards(path)


def _verl_weights(step: Path) -> Path:
    """Where verl has a step's weights: with Megatron it may export them, and shard the rest."""
    actor = step / "actor" if (step / "actor").is_dir() else step
    export = actor / "huggingface"
    is_exported = (actor / "dist_ckpt").is_dir() and any(export.glob("*.safetensors"))
    return export if is_exported else actor


def openrlhf_exports(path: Path) -> dict[int, Path]:
    """OpenRLHF's exports, with the moving average of the weights if the run keeps one."""
    return numbered(path, _GLOBAL_STEP_HF)


def openrlhf_shards(path: Path) -> dict[int, Path]:
    """OpenRLHF's raw weights: of PPO and GRPO, or of supervised fine-tuning."""
    actor = path / "_actor"
    return numbered(actor if actor.is_dir() else path, _GLOBAL_STEP)


def find_layout(path: Path) -> Layout:
    """How the checkpoints below a directory are laid out; `auto` where there is nothing yet.

    Raises:
        ConfigError: It is a file, or there is something else.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError("the run is not a directory", where=f"run.path: {path}", got="a file")
    try:
        names = sorted(entry.name for entry in os.scandir(path))
    except OSError:
        return "auto"
    if iterations := numbered(path, _ITERATION).values():
        known = (each / name for each in iterations for name in _MEGATRON_FILES)
        return "megatron" if any(map(Path.is_file, known)) and not _exports(path) else "slime"
    if (path / "weights").is_dir() and numbered(path / "weights", _STEP):
        return "prime-rl"
    if any(_UNFINISHED_STEP.fullmatch(name) for name in names):
        return "nemo-rl"
    for step in numbered(path, _STEP).values():
        if (step / _TRAINING_INFO).is_file() or (step / "policy").is_dir():
            return "nemo-rl"
        if (step / STABLE).is_file():
            return "prime-rl"
    has_verl = any(_VERL_STEP.fullmatch(name) for name in names)
    if VERL_TRACKER in names or has_verl:
        return "verl"
    if "_actor" in names or any(_GLOBAL_STEP_HF.fullmatch(name) for name in names):
        return "openrlhf"
    steps = [name for name in names if _GLOBAL_STEP.fullmatch(name)]
    if any((path / name / METRIC).is_file() for name in steps):
        return "openrlhf"
    if any(_CHECKPOINT.fullmatch(name) for name in names):
        return "hf"
    if numbered(path / _TITAN_FOLDER, _TITAN_STEP):
        return "torchtitan"
    for step in numbered(path, _TITAN_STEP).values():
        if any(next(step.glob(pattern), None) for pattern in (".metadata", "*.distcp", "sharded")):
            return "torchtitan"
    if steps:
        return "deepspeed"
    if any((path / name / ADAPTER).is_file() for name in names if _ENDS_IN_NUMBER.fullmatch(name)):
        return "peft"
    if _exports(path):
        return "slime"
    weights = [name for name in names if name.endswith((".safetensors", ".pt", ".bin"))]
    if weights:
        raise ConfigError(
            "the directory is a checkpoint, and not the directory of a run",
            where="run.path",
            got=", ".join(weights[:4]),
            expected="the directory above: with checkpoint-N (transformers, TRL), global_stepN_hf "
            "or _actor (OpenRLHF), global_step_N (verl), global_stepN (DeepSpeed), step_N "
            "(prime-rl, NeMo-RL), iter_N (slime, Megatron), step-N (torchtitan)",
        )
    return "auto"


def _exports(path: Path) -> dict[int, Path]:
    """Slime's exports: its user names them, with the number of the rollout at the end."""
    named = numbered(path, _EXPORT)
    return {
        step: directory
        for step, directory in named.items()
        if (directory / "config.json").is_file()
    }


def slime_kind(path: Path) -> Kind:
    """`hf` where there is an export; `auto` as long as there is nothing that can be read."""
    if _exports(path):
        return "hf"
    iterations = numbered(path, _ITERATION).values()
    is_readable = any(next(each.glob(_MEGATRON_RANKS), None) is None for each in iterations)
    return "actor" if is_readable else "auto"


def slime_shards(path: Path) -> dict[int, Path]:
    """Slime's own checkpoints, of either of its backends."""
    return numbered(path, _ITERATION)


def numbered(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Number in the name -> directory, of those below a directory whose names fit."""
    found: dict[int, Path] = {}
    try:
        entries = list(os.scandir(path))
    except OSError:
        return {}
    for entry in entries:
        match = pattern.fullmatch(entry.name)
        try:
            if match and entry.is_dir():
                found[int(match[1])] = Path(entry.path)
        except OSError:
            continue
    return found
