"""What decides whether a model is scored again: the same for benchmarks and lm_eval's tasks."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arm_ray.evaluation.engine import ModelSource
from arm_ray.evaluation.settings import EngineSettings, EvaluationSettings, TaskSettings
from arm_ray.evaluation.tasks import load_tasks
from arm_ray.runtime.scoring import lm_eval
from arm_ray.runtime.scoring.requests import KnownScores
from arm_ray.runtime.scoring.subject import Subject, engine_kind
from tests.builders.merge_case import MergeCase
from tests.doubles.said import reporter_into

# Another value of each key, so that a new key is looked at here.
OTHER: dict[str, Any] = {
    "replicas": 2,
    "tensor_parallel": 2,
    "gpus_per_engine": 0.5,
    "cpus_per_engine": 2,
    "resources": {"here": 1.0},
    "dtype": "float32",
    "max_model_len": 48,
    "gpu_memory_utilization": 0.5,
    "kv_cache_gb": 2.0,
    "max_num_seqs": 3,
    "chunk_size": 5,
    "enforce_eager": True,
    "options": {"block_size": 16},
    "placement_timeout_s": 1.0,
    "timeout_s": 1.0,
}
WITHOUT_INFLUENCE = {
    "replicas", "gpus_per_engine", "resources", "placement_timeout_s", "timeout_s",
}  # fmt: skip


def digests(case: MergeCase, engine: EngineSettings) -> tuple[str, str]:
    """Of a held-out loss, and of a task of lm_eval."""
    task = TaskSettings("held", type="loss", path=str(case.root / "calibration.jsonl"))
    settings = EvaluationSettings((task,), engine=engine)
    base = str(case.root / "base")
    subject = Subject("base", ModelSource(base), base, "weights")
    [loaded] = load_tasks(settings)
    ours = KnownScores(settings, [loaded], Path("nowhere")).digest(loaded, subject)
    opened: Any = SimpleNamespace(digest=lambda _limit: "definitions")
    options = lm_eval.LmEvalOptions(("choices",))
    run = lm_eval._Run(settings, options, opened, Path("nowhere"), reporter_into([]))
    return ours, run.digest(subject)


@pytest.fixture
def base(case: MergeCase) -> MergeCase:
    return case.make(count=0)


def test_each_key_of_the_engine_decides_for_both_or_for_neither(base: MergeCase) -> None:
    assert set(OTHER) == {field.name for field in fields(EngineSettings)}
    before = digests(base, EngineSettings())
    for name, value in OTHER.items():
        after = digests(base, replace(EngineSettings(), **{name: value}))
        expected = name not in WITHOUT_INFLUENCE
        assert [new != old for new, old in zip(after, before, strict=True)] == [expected] * 2, name


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ],
)
def test_each_file_of_a_tokenizer_counts(base: MergeCase, name: str) -> None:
    """For lm_eval's numbers, and for which model goes into the engine of another one."""
    directory = str(base.root / "base")
    kind, [_, of_lm_eval] = engine_kind(directory, directory), digests(base, EngineSettings())
    file = base.root / "base" / name
    # A tokenizer that reads the same: more space after it.
    file.write_bytes((file.read_bytes() if file.is_file() else b"{}") + b"\n")
    assert engine_kind(directory, directory) != kind
    assert digests(base, EngineSettings())[1] != of_lm_eval
