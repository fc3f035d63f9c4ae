"""Copies of models on the nodes of engines, where those do not see what the driver's node has.

Engines are given directories: vLLM reads files. On a node that has the same files under the same
paths (the same size, written at the same time) they are read in place. On another one each model is
copied to the node's disk once, whatever the number of engines there, and removed when the next one
comes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, TypeVar

from arm_ray.checkpoints.naming import split_source
from arm_ray.config import RuntimeConfig, scratch_path
from arm_ray.errors import ArmRayError, EvaluationError, WorkerError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.runtime.cluster.actors import Handle, start_actor
from arm_ray.runtime.cluster.node_files import NodeFiles, read_chunks
from arm_ray.runtime.cluster.nodes import this_node
from arm_ray.runtime.session.lazy_ray import ray
from arm_ray.runtime.shards.files import becomes_visible
from arm_ray.storage.mirror import is_companion, origin, with_adapter
from arm_ray.storage.room import check_room
from arm_ray.storage.store import StoredFile
from arm_ray.storage.urls import is_url

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ROOT = "models"
_HINT = (
    "set runtime.scratch (`scratch` of arm-ray evaluate) to a larger disk, or put the models on "
    "storage that all nodes see"
)
_LOCK = ".lock"
_Rule = Callable[[str, StoredFile], bool]
# Which files of a directory are wanted: those that one of the rules takes, or a trainer's shards
# of a format, which are also in directories below.
_Rules = list[_Rule] | str
# The hub's cache names a revision by its digest: what is below does not change.
_SNAPSHOT = re.compile(r"/snapshots/[0-9a-f]{40}(/|$)")
_GONE_S = 30.0


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
    """

    def __init__(self, home: Handle[NodeFiles], scratch: str | None) -> None:
        self._home = home
        self._root = scratch_path(scratch) / _ROOT / uuid.uuid4().hex
        self._lock: IO[bytes] | None = None
        self._held: dict[Path, dict[str, StoredFile]] = {}
        # One at a time; `remove` interrupts.
        self._busy = threading.Lock()
        self._is_removed = False

    def describe(self, model: str, tokenizer: str) -> Placed:
        """Have a model's configuration and a tokenizer here, to start an engine with.

        Raises:
            EvaluationError: They are gone.
            DiskSpaceError: There is no room.
        """
        source = ModelSource(model)
        directories = {Path(model), Path(tokenizer)}
        with self._busy:
            return self._place(source, tokenizer, {path: [is_companion] for path in directories})

    def place(self, source: ModelSource) -> Placed:
        """Have a model's weights here; copies of others are removed.

        Raises:
            EvaluationError: It is gone, or written anew meanwhile.
            DiskSpaceError: There is no room.
        """
        wanted = directories_of(source)
        with self._busy:
            for other in self._held.keys() - wanted.keys():
                self._drop(other)
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
            if directory not in self._held and becomes_visible(partial(_is_here, directory, files)):
                continue
            try:
                fetched += self._copy(directory, files)
                self._check_unchanged(directory, rules, files)
            except BaseException:
                # An engine would take the rest for a model.
                self._drop(directory)
                raise
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
        if isinstance(rules, str):
            files = self._shards(directory, rules)
        else:
            listed = self._from_home(NodeFiles.listing, directory, False)
            files = {n: file for n, file in listed.items() if any(rule(n, file) for rule in rules)}
        if not files:
            raise EvaluationError(
                "a model is gone",
                where=f"{directory}, on the driver's node",
                expected="its files, until it is scored",
            )
        return files

    def _shards(self, directory: Path, kind: str) -> dict[str, StoredFile]:
        """A trainer's checkpoint without its other steps and what only its optimizer reads."""
        files: dict[str, StoredFile] = self._from_home(NodeFiles.listing, directory, True)
        if kind in ("zero", "universal") and "latest" in files:
            data = self._from_home(
                NodeFiles.read, directory / "latest", 0, files["latest"].num_bytes
            )
            step = bytes(data).decode("utf-8", "replace").strip() + "/"
            if any(name.startswith(step) for name in files):
                files = {n: f for n, f in files.items() if "/" not in n or n.startswith(step)}
        if kind in ("fsdp", "dcp", "megatron", "torchtitan"):
            files = {
                name: file
                for name, file in files.items()
                if not any(part.startswith("optim") for part in name.split("/"))
            }
        return files

    def _from_home(
        self,
        method: Callable[Concatenate[NodeFiles, Path, _P], _R],
        path: Path,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _R:
        try:
            return ray.get(self._home.call(method, path, *args, **kwargs))
        except ray.exceptions.RayError as error:
            raise _unreachable(path, error) from None

    def _check_unchanged(
        self, directory: Path, rules: _Rules, files: Mapping[str, StoredFile]
    ) -> None:
        now = self._listing(directory, rules)
        changed = [name for name, file in files.items() if now.get(name) != file]
        if changed:
            raise _changed(directory / changed[0])

    def _drop(self, directory: Path) -> None:
        shutil.rmtree(self._copy_of(directory), ignore_errors=True)
        self._held.pop(directory, None)

    def _copy_of(self, directory: Path) -> Path:
        # The last part stays: some formats tell a step by it.
        digest = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        return self._root / digest / directory.name

    def _copy(self, directory: Path, files: Mapping[str, StoredFile]) -> int:
        """Bring the files that are missing, or were written anew; returns bytes."""
        target = self._copy_of(directory)
        if self._lock is None:
            self._lock = _claim(self._root)
        held = self._held.setdefault(directory, {})
        if any(name in held and held[name] != file for name, file in files.items()):
            # Written anew: of the old one nothing stays, whatever its files are called.
            self._drop(directory)
            held = self._held.setdefault(directory, {})
        missing = {n: file for n, file in files.items() if n not in held}
        total = sum(file.num_bytes for file in missing.values())
        try:
            target.mkdir(parents=True, exist_ok=True)
            check_room(target, total, "the copy of a model on an engine's node", directory, _HINT)
        except OSError as error:
            raise _unwritable(target, error) from None
        for name, file in missing.items():
            self._fetch(directory / name, target / name, file.num_bytes)
            held[name] = file
        return total

    def _fetch(self, source: Path, target: Path, num_bytes: int) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as copy:
                length = 0
                for part in read_chunks(self._home, source, 0, num_bytes):
                    length += copy.write(part.data)
                    if self._is_removed:
                        raise WorkerError("the copy of a model was given up", where=source)
        # One that the driver's node has met as well, which Ray makes an OSError of this type too.
        except ray.exceptions.RayError as error:
            raise _unreachable(source, error) from None
        except OSError as error:
            raise _unwritable(target, error) from None
        if length != num_bytes:
            raise _changed(source)

    def remove(self) -> None:
        """Remove all copies; one that is being made is given up."""
        self._is_removed = True
        with self._busy:
            self._held.clear()
            shutil.rmtree(self._root, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()
            for directory in (self._root.parent, self._root.parent.parent):
                with contextlib.suppress(OSError):
                    directory.rmdir()


def _claim(root: Path) -> IO[bytes]:
    """Make a directory that is ours while the file is open, and remove those of the dead.

    Raises:
        EvaluationError: It cannot be made.
    """
    try:
        while True:
            root.mkdir(parents=True, exist_ok=True)
            lock = (root / _LOCK).open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), (root / _LOCK).stat()):
                    break
            # Another one took it for a dead one's, before it was locked.
            lock.close()
    except OSError as error:
        raise _unwritable(root, error) from None
    for other in root.parent.iterdir():
        if other != root:
            with contextlib.suppress(OSError), (other / _LOCK).open("rb+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
    return lock


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
        if kind == "peft":
            found[Path(place)] = [with_adapter]
            if source.base is None:
                of_path.append(_is_weights)
        else:
            found[Path(place)] = [is_companion, _is_weights] if kind == "hf" else kind
    found.setdefault(Path(source.path), of_path)
    return found


def _unwritable(target: Path, error: OSError) -> EvaluationError:
    return EvaluationError(
        "the copy of a model cannot be written on an engine's node",
        where=target,
        got=error,
        hint="set runtime.scratch (`scratch` of arm-ray evaluate) to a directory that can be",
    )


def _changed(file: Path) -> EvaluationError:
    return EvaluationError(
        "a model was written anew while it was copied to an engine's node",
        where=file,
        expected="files that stay as they are until the model is scored",
        hint="run again once nothing writes it any more",
    )


def _unreachable(path: Path, error: ray.exceptions.RayError) -> ArmRayError:
    where = f"{path}, on the driver's node"
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = getattr(error, "cause", None) or error
        return EvaluationError(
            "a model cannot be read, to copy it to an engine's node",
            where=where,
            got=f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}",
            expected="its files, until it is scored",
        )
    return WorkerError(
        "what serves the driver's files was lost",
        where=where,
        got=" ".join(str(error).split())[:300],
    )


