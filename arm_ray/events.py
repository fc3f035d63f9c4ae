"""What happened in a run, as typed records: one JSON object a line in `events.jsonl`.

The driver writes them; reports and status read them. Times are seconds, sizes are bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from arm_ray.secrets import all_hidden, hidden
from arm_ray.storage.regular import log_objects


@dataclass(frozen=True)
class Event:
    """Base of all events; `name` is what stands in the file."""

    name: ClassVar[str] = "event"


@dataclass(frozen=True)
class RunStarted(Event):
    """The inputs are valid and the actors are placed."""

    name: ClassVar[str] = "run_started"
    version: str
    first_iteration: int
    max_iterations: int
    operator: str
    num_tensors: int
    num_rotated: int
    num_groups: int
    num_shards: int
    device: str
    compute_dtype: str
    calibration_rows: int
    calibration_digest: str


@dataclass(frozen=True)
class Warned(Event):
    """Something a user should know; the run goes on."""

    name: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True)
class ModuleChange:
    """What an iteration did to the weights of one module.

    `layer` is the decoder layer, 0-based, null outside of them. `module` is its name within the
    layer; the experts of a layer are one module. `update` is |W_t - W_(t-1)| / |W_(t-1)|, and
    `distance` |W_t - W_base| / |W_t|, of Frobenius norms. `angle` is the strength of the rotations,
    arccos(tr(U) / d_out) in degrees: about the angle between a task vector and the rotated one.
    `spectrum` are singular values of the activation shift, from the largest to the smallest, at up
    to 16 evenly spaced ranks. `rank` is the shift's numerical rank. `angle`, `spectrum`
    and `rank` are means over contributors, and over experts and blocks of rows; `angle` is null and
    `spectrum` empty where nothing was rotated.
    """

    layer: int | None
    module: str
    update: float
    distance: float
    angle: float | None = None
    rank: float | None = None
    spectrum: tuple[float, ...] = ()


# What an actor did, when it began (seconds since 1970, by the clock of its node), for how long.
Span = tuple[str, float, float]


@dataclass(frozen=True)
class RunPlanned(Event):
    """What the iterations to come are planned to take, by the rates of `device` (`arm-ray plan`).

    `seconds` are those of all iterations, `iteration_seconds` of each; `peak_shard_bytes` is the
    largest host memory of each shard, `sent_bytes` the hidden states between shards and
    `written_bytes` the states and the model that are written.
    """

    name: ClassVar[str] = "run_planned"
    device: str
    seconds: float
    iteration_seconds: tuple[float, ...]
    peak_shard_bytes: tuple[int, ...]
    sent_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class IterationFinished(Event):
    """A state is complete: in memory, or on its way to the disk too (`bytes_written`).

    `weight_cosine` is cos(W_t, W_(t-1)); `task_vector_cosine` is
    cos(W_t - W_base, W_(t-1) - W_base), null where one of them is zero. `busy_seconds` are each
    shard's, in forward passes and merging, since the iteration before was done. `sent_bytes` are
    the iteration's hidden states that went from shard to shard, `network_bytes` those of them that
    went to another node, and `fetched_bytes` weights that came from elsewhere than the shard's own
    node. `modules` says what became of each weight matrix, and `spans` when each shard worked since
    the iteration before was done: `forward` or `merge`, short pauses left out.
    """

    name: ClassVar[str] = "iteration_finished"
    iteration: int
    regime: str
    reference: str
    contributors: tuple[str, ...]
    weight_cosine: float | None
    task_vector_cosine: float | None
    rotated: int
    rank_deficient: tuple[str, ...]
    seconds: float
    forward_seconds: float
    merge_seconds: float
    bytes_written: int
    busy_seconds: tuple[float, ...] = ()
    sent_bytes: int = 0
    network_bytes: int = 0
    fetched_bytes: int = 0
    modules: tuple[ModuleChange, ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()


@dataclass(frozen=True)
class StepTried:
    """A state that was run to choose a step: its loss, with the interval over samples.

    `state` names one that is there; null: the result of a step with `coefficients`, for each block
    of layers what each contributor's task vector is multiplied by (`λ f_i / m`).
    """

    state: str | None
    coefficients: tuple[tuple[float, ...], ...]
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class StepChosen(Event):
    """How far an iteration goes (`schedule.step`).

    `coefficients` are empty where no step is better than none. `tried` are on the samples that
    chose, `checked` on others, from the boldest step to none at all, and the state before.
    `gain` is by how much the loss on those is smaller than that of the state before, with its
    paired interval.
    """

    name: ClassVar[str] = "step_chosen"
    iteration: int
    search: str
    coefficients: tuple[tuple[float, ...], ...]
    tried: tuple[StepTried, ...]
    checked: tuple[StepTried, ...]
    gain: float
    gain_low: float
    gain_high: float
    samples: int
    check_samples: int
    seconds: float


@dataclass(frozen=True)
class StateLoss:
    """The loss of a state or checkpoint, with the interval over samples."""

    state: str
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class ModelSelected(Event):
    """Which model is published (`select.promise`), and why.

    `compared` are losses on the samples that the choice was made on, `final` on others, which have
    chosen nothing.
    """

    name: ClassVar[str] = "model_selected"
    model: str
    verdict: str
    compared: tuple[StateLoss, ...]
    final: tuple[StateLoss, ...]
    samples: int
    final_samples: int


@dataclass(frozen=True)
class ModelScored(Event):
    """A checkpoint or a merged state has been scored.

    `scores` is task -> metric -> mean, null where it is not finite. `reload_seconds` is null and
    `canary` empty where all of it was known from before. `canary` are the token ids that the
    weights make of a fixed prompt. `samples` are completions, or held-out samples, that were scored
    in these seconds, and `tokens` those drawn, or of held-out samples those that count.
    `fetched_bytes` were copied to an engine's node, which did not have the model.
    """

    name: ClassVar[str] = "model_scored"
    model: str
    path: str
    scores: Mapping[str, Mapping[str, float | None]]
    seconds: float
    reload_seconds: float | None
    canary: tuple[int, ...]
    samples: int = 0
    tokens: int = 0
    fetched_bytes: int = 0


@dataclass(frozen=True)
class StateWritten(Event):
    """A merged state is on disk; `seconds` are those that the slowest shard took to write it."""

    name: ClassVar[str] = "state_written"
    iteration: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class ModelWritten(Event):
    """`model/` is published."""

    name: ClassVar[str] = "model_written"
    state: str
    path: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class RunFinished(Event):
    """The run ended by itself.

    `reason` is `converged`, `max_iterations`, `no_gain`, `patience` or `stop_after`.
    """

    name: ClassVar[str] = "run_finished"
    reason: str
    iterations: int
    seconds: float
    peak_shard_bytes: tuple[int, ...]


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended with an error; what is complete on disk stays, and it can be resumed."""

    name: ClassVar[str] = "run_failed"
    error: str
    message: str


