"""Scores models on tasks of lm-evaluation-harness, with one of our engines.

One module, because it is one job from options to table, and most of it is that job's file format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.config import EvaluateConfig
from arm_ray.errors import ArmRayError, EvaluationError, WorkerError
from arm_ray.evaluation.encode import uses_chat
from arm_ray.evaluation.engine import Completion, LoadReport, Request, context_length
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.events import EventLog, ModelScored
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.cluster.calls import Calls
from arm_ray.runtime.cluster.joining import outliving
from arm_ray.runtime.output.claim import CONFIG_NAME
from arm_ray.runtime.output.opening import results_at
from arm_ray.runtime.scoring.engine_slot import EngineSlot
from arm_ray.runtime.scoring.evaluate import evaluation_session, open_output, subject_of
from arm_ray.runtime.scoring.evaluator import EngineActor, placed_evaluators
from arm_ray.runtime.scoring.model_copies import CopiesOnNodes
from arm_ray.runtime.scoring.requests import vllm_version
from arm_ray.runtime.scoring.service import with_dtype, with_recorded_dtype
from arm_ray.runtime.scoring.subject import Subject, tokenizer_digest
from arm_ray.runtime.session.heartbeat import heartbeat
from arm_ray.runtime.session.progress import LINE_INTERVAL_S, duration
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.storage.regular import json_in
from arm_ray.storage.urls import is_url

if TYPE_CHECKING:
    from arm_ray.evaluation.lm_eval_tasks import OpenTasks

FILE_NAME = "lm_eval.json"
# Of the machine and the working directory, nothing about the scores.
_DROPPED = ("pretty_env_info", "git_hash", "upper_git_hash", "samples")


@dataclass(frozen=True)
class LmEvalOptions:
    """What of the harness is run.

    Attributes:
        tasks: Names of tasks, groups or tags.
        include_path: Directory of task files of one's own.
        num_fewshot: Solved examples in each prompt; None: as each task says.
        limit: The first documents of each task alone; None: all.
        apply_chat_template: Whether prompts go through the tokenizer's chat template.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False


