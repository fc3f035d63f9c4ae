"""Writers of a run's numbers for TensorBoard, MLflow and Weights & Biases.

TensorBoard's file is made anew from the run's events whenever a run goes on, so that it holds what
they say. The other two only take points in addition: `mlflow.json` and `wandb.json` in the run's
directory keep which of their runs is ours, and how far each curve has come.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from arm_ray.checkpoints.weight_file import write_json
from arm_ray.config import MlflowConfig, TrackingConfig, WandbConfig
from arm_ray.errors import ConfigError
from arm_ray.report.scalars import Marks, Point, Record, last_points, points
from arm_ray.storage.regular import json_in

TENSORBOARD_DIRECTORY = "tensorboard"
# The axis of all curves in Weights & Biases, whose own steps only count calls.
STEP_NAME = "step"
Ending = Literal["finished", "failed", "stopped"]


class Tracker(Protocol):
    """Takes the numbers of one run; called from one thread."""

    @property
    def name(self) -> str:
        """What people call it."""

    def open(self, history: Sequence[Record]) -> None:
        """Begin, given what happened in the run before."""

    def write(self, record: Record) -> None:
        """Take one more event."""

    def close(self, ending: Ending) -> None:
        """End, once all events are written."""


def check_installed(settings: TrackingConfig) -> None:
    """Look whether what is asked for is there, before anything starts.

    Raises:
        ConfigError: It is not installed, or nobody is logged in.
    """
    for key, module, wanted in (
        ("mlflow", "mlflow", settings.mlflow),
        ("wandb", "wandb", settings.wandb),
    ):
        if wanted is not None and not _is_installed(module):
            raise ConfigError(
                f"tracking.{key} is asked for, and {module} is not installed",
                where=f"tracking.{key}",
                expected=f"the extra `{key}`",
                hint=f"pip install 'arm-ray[{key}]', or remove tracking.{key}",
            )
    if settings.wandb is not None and settings.wandb.mode == "online":
        import wandb

        # Later it would ask from a thread, in the middle of the run.
        try:
            is_logged_in = wandb.login(verify=False)
        except wandb.Error as error:
            is_logged_in, found = False, str(error)
        else:
            found = "no key"
        if not is_logged_in:
            raise ConfigError(
                "tracking.wandb is online, and nobody is logged in",
                where="tracking.wandb.mode",
                got=found,
                hint="`wandb login`, or WANDB_API_KEY in the environment, or mode: offline",
            )


class TensorBoard:
    """Event files in a directory of ours, which say what the run's events say.

    Args:
        directory: Where they go; event files of an earlier session are replaced.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[tuple[str, int], tuple[float, Point]] = {}
        self._writer: Any = None

    def open(self, history: Sequence[Record]) -> None:
        """Write what happened before into a new file, and remove the old ones."""
        self._known = {(p.tag, p.step): (at, p) for at, p in last_points(history)}
        self._write_anew()

    def write(self, record: Record) -> None:
        """Write the event's numbers; where some are other than before, the whole file again."""
        at, is_changed, new = float(record.get("time", time.time())), False, []
        for point in points(record):
            key = (point.tag, point.step)
            if not point.metric.tag:
                continue
            if key not in self._known:
                new.append(point)
            elif self._known[key][1] != point:
                is_changed = True
            else:
                continue
            self._known[key] = (at, point)
        if is_changed:
            self._write_anew()
        elif new:
            self._add((at, point) for point in new)

    def close(self, ending: Ending) -> None:  # noqa: ARG002
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write_anew(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        old = list(self._directory.glob("events.out.tfevents.*"))
        # A TensorBoard that is running forgets what it has read from step 0 on: all of it.
        self._writer = SummaryWriter(
            str(self._directory), purge_step=0, filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )
        self._add(self._known.values())
        for file in old:
            file.unlink(missing_ok=True)

    def _add(self, given: Iterable[tuple[float, Point]]) -> None:
        for at, point in given:
            self._writer.add_scalar(point.tag, point.value, point.step, walltime=at or None)
        self._writer.flush()


class _Remembered:
    """What a file keeps of one tracker: its run, and how far each curve has come.

    Args:
        path: The file.
        identity: Of what is computed; another one begins another run.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        content: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            content = dict(json_in(path))
        is_ours = content.get("identity") == identity
        self.run: str | None = content.get("run") if is_ours else None
        self.marks = Marks(content.get("steps") if is_ours else None)
        # What an earlier configuration did in this directory is none of the new run's.
        self.is_other = bool(content) and not is_ours

    def save(self) -> None:
        """Write it down."""
        entry = {"run": self.run, "identity": self._identity, "steps": self.marks.steps}
        write_json(self._path, entry)


@dataclass(frozen=True)
class TrackedRun:
    """A run that trackers follow.

    Attributes:
        directory: The run's directory, where they keep what they need.
        name: Name of the run.
        identity: Of what is computed; another one than before begins other curves.
        parameters: The configuration, flat.
    """

    directory: Path
    name: str
    identity: str
    parameters: Mapping[str, Any]


class Mlflow:
    """A run on an MLflow server, or in its local store.

    Args:
        settings: Experiment and server.
        run: What is tracked.
    """

    name = "MLflow"

    def __init__(self, settings: MlflowConfig, run: TrackedRun) -> None:
        self._settings = settings
        self._directory, self._run_name = run.directory, run.name
        self._identity, self._parameters = run.identity, run.parameters
        self._client: Any = None
        self._kept: _Remembered

    def open(self, history: Sequence[Record]) -> None:
        """Go on with our run, or begin one, and send what it lacks."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._kept = _Remembered(self._directory / "mlflow.json", self._identity)
        self._client = MlflowClient(tracking_uri=self._settings.tracking_uri)
        if self._kept.run is None:
            experiment = self._client.get_experiment_by_name(self._settings.experiment)
            number = (
                self._client.create_experiment(self._settings.experiment)
                if experiment is None
                else experiment.experiment_id
            )
            made = self._client.create_run(number, run_name=self._run_name)
            self._kept.run = made.info.run_id
            self._kept.save()
            parameters = [Param(key, str(value)) for key, value in self._parameters.items()]
            # Of a size that the server takes at once.
            for start in range(0, len(parameters), 100):
                self._client.log_batch(self._kept.run, params=parameters[start : start + 100])
        else:
            self._client.update_run(self._kept.run, status="RUNNING")
        self._send([] if self._kept.is_other else last_points(history))

    def write(self, record: Record) -> None:
        """Send an event's numbers, with the event's own time."""
        at = float(record.get("time", time.time()))
        self._send([(at, point) for point in points(record)])

    def close(self, ending: Ending) -> None:
        """Say how it ended."""
        status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[ending]
        self._client.set_terminated(self._kept.run, status=status)

    def _send(self, given: Sequence[tuple[float, Point]]) -> None:
        from mlflow.entities import Metric

        fresh = set(self._kept.marks.new([point for _, point in given]))
        found = [
            Metric(point.tag, point.value, int(1000 * (at or time.time())), point.step)
            for at, point in given
            if point in fresh
        ]
        for start in range(0, len(found), 500):
            self._client.log_batch(self._kept.run, metrics=found[start : start + 500])
        if found:
            self._kept.save()


class Wandb:
    """A run of Weights & Biases, on its servers or offline in the run's directory.

    Args:
        settings: Project, and whether to send.
        run: What is tracked.
    """

    name = "Weights & Biases"

    def __init__(self, settings: WandbConfig, run: TrackedRun) -> None:
        self._settings = settings
        self._directory, self._run_name = run.directory, run.name
        self._identity, self._parameters = run.identity, run.parameters
        self._run: Any = None
        self._kept: _Remembered

    def open(self, history: Sequence[Record]) -> None:
        """Go on with our run, or begin one, and send what it lacks."""
        import wandb

        self._kept = _Remembered(self._directory / "wandb.json", self._identity)
        if self._kept.run is None:
            self._kept.run = uuid.uuid4().hex[:8]
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self._run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            name=self._run_name,
            id=self._kept.run,
            resume="allow",
            mode=self._settings.mode,
            dir=str(self._directory),
            config=dict(self._parameters),
            allow_val_change=True,
            settings=settings,
            # Other runs of this process, of the trainer or of another merge, are none of ours.
            reinit="create_new",
        )
        self._run.define_metric(STEP_NAME)
        self._run.define_metric("*", step_metric=STEP_NAME)
        self._send([] if self._kept.is_other else [point for _, point in last_points(history)])
        self._kept.save()

    def write(self, record: Record) -> None:
        """Send an event's numbers."""
        self._send(points(record))

    def close(self, ending: Ending) -> None:
        """Say how it ended, and send what is left."""
        self._run.finish(exit_code=0 if ending == "finished" else 1)

    def _send(self, given: Sequence[Point]) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for point in self._kept.marks.new(given):
            by_step.setdefault(point.step, {})[point.tag] = point.value
        for step, values in sorted(by_step.items()):
            self._run.log({STEP_NAME: step, **values})
        if by_step:
            self._kept.save()


def _is_installed(module: str) -> bool:
    # A directory `wandb/` of an offline run is a package as well, to Python.
    found = find_spec(module)
    return found is not None and found.origin is not None


def make_trackers(settings: TrackingConfig, run: TrackedRun) -> list[Tracker]:
    """TensorBoard, and what else is asked for; nothing is opened yet."""
    made: list[Tracker] = [TensorBoard(run.directory / TENSORBOARD_DIRECTORY)]
    if settings.mlflow is not None:
        made.append(Mlflow(settings.mlflow, run))
    if settings.wandb is not None:
        made.append(Wandb(settings.wandb, run))
    return made
