"""Benchmarks as declarations: where the data are, what is asked, how it is sampled and graded.

One module, because a benchmark is declared in one place, and most of it is these declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from arm_ray.errors import ArmRayError, EvaluationError
from arm_ray.evaluation.code import livecodebench, programs
from arm_ray.evaluation.data import Row, find_file, read_rows
from arm_ray.evaluation.graders import (
    GraderSpec,
    absolute_scorer,
    grading_identity,
    load_scorer,
)
from arm_ray.evaluation.grading.extraction import gold_answer, keeps_units
from arm_ray.evaluation.grading.qwen_strings import canonical
from arm_ray.evaluation.settings import EvaluationSettings, SamplingSettings, TaskSettings
from arm_ray.storage.regular import is_plain_name
from arm_ray.storage.urls import is_url

Kind = Literal["math", "code", "questions", "loss"]
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
_QUESTION_COLUMNS = ("question", "problem", "Question", "input")
# What a row leads to that holds other things than those of the benchmark.
_NOT_AS_KNOWN = (AttributeError, IndexError, KeyError, TypeError, ValueError)
# Benchmarks whose question is two columns, one after the other.
_QUESTION_PARTS = {"svamp": ("Body", "Question"), "asdiv": ("body", "question")}
# Added to the question by the Qwen2.5-Math toolkit, where the answer is one of the two words.
_CHOICES = {"yes": " (Yes or No)", "no": " (Yes or No)"}
_CHOICES |= dict.fromkeys(("true", "false"), " (True or False)")
# Of MBPP's 974 problems; the others are for training, validation and prompts.
_MBPP_TEST = range(11, 511)
# Where a further question would begin after examples, as in the toolkit's prompt for base models.
_NEXT_QUESTION = "\n\nQuestion:"


@dataclass(frozen=True)
class Prompt:
    """What is put to the model.

    Attributes:
        user: The user message, or, without a chat template, the text.
        system: System message, or None.
        prefix: Beginning of the answer that the model goes on from.
        examples: Solved examples before it: question and answer.
        labelled: Whether, without a chat template, `Question:` and `Answer:` part the examples;
            else the text itself says where a question begins.
        stop: Texts that end a completion without a chat template, beside those of the task.
    """

    user: str
    system: str | None = None
    prefix: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    labelled: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Attributes:
        key: Its name within the task: stable over runs.
        prompt: What is put to the model.
        gold: The right answer as the grader wants it; empty for code.
        row: The row of the data, for graders that need more.
    """

    key: str
    prompt: Prompt
    gold: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A benchmark, ready to be put to models.

    Attributes:
        name: As in the configuration.
        kind: How it is scored.
        problems: In the order of the data.
        sampling: How completions are drawn; not used for losses.
        chat: Whether prompts go through the chat template: `auto`, `on` or `off`.
        grader: `math`, `exact`, `number` or `python` for questions; else the benchmark.
        scorer: File and function of `grader: python`.
        pass_at: k of pass@k, for code.
        digest: Of everything that decides the result, beside the model and the engine.
    """

    name: str
    kind: Kind
    problems: tuple[Problem, ...]
    sampling: SamplingSettings
    chat: Literal["auto", "on", "off"]
    grader: str
    scorer: str | None = None
    pass_at: tuple[int, ...] = (1,)
    digest: str = ""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's numbers, the main one first."""
        if self.kind == "math" or (self.kind == "questions" and self.grader == "math"):
            return ("strict", "qwen_compat")
        if self.kind == "code":
            return tuple(f"pass@{k}" for k in self.pass_at)
        return ("loss",) if self.kind == "loss" else ("score",)

    @property
    def repeats(self) -> int:
        """Completions of each problem."""
        is_drawn = self.kind != "loss" and self.sampling.temperature > 0.0
        return self.sampling.repeats if is_drawn else 1


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark before its data are there.

    Attributes:
        kind: How it is scored.
        files: Where its data may lie below `data_dir`.
        hub: Data set id, or None where the hub has no form that can be read.
        prompt: Row and user template -> prompt.
        template: The user message; `{question}` is replaced.
        chat: Whether the benchmark's protocol has a chat template.
        sampling: What its protocol sets otherwise than the paper's defaults.
        plain_stop: Texts at which its protocol ends a completion without a chat template.
        has: Which rows of the data belong to it; None: all.
    """

    kind: Literal["math", "code"]
    files: tuple[str, ...]
    hub: str | None
    prompt: Callable[[Row, str], Prompt] | None = None
    template: str = BOXED
    chat: Literal["auto", "off"] = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    plain_stop: tuple[str, ...] = ()
    has: Callable[[Row], bool] | None = None


def _is_mbpp_test(row: Row) -> bool:
    """Whether a row is of MBPP's test split, as far as it says what it is."""
    try:
        return int(row["task_id"]) in _MBPP_TEST
    except (KeyError, TypeError, ValueError):
        return True


