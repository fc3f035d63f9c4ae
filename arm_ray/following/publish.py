"""Published models: `step-000120/` and so on, whole or not there, and links to two of them.

::

    step-000120/            a model that loads as it is
    step-000120/arm_ray.json    what it was made of, and how it scores
    best -> step-000100     the one to use
    latest -> step-000120   the newest

Whoever follows a link holds a directory that may be removed later: resolve it first, or keep as
many models (`publish.keep`) as it takes to load one.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.weight_file import write_json
from arm_ray.errors import RunDirectoryError
from arm_ray.storage.atomic import copy_file, copy_tree, sync_directory
from arm_ray.storage.regular import json_in

EVIDENCE = "arm_ray.json"
BEST, LATEST = "best", "latest"
_STEP = re.compile(r"step-(\d+)")
# The best model of a step that was written again, while it is the best.
_KEPT = "-replaced"
_REPLACED, _REMOVED = ".replaced-", ".removed-"
# Of Linux's renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def publish(
    model: Path,
    directory: Path,
    step: int,
    evidence: Mapping[str, Any],
    keep: int,
    is_best: bool,
) -> Path:
    """Publish a finished model directory; the same call after a kill at any point completes it.

    The model's files are linked where that is possible, so that `model` may stay or go. What is
    published of this step with the same evidence is left as it is.

    Args:
        model: The directory.
        directory: Where models are published.
        step: Of the training.
        evidence: Content of `arm_ray.json`.
        keep: How many models stay, beside the best.
        is_best: Whether `best` is pointed to it.

    Returns:
        The published directory.

    Raises:
        RunDirectoryError: Something else has its place.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{step:06d}"
    if not _is_published(target, evidence):
        if target.exists() and not _is_of(target, evidence.get("run")):
            raise RunDirectoryError(
                "a model of another run, or something else, is where a model is to be published",
                where=target,
                expected="nothing, or a model of the same run",
                hint="choose another publish.dir; nothing there was touched",
            )
        partial = directory / f".{target.name}.partial"
        _remove_tree(partial)
        copy_tree(model, partial, _link_or_copy)
        # Beside what the model itself says: digests, by which it can be verified.
        own = partial / EVIDENCE
        said = json_in(own) if own.is_file() else {}
        write_json(own, {**said, **evidence})
        sync_directory(partial)
        if not is_best and _pointed(directory, BEST) == target:
            _keep_best(directory, target)
        _put(partial, target)
        sync_directory(directory)
    _point(directory, LATEST, target.name)
    if is_best:
        _point(directory, BEST, target.name)
    _prune(directory, keep, target.name, evidence.get("run"))
    return target


def published(directory: Path) -> dict[int, Path]:
    """Step -> directory of all published models, by step."""
    found = {}
    for path in directory.glob("step-*"):
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def best(directory: Path) -> Path | None:
    """The directory that `best` points to; None where there is none."""
    return _pointed(directory, BEST)


def evidence(path: Path) -> dict[str, Any]:
    """What a published model was made of."""
    content: dict[str, Any] = json_in(path / EVIDENCE)
    return content


def recover(directory: Path) -> None:
    """Clear up after a kill: put back what was being replaced, remove what was cut off."""
    if not directory.is_dir():
        return
    for path in directory.glob(f"{_REPLACED}*"):
        target = directory / path.name.removeprefix(_REPLACED)
        if target.exists():
            _remove_tree(path)
        else:
            # The new one was not in its place yet.
            path.rename(target)
    for pattern in (f"{_REMOVED}*", ".step-*.partial", f".step-*{_KEPT}"):
        for path in directory.glob(pattern):
            _remove_tree(path)
    for name in (BEST, LATEST):
        (directory / f".{name}.partial").unlink(missing_ok=True)


def _is_published(target: Path, given: Mapping[str, Any]) -> bool:
    """Whether a model is published with this evidence, which is written last."""
    try:
        found, wanted = evidence(target), json.loads(json.dumps(given))
        return bool({key: found.get(key) for key in wanted} == wanted)
    except (OSError, ValueError, AttributeError):
        return False


def _is_of(path: Path, run: object) -> bool:
    """Whether a directory is a model that was published of this run."""
    try:
        return bool(evidence(path).get("run") == run)
    except (OSError, ValueError, AttributeError):
        return False


def _keep_best(directory: Path, target: Path) -> None:
    """Keep the best model under another name, for one that is not the best takes its place."""
    kept = directory / f"{target.name}{_KEPT}"
    partial = directory / f".{kept.name}"
    _remove_tree(partial)
    copy_tree(target, partial, _link_or_copy)
    sync_directory(partial)
    _remove_tree(kept)
    partial.rename(kept)
    _point(directory, BEST, kept.name)


def _put(partial: Path, target: Path) -> None:
    """Rename a finished directory into its place."""
    if not target.exists():
        partial.rename(target)
        return
    # A restarted trainer came by this step again.
    if _exchange(partial, target):
        _remove_tree(partial)
        return
    old = _hidden_name(target.parent, _REPLACED, target.name)
    target.rename(old)
    partial.rename(target)
    _remove_tree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Have two directories take each other's name at once; False where that is not possible.

    With two renames, `best` would point to nothing between them.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    result: int = call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return result == 0


def _prune(directory: Path, keep: int, newest: str, run: object) -> None:
    """Remove the run's oldest models; the best, the newest and `keep` in all stay."""
    chosen = _pointed(directory, BEST)
    steps = [path for path in published(directory).values() if _is_of(path, run)]
    kept = {path.name for path in steps[-keep:]} | {newest}
    if chosen is not None:
        kept.add(chosen.name)
    for path in [*steps, *directory.glob(f"step-*{_KEPT}")]:
        if path.name not in kept:
            hidden = _hidden_name(directory, _REMOVED, path.name)
            path.rename(hidden)
            _remove_tree(hidden)


def _pointed(directory: Path, name: str) -> Path | None:
    try:
        target = directory / os.readlink(directory / name)
    except OSError:
        return None
    return target if target.is_dir() else None


def _point(directory: Path, name: str, target: str) -> None:
    """Have a link point to a model; there is always one of the two."""
    partial = directory / f".{name}.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target, target_is_directory=True)
    os.replace(partial, directory / name)


def _hidden_name(directory: Path, prefix: str, name: str) -> Path:
    hidden = directory / f"{prefix}{name}"
    _remove_tree(hidden)
    return hidden


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        # A link to a link would point to nowhere from here.
        os.link(os.path.realpath(source), target)
    except OSError:
        copy_file(source, target, keeps_times=True)