def _is_weights(name: str, _file: StoredFile) -> bool:
    return name.endswith(".safetensors")


def _is_here(directory: Path, files: Mapping[str, StoredFile]) -> bool:
    """Whether this node has the same files under the same path."""
    is_immutable = _SNAPSHOT.search(str(directory)) is not None
    for name, file in files.items():
        try:
            status = (directory / name).stat()
        except OSError:
            return False
        if status.st_size != file.num_bytes:
            return False
        if status.st_mtime_ns != file.time_ns and not is_immutable:
            return False
    return True


class CopiesOnNodes:
    """The driver's side: starts what is needed on the nodes of engines, and ends it.

    Args:
        scratch: Directory for copies on each node; None: as `runtime.scratch`.
        is_shared: Whether all nodes are said to see the driver's files; then there are no copies.
    """

    def __init__(self, scratch: str | None, *, is_shared: bool = False) -> None:
        self._scratch, self._is_shared = scratch, is_shared
        self._home: Handle[NodeFiles] | None = None
        self._actors: dict[str, Handle[ModelCopies]] = {}

    def on(self, node: str) -> Handle[ModelCopies] | None:
        """Handle of a node's `ModelCopies`; None where it needs none."""
        if self._is_shared or node == this_node():
            return None
        if self._home is None:
            self._home = start_on(this_node(), NodeFiles, self._scratch, _ROOT)
        if node not in self._actors:
            self._actors[node] = start_on(node, ModelCopies, self._home, self._scratch)
        return self._actors[node]

    def close(self) -> None:
        """Remove all copies and end the actors."""
        with contextlib.suppress(ray.exceptions.RayError):
            refs = [copies.call(ModelCopies.remove) for copies in self._actors.values()]
            if refs:
                ray.wait(refs, num_returns=len(refs), timeout=_GONE_S)
        for actor in [*self._actors.values(), self._home]:
            if actor is not None:
                actor.end()
        self._actors.clear()
        self._home = None


def copies_of(runtime: RuntimeConfig) -> CopiesOnNodes:
    """For the engines of a merge with these settings."""
    return CopiesOnNodes(runtime.scratch, is_shared=runtime.storage == "shared")


def start_on(node: str, kind: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> Handle[_R]:
    """Start an actor on a node, without CPUs of its own, that comes again where it is killed.

    Args:
        node: Ray's id of the node.
        kind: Its class; what it does can be done twice.
        args: What the class is made with.
        kwargs: The same, by name.
    """
    options = {
        "num_cpus": 0,
        # More than there are engines on a node, and one that removes.
        "max_concurrency": 32,
        "max_restarts": 3,
        "max_task_retries": 3,
        "scheduling_strategy": ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node, soft=False
        ),
    }
    return start_actor(options, kind, *args, **kwargs)