def _math(name: str, hub: str | None, **extra: Any) -> Benchmark:
    return Benchmark("math", (f"{name}/test.jsonl", f"{name}.jsonl"), hub, **extra)


def _code_prompt(name: str) -> Callable[[Row, str], Prompt]:
    def make(row: Row, _template: str) -> Prompt:
        made = programs.prompt(name, row)
        return Prompt(made.user, made.system, made.response_prefix)

    return make


BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k": _math("gsm8k", "openai/gsm8k/main:test"),
    "math500": _math("math500", "HuggingFaceH4/MATH-500:test"),
    "olympiadbench": _math("olympiadbench", None),
    "college_math": _math("college_math", None),
    "minerva_math": _math("minerva_math", None),
    "svamp": _math("svamp", None),
    "asdiv": _math("asdiv", None),
    "humaneval": Benchmark(
        "code",
        ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"),
        "openai/openai_humaneval:test",
        _code_prompt("humaneval"),
    ),
    "mbpp": Benchmark(
        "code",
        ("mbpp/mbpp_sanitized.jsonl", "mbpp/mbpp.jsonl"),
        "google-research-datasets/mbpp/sanitized:test",
        _code_prompt("mbpp"),
        has=_is_mbpp_test,
    ),
    "humaneval_pro": Benchmark(
        "code",
        ("humaneval_pro/humaneval_pro.json", "humaneval_pro.json"),
        "CodeEval-Pro/humaneval-pro:train",
        _code_prompt("humaneval_pro"),
        chat="off",
    ),
    "mbpp_pro": Benchmark(
        "code",
        ("mbpp_pro/mbpp_pro.json", "mbpp_pro.json"),
        "CodeEval-Pro/mbpp-pro:train",
        _code_prompt("mbpp_pro"),
        chat="off",
    ),
    "livecodebench": Benchmark(
        "code",
        ("livecodebench/test.jsonl", "livecodebench.jsonl"),
        None,
        _code_prompt("livecodebench"),
        sampling={"temperature": 0.2, "top_p": 0.95, "max_tokens": 2000, "repeats": 10},
        # Its prompt's headings. An answer of a chat model may have headings of its own.
        plain_stop=("###",),
    ),
}


def load_tasks(settings: EvaluationSettings) -> list[Task]:
    """Read every task's data and make its prompts.

    Raises:
        EvaluationError: An unknown task, missing or malformed data, or settings that do not fit.
    """
    tasks = [load_task(given, settings) for given in settings.task_settings]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EvaluationError(
            "two tasks have the same name", where="evaluation.tasks", got=", ".join(twice)
        )
    return tasks


