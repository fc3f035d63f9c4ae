"""Task files, and recorded evaluations."""

from __future__ import annotations

import gzip
import json
import os
from typing import Any

from tests.refusals.place import Malformed, Place

_QUIZ = json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n"


def quiz(
    content: str | bytes, name: str = "quiz.jsonl", where: str | None = None, **keys: Any
) -> Malformed:
    """An evaluation on a task of this content."""

    def make(place: Place) -> list[str]:
        path = place.file(name, content)
        return place.evaluate([{"name": "quiz", "type": "questions", "path": str(path), **keys}])

    return Malformed(make, where=where)


def task(where: str, **keys: Any) -> Malformed:
    return Malformed(lambda place: place.evaluate([keys]), where=where)


def _made(place: Place, make: Any, name: str = "quiz.jsonl") -> list[str]:
    make(place.root / name)
    path = str(place.root / name)
    return place.evaluate([{"name": "quiz", "type": "questions", "path": path}])


def _scorer(text: str, name: str = "scorer.py:score") -> Malformed:
    def make(place: Place) -> list[str]:
        quiz_file = place.file("quiz.jsonl", _QUIZ)
        place.file("scorer.py", text)
        given = {"grader": "python", "scorer": str(place.root / name)}
        found = {"name": "quiz", "type": "questions", "path": str(quiz_file), **given}
        return place.evaluate([found])

    return Malformed(make, where=".py")


def _benchmark(name: str, file: str, content: str | bytes, where: str | None = None) -> Malformed:
    def make(place: Place) -> list[str]:
        place.file(f"data/{file}", content)
        section = {"tasks": [name], "data_dir": str(place.root / "data")}
        return place.evaluate([name], evaluation=section)

    return Malformed(make, where=where)


def _parquet(question: str, count: int) -> Malformed:
    """Rows that are alike, which take next to nothing."""

    def make(place: Place) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        words = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [question])
        pq.write_table(pa.table({"question": words, "answer": words}), place.root / "quiz.parquet")
        path = str(place.root / "quiz.parquet")
        return place.evaluate([{"name": "quiz", "type": "questions", "path": path}])

    return Malformed(make, says="it has more than")


def _piped(file: str) -> Malformed:
    def make(place: Place) -> list[str]:
        path = place.root / "data" / file
        path.parent.mkdir(parents=True)
        os.mkfifo(path)
        return place.evaluate([{"name": "livecodebench", "path": str(path)}])

    return Malformed(make)


