"""What a program calls: the jobs of the command line as functions. The package has them lazily.

    import arm_ray

    result = arm_ray.merge("merge.yaml", schedule__max_iterations=4)
    print(result.path, result.best)

**Configurations** are a YAML file, a mapping of the same content, or what `load_config` returns.
**Overrides** are keywords, with two underscores where a configuration has a section:
`schedule__max_iterations=4`; or a mapping of dotted keys: `overrides={"method.coefficient": 0.5}`,
which also takes names of keys that are no Python names. Keywords come last. Values are Python
values. Errors are `arm_ray.errors.ArmRayError`.

Calls start Ray where the command line would, and end what they have started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

from arm_ray.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from arm_ray.config import EvaluateConfig, MergeConfig
    from arm_ray.following.config import AttachConfig
    from arm_ray.planning.plan import Plan
    from arm_ray.report.run_facts import Score
    from arm_ray.study.config import StudyConfig
    from arm_ray.training.pipeline import PipelineConfig

ConfigT = TypeVar("ConfigT", bound="BaseModel")
Source: TypeAlias = "str | Path | Mapping[str, Any] | ConfigT"
Kind = Literal["merge", "evaluate", "attach", "pipeline", "study"]
_KINDS: tuple[Kind, ...] = ("merge", "evaluate", "attach", "pipeline", "study")


@dataclass(frozen=True)
class MergeResult:
    """What has become of a merge.

    Attributes:
        path: Directory of the merged model, or its URL; None where the merge was halted before.
        run: Its run directory.
        best: What the model is: `state-0002`, or `candidate-1` or `base` where no merge was better;
            None where it is not written yet.
        reason: Why it ended: `max_iterations`, `converged`, `no_gain`, `patience`, `stop_after`, or
            `complete`: it was done before.
        iterations: Complete iterations.
        scores: Of base, checkpoints and states, with intervals: of the evaluation, and the losses
            that chose. Empty where nothing was compared.
    """

    path: Path | None
    run: Path
    best: str | None
    reason: str
    iterations: int
    scores: tuple[Score, ...]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What has happened, as `events.jsonl` of the run has it; read anew each time."""
        return _events(self.run)

    @property
    def report(self) -> Path | None:
        """The page that shows the run; None: there is none."""
        return _page(self.run)


@dataclass(frozen=True)
class EvaluateResult:
    """What models scored.

    Attributes:
        run: The directory of the results.
        scores: Of each model and task, with intervals.
    """

    run: Path
    scores: tuple[Score, ...]

    def of(self, model: str) -> dict[str, float]:
        """The scores of one model: task -> number.

        Raises:
            KeyError: It was not scored.
        """
        found = {score.task: score.mean for score in self.scores if score.model == model}
        if not found:
            raise KeyError(model)
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        """What has happened, as `events.jsonl` of the run has it; read anew each time."""
        return _events(self.run)

    @property
    def report(self) -> Path | None:
        """The page that shows the run; None: there is none."""
        return _page(self.run)


@dataclass(frozen=True)
class AttachResult:
    """What has become of following a run.

    Attributes:
        best: Directory of the best published model, as `best` points to it; None: there is none.
        published: The directory of all published models.
        run: The directory of snapshots, merges and records.
        reason: `finished`, or `idle`: nothing new came for long.
        arrivals: Checkpoints that were merged when they came, or given up.
    """

    best: Path | None
    published: Path
    run: Path
    reason: str
    arrivals: int

    @property
    def events(self) -> list[dict[str, Any]]:
        """What has happened, as `events.jsonl` of the run has it; read anew each time."""
        return _events(self.run)


