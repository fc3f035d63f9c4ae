"""What is disturbed: jobs on tiny models, their reference, and how both are compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from arm_ray.evaluation.records import read_records
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.real_models import calibration_texts, moved_copy, real_base
from tests.builders.training import content as training_content
from tests.builders.training import make_base, make_rows

# Digest of each thing that a job leaves, by its name.
Result = Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """One kind of job.

    Attributes:
        name: `merge`, `attach`, `sft`.
        root: Where its inputs are and its outputs go.
        variants: Overrides that runs take in turn, on which the result does not depend; the first
            is the reference's.
        victims: The kinds of processes that it has.
    """

    name: str
    root: Path
    variants: Sequence[Sequence[str]]
    victims: Sequence[str]

    def command(self, output: str, number: int) -> list[str]:
        """Arguments of the command line for a run with this output; runs count from 1."""
        variant = self.variants[number % len(self.variants)]
        return [self.name, str(self._config(output)), *variant]

    def undisturbed(self) -> list[str]:
        """The same for the reference."""
        return [self.name, str(self._config("undisturbed")), *self.variants[0]]

    def _config(self, output: str) -> Path:
        path = self.root / f"{output}.yaml"
        content = yaml.safe_load((self.root / "job.yaml").read_text())
        path.write_text(yaml.safe_dump(_placed(content, str(self.root / output))))
        return path

    def result(self, output: str) -> Result:
        """What a run has left."""
        found = dict(_RESULTS[self.name](self.root / output))
        assert found, f"{output} has left nothing to compare"
        return found

    def events(self, output: str) -> Path:
        """Where a run writes its events."""
        run = self.root / output
        return (run / "work" if self.name == "attach" else run) / "events.jsonl"


def _placed(content: Any, output: str) -> Any:
    """The content with this output in the place of `OUTPUT`."""
    if isinstance(content, dict):
        return {key: _placed(value, output) for key, value in content.items()}
    if isinstance(content, list):
        return [_placed(value, output) for value in content]
    return content.replace("OUTPUT", output) if isinstance(content, str) else content


def merge_job(root: Path) -> Job:
    """A merge of twelve iterations whose states are scored by an engine and a grader."""
    root.mkdir(parents=True, exist_ok=True)
    case = MergeCase(root / "inputs").make(num_layers=6, rows=48, sizes=SERVED)
    rows = [{"question": f"{i} red apples and", "answer": str(i)} for i in range(20)]
    questions = case.root / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = case.content("OUTPUT") | {"output": "OUTPUT"}
    content["schedule"] |= {"max_iterations": 12}
    content["runtime"] |= {"max_recoveries": 1000, "placement_timeout_s": 120}
    content["evaluation"] = {
        "tasks": [
            {
                "name": "asked",
                "type": "questions",
                "path": str(questions),
                "max_tokens": 6,
                "repeats": 1,
            },
            {"name": "held", "type": "loss", "path": str(case.root / "calibration.jsonl")},
        ],
        "every": 3,
        "engine": {"max_model_len": 128, "dtype": "float32", "chunk_size": 8},
        "resamples": 100,
    }
    (root / "job.yaml").write_text(yaml.safe_dump(content))
    variants = [
        ("runtime.layer_shards=1",),
        ("runtime.layer_shards=2", "runtime.storage=per_node", "keep_states=last"),
        ("runtime.layer_shards=3", "keep_states=none"),
        ("runtime.layer_shards=3", "runtime.storage=per_node", "runtime.partition=looped"),
        ("runtime.layer_shards=2", "runtime.transport=object_store"),
    ]
    # Of all of these, and more often those that a run survives by itself.
    victims = (
        *("layer shard", "raylet", "evaluator", "grader", "files of a node", "driver"),
        *("control store", "whole cluster", "layer shard", "raylet", "evaluator", "layer shard"),
    )
    return Job("merge", root, variants, victims)


def _merge_results(run: Path) -> Iterator[tuple[str, str]]:
    yield from _weights(run / "model", "model")
    for scored in sorted((run / "evaluation").glob("*/*.parquet")):
        rows = json.dumps([vars(row) for row in read_records(scored.parent, scored.stem)])
        yield f"{scored.parent.name}/{scored.stem}", _digest(rows.encode())


def smollm2_job(root: Path) -> Job:
    """A merge of SmolLM2-135M with two copies, by two layer shards."""
    root.mkdir(parents=True, exist_ok=True)
    base = real_base(root / "base")
    content = {
        "base": str(base),
        "candidates": [str(moved_copy(base, root / f"copy{seed}", seed)) for seed in (1, 2)],
        "output": "OUTPUT",
        "calibration": {
            "path": str(calibration_texts(root / "texts.jsonl")),
            "batch_size": 4,
            "max_length": 64,
        },
        "schedule": {
            "anchor_iterations": 2,
            "max_iterations": 6,
            "tolerance": 0.0,
            "step": "fixed",
        },
        "runtime": {"max_recoveries": 1000, "placement_timeout_s": 120},
    }
    (root / "job.yaml").write_text(yaml.safe_dump(content))
    variants = [("runtime.layer_shards=1",), ("runtime.layer_shards=2", "runtime.storage=per_node")]
    victims = ("layer shard", "raylet", "files of a node", "driver", "whole cluster")
    return Job("merge", root, variants, victims)


def attach_job(root: Path, count: int = 6) -> Job:
    """A run of checkpoints, all of them there at the start, that is followed to its end."""
    root.mkdir(parents=True, exist_ok=True)
    case = MergeCase(root / "inputs").make(count=count, num_layers=4, sizes=SERVED)
    run = root / "train"
    run.mkdir()
    for number, path in enumerate(case.candidates, start=1):
        state = {"global_step": 10 * number, "max_steps": 10 * count}
        (path / "trainer_state.json").write_text(json.dumps(state))
        path.rename(run / path.name)
    content = {
        "run": {"path": str(run), "poll_s": 0.2, "idle_timeout_s": 120.0, "start": "all"},
        "merge": {
            "base": str(case.root / "base"),
            "calibration": {
                "path": str(case.root / "calibration.jsonl"),
                "batch_size": 8,
                "max_length": 32,
            },
            "runtime": {"layer_shards": 2, "max_recoveries": 1000, "micro_batch_tokens": 96},
        },
        "publish": {"dir": "OUTPUT", "promote": "always"},
    }
    (root / "job.yaml").write_text(yaml.safe_dump(content))
    variants = [(), ("merge.runtime.transport=object_store",)]
    return Job("attach", root, variants, ("driver", "layer shard"))


def _attach_results(published: Path) -> Iterator[tuple[str, str]]:
    for link in ("best", "latest"):
        if (published / link).is_symlink():
            yield link, os.readlink(published / link)
    for model in sorted(published.glob("step-*")):
        yield from _weights(model, model.name)


def sft_job(root: Path) -> Job:
    """Fine-tuning by two workers."""
    root.mkdir(parents=True, exist_ok=True)
    base, data = make_base(root / "base"), make_rows(root / "rows.jsonl")
    content = training_content(base, data, Path("OUTPUT"))
    content |= {"steps": 24, "save_steps": [6, 12, 18, 24], "micro_batch_size": 2}
    content["runtime"] |= {"workers": 2, "max_failures": 100}
    (root / "job.yaml").write_text(yaml.safe_dump(content))
    return Job("sft", root, [()], ("training worker",))


def _sft_results(output: Path) -> Iterator[tuple[str, str]]:
    for checkpoint in sorted(output.glob("checkpoint-*")):
        yield from _weights(checkpoint, checkpoint.name)


_RESULTS = {"merge": _merge_results, "attach": _attach_results, "sft": _sft_results}


def _weights(model: Path, name: str) -> Iterator[tuple[str, str]]:
    for file in sorted(model.glob("*.safetensors")):
        yield f"{name}/{file.name}", _digest(file.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