# Of the process: told of what every log takes.
_listeners: list[Callable[[Path, Mapping[str, Any]], None]] = []


@contextlib.contextmanager
def listened(listener: Callable[[Path, Mapping[str, Any]], None]) -> Iterator[None]:
    """Have the records of all event logs of this process passed on within the context.

    Args:
        listener: Called with the log's file and a record that has been written there, in the thread
            that writes it; of one log, in the order of the file.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class EventLog:
    """Appends events to a file, one line each, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of the kind that lets an observer write as well.
        self._lock = threading.RLock()
        self._observers: list[Callable[[Mapping[str, Any]], None]] = []

    def subscribe(self, observer: Callable[[Mapping[str, Any]], None]) -> None:
        """Have each event's record passed on once it is written.

        Events come one after another, in the order of the file, in the threads that write them; an
        observer must neither raise nor take long.
        """
        with self._lock:
            self._observers.append(observer)

    def unsubscribe(self, observer: Callable[[Mapping[str, Any]], None]) -> None:
        """Pass nothing on to it any more."""
        with self._lock:
            self._observers.remove(observer)

    def write(self, event: Event) -> None:
        """Append one event with the time (seconds since 1970)."""
        record = {"time": round(time.time(), 3), "event": event.name, **dataclasses.asdict(event)}
        line = json.dumps(record)
        # Messages of libraries may repeat what they were given.
        shown = hidden(line)
        if shown != line:
            record = all_hidden(json.loads(line))
            line = json.dumps(record)
        with self._lock:
            with self.path.open("a+b") as file:
                # A crash may have left half a line: do not glue this one to it.
                size = file.seek(0, 2)
                file.seek(max(0, size - 1))
                start = b"\n" if size and file.read(1) != b"\n" else b""
                file.write(start + line.encode() + b"\n")
            for observer in tuple(self._observers):
                observer(record)
            for listener in tuple(_listeners):
                listener(self.path, record)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read all events of a run; lines that are none, as a crash leaves them, are left out.

    Raises:
        OSError: The file cannot be read, is no regular file, or is too large for a text.
    """
    return [record for record in log_objects(path) if isinstance(record.get("event"), str)]
