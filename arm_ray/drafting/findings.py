"""What the directory of a run says of it: checkpoints, base, data, learning rates.

Only JSON, YAML and Markdown are read, never a pickle such as `training_args.bin`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.formats import missing
from arm_ray.errors import ConfigError, NotACheckpointError
from arm_ray.following.layouts import TRAINER_STATE, Found, RunWatcher
from arm_ray.following.places import ADAPTER
from arm_ray.storage.regular import json_in, read_text
from arm_ray.storage.yaml_text import LARGEST_YAML, front_matter, load_yaml

_CARD = "README.md"
_MODEL_CONFIG = "config.json"
# What verl writes beside its shards.
_EXPORT = "huggingface"
# A configuration of `jobs.sft` or `jobs.grpo`.
_JOB_CONFIG = "config.yaml"
# Trainings by reinforcement, by how they lay checkpoints out.
_RL_LAYOUTS = frozenset(("openrlhf", "verl", "prime-rl", "nemo-rl", "slime"))
# At most this part of the highest learning rate is a learning rate that was decayed.
_DECAYED = 0.1


@dataclass(frozen=True)
class Told:
    """Something that a file says.

    Attributes:
        value: What it is.
        by: The file.
    """

    value: str
    by: str


@dataclass(frozen=True)
class RunFindings:
    """What is known of the checkpoints that a configuration is written for.

    Attributes:
        path: Of the run; None: checkpoints were named one by one.
        layout: How the trainer lays them out; empty: they were named.
        complete: Directories of complete checkpoints, by step.
        incomplete: Step -> what is missing of the others.
        base: The model that the training began with; None: nothing says it.
        data: What it was trained on; None: nothing says it.
        are_adapters: Whether they are LoRA adapters.
        is_float32: Whether their weights are stored in float32.
        rates: Highest and last learning rate; None: nothing says them.
    """

    path: Path | None
    layout: str
    complete: Mapping[int, Path]
    incomplete: Mapping[int, str]
    base: Told | None = None
    data: Told | None = None
    are_adapters: bool = False
    is_float32: bool = False
    rates: tuple[float, float] | None = None

    @property
    def is_reinforced(self) -> bool:
        """Whether the run is one of reinforcement learning, as far as its layout tells."""
        return self.layout in _RL_LAYOUTS

    @property
    def is_decayed(self) -> bool:
        """Whether the learning rate fell to a tenth or less of its highest value."""
        return self.rates is not None and self.rates[1] <= _DECAYED * self.rates[0]


def checkpoints_of(path: Path, found_by: str = "") -> tuple[str, list[Found]]:
    """How a run lays out its checkpoints, and those that are in its directory.

    Args:
        path: Of the run.
        found_by: The file by which the directory is a checkpoint itself; empty: it is none.

    Returns:
        The layout, empty where it is no run's directory, and the checkpoints by step.
    """
    watcher = RunWatcher(path, missing=missing)
    try:
        # What nothing else says is complete, two looks at the same files do.
        watcher.scan()
        found = watcher.scan()
    except ConfigError:
        return "", []
    if found_by and watcher.layout == "deepspeed" and len(found) < 2:
        return "", []  # one checkpoint, with its shards in a directory below
    return watcher.layout, found


def look_at_run(path: Path) -> RunFindings:
    """Look at the directory of a run.

    Raises:
        NotACheckpointError: There is none, or it holds no complete checkpoint.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise NotACheckpointError(
            "the directory of the run does not exist",
            where=path,
            expected="a directory with the checkpoints of a training run",
        )
    layout, found = checkpoints_of(path)
    complete = {item.step: item.path for item in found if item.complete}
    incomplete = {item.step: item.reason for item in found if not item.complete}
    if not complete:
        reasons = "; ".join(f"step {step}: {why}" for step, why in incomplete.items())
        raise NotACheckpointError(
            "the directory holds no complete checkpoint of a run",
            where=path,
            got=reasons or "nothing that looks like a checkpoint of a run",
            expected="checkpoint-N, global_step_N, step_N, iter_N, …, as a trainer writes them",
            hint="name base and checkpoints one by one: arm-ray init BASE CHECKPOINT…",
        )
    return _described(path, layout, complete, incomplete)


