"""Whether what a run left is whole, making it whole again, and making it a second time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import INDEX_NAME
from arm_ray.checkpoints.inspect import inspect_checkpoint
from arm_ray.checkpoints.naming import split_source
from arm_ray.checkpoints.provenance import (
    PROVENANCE_NAME,
    Damage,
    FileDigests,
    damage_of,
    digests_of,
    files_of,
    read_provenance,
)
from arm_ray.config import MergeConfig, load_merge_config, parse_merge_config, read_yaml
from arm_ray.errors import (
    ArmRayError,
    ConfigError,
    CorruptCheckpointError,
    RunDirectoryError,
)
from arm_ray.evaluation.settings import GradingSettings
from arm_ray.events import read_events
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.output.claim import CONFIG_NAME, claimed
from arm_ray.runtime.output.provenance import environment
from arm_ray.schedule import BASE, INITIAL, candidate_name
from arm_ray.storage.urls import is_url


@dataclass(frozen=True)
class Verified:
    """What came of looking at a model or a run.

    Attributes:
        path: Of the model or the run.
        looked_at: What was compared, in words.
        damage: What is not as it was written; of a run's state, under `states/NNNN`.
        to_do: How to make it whole again; None where nothing is damaged.
    """

    path: Path
    looked_at: tuple[str, ...]
    damage: tuple[Damage, ...]
    to_do: str | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing but texts was changed."""
        return all(each.is_text for each in self.damage)


def is_run(path: Path) -> bool:
    """Whether a directory is that of a merge, and not of a model."""
    if not (path / CONFIG_NAME).is_file() or (path / "config.json").is_file():
        return False
    # A study, an evaluation and attach have another configuration there.
    return "candidates" in read_yaml(path / CONFIG_NAME)


def verify(path: Path) -> Verified:
    """Read every byte of a model, or of what a run left, and compare it with what was written.

    Args:
        path: A model directory that has `arm_ray.json`, or a run directory.

    Raises:
        RunDirectoryError: It is neither.
        CorruptCheckpointError: A model says nothing about itself.
    """
    if not is_run(path):
        if not path.is_dir():
            raise RunDirectoryError(
                "there is no such directory", where=path, expected="a model, or a run of a merge"
            )
        files = files_of(read_provenance(path))
        damage = tuple(damage_of(path, files))
        to_do = (
            "copy the model again from where it came, or make it again: arm-ray reproduce "
            f"{path} --output DIR, with the checkpoints that it names"
        )
        return Verified(path, _sizes(files), damage, _if_damaged(damage, to_do))
    looked_at, found = [], list[Damage]()
    config = load_merge_config(path / CONFIG_NAME)
    model = path / "model"
    if model.is_dir():
        try:
            expected = files_of(read_provenance(model))
        except ArmRayError as error:
            if (model / PROVENANCE_NAME).exists():
                found.append(Damage(f"model/{PROVENANCE_NAME}", f"cannot be read: {error.got}"))
            looked_at.append(f"model: without digests ({error.what}); its tables alone")
            found += _of_tables(model, "model")
        else:
            looked_at += [f"model: {line}" for line in _sizes(expected)]
            found += [
                Damage(f"model/{d.what}", d.how, d.is_text) for d in damage_of(model, expected)
            ]
    elif _wrote_model(path):
        found.append(Damage("model", "is missing"))
    done = states.finished_states(path)
    kept = range(1, max(done, default=0) + 1) if config.keep_states == "all" else done
    for iteration in kept:
        directory = states.state_directory(path, iteration)
        name = directory.relative_to(path).as_posix()
        if iteration not in done:
            found.append(Damage(name, "is missing, or not complete"))
        elif (directory / INDEX_NAME).is_file():
            looked_at.append(f"{name}: its tables")
            # One that a running merge has just removed is no damage.
            found += [
                d for d in _of_tables(directory, name) if states.is_published(path, iteration)
            ]
    damage = tuple(found)
    return Verified(
        path, tuple(looked_at), damage, _if_damaged(damage, f"arm-ray verify --repair {path}")
    )


def _wrote_model(path: Path) -> bool:
    """Whether the run's events say that there was a model."""
    events = path / "events.jsonl"
    found = read_events(events) if events.is_file() else []
    return any(event["event"] == "model_written" for event in found)


def _if_damaged(damage: Sequence[Damage], to_do: str) -> str | None:
    return None if all(each.is_text for each in damage) else to_do