@overload
def load_config(
    source: Source[MergeConfig],
    kind: Literal["merge"] = "merge",
    *,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> MergeConfig: ...


@overload
def load_config(
    source: Source[EvaluateConfig],
    kind: Literal["evaluate"],
    *,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> EvaluateConfig: ...


@overload
def load_config(
    source: Source[AttachConfig],
    kind: Literal["attach"],
    *,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> AttachConfig: ...


@overload
def load_config(
    source: Source[PipelineConfig],
    kind: Literal["pipeline"],
    *,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> PipelineConfig: ...


@overload
def load_config(
    source: Source[StudyConfig],
    kind: Literal["study"],
    *,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> StudyConfig: ...


def load_config(
    source: Any,
    kind: Kind = "merge",
    *,
    overrides: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Any:
    """Read and check a configuration.

    Args:
        source: A YAML file, a mapping of the same content, or a configuration.
        kind: Of which command.
        overrides: Dotted key -> value, in place of what the source says.
        keys: The same by name, with `__` in place of dots.

    Raises:
        ConfigError: It cannot be read, or is wrong; all problems are listed.
    """
    if kind not in _KINDS:
        raise ConfigError(
            "there is no such kind of configuration",
            where="kind",
            got=repr(kind),
            expected=" or ".join(map(repr, _KINDS)),
        )
    where = str(source) if isinstance(source, str | Path) else "config"
    return _parse(kind, _content(source), _texts(overrides, keys), where)


def overridden_content(
    source: Any, overrides: Mapping[str, Any] | None, keys: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a configuration with overrides, before it is checked; see `load_config`."""
    from arm_ray.config import overridden

    return overridden(_content(source), _texts(overrides, keys))


def merge(
    config: Source[MergeConfig],
    *,
    overrides: Mapping[str, Any] | None = None,
    address: str | None = None,
    stop_after: int | None = None,
    console: Console | None = None,
    progress: bool = True,
    **keys: Any,
) -> MergeResult:
    """Merge checkpoints as configured, or go on with the run in its output directory.

    Args:
        config: A YAML file, a mapping of the same content, or a configuration.
        overrides: Dotted key -> value, in place of what that says.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray, or
            none where the merge does not need it.
        stop_after: Halt after this iteration; the same call without it goes on.
        console: Where progress and the summary go; None: standard error.
        progress: Whether they are shown.
        keys: Overrides by name, with `__` in place of dots.

    Raises:
        ArmRayError: Any of its kinds. What is complete on disk stays, and the same call goes on.
    """
    settled = load_config(config, "merge", overrides=overrides, **keys)
    from arm_ray.runtime.merge.run import merge as run

    done = run(settled, address=address, stop_after=stop_after, console=_console(console, progress))
    scores, chosen = _scores(done.run)
    best = done.selected or (chosen if done.model is not None else None)
    return MergeResult(done.model, done.run, best, done.reason, done.iterations, scores)


def evaluate(
    config: Source[EvaluateConfig],
    *,
    overrides: Mapping[str, Any] | None = None,
    address: str | None = None,
    console: Console | None = None,
    progress: bool = True,
    **keys: Any,
) -> EvaluateResult:
    """Score models on benchmarks; what is scored already is not scored again.

    Args:
        config: A YAML file, a mapping of the same content, or a configuration.
        overrides: Dotted key -> value, in place of what that says.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress and tables go; None: standard error.
        progress: Whether they are shown.
        keys: Overrides by name, with `__` in place of dots.

    Raises:
        ArmRayError: Any of its kinds. What is complete on disk stays and is used again.
    """
    settled = load_config(config, "evaluate", overrides=overrides, **keys)
    from arm_ray.runtime.scoring.evaluate import evaluate as run

    run(settled, address=address, console=_console(console, progress))
    directory = Path(settled.output).expanduser().absolute()
    return EvaluateResult(directory, _scores(directory)[0])


def attach(
    config: Source[AttachConfig],
    *,
    overrides: Mapping[str, Any] | None = None,
    address: str | None = None,
    console: Console | None = None,
    progress: bool = True,
    **keys: Any,
) -> AttachResult:
    """Follow a run until it ends: merge every new checkpoint, score it, publish what is better.

    It takes as long as the run. Beside a trainer in the same process, see
    `arm_ray.integrations.AttachCallback`.

    Args:
        config: A YAML file, a mapping of the same content, or a configuration.
        overrides: Dotted key -> value, in place of what that says.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress goes; None: standard error.
        progress: Whether it is shown.
        keys: Overrides by name, with `__` in place of dots.

    Raises:
        ArmRayError: Any of its kinds. What is published stays, and the same call goes on.
    """
    settled = load_config(config, "attach", overrides=overrides, **keys)
    from arm_ray.runtime.attach.run import attach as run

    done = run(settled, address=address, console=_console(console, progress))
    return AttachResult(done.best, settled.published, settled.work, done.reason, len(done.arrivals))


def plan(
    config: Source[MergeConfig],
    *,
    overrides: Mapping[str, Any] | None = None,
    gpus: int | None = None,
    gpu_memory_gb: float | None = None,
    nodes: int = 1,
    device: str | None = None,
    tokens_per_sample: int | None = None,
    **keys: Any,
) -> Plan:
    """Say what a merge will need, from its configuration and headers; starts and reads nothing.

    Args:
        config: A YAML file, a mapping of the same content, or a configuration.
        overrides: Dotted key -> value, in place of what that says.
        gpus: GPUs in all; None: enough, or none without a device that is a GPU.
        gpu_memory_gb: Memory of one, 10^9 bytes; None: the device's.
        nodes: How many there are.
        device: `h100-80gb`, `a100-80gb`, `h200`, `cpu`, or `this-cpu` (measured); None: `h100-80gb`
            with GPUs, else `cpu`.
        tokens_per_sample: None: the mean of a mini-batch where data and tokenizer are at hand, else
            `calibration.max_length`, the most there can be.
        keys: Overrides by name, with `__` in place of dots.

    Raises:
        ArmRayError: The configuration or the checkpoints are wrong.
    """
    settled = load_config(config, "merge", overrides=overrides, **keys)
    from arm_ray.planning.cluster import make_cluster
    from arm_ray.runtime.plan import plan_of

    cluster = make_cluster(
        settled.runtime, gpus=gpus, gpu_memory_gb=gpu_memory_gb, nodes=nodes, device=device
    )
    return plan_of(settled, cluster, tokens_per_sample)


def _content(source: Any) -> dict[str, Any]:
    from arm_ray.config import read_yaml

    if isinstance(source, str | Path):
        return read_yaml(Path(source))
    if isinstance(source, Mapping):
        found: dict[str, Any] = _plain(source)
        return found
    dumped: dict[str, Any] = source.model_dump(mode="json")
    return dumped


def _parse(kind: Kind, content: dict[str, Any], overrides: list[str], where: str) -> Any:
    if kind == "merge":
        from arm_ray.config import parse_merge_config

        return parse_merge_config(content, overrides, source=where)
    if kind == "evaluate":
        from arm_ray.config import EvaluateConfig, validate

        return validate(EvaluateConfig, content, overrides, source=where)
    if kind == "attach":
        from arm_ray.following.config import parse_attach_config

        return parse_attach_config(content, overrides, source=where)
    from arm_ray.config import validate

    if kind == "pipeline":
        from arm_ray.training.pipeline import PipelineConfig

        return validate(PipelineConfig, content, overrides, source=where)
    from arm_ray.study.config import StudyConfig

    return validate(StudyConfig, content, overrides, source=where)


def _texts(overrides: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> list[str]:
    """Overrides as a command line has them: JSON is YAML, so that values keep their types."""
    given = {**(overrides or {}), **{name.replace("__", "."): v for name, v in keys.items()}}
    return [f"{key}={_json(key, value)}" for key, value in given.items()]


def _json(key: str, value: Any) -> str:
    try:
        return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ConfigError(
            "the value of an override is none that a configuration can have",
            where=key,
            got=repr(value),
            expected="a number, text, true or false, none, or lists and mappings of them",
        ) from None


def _plain(value: Any) -> Any:
    """With lists and texts where a program has tuples and paths."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def _console(given: Console | None, progress: bool) -> Console | None:
    if progress:
        return given
    from rich.console import Console

    return Console(quiet=True)


def _scores(run: Path) -> tuple[tuple[Score, ...], str | None]:
    """The scores that a run's directory holds, and which model it publishes."""
    from arm_ray.report.run_facts import chosen_of, scores_of
    from arm_ray.report.run_record import open_record

    if not run.is_dir():  # at a URL
        return (), None
    record = open_record(run)
    scores = tuple(scores_of(record))
    return scores, chosen_of(record, scores)


def _events(run: Path) -> list[dict[str, Any]]:
    from arm_ray.events import read_events

    file = run / "events.jsonl"
    return read_events(file) if file.is_file() else []


def _page(run: Path) -> Path | None:
    file = run / "report.html"
    return file if file.is_file() else None
