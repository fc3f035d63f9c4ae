"""Benchmarks and data of one's own as tasks, and their prompts as token ids."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.encode import (
    completion_seed,
    encode_prompt,
    encode_sample,
    prompt_stops,
    render_prompt,
)
from arm_ray.evaluation.settings import EvaluationSettings, SamplingSettings, TaskSettings
from arm_ray.evaluation.tasks import BENCHMARKS, Prompt, Task, load_task, load_tasks
from tests.builders.models import save_tokenizer

GSM8K = [
    {"question": "What is 2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 5"},
    {"question": "What is 500 + 500?", "answer": "Easy.\n#### 1,000"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(*tasks: str | TaskSettings, **others: Any) -> EvaluationSettings:
    return EvaluationSettings(tasks, **others)


def questions(path: Path, **others: Any) -> Task:
    given = TaskSettings("mine", str(path), "questions", **others)
    return load_task(given, settings(given))


def test_a_benchmark_is_found_in_the_data_directory(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "test.jsonl", GSM8K)
    [task] = load_tasks(settings("gsm8k", data_dir=str(tmp_path)))
    assert (task.kind, task.metrics) == ("math", ("strict", "qwen_compat"))
    assert task.repeats == 5
    first = task.problems[0]
    assert first.gold == "5"
    assert first.prompt.user == (
        "What is 2 + 3?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert first.prompt.system is None


def test_a_limit_takes_the_first_problems(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", GSM8K)
    given = TaskSettings("gsm8k", str(file), limit=1)
    assert [p.gold for p in load_task(given, settings(given)).problems] == ["5"]


def test_one_s_own_questions(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", [{"q": "1 + 1 {x}", "a": 2}])
    task = questions(file, question_column="q", answer_column="a", template="Q: {question}\nA:")
    assert task.metrics == ("strict", "qwen_compat")
    assert (task.problems[0].prompt.user, task.problems[0].gold) == ("Q: 1 + 1 {x}\nA:", "2")
    exact = questions(file, question_column="q", answer_column="a", grader="exact")
    assert (exact.metrics, exact.problems[0].prompt.user) == (("score",), "1 + 1 {x}")


def test_settings_of_a_task_go_before_those_of_all(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", GSM8K)
    given = TaskSettings("gsm8k", str(file), temperature=0.0, max_tokens=10, stop=("\n",))
    sampling = load_task(given, settings(given)).sampling
    assert sampling == SamplingSettings(0.0, 0.8, 10, 5, 0, ("\n",))
    assert load_task(given, settings(given)).repeats == 1


def test_few_shot_examples_are_turns_before_the_question(tmp_path: Path) -> None:
    file = write(tmp_path / "test.jsonl", GSM8K)
    given = TaskSettings(
        "gsm8k", str(file), few_shot=1, few_shot_path=str(file), template="{question}"
    )
    prompt = load_task(given, settings(given)).problems[1].prompt
    assert prompt.examples == (("What is 2 + 3?", GSM8K[0]["answer"]),)
    more = TaskSettings("gsm8k", str(file), few_shot=3, few_shot_path=str(file))
    with pytest.raises(EvaluationError, match="more examples than there are"):
        load_task(more, settings(more))
    with pytest.raises(EvaluationError, match="no file of examples"):
        load_task(TaskSettings("gsm8k", str(file), few_shot=1), settings("gsm8k"))


def test_examples_are_asked_as_the_question_is(tmp_path: Path) -> None:
    file = str(write(tmp_path / "q.jsonl", GSM8K))
    task = questions(Path(file), grader="exact", few_shot=1, few_shot_path=file)
    assert task.problems[1].prompt.examples == (("What is 2 + 3?", GSM8K[0]["answer"]),)
    rows = [{"body": "Ann has 2 pens.", "question": "How many?", "answer": "2 (pens)"}]
    file = str(write(tmp_path / "asdiv.jsonl", rows))
    given = TaskSettings("asdiv", file, few_shot=1, few_shot_path=file)
    prompt = load_task(given, settings(given)).problems[0].prompt
    assert prompt.examples == ((prompt.user, "2 (pens)"),)
    assert prompt.user.startswith("Ann has 2 pens. How many?\nPlease reason")


def test_examples_without_an_answer_are_told(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text("def score(completion, row):\n    return 1\n")
    file = str(write(tmp_path / "q.jsonl", [{"question": "why?"}]))
    scorer = f"{tmp_path}/scorer.py:score"
    assert len(questions(Path(file), scorer=scorer).problems) == 1
    with pytest.raises(EvaluationError, match=r"(?s)no 'answer'.*q\.jsonl, row 1"):
        questions(Path(file), scorer=scorer, few_shot=1, few_shot_path=file)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(GSM8K), file)
    elif suffix == ".json":
        file.write_text(json.dumps(GSM8K, indent=1))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in GSM8K).encode()
        file.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    given = TaskSettings("gsm8k", str(file))
    assert [p.gold for p in load_task(given, settings(given)).problems] == ["5", "1,000"]


def test_the_digest_changes_with_what_is_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", GSM8K)
    base = questions(file)
    assert questions(file).digest == base.digest
    changed = [
        questions(file, limit=1),
        questions(file, template="{question}!"),
        questions(file, max_tokens=7),
        questions(file, grader="number"),
    ]
    assert len({base.digest, *(task.digest for task in changed)}) == 5


def test_the_digest_changes_with_the_scorer_and_the_graders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "q.jsonl", GSM8K)
    scorer = tmp_path / "scorer.py"

    def digests(value: int) -> tuple[str, str]:
        scorer.write_text(f"def score(completion, row):\n    return {value}\n")
        return questions(file, scorer=f"{scorer}:score").digest, questions(file).digest

    scored, math = digests(0)
    assert digests(0) == (scored, math)
    assert digests(1)[0] != scored
    assert digests(1)[1] == math
    monkeypatch.setattr("arm_ray.evaluation.graders.metadata.version", lambda _name: "0.0")
    assert digests(0)[0] == scored
    assert digests(0)[1] != math
    monkeypatch.setattr("arm_ray.evaluation.graders.GRADING_VERSION", -1)
    assert digests(0)[0] != scored


def test_a_scorer_is_loaded_with_the_task_from_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "q.jsonl", GSM8K)
    (tmp_path / "scorer.py").write_text("score = 3\ndef right(completion, row):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    assert questions(file, scorer="scorer.py:right").scorer == f"{tmp_path}/scorer.py:right"
    for wrong in ("nowhere.py:right", "scorer.py:rihgt", "scorer.py:score", "scorer"):
        with pytest.raises(EvaluationError, match="scorer cannot be loaded"):
            questions(file, scorer=wrong)


@pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "a\\b"])
def test_a_task_s_name_must_do_for_files(tmp_path: Path, name: str) -> None:
    file = str(write(tmp_path / "q.jsonl", GSM8K))
    given = TaskSettings(name, file, "questions")
    with pytest.raises(EvaluationError, match="name is used for files"):
        load_task(given, settings(given))


def test_mbpp_is_its_test_problems(tmp_path: Path) -> None:
    rows = [
        {"task_id": task_id, "prompt": "Add.", "code": "def f():\n    pass", "test_list": ["f()"]}
        for task_id in (2, 11, 510, 511, 600)
    ]
    file = str(write(tmp_path / "mbpp.jsonl", rows))

    def ids(given: TaskSettings) -> list[Any]:
        return [p.row.get("task_id") for p in load_task(given, settings(given)).problems]

    assert ids(TaskSettings("mbpp", file)) == [11, 510]
    assert ids(TaskSettings("mbpp", file, limit=1)) == [11]
    own = TaskSettings("mbpp", file, "questions", question_column="prompt", answer_column="code")
    assert len(ids(own)) == 5
    without = [{name: row[name] for name in row if name != "task_id"} for row in rows]
    assert len(ids(TaskSettings("mbpp", str(write(tmp_path / "n.jsonl", without))))) == 5
    write(tmp_path / "mbpp.jsonl", rows[:1])
    with pytest.raises(EvaluationError, match="none of the rows"):
        ids(TaskSettings("mbpp", file))


LCB_ROW = {
    "question_content": "Print 1.",
    "question_id": "a",
    "contest_date": "2024-01-01T00:00:00",
    "starter_code": "",
    "public_test_cases": "[]",
    "private_test_cases": '[{"input": "", "output": "1", "testtype": "stdin"}]',
    "metadata": "{}",
}


def test_a_protocol_holds_value_by_value(tmp_path: Path, tokenizer: Any) -> None:
    file = str(write(tmp_path / "lcb.jsonl", [LCB_ROW]))

    def task(**sampling: Any) -> Task:
        given = TaskSettings("livecodebench", file)
        return load_task(given, settings(given, sampling=SamplingSettings(**sampling)))

    assert task().sampling == SamplingSettings(0.2, 0.95, 2000, 10)
    assert task(seed=1).sampling == SamplingSettings(0.2, 0.95, 2000, 10, 1)
    assert task(temperature=0.5, repeats=3).sampling == SamplingSettings(0.5, 0.95, 2000, 3)
    prompt = task().problems[0].prompt
    assert prompt_stops(tokenizer, prompt, "off", "t") == ("###",)
    assert prompt_stops(tokenizer, prompt, "auto", "t") == ()
    assert task(stop=("x",)).problems[0].prompt.stop == ()


@pytest.mark.parametrize(
    ("gold", "added"),
    [
        ("Yes.", " (Yes or No)"),
        ("$no$", " (Yes or No)"),
        ("True", " (True or False)"),
        ("No solution", ""),
        ("7", ""),
    ],
)
def test_two_choices_are_named_as_the_toolkit_does(tmp_path: Path, gold: str, added: str) -> None:
    file = str(write(tmp_path / "c.jsonl", [{"question": "Is it?", "answer": gold}]))
    given = TaskSettings("college_math", file)
    prompt = load_task(given, settings(given)).problems[0].prompt
    assert prompt.user.startswith(f"Is it?{added}\n")
    # Of one's own questions nothing is known.
    assert questions(Path(file)).problems[0].prompt.user.startswith("Is it?\n")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (TaskSettings("gsm9k"), "did you mean 'gsm8k'"),
        (TaskSettings("gsm8k", "/nowhere/test.jsonl"), "cannot be had"),
        (TaskSettings("olympiadbench"), "data of 'olympiadbench' are not there"),
        (TaskSettings("mine", type="questions"), "has no data"),
        (
            TaskSettings("mine", "{q}", "questions", question_column="qestion"),
            "did you mean 'question'",
        ),
        (
            TaskSettings("mine", "{q}", "questions", scorer="a.py:f", grader="exact"),
            "`scorer` together",
        ),
        (TaskSettings("mine", "{q}", "loss"), "nothing to take the loss of"),
        (TaskSettings("mine", "{bad}", "questions"), "line 2"),
        (TaskSettings("mine", "{empty}", "questions"), "empty"),
        (TaskSettings("mine", "{text}", "questions"), "kind that is not read"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, task: TaskSettings, words: str) -> None:
    write(tmp_path / "q.jsonl", GSM8K)
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.txt").write_text("hello")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("q", "bad", "empty")}
    files["text"] = str(tmp_path / "text.txt")
    given = dataclasses.replace(task, path=task.path.format(**files)) if task.path else task
    with pytest.raises(EvaluationError, match=words):
        load_tasks(settings(given, data_dir=str(tmp_path)))


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    file = str(write(tmp_path / "q.jsonl", GSM8K))
    tasks = [TaskSettings("gsm8k", file), TaskSettings("gsm8k", file, limit=1)]
    with pytest.raises(EvaluationError, match="the same name"):
        load_tasks(settings(*tasks))


def test_every_benchmark_of_the_paper_is_known() -> None:
    paper = {"gsm8k", "math500", "olympiadbench", "college_math", "minerva_math"}
    code = {"humaneval", "mbpp", "humaneval_pro", "mbpp_pro", "livecodebench"}
    assert paper | code <= set(BENCHMARKS)
    assert {BENCHMARKS[name].kind for name in code} == {"code"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    loaded = AutoTokenizer.from_pretrained(path)
    loaded.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return loaded


def test_a_prompt_goes_through_the_chat_template(tokenizer: Any) -> None:
    prompt = Prompt(" 2 + 3? ", "Be brief.", "It is", (("1 + 1?", "2"),))
    text, has_specials = render_prompt(tokenizer, prompt, "auto", "t")
    assert has_specials
    assert text == (
        "<|im_start|>system Be brief.<|im_end|><|im_start|>user 1 + 1?<|im_end|>"
        "<|im_start|>assistant 2<|im_end|><|im_start|>user 2 + 3?<|im_end|>"
        "<|im_start|>assistant It is"
    )
    ids = encode_prompt(tokenizer, prompt, "auto", "t")
    assert tokenizer.decode(ids) == text
    # The template's special tokens are single tokens, and none is added.
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5


def test_without_a_chat_template_the_text_is_as_it_is(tokenizer: Any) -> None:
    prompt = Prompt("2 + 3 =", examples=(("1 + 1 =", "2"),))
    text, has_specials = render_prompt(tokenizer, prompt, "off", "t")
    assert (text, has_specials) == ("1 + 1 =\n2\n\n2 + 3 =", False)


def test_examples_end_where_the_next_question_would_begin(tokenizer: Any, tmp_path: Path) -> None:
    file = str(write(tmp_path / "q.jsonl", [{"question": "2?", "answer": "1\n\n#### 3"}]))

    def rendered(template: str | None) -> tuple[str, tuple[str, ...]]:
        task = questions(
            Path(file), grader="exact", few_shot=1, few_shot_path=file, template=template
        )
        prompt = task.problems[0].prompt
        assert prompt_stops(tokenizer, prompt, "auto", "t") == ()
        text, _ = render_prompt(tokenizer, prompt, "off", "t")
        return text, prompt_stops(tokenizer, prompt, "off", "t")

    text, stops = rendered(None)
    assert text == "Question: 2?\nAnswer: 1\n\n#### 3\n\n\nQuestion: 2?\nAnswer:"
    assert stops == ("\n\nQuestion:",)
    text, stops = rendered("Q: {question}\nA: ")
    assert text == "Q: 2?\nA: 1\n\n#### 3\n\nQ: 2?\nA: "
    assert stops == ("\n\nQ:",)
    # Each stop does occur where the next question begins, and not in an answer.
    for text, stops in (rendered(None), rendered("Q: {question}\nA: ")):
        assert text.count(stops[0]) == 1
    assert questions(Path(file)).problems[0].prompt.stop == ()


def test_a_template_that_is_not_there_or_fails_is_told(tokenizer: Any, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    plain.chat_template = None
    assert render_prompt(plain, Prompt("a"), "auto", "t") == ("a", False)
    with pytest.raises(EvaluationError, match="tokenizer has none"):
        encode_prompt(plain, Prompt("a"), "on", "task x")
    plain.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(EvaluationError, match="no system here"):
        encode_prompt(plain, Prompt("a"), "on", "task x")


def test_only_the_completion_of_a_sample_counts(tokenizer: Any) -> None:
    ids, first = encode_sample(tokenizer, {"prompt": "red apples", "completion": " and two"}, "t")
    assert tokenizer.decode(ids[:first]) == "red apples"
    assert tokenizer.decode(ids[first:]) == " and two<|im_end|>"
    ids, first = encode_sample(tokenizer, {"text": "red apples"}, "t")
    assert (tokenizer.decode(ids), first) == ("red apples", 1)
    messages = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "red"}]
    ids, first = encode_sample(tokenizer, {"messages": messages}, "t")
    assert tokenizer.decode(ids[first:]) == "red<|im_end|>"


def test_seeds_differ_by_problem_and_repeat_alone() -> None:
    seeds = {completion_seed(0, problem, r) for problem in "abc" for r in range(5)}
    assert len(seeds) == 15
    assert completion_seed(0, "a", 1) == completion_seed(0, "a", 1) != completion_seed(1, "a", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
