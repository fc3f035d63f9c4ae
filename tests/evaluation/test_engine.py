"""A real vLLM engine that takes in one model's weights after another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from arm_ray.errors import EvaluationError
from arm_ray.evaluation import engine as module
from arm_ray.evaluation.engine import Engine, ModelSource, Request
from arm_ray.evaluation.settings import EngineSettings
from tests.builders.adapters import write_adapters, write_dense
from tests.builders.engines import SETTINGS, Served
from tests.builders.merge_case import MergeCase
from tests.builders.models import SERVED
from tests.builders.zero import write_zero

pytestmark = pytest.mark.usefixtures("local_ray")
REQUESTS = [
    *(Request(tuple(range(5, 5 + n)), 0.9, 0.9, 10, seed=n) for n in (3, 9, 20)),
    Request((4, 5, 6), 0.0, 1.0, 10, 0),
]


@pytest.fixture
def serve() -> Iterator[Any]:
    started: list[Served] = []

    def serve(model: Path, tokenizer: Path | None = None) -> Served:
        started.append(Served(model, tokenizer or model))
        return started[-1]

    yield serve
    for served in started:
        served.close()


@pytest.mark.parametrize("family", ["smollm2", "qwen2.5"], ids=["tied", "untied"])
def test_reloaded_weights_speak_as_a_fresh_engine_does(
    case: MergeCase, serve: Any, family: str
) -> None:
    case.make(family, sizes=SERVED, max_shard_size="100KB")
    base, (first, second) = case.root / "base", case.candidates
    served = serve(base)
    reports, texts = {}, {}
    for label, path in (("a", first), ("b", second), ("base", base), ("b2", second)):
        reports[label] = served.load(ModelSource(str(path)), label)
        texts[label] = served.generate(REQUESTS)
        assert {completion.version for completion in texts[label]} == {label}
    assert [c.text for c in texts["b"]] == [c.text for c in texts["b2"]]
    assert reports["b"].canary == reports["b2"].canary
    canaries = {reports[label].canary for label in ("a", "b", "base")}
    assert len(canaries) == 3
    served.close()

    fresh = serve(second, base)
    # Of the weights that it started with, before any reload.
    assert fresh.sing() == reports["b"].canary
    assert [c.text for c in fresh.generate_as_started(REQUESTS)] == [c.text for c in texts["b"]]

    model = AutoModelForCausalLM.from_pretrained(second)
    ids = [5, 9, 11, 7, 200, 31]
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    expected = [float(logs[i - 1, ids[i]]) for i in range(1, len(ids))]
    fresh.load(ModelSource(str(second)), "again")
    whole, tail, long = fresh.log_likelihoods([(ids, 1), (ids, 4), ([7] * 64, 1)])
    assert whole[:2] == (pytest.approx(sum(expected), abs=1e-3), 5)
    assert tail[:2] == (pytest.approx(sum(expected[3:]), abs=1e-3), 2)
    assert long is None


def test_an_adapter_a_long_prompt_and_a_failed_reload(case: MergeCase, serve: Any) -> None:
    case.make("smollm2", sizes=SERVED)
    base = case.root / "base"
    [adapter, _] = write_adapters(case)
    dense = write_dense(case, adapter)
    served = serve(base)
    with pytest.raises(EvaluationError, match="no model loaded"):
        served.generate(REQUESTS)
    served.load(ModelSource(str(dense)), "dense")
    by_dense = served.generate(REQUESTS)
    served.load(ModelSource(str(base), str(adapter)), "adapter")
    by_adapter = served.generate(REQUESTS)
    assert [c.text for c in by_adapter] == [c.text for c in by_dense]
    served.load(ModelSource(str(base)), "base")
    assert [c.text for c in served.generate(REQUESTS)] != [c.text for c in by_dense]

    long = [Request((7,) * n, 0.0, 1.0, 10, 0) for n in (64, 60, 63)]
    too_long, cut, one = served.generate(long)
    assert (too_long.finish, too_long.num_tokens, too_long.text) == ("too_long", 0, "")
    # Both end where the context does, if they have not ended before.
    assert cut.num_tokens <= 4
    assert one.num_tokens == 1

    same = served.generate([Request((5, 6), 1.0, 1.0, 8, seed) for seed in (1, 1, 2, 3)])
    assert same[0].text == same[1].text
    assert len({completion.text for completion in same}) >= 2

    other = case.root / "other"
    MergeCase(other).make("smollm2", sizes={**SERVED, "hidden_size": 256})
    with pytest.raises(EvaluationError, match="did not take in the weights"):
        served.load(ModelSource(str(other / "base")), "other")
    with pytest.raises(EvaluationError, match="no model loaded"):
        served.generate(REQUESTS)


def test_shards_are_streamed_also_into_an_engine_without_weights(
    case: MergeCase, serve: Any
) -> None:
    case.make("smollm2", sizes=SERVED)
    base, [first, second] = case.root / "base", case.candidates
    shards, bare = case.root / "zero", case.root / "bare"
    write_zero(first, shards, 3)
    bare.mkdir()
    shutil.copy(first / "config.json", bare)
    served = serve(bare, base)
    streamed = served.load(ModelSource(str(bare), f"zero:{shards}"), "shards")
    texts = [c.text for c in served.generate(REQUESTS)]
    # A whole model goes into it as well.
    assert served.load(ModelSource(str(second)), "second").canary != streamed.canary
    assert served.load(ModelSource(str(first)), "first").canary == streamed.canary
    served.close()
    served = serve(base)
    again = served.load(ModelSource(str(base), f"zero:{shards}"), "shards")
    assert again.canary == streamed.canary
    assert [c.text for c in served.generate(REQUESTS)] == texts
    assert served.load(ModelSource(str(first)), "first").canary == streamed.canary


def test_an_engine_that_does_not_fit_says_what_was_asked(
    case: MergeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.make("smollm2", sizes=SERVED)
    huge = EngineSettings(kv_cache_gb=1e6)
    with pytest.raises(EvaluationError, match="1e\\+06 GB of key-value cache") as caught:
        Engine(str(case.root / "base"), "unused", huge)
    assert "GB free" in str(caught.value)
    with pytest.raises(EvaluationError, match="holds no model"):
        Engine(str(case.root / "nowhere"), "unused", SETTINGS)
    monkeypatch.setattr(module, "_available_memory", lambda: 1000)
    with pytest.raises(EvaluationError, match="does not fit into this machine's memory"):
        Engine(str(case.root / "base"), "unused", SETTINGS)


def test_end_tokens_come_from_the_tokenizer_and_the_model(case: MergeCase, serve: Any) -> None:
    case.make("smollm2", sizes=SERVED)
    base = case.root / "base"
    vocabulary = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    ids = {row["content"]: row["id"] for row in vocabulary}
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [17, 3]}))
    served = serve(base)
    assert served.end_ids() == sorted({ids["<|im_end|>"], ids["<|endoftext|>"], 17, 3})