def load_task(given: TaskSettings, settings: EvaluationSettings) -> Task:
    """Read one task's data and make its prompts. See `load_tasks`."""
    if not is_plain_name(given.name):
        raise EvaluationError(
            "a task's name is used for files",
            where="evaluation.tasks",
            got=ascii(given.name)[:300],
            expected="a short name without slashes that does not begin with a dot",
            hint="name the data in the task's `path`",
        )
    known = BENCHMARKS.get(given.name)
    kind = given.type or ("benchmark" if known else None)
    if kind is None or (kind == "benchmark" and known is None):
        raise _unknown(given)
    sampling = _sampling(given, settings.sampling, known)
    if kind == "loss":
        task = _loss_task(given, sampling)
    elif kind == "questions":
        task = _questions_task(given, sampling)
    else:
        assert known is not None
        # Text that a configuration gives takes the place of the benchmark's.
        is_given = given.stop is not None or bool(settings.sampling.stop)
        stop = () if is_given else known.plain_stop
        task = _benchmark_task(given, known, settings.data_dir, sampling, stop)
    too_many = [k for k in task.pass_at if task.kind == "code" and k > task.repeats]
    if too_many:
        raise EvaluationError(
            f"the task {task.name!r} wants pass@{too_many[0]} of fewer completions",
            where="evaluation.tasks: pass_at",
            got=f"{task.repeats} completion(s) of each problem",
            expected=f"at least {too_many[0]} (repeats, with a temperature above 0)",
        )
    return dataclasses.replace(task, digest=_digest(task))


def _benchmark_task(
    given: TaskSettings,
    known: Benchmark,
    data_dir: str | None,
    sampling: SamplingSettings,
    stop: tuple[str, ...],
) -> Task:
    name = given.name
    if known.kind == "code" and (given.template or given.few_shot):
        raise EvaluationError(
            f"the prompts of {name!r} are the benchmark's own",
            where="evaluation.tasks",
            got="a template or few-shot examples",
            hint="define a task of your own, with type: questions, for other prompts",
        )
    rows = _rows(given, known, data_dir)
    template = given.template or known.template

    def example(row: Row, where: str) -> tuple[str, str]:
        answer = gold_text(name, row)
        return _question(name, row, where, answer), answer

    few_shot = _few_shot(given, template, example)
    problems = []
    for index, row in enumerate(rows):
        where = f"{name}, row {index + 1}"
        try:
            if known.prompt is not None:
                prompt = dataclasses.replace(known.prompt(row, template), stop=stop)
                gold = ""
            else:
                gold = gold_answer(name, row)
                user = _filled(template, _question(name, row, where, gold))
                prompt = dataclasses.replace(few_shot, user=user)
        except ArmRayError as error:
            raise error.at(where) from None
        except _NOT_AS_KNOWN as error:
            raise EvaluationError(
                f"a row of {name!r} is not as the benchmark has it",
                where=where,
                got=f"columns {', '.join(map(str, row))}"[:300],
                expected="the benchmark's own columns, with what it has in them",
                hint="take the benchmark's own file, or name the one that it is",
            ) from error
        if given.system is not None:
            prompt = dataclasses.replace(prompt, system=given.system or None)
        problems.append(Problem(problem_key(row, index), prompt, gold, row))
    chat = known.chat if given.chat_template == "auto" else given.chat_template
    return Task(name, known.kind, tuple(problems), sampling, chat, name, None, tuple(given.pass_at))


def _questions_task(given: TaskSettings, sampling: SamplingSettings) -> Task:
    grader = given.grader or ("python" if given.scorer else "math")
    if (grader == "python") != (given.scorer is not None):
        raise EvaluationError(
            f"the task {given.name!r} needs `grader: python` and `scorer` together",
            where="evaluation.tasks",
            got=f"grader {grader!r}, scorer {given.scorer!r}",
            expected="scorer: path/to/file.py:function",
        )
    scorer = None
    if given.scorer is not None:
        # Graders may run in another directory, and what is wrong with it is told before hours of
        # generation.
        scorer = absolute_scorer(given.scorer)
        load_scorer(scorer)
    template = given.template or (BOXED if grader == "math" else "{question}")
    needs_answer = grader != "python"
    rows = _rows(given, None, None)

    def example(row: Row, where: str) -> tuple[str, str]:
        question = _text(given, row, given.question_column, where)
        return question, _text(given, row, given.answer_column, where)

    few_shot = dataclasses.replace(_few_shot(given, template, example), system=given.system or None)
    problems = []
    for index, row in enumerate(rows):
        where = f"{given.path}, row {index + 1}"
        question = _text(given, row, given.question_column, where)
        gold = _text(given, row, given.answer_column, where) if needs_answer else ""
        prompt = dataclasses.replace(few_shot, user=_filled(template, question))
        problems.append(Problem(problem_key(row, index), prompt, gold, row))
    return Task(
        given.name,
        "questions",
        tuple(problems),
        sampling,
        given.chat_template,
        grader,
        scorer,
    )


