"""New weights in a running vLLM engine against an engine started anew, SmolLM2-135M, bf16.

Each fresh engine is a process of its own, as an actor is. Timed are the start of the engine with
the weights (with and without Python's imports before it), and `Engine.load` of the same model in
an engine that served another one. Both end with a canary prompt's answer. The greedy completions
of the two must be equal, token for token.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import demo_candidates, report

MODELS = {
    "base": "runs/smollm2/base",
    **{Path(path).name: path for path in demo_candidates()},
}
TOKENIZER = MODELS["base"]
QUESTIONS = Path("examples/smollm2/data/heldout.jsonl")
NUM_QUESTIONS = 32
ROUNDS = 3
GOAL = 0.25


def main() -> int:
    """Run the benchmark; returns the exit code."""
    if not all(Path(path).is_dir() for path in MODELS.values()):
        print("run `make demo` first: its models are used here", file=sys.stderr)
        return 2
    reloaded = _in_process(["reload"])
    rows = []
    is_equal = True
    for name in MODELS:
        fresh = _in_process(["fresh", name])
        is_equal &= fresh["completions"] == reloaded[name]["completions"]
        again = statistics.median(reloaded[name]["seconds"])
        rows.append(
            {
                "model": name,
                "process + imports + engine, s": fresh["process_seconds"],
                "engine, s": fresh["start_seconds"],
                "new weights in place, s": again,
                "share of engine start": again / fresh["start_seconds"],
                "share of process": again / fresh["process_seconds"],
            }
        )
    share = max(row["share of engine start"] for row in rows)
    goals = [
        (f"new weights in {share:.2f} of an engine's start (goal: {GOAL})", share <= GOAL),
        (f"{NUM_QUESTIONS} greedy completions of each model equal to a fresh engine's", is_equal),
    ]
    report("reweighting", "New weights in a running engine (SmolLM2-135M, bf16)", rows, goals)
    return 0 if is_equal else 1


def _in_process(arguments: list[str]) -> Any:
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.reweighting", "--child", *arguments]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    result = json.loads(found.stdout.splitlines()[-1])
    if arguments[0] == "fresh":
        # Without the completions, which are no part of a reload's time either.
        result["process_seconds"] = time.monotonic() - started - result["generate_seconds"]
    return result


def _child(arguments: list[str]) -> None:
    from transformers import AutoTokenizer

    from arm_ray.evaluation.engine import Engine, ModelSource, Request
    from arm_ray.evaluation.settings import EngineSettings

    settings = EngineSettings(
        dtype="bfloat16", max_model_len=1024, max_num_seqs=64, cpus_per_engine=2
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:NUM_QUESTIONS]
    requests = [
        Request(tuple(tokenizer(json.loads(line)["prompt"])["input_ids"]), 0.0, 1.0, 24, 0)
        for line in lines
    ]
    first = MODELS[arguments[1]] if arguments[0] == "fresh" else MODELS["base"]
    started = time.monotonic()
    engine = Engine(first, TOKENIZER, settings)
    if arguments[0] == "fresh":
        engine.sing()
        seconds = time.monotonic() - started
        begun = time.monotonic()
        # The weights that it was started with, not loaded once more: only named.
        engine._llm.update_weight_version("fresh")
        engine.version = "fresh"
        texts = [c.text for c in engine.generate(requests)]
        rest = time.monotonic() - begun
        print(
            json.dumps({"start_seconds": seconds, "generate_seconds": rest, "completions": texts})
        )
        return
    result: dict[str, Any] = {name: {"seconds": []} for name in MODELS}
    for turn in range(ROUNDS):
        for name, path in MODELS.items():
            loaded = engine.load(ModelSource(path), f"{name}-{turn}")
            result[name]["seconds"].append(loaded.seconds)
            result[name]["completions"] = [c.text for c in engine.generate(requests)]
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2:])
    else:
        sys.exit(main())
