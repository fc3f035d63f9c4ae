"""The output directory of a run: what is in it, and whether a merge may go on in it.

::

    config.yaml      the resolved configuration
    inputs.json      digests of the checkpoints and the calibration data
    precision.json   the number format of the forward pass
    events.jsonl     what happened
    states/NNNN/     the state after iteration NNNN, a model in float32
    model/           the final merged model
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from arm_ray.checkpoints import states
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.config import MergeConfig, config_difference, parse_merge_config, read_yaml
from arm_ray.errors import ArmRayError, DiskSpaceError, RunDirectoryError
from arm_ray.events import EventLog
from arm_ray.planning.state_life import StateLife, states_to_come
from arm_ray.runtime.output.claim import (
    CONFIG_NAME,
    claimed,
    holds_earlier,
    refuse_other,
    unusable,
    write_config,
)
from arm_ray.runtime.output.precision import recorded
from arm_ray.storage.atomic import write_text
from arm_ray.storage.regular import json_in
from arm_ray.storage.room import size_text

INPUTS_NAME = "inputs.json"
_ID_NAME = ".run_id"
_MAKE_ROOM = "free some, choose another output, or set keep_states: none"


@dataclass(frozen=True)
class SpaceNeeds:
    """What a run writes; bytes.

    Attributes:
        state_bytes: Size of a merged state.
        model_bytes: Size of the final model, or the most that an adapter takes.
        num_candidates: How many candidates there are.
        life: Which states are written.
    """

    state_bytes: int
    model_bytes: int
    num_candidates: int
    life: StateLife


class RunDirectory:
    """One run's output directory, open and locked.

    Attributes:
        path: The directory.
        config: The configuration.
        events: What happened.
        finished: Iteration -> manifest of each complete state.
        inputs: What the run reads -> digest.
        id: Tells the run from another one that was in the same directory before.
        url: Where the run is uploaded to; None where it lives in the output directory.
        published_iteration: The last one of a run that is complete at the URL and not here; else 0.
    """

    def __init__(self, path: Path, config: MergeConfig) -> None:
        self.path = path
        self.config = config
        self.events = EventLog(path / "events.jsonl")
        self.finished: dict[int, states.StateManifest] = {}
        self.inputs: dict[str, str] = {}
        self.id = ""
        self.url: str | None = None
        self.published_iteration = 0

    @property
    def model(self) -> Path:
        """Where the final model is published."""
        return self.path / "model"

    @property
    def partial_model(self) -> Path:
        """Where the final model is made, before it is renamed to `model`."""
        return self.path / "model.partial"

    @property
    def is_complete(self) -> bool:
        """Whether the final model is there."""
        return self.model.is_dir() or self.published_iteration > 0

    @property
    def model_name(self) -> str:
        """Where the final model is for others."""
        return str(self.model) if self.url is None else f"{self.url}/model"

    @property
    def last_iteration(self) -> int:
        """The last iteration whose state is complete; 0 where none is."""
        return max(self.finished, default=self.published_iteration)

    def record_inputs(self, digests: Mapping[str, str]) -> None:
        """Write down what the run reads, or check that it is still the same.

        Raises:
            RunDirectoryError: An input has changed since the run began.
        """
        changed = [
            name for name, digest in digests.items() if self.inputs.get(name, digest) != digest
        ]
        if changed:
            raise RunDirectoryError(
                f"the run cannot go on: {', '.join(changed)} changed since it began",
                where=self.path,
                hint="restore the data, or choose another output directory",
            )
        self.inputs.update(digests)
        write_json(self.path / INPUTS_NAME, self.inputs)

    def prune(self, needed: Collection[int], iteration: int) -> None:
        """Remove states that nothing needs, unless `keep_states` is `all`.

        Args:
            needed: Iterations whose states stay.
            iteration: The last one that is done; states of later ones are being made.
        """
        if self.config.keep_states == "all" or not (self.path / "states").is_dir():
            return
        for found in states.state_directories(self.path):
            if found not in needed and found <= iteration:
                states.discard_state(self.path, found)

    def check_disk_space(self, needs: SpaceNeeds) -> None:
        """Check that the states still to come and the final model fit on the disk.

        Raises:
            DiskSpaceError: Says how much is missing.
        """
        count = self._states_to_come(needs)
        needed = count * needs.state_bytes + needs.model_bytes
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise DiskSpaceError(
                "not enough room on the disk for the run",
                where=self.path,
                got=f"{size_text(free)} free",
                expected=_needed(count, needs, needed - free),
                hint=_MAKE_ROOM,
            )

    def disk_full(self, needs: SpaceNeeds, cause: OSError) -> DiskSpaceError:
        """The error for a disk that was filled up, by the run or by others, while it wrote."""
        count = self._states_to_come(needs)
        needed = count * needs.state_bytes + needs.model_bytes
        free = shutil.disk_usage(self.path).free
        unfinished = [
            directory
            for directory in states.state_directories(self.path).values()
            if states.read_manifest(directory) is None
        ]
        taken = sum(map(_bytes_on_disk, [*unfinished, self.partial_model]))
        return DiskSpaceError(
            f"the disk is full: {cause.strerror}",
            where=self.path,
            got=f"{size_text(free)} free, and {size_text(taken)} in unfinished files, "
            "which go first",
            expected=_needed(count, needs, max(0, needed - free - taken)),
            hint=f"{_MAKE_ROOM}; the same command goes on after iteration {self._last_on_disk}",
        )

    @property
    def _last_on_disk(self) -> int:
        """The last iteration whose state is on disk; 0 where none is."""
        return max(states.finished_states(self.path), default=self.published_iteration)

    def _states_to_come(self, needs: SpaceNeeds) -> int:
        return states_to_come(self.config, needs.num_candidates, needs.life, self._last_on_disk)


def _needed(count: int, needs: SpaceNeeds, missing: int) -> str:
    return (
        f"{size_text(count * needs.state_bytes + needs.model_bytes)}: {count} states of "
        f"{size_text(needs.state_bytes)} and the model of {size_text(needs.model_bytes)}; "
        f"{size_text(missing)} are missing"
    )


def _bytes_on_disk(directory: Path) -> int:
    """What the files below a directory take, which of a file with holes is less than its size."""
    total = 0
    for path in directory.rglob("*"):
        # Others may be removing files meanwhile.
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


@contextlib.contextmanager
def open_run(
    config: MergeConfig, path: Path | None = None, *, keeps_config: bool = False
) -> Iterator[RunDirectory]:
    """Create the run directory, or open it to go on, and hold its lock meanwhile.

    Args:
        config: The configuration.
        path: The directory; None: the output.
        keeps_config: Whether the configuration that is there stays as it is.

    Raises:
        RunDirectoryError: It holds something else, a run with another configuration, or a run
            that another process is working on.
    """
    path = path or Path(config.output).expanduser().resolve()
    known = _existing_config(path)
    finished = states.finished_states(path) if known is not None else {}
    published = (path / "model").is_dir()
    if known is not None and (finished or published):
        known, wanted = (_with_recorded_dtype(c, path) for c in (known, config))
        refuse_other(path, config_difference(known, wanted, published=published))
    with claimed(path, "merge"):
        run = RunDirectory(path, config)
        states.discard_unfinished_states(path)
        shutil.rmtree(run.partial_model, ignore_errors=True)
        run.finished = states.finished_states(path)
        if run.finished:
            with contextlib.suppress(OSError, ValueError):
                run.inputs = json_in(path / INPUTS_NAME)
        if not (path / _ID_NAME).is_file():
            write_text(path / _ID_NAME, uuid.uuid4().hex)
        run.id = (path / _ID_NAME).read_text(encoding="utf-8")
        if not keeps_config:
            write_config(path, config.to_yaml())
        yield run


def _with_recorded_dtype(config: MergeConfig, path: Path) -> MergeConfig:
    """The configuration with what `precision.compute_dtype: auto` came to in the run."""
    found = recorded(path)
    if found is None or config.precision.compute_dtype != "auto":
        return config
    return config.with_compute_dtype(found)


def _existing_config(path: Path) -> MergeConfig | None:
    if not holds_earlier(path, "merge", (_ID_NAME, f".{_ID_NAME}.partial")):
        return None
    try:
        return parse_merge_config(read_yaml(path / CONFIG_NAME), source=str(path / CONFIG_NAME))
    except ArmRayError as error:
        raise unusable(path, "merge", error.what.splitlines()[0]) from None