def _loss_task(given: TaskSettings, sampling: SamplingSettings) -> Task:
    rows = _rows(given, None, None)
    problems = []
    for index, row in enumerate(rows):
        if not any(row.get(name) for name in ("messages", "text", "completion")):
            raise EvaluationError(
                f"a row of the task {given.name!r} has nothing to take the loss of",
                where=f"{given.path}, row {index + 1}",
                got="columns " + ", ".join(map(str, row)),
                expected="`text`; `prompt` and `completion`; or `messages`",
            )
        problems.append(Problem(problem_key(row, index), Prompt(""), "", row))
    return Task(given.name, "loss", tuple(problems), sampling, given.chat_template, "loss")


def _rows(given: TaskSettings, known: Benchmark | None, data_dir: str | None) -> list[Row]:
    if given.path is not None:
        path = given.path
    elif known is None:
        raise EvaluationError(
            f"the task {given.name!r} has no data", where="evaluation.tasks", expected="a `path`"
        )
    else:
        file = find_file(data_dir, known.files)
        if file is None and known.hub is None:
            raise EvaluationError(
                f"the data of {given.name!r} are not there",
                where=data_dir or "evaluation.data_dir is not set",
                expected=" or ".join(known.files) + " in it",
                hint="set evaluation.data_dir, or the task's `path`; this benchmark's licence or "
                "format keeps it from being fetched by itself (docs/evaluation.md)",
            )
        path = file if file is not None else str(known.hub)
    if known is not None and given.name == "livecodebench":
        if is_url(path):
            raise EvaluationError(
                "LiveCodeBench's files are not read from URLs",
                where=path,
                expected="a directory of the benchmark's data set on disk",
                hint="copy it, and set the task's `path`",
            )
        return [dict(p.row) for p in livecodebench.load_rows(path, limit=given.limit)]
    if known is None or known.has is None:
        return read_rows(path, given.limit)
    rows = [row for row in read_rows(path) if known.has(row)]
    if not rows:
        raise EvaluationError(
            f"none of the rows belongs to the test problems of {given.name!r}",
            where=path,
            expected="rows of the benchmark's test split",
            hint="for other rows, define a task of your own with type: questions",
        )
    return rows[: given.limit]


