"""Tasks of lm-evaluation-harness with local data, and how the harness runs them."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks._index import TaskIndex

from arm_ray.evaluation.lm_eval_tasks import OpenTasks
from tests.builders.models import WORDS

CONTEXT = 64


def write_tasks(root: Path) -> Path:
    """Task files with local data, one of each kind: `choices`, `texts`, `answers`; `all` is all."""
    choose = random.Random(5)
    data = root / "data"
    data.mkdir(parents=True)

    def some(low: int, high: int) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(low, high)))

    rows: dict[str, list[dict[str, Any]]] = {
        # The last question is longer than the context.
        "choices": [
            {"question": some(1, 3), "options": [some(1, 2), some(1, 2), "in"], "label": i % 3}
            for i in range(11)
        ]
        + [{"question": some(60, 60), "options": ["red", "two green", "in"], "label": 2}],
        "texts": [{"text": some(2, 90)} for _ in range(6)],
        "answers": [{"question": some(1, 4), "answer": some(1, 1)} for _ in range(5)],
    }
    definitions: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "label",
            "doc_to_choice": "options",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("acc", "acc_norm")
            ],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {"metric": "word_perplexity", "higher_is_better": False, "aggregation": how}
                for how in ("weighted_perplexity",)
            ],
        },
        "answers": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}} =",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["left"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        },
    }
    for name, definition in definitions.items():
        for split in ("test", "train"):
            text = "".join(json.dumps(row) + "\n" for row in rows[name])
            (data / f"{name}-{split}.json").write_text(text)
        write_task(root, name, **definition)
    write_task(root, "shots", **definitions["answers"], training_split="train")
    sampled = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 0.8}
    write_task(root, "sampled", **{**definitions["answers"], "generation_kwargs": sampled})
    group = {"group": "all", "task": ["choices", "texts", "answers"]}
    (root / "all.yaml").write_text(yaml.dump(group))
    return root


def write_task(root: Path, name: str, **content: Any) -> None:
    data = "answers" if name in ("shots", "sampled") else name
    files = {split: str(root / "data" / f"{data}-{split}.json") for split in ("test", "train")}
    base: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(root / "cache")},
        "test_split": "test",
    }
    (root / f"{name}.yaml").write_text(yaml.dump({**base, **content}))


def read_index_once(patch: pytest.MonkeyPatch) -> None:
    """Spare each test the 4 s in which lm_eval reads the 14,000 task files of its own."""
    patch.setattr(
        TaskIndex, "build", staticmethod(lambda paths: {**own_index(), **read_index(paths[1:])})
    )


read_index = TaskIndex.build


@functools.cache
def own_index() -> dict[str, Any]:
    found: dict[str, Any] = read_index([Path(lm_eval.__file__).parent / "tasks"])
    return found


def asked(*arguments: Any, kind: Any = "loglikelihood", doc: int = 0, idx: int = 0) -> Instance:
    return Instance(kind, {}, tuple(arguments), idx, ("tried", doc, 1))


def harness(lm: Any, tasks: OpenTasks, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks.names),
        task_manager=tasks,
        bootstrap_iters=10,
        log_samples=True,
        **options,
    )
    return found