def _sizes(files: Mapping[str, FileDigests]) -> tuple[str, ...]:
    total = sum(file.num_bytes for file in files.values())
    tensors = sum(len(file.tensors) for file in files.values())
    return (f"{len(files)} files, {tensors} tensors, {total / 1e9:.3f} GB, every byte",)


def _of_tables(directory: Path, name: str) -> Iterator[Damage]:
    try:
        found = inspect_checkpoint(directory)
    except ArmRayError as error:
        yield Damage(name, f"cannot be read: {error.what}")
        return
    if not found.complete:
        yield Damage(name, found.reason)


def repair(
    path: Path, *, address: str | None = None, console: Console | None = None
) -> tuple[Verified, bool | None]:
    """Make what is damaged of a run again, from what is whole.

    A damaged model is kept beside the new one, as `model.damaged`.

    Args:
        path: The run directory.
        address: Of a Ray cluster, as for a merge.
        console: As for a merge.

    Returns:
        What is found afterwards; and whether the model is bit for bit what it was, None where
        nothing told what it was, or nothing had to be made.

    Raises:
        RunDirectoryError: It is no run directory, or another process works in it.
        ArmRayError: As a merge.
    """
    if not is_run(path):
        raise RunDirectoryError(
            "only a run can be repaired",
            where=path,
            expected="a run directory, which says what the model was made of",
            hint=f"make the model again: arm-ray reproduce {path} --output DIR",
        )
    config = load_merge_config(path / CONFIG_NAME)
    if is_url(config.output):
        raise RunDirectoryError(
            "a run at a URL is not repaired here",
            where=path,
            got=config.output,
            expected="a run in a directory",
            hint="remove its model from the URL, and run the same merge again",
        )
    # The run may have been moved, and is not pushed a second time. What it says of itself stays.
    config = config.model_copy(update={"output": str(path), "push_to_hub": None})
    # What cannot be made again is not touched.
    open_inputs(config)
    with claimed(path, "merge"):
        before = verify(path)
        if before.is_whole and (path / "model").is_dir():
            return before, None
        was, aside = _set_aside(path, before.damage)
    try:
        merge(config, address=address, console=console, keeps_config=True)
    except BaseException:
        # As it was, as far as the disk lets it be; what went wrong first is what is told.
        with contextlib.suppress(OSError):
            if aside is not None and not (path / "model").exists():
                aside.rename(path / "model")
        raise
    after = verify(path)
    return after, (same_tensors(was, digests_of(path / "model")) if was else None)


def _set_aside(path: Path, damage: Sequence[Damage]) -> tuple[dict[str, FileDigests], Path | None]:
    """Make room for what is made again; what the model was, and where it is now."""
    broken = [
        int(each.what.removeprefix("states/")) for each in damage if each.what.startswith("states/")
    ]
    for iteration in states.state_directories(path):
        # What comes after is made from it, and a merge goes on after the last that is there.
        if broken and iteration >= min(broken):
            states.discard_state(path, iteration)
    model, was = path / "model", dict[str, FileDigests]()
    if not model.is_dir():
        return was, None
    if (model / PROVENANCE_NAME).is_file():
        with contextlib.suppress(ArmRayError):
            was = files_of(read_provenance(model))
    aside = _free_name(path / "model.damaged")
    model.rename(aside)
    return was, aside