def evaluate_lm_eval(
    config: EvaluateConfig,
    options: LmEvalOptions,
    tasks: OpenTasks | None = None,
    *,
    address: str | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Score models on tasks of lm_eval; what is scored already is not scored again.

    `<output>/<model>/lm_eval.json` holds the numbers, in the format of lm_eval, and under
    `arm_ray` how they came about. An earlier file with other settings stays, as
    `lm_eval-<digest>.json`.

    Args:
        config: Models, output and the engine's settings; its own tasks are not looked at.
        options: What of the harness is run.
        tasks: The tasks, if `open_lm_eval` has loaded them already.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress and the table go; None: standard error.

    Returns:
        Model -> content of its file.

    Raises:
        EvaluationError: lm_eval is missing, a task cannot be used, or a model cannot be loaded;
            then the other models are scored nevertheless.
        ArmRayError: Another of its kinds. What is complete on disk stays and is used again.
    """
    if is_url(config.output):
        with results_at(config.output) as local:
            at_disk = config.model_copy(update={"output": str(local)})
            return evaluate_lm_eval(at_disk, options, tasks, address=address, console=console)
    reporter = Reporter(console or Console(stderr=True))
    started = time.monotonic()
    tasks = tasks or open_lm_eval(options)
    for note in tasks.notes:
        reporter.say(note)
    subjects = [subject_of(name, given, config) for name, given in config.models.items()]
    if options.apply_chat_template:
        for subject in subjects:
            uses_chat(load_tokenizer(subject.tokenizer), "on", subject.name)
    output = outliving(config.output)
    # What an evaluation on our own tasks has written there says more than we know here.
    has_config = (output / CONFIG_NAME).is_file()
    output = output.resolve() if has_config else open_output(output, config)
    check_installed(config.tracking)
    reporter = reporter.with_events(EventLog(output / "events.jsonl"))
    # What is scored there already is scored in the format that is recorded, if it was `auto`.
    known = with_recorded_dtype(config.evaluation, output)
    run = _Run(known, options, tasks, output, reporter)
    reporter.say(f"lm_eval: scoring {len(subjects)} model(s) on {', '.join(tasks.names)}")
    digests = {subject.name: run.digest(subject) for subject in subjects}
    found = {name: run.known(name, digest) for name, digest in digests.items()}
    scored = {name: content for name, content in found.items() if content is not None}
    for name in scored:
        reporter.say(f"{name}: lm_eval's numbers are there already")
    missing = [subject for subject in subjects if subject.name not in scored]
    failures: list[ArmRayError] = []
    if missing:
        with (
            heartbeat(reporter.console),
            evaluation_session(config, run.settings, output, address, reporter),
        ):
            first = missing[0]
            settled = with_dtype(config.evaluation, first.source.path, output, reporter)
            run = _Run(settled, options, tasks, output, reporter)
            digests = {subject.name: run.digest(subject) for subject in missing}
            with placed_evaluators(
                run.settings,
                first.source.path,
                first.tokenizer,
                runs_code=False,
                copies=CopiesOnNodes(config.scratch),
            ) as gang:
                limit = run.settings.engine.timeout_s
                slot = EngineSlot(gang, 0, first, limit, reporter, Calls())
                for subject in missing:
                    try:
                        report = slot.load_even_if_lost(subject)
                    except (EvaluationError, WorkerError) as error:
                        failures.append(error.of(subject.name))
                        reporter.say(f"{subject.name}: not scored, its weights cannot be loaded")
                        continue
                    assert report is not None
                    scored[subject.name] = run.score(subject, slot, report, digests[subject.name])
    ordered = {name: scored[name] for name in config.models if name in scored}
    if ordered:
        _print_table(reporter.console, ordered, title=f"lm_eval ({output.name})")
    reporter.say(f"{duration(time.monotonic() - started)}; numbers are in {output}")
    if failures:
        raise failures[0]
    return ordered


class _Model:
    """A model that an engine holds, as lm_eval's model class calls it."""

    def __init__(self, slot: EngineSlot, subject: Subject) -> None:
        self._slot, self._subject = slot, subject

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.generate`."""
        return self._slot.ask(self._subject, EngineActor.generate, requests)

    def log_likelihoods(
        self, samples: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, int, bool] | None]:
        """See `Engine.log_likelihoods`."""
        return self._slot.ask(self._subject, EngineActor.log_likelihoods, samples)


class _Run:
    """What is the same for all models of a run."""

    def __init__(
        self,
        settings: EvaluationSettings,
        options: LmEvalOptions,
        tasks: OpenTasks,
        output: Path,
        reporter: Reporter,
    ) -> None:
        # One engine, and nothing that grades: lm_eval does that in this process.
        self.settings = replace(
            settings,
            engine=replace(settings.engine, replicas=1),
            grading=replace(settings.grading, workers=0),
        )
        self._options, self._tasks, self._output = options, tasks, output
        self._reporter = reporter
        self._tasks_digest = tasks.digest(options.limit)

    def digest(self, subject: Subject) -> str:
        """Of everything that decides a model's numbers, 16 hex digits."""
        content = {
            **self._described(subject),
            "include_path": None,  # what is in it counts
            "definitions": self._tasks_digest,
            "tokenizer": tokenizer_digest(subject.tokenizer),
            "weights": subject.identity,
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def known(self, name: str, digest: str) -> dict[str, Any] | None:
        """What an earlier run has found with the same settings."""
        directory = self._output / name
        for file in (directory / FILE_NAME, _kept_as(directory, digest)):
            content = _read(file)
            if content is not None and content.get("arm_ray", {}).get("digest") == digest:
                return content
        return None

    def score(
        self, subject: Subject, slot: EngineSlot, report: LoadReport, digest: str
    ) -> dict[str, Any]:
        """Run lm_eval on a model that the engine holds, and write its file and event."""
        from arm_ray.evaluation.lm_eval_bridge import EngineLM

        started = time.monotonic()
        lm = EngineLM(
            _Model(slot, subject),
            load_tokenizer(subject.tokenizer),
            context_length(subject.source.path, self.settings.engine),
            seed=self.settings.sampling.seed,
            chunk_size=self.settings.engine.chunk_size,
            progress=_Lines(self._reporter.about(subject.name)),
        )
        found = self._evaluate(subject, lm)
        cut = sum(count.cut for count in lm.counts.values())
        asked = sum(count.requests for count in lm.counts.values())
        if cut:
            self._reporter.say(
                f"{subject.name}: {cut} of {asked} prompts did not fit into the context of "
                f"{lm.max_length} tokens and were cut from the left, as lm_eval does"
            )
        if lm.dropped_system_messages:
            self._reporter.say(
                f"{subject.name}: the chat template refuses system messages; "
                f"{lm.dropped_system_messages} were left out, as lm_eval does"
            )
        seconds = time.monotonic() - started
        content = {name: value for name, value in found.items() if name not in _DROPPED}
        content["arm_ray"] = {
            "digest": digest,
            "model": subject.name,
            "source": asdict(subject.source),
            "version": report.version,
            "settings": self._described(subject),
            "requests": {kind: asdict(count) for kind, count in lm.counts.items()},
            "dropped_system_messages": lm.dropped_system_messages,
            "seconds": round(seconds, 3),
            "reload_seconds": round(report.seconds, 3),
        }
        plain: dict[str, Any] = _plain(content)
        self._write(subject.name, plain)
        shown = shown_scores(plain)
        self._reporter.write(
            ModelScored(
                subject.name,
                subject.source.given,
                {
                    f"lm_eval/{task}": {metric: round(v, 6)}
                    for task, (metric, v, _) in shown.items()
                },
                round(seconds, 3),
                round(report.seconds, 3),
                report.canary.token_ids,
                sum(count.requests for count in lm.counts.values()),
                fetched_bytes=report.fetched_bytes,
            )
        )
        parts = [f"{task} {metric} {v:.4f}" for task, (metric, v, _) in shown.items()]
        self._reporter.say(f"scored {subject.name}: {', '.join(parts)}  {seconds:.1f} s")
        return plain

    def _evaluate(self, subject: Subject, lm: Any) -> dict[str, Any]:
        import lm_eval

        try:
            with _one_process():
                found: dict[str, Any] = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=list(self._tasks.names),
                    task_manager=self._tasks,
                    num_fewshot=self._options.num_fewshot,
                    limit=self._options.limit,
                    apply_chat_template=self._options.apply_chat_template,
                    bootstrap_iters=self.settings.resamples,
                    log_samples=False,
                )
        except ArmRayError as error:
            raise error.of(subject.name) from None
        except Exception as error:  # tasks and metrics raise what they like
            raise EvaluationError(
                f"{subject.name}: lm_eval failed",
                where=", ".join(self._tasks.names),
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
                hint="run the tasks one by one to see which it is; finished models are kept",
            ) from error
        return found

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        directory = self._output / name
        directory.mkdir(parents=True, exist_ok=True)
        earlier = (_read(directory / FILE_NAME) or {}).get("arm_ray", {}).get("digest")
        if earlier is not None and earlier != content["arm_ray"]["digest"]:
            (directory / FILE_NAME).replace(_kept_as(directory, earlier))
        write_json(directory / FILE_NAME, content)

    def _described(self, subject: Subject) -> dict[str, Any]:
        """Settings that are part of the numbers."""
        return {
            **asdict(self._options),
            "engine": self.settings.engine.identity(),
            "context": context_length(subject.source.path, self.settings.engine),
            "seed": self.settings.sampling.seed,
            "resamples": self.settings.resamples,
            "vllm": vllm_version(),
            "lm_eval": _lm_eval_version(),
        }


class _Lines:
    """Progress of one model, a line now and then."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._started = self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total:
            self._started = now
        elif now - self._last > LINE_INTERVAL_S:
            self._last = now
            rest = (now - self._started) / done * (total - done)
            self._reporter.say(f"{done} of {total} {what}, about {rest:.0f} s to go")


def shown_scores(content: Mapping[str, Any]) -> dict[str, tuple[str, float, float | None]]:
    """Task or group -> main metric, its value and standard error, of a file's content.

    The main metric is the first one of the task. Members of a group that has numbers of its own are
    left out.
    """
    found: Mapping[str, Mapping[str, Any]] = content["results"]
    members: Mapping[str, Sequence[str]] = content.get("group_subtasks") or {}
    hidden: set[str] = set()
    waiting = [name for name in members if name in (content.get("groups") or {})]
    while waiting:
        below = set(members.get(waiting.pop(), ())) - hidden
        hidden |= below
        waiting += below
    shown = {}
    for task, values in found.items():
        if task in hidden:
            continue
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            shown[task] = (label, float(value), error if isinstance(error, float) else None)
            break
    return shown


def _print_table(console: Console, scored: Mapping[str, Mapping[str, Any]], title: str) -> None:
    shown = {model: shown_scores(content) for model, content in scored.items()}
    sizes = next(iter(scored.values())).get("n-samples") or {}
    heads = {task: score[0] for scores in shown.values() for task, score in scores.items()}
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for task, metric in heads.items():
        size = sizes.get(task, {}).get("effective")
        head = f"{task}\n{metric}" + (f"\nn = {size}" if size else "")
        table.add_column(head, justify="right")
    for model, scores in shown.items():
        table.add_row(model, *(_cell(scores.get(task)) for task in heads))
    console.print(table)


def _cell(score: tuple[str, float, float | None] | None) -> str:
    if score is None:
        return "-"
    _, value, error = score
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def open_lm_eval(options: LmEvalOptions) -> OpenTasks:
    """Find, check and load the tasks, without an engine.

    Raises:
        EvaluationError: lm_eval is missing, or a task cannot be used.
    """
    try:
        # Both are needed, and what is missing is said before an engine runs.
        from arm_ray.evaluation import lm_eval_bridge  # noqa: F401
        from arm_ray.evaluation.lm_eval_tasks import open_tasks
    except ImportError as error:
        raise EvaluationError(
            "lm-evaluation-harness cannot be imported",
            got=f"{type(error).__name__}: {error}",
            expected="lm_eval 0.4.12 or newer",
            hint="pip install arm-ray[lm-eval]",
        ) from None
    return open_tasks(options.tasks, options.include_path, options.num_fewshot)


def _lm_eval_version() -> str:
    from importlib import metadata

    return metadata.version("lm_eval")


def _kept_as(directory: Path, digest: str) -> Path:
    return directory / f"lm_eval-{digest}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json_in(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _plain(value: Any) -> Any:
    """As JSON has it; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm_eval's bootstrap from forking this process, in which Ray's threads run."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
