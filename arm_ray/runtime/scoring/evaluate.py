"""Scores any models on benchmarks, and compares them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from arm_ray.checkpoints import states
from arm_ray.checkpoints.formats import find_format, open_given, open_source, split_source
from arm_ray.checkpoints.huggingface import resolve_path
from arm_ray.config import EvaluateConfig
from arm_ray.errors import ArmRayError, ConfigError, EvaluationError, RunDirectoryError
from arm_ray.evaluation.records import TaskScores
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.tasks import Task, load_tasks
from arm_ray.events import EventLog
from arm_ray.report.scores import paired_results, print_scores, scores_as_json
from arm_ray.report.trackers import check_installed
from arm_ray.runtime.cluster.joining import outliving, ray_session
from arm_ray.runtime.output.claim import claimed, holds_earlier, write_config
from arm_ray.runtime.output.opening import results_at
from arm_ray.runtime.scoring.model_copies import CopiesOnNodes
from arm_ray.runtime.scoring.requests import KnownScores
from arm_ray.runtime.scoring.results import write_table
from arm_ray.runtime.scoring.service import as_error, scoring_service, with_recorded_dtype
from arm_ray.runtime.scoring.state_scoring import local_evaluator_slots
from arm_ray.runtime.scoring.subject import Subject, model_source
from arm_ray.runtime.session.heartbeat import heartbeat
from arm_ray.runtime.session.page import write_page
from arm_ray.runtime.session.progress import duration
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.runtime.session.telemetry import telemetry
from arm_ray.storage.regular import is_plain_name
from arm_ray.storage.urls import is_url


def evaluate(
    config: EvaluateConfig, *, address: str | None = None, console: Console | None = None
) -> dict[str, dict[str, TaskScores]]:
    """Score models as configured; what is scored already is not scored again.

    Args:
        config: The configuration.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, and without that a local Ray.
        console: Where progress goes; None: standard error. The tables go there too.

    Returns:
        Model -> task -> numbers.

    Raises:
        ArmRayError: Any of its kinds. What is complete on disk stays and is used again.
    """
    if is_url(config.output):
        with results_at(config.output) as local:
            at_disk = config.model_copy(update={"output": str(local)})
            return evaluate(at_disk, address=address, console=console)
    reporter = Reporter(console or Console(stderr=True))
    started = time.monotonic()
    output = outliving(config.output)
    check_installed(config.tracking)
    tasks = load_tasks(config.evaluation)
    subjects = [subject_of(name, given, config) for name, given in config.models.items()]
    output = open_output(output, config)
    reporter = reporter.with_events(EventLog(output / "events.jsonl"))

    sizes = ", ".join(f"{t.name} ({len(t.problems)} x {t.repeats})" for t in tasks)
    reporter.say(f"scoring {len(subjects)} model(s) on {sizes}")
    scores = _known_scores(config.evaluation, tasks, subjects, output)
    if scores is not None:
        reporter.say("all of it is scored already")
        return _report(config, scores, output, reporter, started)
    with (
        heartbeat(reporter.console),
        evaluation_session(config, config.evaluation, output, address, reporter),
    ):
        first, copies = subjects[0], CopiesOnNodes(config.scratch)
        with scoring_service(config.evaluation, tasks, output, first, reporter, copies) as service:
            for subject in subjects:
                service.submit(subject)
            try:
                service.wait()
            except Exception as error:
                raise as_error(error) from error
            scores = service.scores()
    return _report(config, scores, output, reporter, started)


def _known_scores(
    settings: EvaluationSettings, tasks: Sequence[Task], subjects: Sequence[Subject], output: Path
) -> dict[str, dict[str, TaskScores]] | None:
    """Model -> task -> numbers, if all of them are on disk; else None. Starts nothing."""
    known = KnownScores(with_recorded_dtype(settings, output), tasks, output)
    scores = {}
    for subject in subjects:
        found = known.of(subject)
        if len(found) < len(tasks):
            return None
        scores[subject.name] = found
    return scores


def _report(
    config: EvaluateConfig,
    scores: dict[str, dict[str, TaskScores]],
    output: Path,
    reporter: Reporter,
    started: float,
) -> dict[str, dict[str, TaskScores]]:
    """Compare all models with the first, write and print the numbers, and return them."""
    reference = next(iter(config.models))
    paired = paired_results(scores, output, reference, config.evaluation)
    write_table(output, scores_as_json(scores, paired))
    print_scores(reporter.console, scores, paired, title=f"scores, in % ({output.name})")
    seconds = duration(time.monotonic() - started)
    write_page(output, reporter)
    reporter.say(f"{seconds}; records and numbers are in {output}")
    return scores


@contextlib.contextmanager
def evaluation_session(
    config: EvaluateConfig,
    settings: EvaluationSettings,
    output: Path,
    address: str | None,
    reporter: Reporter,
) -> Iterator[None]:
    """Have the output to oneself, Ray at hand, and the run's numbers told to who wants them.

    Args:
        config: Of the evaluation.
        settings: What is reserved in a Ray that is started here.
        output: The output directory.
        address: As for `evaluate`.
        reporter: It has the run's events.
    """
    slots = 1 + local_evaluator_slots(settings)
    with (
        claimed(output, "evaluation"),
        ray_session(address, slots, {"job": "evaluate", "output": str(output)}),
        telemetry(
            reporter,
            config.tracking,
            output,
            config.tracking.run or output.name,
            parameters=config.model_dump(mode="json", exclude={"tracking"}),
        ),
    ):
        yield


def subject_of(name: str, given: str, config: EvaluateConfig) -> Subject:
    """Check a model and say where its weights and tokenizer are.

    Args:
        name: Of the model in results.
        given: Its path, hub id or URL.
        config: Of the evaluation.

    Raises:
        ArmRayError: The name or the model cannot be used.
    """
    if not is_plain_name(name):
        raise ConfigError(
            "a model's name is used for a directory",
            where="models",
            got=ascii(name)[:300],
            expected="a short name without slashes that does not begin with a dot",
        )
    try:
        kind, place = split_source(given)
        if is_url(place):
            return _subject_at_url(name, given, config)
        path = resolve_path(place)
        if kind == "auto":
            kind = find_format(path)[0]
        if kind == "peft" and config.adapter_base is None:
            raise EvaluationError(
                "the path holds a LoRA adapter, and its base is not named",
                where=path,
                expected="the key adapter_base (or --adapter-base)",
            )
        named = config.adapter_base if kind != "hf" else None
        base = None if named is None else open_given(named)
        checkpoint = open_source(path, base, kind)
        source = model_source(checkpoint)
    except ArmRayError as error:
        raise error.of(name) from None
    tokenizer = _tokenizer(name, Path(source.path), path, config)
    return Subject(name, source, str(tokenizer), checkpoint.fingerprint)


def _subject_at_url(name: str, given: str, config: EvaluateConfig) -> Subject:
    base = None if config.adapter_base is None else open_given(config.adapter_base)
    checkpoint = open_given(given, base)
    source = model_source(checkpoint)
    tokenizer = _tokenizer(name, Path(source.path), checkpoint.path, config)
    return Subject(name, source, str(tokenizer), checkpoint.fingerprint)


def _tokenizer(name: str, base: Path, path: Path, config: EvaluateConfig) -> Path:
    given = [Path(config.tokenizer).expanduser().resolve()] if config.tokenizer else [path, base]
    for directory in given:
        if states.has_tokenizer(directory):
            return directory
    raise EvaluationError(
        f"{name}: no tokenizer for the prompts",
        where=given[0],
        expected="tokenizer.json or tokenizer.model",
        hint="copy it beside the weights, or name one (tokenizer, --tokenizer)",
    )


def open_output(output: Path, config: EvaluateConfig) -> Path:
    """Make the directory of the results, unless it holds something else.

    Raises:
        RunDirectoryError: It does, or cannot be written.
    """
    holds_earlier(output, "evaluation")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_config(output, config.to_yaml())
    except OSError as error:
        raise RunDirectoryError(
            "the output directory cannot be written", where=output, got=error
        ) from None
    return output.resolve()