def _free_name(path: Path) -> Path:
    """It, or the first of `NAME-2`, … that is not there."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def tensors_in(files: Mapping[str, FileDigests]) -> dict[str, str]:
    """Name of every tensor -> digest of its data."""
    return {name: digest for file in files.values() for name, digest in file.tensors.items()}


def same_tensors(left: Mapping[str, FileDigests], right: Mapping[str, FileDigests]) -> bool:
    """Whether two models have the same tensors, bit for bit, however spread over files."""
    return tensors_in(left) == tensors_in(right)


@dataclass(frozen=True)
class Reproduced:
    """What came of making a model a second time.

    Attributes:
        model: The new one.
        differing: Names of the tensors whose bits differ, or that one of the two lacks.
        num_tensors: Of the model.
        changed: What of the software and the machine is not as it was: a sentence each.
    """

    model: Path
    differing: tuple[str, ...]
    num_tensors: int
    changed: tuple[str, ...]


def reproduce(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    console: Console | None = None,
) -> Reproduced:
    """Make a model again as `arm_ray.json` beside it says, and compare the two bit for bit.

    Args:
        path: The model.
        output: The run directory of the new one.
        overrides: `key=value` of the configuration, for checkpoints that lie elsewhere now.
        address: Of a Ray cluster, as for a merge.
        console: As for a merge.

    Raises:
        CorruptCheckpointError: The model says nothing about itself.
        ArmRayError: As a merge.
    """
    content = read_provenance(path)
    merged = merge(
        config_of(content, output, overrides, path / PROVENANCE_NAME),
        address=address,
        console=console,
    )
    if merged.model is None:
        raise RunDirectoryError("the merge was halted before its end", where=merged.run)
    was, found = tensors_in(files_of(content)), tensors_in(digests_of(merged.model))
    names = sorted(was.keys() | found.keys())
    differing = tuple(name for name in names if was.get(name) != found.get(name))
    changed = tuple(
        f"{key}: {then} then, {now} now"
        for key, then, now in _pairs(content["environment"], environment(None))
        if then != now and now is not None
    )
    return Reproduced(merged.model, differing, len(names), changed)


def config_of(
    content: Mapping[str, Any], output: Path, overrides: Sequence[str], where: Path
) -> MergeConfig:
    """The configuration that a model was made with, for another output.

    Nothing is scored that does not choose the model, and nobody is told. Code that the model's
    maker names is not run: whoever makes it again names it.

    Raises:
        CorruptCheckpointError: It does not say how the model was made.
        ConfigError: It is no configuration, or one with code.
    """
    try:
        given = {**content["config"], "output": str(output), "push_to_hub": None, "tracking": {}}
        there = {name: str(found["path"]) for name, found in content["inputs"].items()}
        given["base"] = _place(str(given["base"]), there.get(BASE))
        given["candidates"] = [
            _place(str(each), there.get(candidate_name(i)))
            for i, each in enumerate(list(given["candidates"]))
        ]
        if given.get("initial_state"):
            given["initial_state"] = _place(str(given["initial_state"]), there.get(INITIAL))
        dict(content["environment"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            "what is written beside the model does not say how it was made",
            where=where,
            expected="config, inputs and environment, as arm_ray writes them",
            hint="copy the model again from where it came",
        ) from error
    taken = {key: _take(given, key) for key in _CODE}
    config = parse_merge_config(given, overrides, source=str(where))
    if config.evaluation is not None and not config.selects_by_task:
        config = config.model_copy(update={"evaluation": None})
    evaluation = config.evaluation
    asked = [text.partition("=")[0] for text in overrides]
    for key, found in taken.items():
        is_used = evaluation is not None or not key.startswith("evaluation.")
        is_asked = any(f"{key}.".startswith(f"{a}.") or a.startswith(f"{key}.") for a in asked)
        if is_used and not is_asked and found not in _CODE[key]:
            raise _code(where, key, found)
    for task in () if evaluation is None else evaluation.task_settings:
        if task.scorer is not None and not {"evaluation", "evaluation.tasks"} & {*asked}:
            raise _code(where, "evaluation.tasks", f"scorer: {task.scorer}")
    return config


# Keys that name code, or say how it is run, and what they are where they do neither.
_CODE: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (None, [], ()),
    "evaluation.engine.options": (None, {}),
    "evaluation.grading.sandbox": (None, GradingSettings.sandbox),
    "evaluation.grading.interpreter": (None, GradingSettings.interpreter),
}


def _take(content: dict[str, Any], key: str) -> Any:
    """Take a key out of the content of a configuration; None: it is not there."""
    name, _, rest = key.partition(".")
    if not rest:
        return content.pop(name, None)
    if not isinstance(content.get(name), Mapping):
        return None
    content[name] = dict(content[name])
    return _take(content[name], rest)


def _code(where: Path, key: str, got: object) -> ConfigError:
    return ConfigError(
        "the model was made with code or options that are not used because a file says so",
        where=f"{where}, {key}",
        got=got,
        expected="nothing of the kind, or your own word for it",
        hint=f"where you trust it, say so: {key}=VALUE",
    )


def _place(given: str, path: str | None) -> str:
    """A checkpoint as it was named then, or where it lay, where a relative name leads nowhere."""
    kind, place = split_source(given)
    is_there = is_url(place) or Path(place).expanduser().exists()
    if is_there or path is None or not Path(path).is_dir():
        return given
    return path if kind == "auto" else f"{kind}:{path}"


def _pairs(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key, value in then.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, now.get(key) or {}, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value, now.get(key)
