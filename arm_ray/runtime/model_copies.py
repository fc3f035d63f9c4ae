"""Copies of models on the nodes of engines, where those do not see what the driver's node has.

Engines are given directories: vLLM reads files. On a node that has the same files under the same
paths (the same size, written at the same time) they are read in place. On another one each model is
copied to the node's disk once, whatever the number of engines there, and removed when the next one
comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arm_ray.checkpoints.formats import find_format, split_source
from arm_ray.config import RuntimeConfig, scratch_path
from arm_ray.errors import ArmRayError, DiskSpaceError, EvaluationError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.runtime.node_files import NodeFiles, read_chunks
from arm_ray.runtime.placement import this_node
from arm_ray.runtime.scratch import sighted
from arm_ray.storage.mirror import is_companion, origin, with_adapter
from arm_ray.storage.store import StoredFile
from arm_ray.storage.urls import is_url

_ROOT = "models"
# Whether a file of a directory is wanted. None: all of them, those of its directories too.
_Rule = Callable[[str, StoredFile], bool]
_Rules = list[_Rule] | None


@dataclass(frozen=True)
class Placed:
    """Where a model is on a node.

    Attributes:
        source: The model; some of its directories may be copies.
        tokenizer: Directory of the tokenizer; None where none was asked for.
        fetched_bytes: What was copied for it, in bytes.
    """

    source: ModelSource
    tokenizer: str | None
    fetched_bytes: int


class ModelCopies:
    """One node's copies. A plain class; Ray makes it an actor, without CPUs of its own.

    Args:
        home: `NodeFiles` of the driver's node.
        scratch: Directory for copies; None: as `runtime.scratch`.
        name: Of the evaluation, which no other one has.
    """

    def __init__(self, home: Any, scratch: str | None, name: str) -> None:
        self._home = home
        self._root = scratch_path(scratch) / _ROOT / name
        # What an evaluation that was killed has left.
        shutil.rmtree(self._root, ignore_errors=True)
        self._held: dict[Path, dict[str, StoredFile]] = {}

    def describe(self, model: str, tokenizer: str) -> Placed:
        """Have a model's configuration and a tokenizer here, to start an engine with.

        Raises:
            EvaluationError: They are gone.
            DiskSpaceError: There is no room.
        """
        source = ModelSource(model)
        directories = {Path(model), Path(tokenizer)}
        return self._place(source, tokenizer, {path: [is_companion] for path in directories})

    def place(self, source: ModelSource) -> Placed:
        """Have a model's weights here; copies of others are removed.

        Raises:
            EvaluationError: It is gone, or written anew meanwhile.
            DiskSpaceError: There is no room.
        """
        wanted = directories_of(source)
        for other in self._held.keys() - wanted.keys():
            shutil.rmtree(self._copy_of(other), ignore_errors=True)
            del self._held[other]
        return self._place(source, None, wanted)

    def _place(
        self,
        source: ModelSource,
        tokenizer: str | None,
        wanted: Mapping[Path, _Rules],
    ) -> Placed:
        places: dict[str, str] = {}
        fetched = 0
        for directory, rules in wanted.items():
            if origin(directory) is not None:
                # Each node makes its own from the URL.
                continue
            files = self._listing(directory, rules)
            if directory not in self._held and sighted(partial(_is_here, directory, files)):
                continue
            fetched += self._copy(directory, files)
            places[str(directory)] = str(self._copy_of(directory))

        def moved(given: str | None) -> str | None:
            if given is None or is_url(given):
                return given
            kind, place = split_source(given)
            place = str(Path(place))
            return f"{kind}:{places[place]}" if place in places else given

        return Placed(
            replace(
                source,
                path=places.get(source.path, source.path),
                weights=moved(source.weights),
                base=moved(source.base),
            ),
            None if tokenizer is None else places.get(tokenizer, tokenizer),
            fetched,
        )

    def _listing(self, directory: Path, rules: _Rules) -> dict[str, StoredFile]:
        files: dict[str, StoredFile] = ray.get(self._home.listing.remote(directory, rules is None))
        if rules is not None:
            files = {n: file for n, file in files.items() if any(rule(n, file) for rule in rules)}
        if not files:
            raise EvaluationError(
                "a model is gone",
                where=f"{directory}, on the driver's node",
                expected="its files, until it is scored",
            )
        return files

    def _copy_of(self, directory: Path) -> Path:
        # The last part stays: some formats tell a step by it.
        digest = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        return self._root / digest / directory.name

    def _copy(self, directory: Path, files: Mapping[str, StoredFile]) -> int:
        """Bring the files that are missing, or were written anew; returns bytes."""
        target, held = self._copy_of(directory), self._held.setdefault(directory, {})
        missing = {n: file for n, file in files.items() if held.get(n) != file}
        total = sum(file.num_bytes for file in missing.values())
        try:
            target.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(target).free
        except OSError as error:
            raise _unwritable(target, error) from None
        if total > free:
            raise DiskSpaceError(
                "not enough room on an engine's node for the copy of a model",
                where=f"{directory}, to {target}",
                got=f"{free} bytes free",
                expected=f"{total} bytes",
                hint="free some, set runtime.scratch (TMPDIR for arm-ray evaluate) to a larger "
                "disk, or put the models on storage that all nodes see",
            )
        for name, file in missing.items():
            try:
                self._fetch(directory / name, target / name, file.num_bytes)
            except OSError as error:
                raise _unwritable(target / name, error) from None
            held[name] = file
        return total

    def _fetch(self, source: Path, target: Path, num_bytes: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        length = 0
        with target.open("wb") as copy:
            for part in read_chunks(self._home, source, 0, num_bytes):
                copy.write(part.data)
                length += len(part)
        if length != num_bytes:
            raise EvaluationError(
                "a model was written anew while it was copied to an engine's node",
                where=source,
                got=f"{length} bytes",
                expected=f"{num_bytes} bytes",
                hint="run again once nothing writes it any more",
            )

    def remove(self) -> None:
        """Remove all copies."""
        self._held.clear()
        shutil.rmtree(self._root, ignore_errors=True)
        for directory in (self._root.parent, self._root.parent.parent):
            with contextlib.suppress(OSError):
                directory.rmdir()


def directories_of(source: ModelSource) -> dict[Path, _Rules]:
    """What an engine reads of which directories, to take a model in."""
    of_path: list[_Rule] = [is_companion]
    if source.weights is None:
        of_path.append(_is_weights)
    found: dict[Path, _Rules] = {}
    for given in (source.weights, source.base):
        if given is None or is_url(given):
            continue
        kind, place = split_source(given)
        if kind == "auto":
            kind = find_format(Path(place))[0]
        if kind == "peft":
            found[Path(place)] = [with_adapter]
            if source.base is None:
                of_path.append(_is_weights)
        else:
            # Shards and what tells of them are in files of many names.
            found[Path(place)] = [is_companion, _is_weights] if kind == "hf" else None
    found.setdefault(Path(source.path), of_path)
    return found


def _unwritable(target: Path, error: OSError) -> EvaluationError:
    return EvaluationError(
        "the copy of a model cannot be written on an engine's node",
        where=target,
        got=error,
        hint="set runtime.scratch (TMPDIR for arm-ray evaluate) to a directory that can be",
    )


def _is_weights(name: str, _file: StoredFile) -> bool:
    return name.endswith(".safetensors")


def _is_here(directory: Path, files: Mapping[str, StoredFile]) -> bool:
    """Whether this node has the same files under the same path."""
    for name, file in files.items():
        try:
            status = (directory / name).stat()
        except OSError:
            return False
        if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.time_ns):
            return False
    return True


class CopiesOnNodes:
    """The driver's side: starts what is needed on the nodes of engines, and ends it.

    Args:
        scratch: Directory for copies on each node; None: as `runtime.scratch`.
        directory: Where the evaluation's results go: it gives the copies their name.
        is_shared: Whether all nodes are said to see the driver's files; then there are no copies.
    """

    def __init__(self, scratch: str | None, directory: Path, *, is_shared: bool = False) -> None:
        self._scratch, self._is_shared = scratch, is_shared
        self._name = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:24]
        self._home: Any = None
        self._actors: dict[str, Any] = {}

    def on(self, node: str) -> Any:
        """Handle of a node's `ModelCopies`; None where it needs none."""
        if self._is_shared or node == this_node():
            return None
        if self._home is None:
            self._home = _start(NodeFiles, this_node(), 4, self._scratch, self._name)
        if node not in self._actors:
            arguments = (self._home, self._scratch, self._name)
            self._actors[node] = _start(ModelCopies, node, 1, *arguments)
        return self._actors[node]

    def close(self) -> None:
        """Remove all copies and end the actors."""
        for copies in self._actors.values():
            with contextlib.suppress(RayError, ArmRayError):
                ray.get(copies.remove.remote(), timeout=30)
        for actor in [*self._actors.values(), self._home]:
            if actor is not None:
                with contextlib.suppress(RayError):
                    ray.kill(actor)
        self._actors.clear()
        self._home = None


def copies_of(runtime: RuntimeConfig, directory: Path) -> CopiesOnNodes:
    """For the engines of a merge.

    Args:
        runtime: Its settings.
        directory: Where the evaluation's results go.
    """
    return CopiesOnNodes(runtime.scratch, directory, is_shared=runtime.storage == "shared")


def _start(kind: type, node: str, max_concurrency: int, *arguments: object) -> Any:
    actor: Any = ray.remote(kind)
    return actor.options(
        num_cpus=0,
        max_concurrency=max_concurrency,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(*arguments)