CASES: dict[str, Malformed] = {
    "not there": task("none.jsonl", name="quiz", type="questions", path="/tmp/none.jsonl"),
    "no path": task("evaluation.tasks", name="quiz", type="questions"),
    "an unknown name": task("evaluation.tasks", name="gsm9k"),
    "a name with a slash": task("evaluation.tasks", name="../x", type="questions", path="y"),
    "a name with a newline": task("evaluation.tasks", name="a\nb", type="questions", path="y"),
    "a name of 5000 characters": task("evaluation.tasks", name="x" * 5000, type="loss", path="y"),
    "a name twice": Malformed(
        lambda place: place.evaluate(
            [
                {"name": "quiz", "type": "questions", "path": str(place.file("a.jsonl", _QUIZ))},
                {"name": "quiz", "type": "questions", "path": str(place.file("b.jsonl", _QUIZ))},
            ]
        ),
        where="evaluation.tasks",
    ),
    "empty": quiz(""),
    "no JSON": quiz("seven\n"),
    "a list in a line": quiz("[1]\n"),
    "a row cut off": quiz(_QUIZ + '{"question": '),
    "no UTF-8": quiz(b'{"question": "\xff"}\n'),
    "brackets": quiz("[" * 100_000 + "\n"),
    "an array of brackets": quiz("[" * 100_000, "quiz.json"),
    "an array that is cut off": quiz('[{"question": "a"', "quiz.json"),
    "an array of numbers": quiz("[1, 2]", "quiz.json"),
    "an array that is empty": quiz("[]", "quiz.json"),
    "an integer of ten thousand digits": quiz('{"question": ' + "9" * 10_000 + "}\n"),
    "gzip that is none": quiz(_QUIZ, "quiz.jsonl.gz"),
    "gzip cut off": quiz(gzip.compress(_QUIZ.encode() * 500)[:-20], "quiz.jsonl.gz"),
    "gzip damaged": quiz(gzip.compress(_QUIZ.encode() * 500)[:20] + b"\xff" * 30, "quiz.jsonl.gz"),
    "a packed bomb": quiz(gzip.compress(bytes(1 << 29), 9), "quiz.jsonl.gz"),
    "blank lines without an end": quiz("\n" * (1 << 25)),
    "Parquet of a million equal rows": _parquet("seven", 1_000_000),
    "Parquet of a text that is repeated": _parquet("x" * (1 << 20), 20_000),
    "Parquet that is none": quiz(_QUIZ, "quiz.parquet"),
    "Parquet of zeros": quiz(b"PAR1" + bytes(500) + b"PAR1", "quiz.parquet"),
    "a file of an unknown kind": quiz(_QUIZ, "quiz.csv"),
    "no questions": quiz('{"answer": "2"}\n'),
    "no answers": quiz('{"question": "2"}\n'),
    "a question that is null": quiz('{"question": null, "answer": "2"}\n'),
    "a column that is not there": quiz(_QUIZ, question_column="problem"),
    "a pipe": Malformed(lambda place: _made(place, os.mkfifo)),
    "Parquet that is a pipe": Malformed(lambda place: _made(place, os.mkfifo, "quiz.parquet")),
    "Parquet that is a device": Malformed(
        lambda place: _made(place, lambda p: p.symlink_to("/dev/zero"), "quiz.parquet")
    ),
    "a device": Malformed(lambda place: _made(place, lambda p: p.symlink_to("/dev/zero"))),
    "a directory": Malformed(lambda place: _made(place, lambda p: p.mkdir())),
    "a link to itself": Malformed(lambda place: _made(place, lambda p: p.symlink_to(p.name))),
    "loss: nothing to take it of": Malformed(
        lambda place: place.evaluate(
            [{"name": "held", "type": "loss", "path": str(place.file("a.jsonl", '{"x": 1}\n'))}]
        )
    ),
    "loss: rows of numbers": Malformed(
        lambda place: place.evaluate(
            [{"name": "held", "type": "loss", "path": str(place.file("a.jsonl", "5\n"))}]
        )
    ),
    "a scorer that is not there": _scorer("", "none.py:score"),
    "a scorer without a function": _scorer("x = 1\n"),
    "a scorer that is no Python": _scorer("def score(:\n"),
    "a scorer that raises": _scorer("raise RuntimeError('not today')\n"),
    "a scorer that is a number": _scorer("score = 5\n"),
    "a scorer without a name": _scorer("def score(a, b): return 1\n", "scorer.py"),
    "few-shot examples without a file": quiz(_QUIZ, where="few_shot_path", few_shot=9),
    "few-shot examples that are not there": quiz(
        _QUIZ, where="none-at-all", few_shot=1, few_shot_path="/tmp/none-at-all.jsonl"
    ),
    "gsm8k: other columns": _benchmark("gsm8k", "gsm8k/test.jsonl", '{"a": 1}\n', where="gsm8k"),
    "gsm8k: an answer that is a list": _benchmark(
        "gsm8k", "gsm8k/test.jsonl", '{"question": "a", "answer": [1]}\n', where="gsm8k"
    ),
    "humaneval: other columns": _benchmark(
        "humaneval", "humaneval/HumanEval.jsonl", '{"a": 1}\n', where=""
    ),
    "humaneval: numbers for code": _benchmark(
        "humaneval",
        "humaneval/HumanEval.jsonl",
        '{"task_id": 1, "prompt": 2, "test": 3, "entry_point": 4}\n',
        where="",
    ),
    "mbpp: tests that are a number": _benchmark(
        "mbpp",
        "mbpp/mbpp.jsonl",
        '{"task_id": 11, "text": "a", "code": "b", "test_list": 5}\n',
        where="",
    ),
    "livecodebench: other columns": _benchmark(
        "livecodebench", "livecodebench/test.jsonl", '{"a": 1}\n'
    ),
    "livecodebench: a pipe": _piped("livecodebench/test.jsonl"),
    "livecodebench: no UTF-8": _benchmark(
        "livecodebench", "livecodebench/test.jsonl", b"\xff\xfe\n"
    ),
    "livecodebench: brackets": _benchmark(
        "livecodebench", "livecodebench/test.jsonl", "[" * 100_000 + "\n"
    ),
    "livecodebench: a directory of other files": Malformed(
        lambda place: place.evaluate(
            [{"name": "livecodebench", "path": str(place.file("x/a.txt").parent)}]
        )
    ),
    "olympiadbench: no data": Malformed(
        lambda place: place.evaluate(
            ["olympiadbench"],
            evaluation={"tasks": ["olympiadbench"], "data_dir": str(place.root)},
        )
    ),
}