def look_at_checkpoints(paths: Sequence[Path]) -> RunFindings:
    """Look at checkpoints that are named one by one, in the order of the training.

    Raises:
        NotACheckpointError: One of them is none, or is not whole.
    """
    complete: dict[int, Path] = {}
    for number, given in enumerate(paths):
        path = given.expanduser().absolute()
        if not path.is_dir():
            raise NotACheckpointError("a checkpoint directory does not exist", where=path)
        why = missing(path)
        if why is not None:
            raise NotACheckpointError(
                "a checkpoint is not complete",
                where=path,
                got=why,
                hint=f"arm-ray inspect {path} says what it is",
            )
        complete[number] = path
    return _described(None, "", complete, {})


def _described(
    path: Path | None, layout: str, complete: Mapping[int, Path], incomplete: Mapping[int, str]
) -> RunFindings:
    newest = complete[max(complete)]
    places = list(dict.fromkeys([newest, newest / _EXPORT, *_above(newest, path)]))
    config = _json(newest / _MODEL_CONFIG)
    return RunFindings(
        path,
        layout,
        complete,
        incomplete,
        base=next(_bases(places, set(complete.values())), None),
        data=next(_data(places), None),
        are_adapters=(newest / ADAPTER).is_file(),
        is_float32="float32" in (config.get("dtype"), config.get("torch_dtype")),
        rates=_rates(newest / TRAINER_STATE),
    )


def _above(newest: Path, path: Path | None) -> list[Path]:
    """The directories between a checkpoint and its run, and the run's."""
    if path is None:
        return [newest.parent]
    return [place for place in newest.parents if place == path or path in place.parents]


def _bases(places: Sequence[Path], checkpoints: set[Path]) -> Iterator[Told]:
    for name, key in ((ADAPTER, "base_model_name_or_path"), (_MODEL_CONFIG, "_name_or_path")):
        for place in places:
            file = place / name
            found = _as_source(_json(file).get(key), file)
            if found is not None and Path(found).absolute() not in checkpoints:
                yield Told(found, str(file))
    for place in places:
        job, card = _job(place / _JOB_CONFIG), _card(place / _CARD)
        named = ((_JOB_CONFIG, job.get("model")), (_CARD, card.get("base_model")))
        for name, value in named:
            file = place / name
            # Of a merge, a card names several.
            if isinstance(value, list) and len(value) == 1:
                [value] = value
            found = _as_source(value, file)
            if found is not None:
                yield Told(found, str(file))


def _data(places: Sequence[Path]) -> Iterator[Told]:
    for place in places:
        section = _job(place / _JOB_CONFIG).get("data")
        value = section.get("path") if isinstance(section, dict) else section
        found = _as_source(value, place / _JOB_CONFIG)
        if found is not None:
            yield Told(found, str(place / _JOB_CONFIG))
        sets = _card(place / _CARD).get("datasets")
        for name in sets if isinstance(sets, list) else [sets]:
            # Cards also name what is no data set: "generator", "json".
            if isinstance(name, str) and "/" in name:
                yield Told(name, str(place / _CARD))


def _as_source(value: Any, file: Path) -> str | None:
    """A directory or file as it is found from here, or the id of what is on the hub."""
    if not isinstance(value, str) or not value.strip():
        return None
    given = Path(value).expanduser()
    if given.is_absolute() or given.exists():
        return str(given.absolute())
    beside = file.parent / given
    if beside.exists():
        return str(beside.resolve())
    is_id = value.count("/") <= 1 and not value.startswith(".")
    return value if is_id else None


def _rates(file: Path) -> tuple[float, float] | None:
    """The highest and the last learning rate that a trainer has logged."""
    history = _json(file).get("log_history")
    found = [
        float(entry["learning_rate"])
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("learning_rate"), int | float)
    ]
    return (max(found), found[-1]) if found and max(found) > 0.0 else None


def _json(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where it is not there, or is none."""
    try:
        content = json_in(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _card(file: Path) -> dict[str, Any]:
    """What stands before the text of a model card; empty where there is none."""
    try:
        return front_matter(read_text(file))[0]
    except (OSError, ValueError):
        return {}


def _job(file: Path) -> dict[str, Any]:
    """The configuration of a training job of ours; empty where it is none."""
    try:
        content = load_yaml(read_text(file, LARGEST_YAML))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