def _few_shot(
    given: TaskSettings, template: str, example: Callable[[Row, str], tuple[str, str]]
) -> Prompt:
    """A prompt of solved examples, which lacks but the question; empty where none are wanted.

    Args:
        given: The task.
        template: Of its user messages.
        example: Row and where it is -> question and answer.
    """
    if not given.few_shot:
        return Prompt("")
    if given.few_shot_path is None:
        raise EvaluationError(
            f"the task {given.name!r} has no file of examples",
            where="evaluation.tasks: few_shot_path",
            expected=f"a file with at least {given.few_shot} rows",
        )
    rows = read_rows(given.few_shot_path, given.few_shot)
    if len(rows) < given.few_shot:
        raise EvaluationError(
            f"the task {given.name!r} wants more examples than there are",
            where=given.few_shot_path,
            got=f"{len(rows)} rows",
            expected=f"{given.few_shot}",
        )
    solved = [
        example(row, f"{given.few_shot_path}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    examples = tuple((_filled(template, question), answer) for question, answer in solved)
    # Without a chat template nothing but the text tells a model where an answer ends: it would go
    # on with a question of its own, whose answer would then be graded.
    opening = template.partition("{question}")[0].strip()
    if any(character.isalpha() for character in opening):
        return Prompt("", examples=examples, stop=(f"\n\n{opening}",))
    return Prompt("", examples=examples, labelled=True, stop=(_NEXT_QUESTION,))


def gold_text(benchmark: str, row: Row) -> str:
    """A solved example's answer: the whole solution where the data have it."""
    for column in ("solution", "answer", "Answer"):
        if isinstance(row.get(column), str):
            return str(row[column])
    return gold_answer(benchmark, row)


def _question(name: str, row: Row, where: str, answer: str) -> str:
    """A benchmark's question as the Qwen2.5-Math toolkit asks it."""
    question = question_text(name, row)
    if question is None:
        parts = _QUESTION_PARTS.get(name)
        raise EvaluationError(
            f"a row of {name!r} has no question",
            where=where,
            got="columns " + ", ".join(map(str, row)),
            expected=" and ".join(parts) if parts else " or ".join(_QUESTION_COLUMNS),
        )
    # Solutions are never one of the words, and long to tidy up.
    is_word = len(answer) < 20
    word = canonical(answer, keep_units=keeps_units(name)).lower() if is_word else ""
    return question + _CHOICES.get(word, "")


def question_text(name: str, row: Row) -> str | None:
    """A benchmark's question as its row has it; None where it has none."""
    if name in _QUESTION_PARTS:
        body, question = (str(row.get(part) or "").strip() for part in _QUESTION_PARTS[name])
        if not body or not question:
            return None
        end = "." if name == "svamp" and not body.endswith(".") else ""
        return f"{body}{end} {question}"
    found = (str(row[column]).strip() for column in _QUESTION_COLUMNS if row.get(column))
    return next(found, None)


def _text(given: TaskSettings, row: Row, column: str, where: str) -> str:
    """Text of a column that a row of one's own data must have."""
    if row.get(column) in (None, ""):
        raise _no_column(given, row, column, where)
    return str(row[column])


def _filled(template: str, question: str) -> str:
    # Not str.format: templates hold braces of LaTeX.
    return template.replace("{question}", question)


def problem_key(row: Row, index: int) -> str:
    """A problem's name within its task: the row's number, and its own name where it has one."""
    for column in ("task_id", "unique_id", "question_id", "id", "idx"):
        value = row.get(column)
        if isinstance(value, (str, int)) and value != "":
            return f"{index}:{value}"
    return str(index)


def _sampling(
    given: TaskSettings, default: SamplingSettings, known: Benchmark | None
) -> SamplingSettings:
    values = {f.name: getattr(default, f.name) for f in dataclasses.fields(SamplingSettings)}
    # A benchmark's own protocol holds unless the configuration says otherwise, value by value.
    for name, value in (known.sampling if known is not None else {}).items():
        if values[name] == getattr(SamplingSettings(), name):
            values[name] = value
    for name in ("temperature", "top_p", "max_tokens", "repeats", "stop"):
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    return SamplingSettings(**values)


def _digest(task: Task) -> str:
    spec = GraderSpec(task.name, task.kind, task.grader, task.scorer)
    content = {
        **{name: getattr(task, name) for name in ("name", "kind", "chat", "grader", "scorer")},
        "sampling": dataclasses.asdict(task.sampling),
        "pass_at": task.pass_at,
        "grading": {} if task.kind == "loss" else grading_identity(spec),
        "problems": [dataclasses.asdict(problem) for problem in task.problems],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unknown(given: TaskSettings) -> EvaluationError:
    near = difflib.get_close_matches(given.name, BENCHMARKS, n=1)
    return EvaluationError(
        f"there is no benchmark {given.name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        where="evaluation.tasks",
        got=given.name,
        expected="one of " + ", ".join(BENCHMARKS) + "; or a task of your own with `path` and "
        "`type: questions` or `type: loss`",
    )


def _no_column(given: TaskSettings, row: Row, column: str, where: str) -> EvaluationError:
    near = difflib.get_close_matches(column, [str(name) for name in row], n=1)
    return EvaluationError(
        f"a row of the task {given.name!r} has no {column!r}",
        where=where,
        got="columns " + ", ".join(map(str, row)),
        expected=f"text in the column {column!r}",
        hint=(f"did you mean {near[0]!r}? " if near else "")
        + "set question_column and answer_column of the task",
    )
