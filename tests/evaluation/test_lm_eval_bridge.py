"""Tasks of lm-evaluation-harness over engines that compute in this process."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedModel

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from arm_ray.errors import EvaluationError
from arm_ray.evaluation import lm_eval_tasks
from arm_ray.evaluation.engine import Completion, Request
from arm_ray.evaluation.lm_eval_bridge import EngineLM, Sampling, sampling_of
from arm_ray.evaluation.lm_eval_tasks import open_tasks
from tests.builders.lm_eval_tasks import (
    CONTEXT,
    asked,
    harness,
    read_index_once,
    write_task,
    write_tasks,
)
from tests.builders.models import WORDS, save_tokenizer, tiny_model


class TorchEngine:
    """What an engine computes, by a plain forward pass of transformers."""

    def __init__(self, model: PreTrainedModel, end: int) -> None:
        self.model, self.end = model, end
        self.samples: list[tuple[tuple[int, ...], int]] = []
        self.requests: list[Request] = []

    def logs(self, ids: Sequence[int]) -> torch.Tensor:
        assert 0 < len(ids) < CONTEXT
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([list(ids)])).logits[0].double(), -1)

    def log_likelihoods(
        self, samples: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, int, bool] | None]:
        found: list[tuple[float, int, bool] | None] = []
        for ids, first in samples:
            self.samples.append((tuple(ids), first))
            logs = self.logs(ids)
            picked = [float(logs[i - 1, ids[i]]) for i in range(first, len(ids))]
            greedy = all(int(logs[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))
            found.append((math.fsum(picked), len(picked), greedy))
        return found

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        made = []
        for request in requests:
            self.requests.append(request)
            assert len(request.token_ids) + request.max_tokens <= CONTEXT
            ids = list(request.token_ids)
            draw = random.Random(request.seed)
            while len(ids) < len(request.token_ids) + request.max_tokens:
                drawn = draw.randrange(5, 300) if request.temperature else None
                ids.append(int(self.logs(ids)[-1].argmax()) if drawn is None else drawn)
                if ids[-1] == self.end:
                    break
            new = [i for i in ids[len(request.token_ids) :] if i != self.end]
            text = self.tokenizer.decode(new)
            made.append(Completion(text, len(new), "stop", "it"))
        return made

    tokenizer: Any = None


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    read_index_once(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture
def engine(tokenizer: Any) -> TorchEngine:
    made = TorchEngine(tiny_model("smollm2", seed=1), tokenizer.eos_token_id)
    made.tokenizer = tokenizer
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("shots", [None, 2])
def test_numbers_are_those_of_the_harness_own_transformers_backend(
    engine: TorchEngine, tokenizer: Any, directory: Path, shots: int | None
) -> None:
    """Every log-likelihood and completion, documents longer than the context included."""
    names = ["all", "shots"] if shots is None else ["shots"]
    tasks = open_tasks(names, str(directory), shots)
    ours = EngineLM(engine, tokenizer, CONTEXT, chunk_size=4)
    # vLLM has to draw a token after each prompt: its windows are two tokens shorter.
    theirs = HFLM(
        pretrained=engine.model,
        tokenizer=tokenizer,
        max_length=CONTEXT - 2,
        batch_size=1,
        device="cpu",
    )
    found, expected = (harness(lm, tasks, num_fewshot=shots) for lm in (ours, theirs))
    for name, samples in expected["samples"].items():
        pairs = zip(found["samples"][name], samples, strict=True)
        for one, other in pairs:
            for mine, its in zip(one["resps"], other["resps"], strict=True):
                if name in ("answers", "shots"):
                    assert mine == its
                else:
                    flat = torch.tensor(mine, dtype=torch.float64).flatten().tolist()
                    right = torch.tensor(its, dtype=torch.float64).flatten().tolist()
                    assert flat == pytest.approx(right, abs=1e-4)
    for name, values in expected["results"].items():
        for key, value in values.items():
            if isinstance(value, float):
                assert found["results"][name][key] == pytest.approx(value, rel=1e-5), (name, key)
    assert ours.counts["generate_until"].requests == (10 if shots is None else 5)
    if shots is None:
        assert ours.counts["loglikelihood"].cut == 3
        assert ours.counts["loglikelihood"].requests == 36
        assert ours.counts["loglikelihood_rolling"].requests > 6
        assert ours.counts["loglikelihood_rolling"].cut == 0


def test_the_same_tasks_give_the_same_numbers_to_model_after_model(
    engine: TorchEngine, tokenizer: Any, directory: Path
) -> None:
    tasks = open_tasks(["texts", "shots"], str(directory), 2)
    runs = [
        harness(EngineLM(engine, tokenizer, CONTEXT, chunk_size=size), tasks, num_fewshot=2)
        for size in (256, 3, 1)
    ]
    assert runs[0]["results"] == runs[1]["results"] == runs[2]["results"]
    fresh = harness(
        EngineLM(engine, tokenizer, CONTEXT),
        open_tasks(["texts", "shots"], str(directory), 2),
        num_fewshot=2,
    )
    assert fresh["results"] == runs[0]["results"]


def test_contexts_are_cut_from_the_left_and_counted(engine: TorchEngine, tokenizer: Any) -> None:
    lm = EngineLM(engine, tokenizer, CONTEXT)
    answer = tokenizer(" red")["input_ids"]
    long = "red apples " * 60
    lm.loglikelihood([asked("two", " red"), asked("", "red"), asked(long.strip(), " red")])
    short, alone, cut = engine.samples
    assert short == (tuple(tokenizer("two red")["input_ids"]), len(tokenizer("two")["input_ids"]))
    assert alone == ((tokenizer.eos_token_id, *tokenizer("red")["input_ids"]), 1)
    assert len(cut[0]) == CONTEXT - 1
    assert cut[1] == CONTEXT - 1 - len(answer)
    assert list(cut[0]) == tokenizer(long.strip() + " red")["input_ids"][-(CONTEXT - 1) :]
    assert (lm.counts["loglikelihood"].requests, lm.counts["loglikelihood"].cut) == (3, 1)
    with pytest.raises(EvaluationError, match="longer than the context"):
        lm.loglikelihood([asked("two", " " + long)])
    # Spaces alone belong to the continuation, and something has to stand before it.
    lm.loglikelihood([asked("  ", "red")])
    assert engine.samples[-1][0][0] == tokenizer.eos_token_id
    assert engine.samples[-1][1] == 1


def test_an_engine_with_a_shorter_context_is_an_error(engine: TorchEngine, tokenizer: Any) -> None:
    class Shorter(TorchEngine):
        def log_likelihoods(self, samples: Any) -> Any:
            return [None for _ in samples]

        def generate(self, requests: Any) -> Any:
            return [Completion("", 0, "too_long", "it") for _ in requests]

    lm = EngineLM(Shorter(engine.model, 0), tokenizer, CONTEXT)
    with pytest.raises(EvaluationError, match="shorter than lm_eval was told"):
        lm.loglikelihood([asked("two", " red")])
    with pytest.raises(EvaluationError, match="shorter than lm_eval was told"):
        lm.generate_until([asked("two", {"max_gen_toks": 4}, kind="generate_until")])


def test_sampled_completions_depend_on_their_own_request_alone(
    engine: TorchEngine, tokenizer: Any
) -> None:
    arguments = {"max_gen_toks": 4, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    many = [
        asked(f"{word} =", arguments, kind="generate_until", doc=number)
        for number, word in enumerate(WORDS)
        for _ in range(2)
    ]
    texts = EngineLM(engine, tokenizer, CONTEXT, seed=3).generate_until(many)
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == len(many)
    assert {(r.temperature, r.top_p, r.max_tokens) for r in engine.requests} == {(0.7, 0.9, 4)}
    backwards = many[::-1]
    again = EngineLM(engine, tokenizer, CONTEXT, seed=3, chunk_size=5).generate_until(backwards)
    pairs = [sorted(texts[i : i + 2]) for i in range(0, len(texts), 2)]
    assert [sorted(again[i : i + 2]) for i in range(0, len(again), 2)] == pairs[::-1]
    EngineLM(engine, tokenizer, CONTEXT, seed=4).generate_until(many[:1])
    assert engine.requests[-1].seed not in seeds


def test_completions_are_cut_at_stop_texts_and_prompts_from_the_left(
    engine: TorchEngine, tokenizer: Any
) -> None:
    class Fixed(TorchEngine):
        def generate(self, requests: Any) -> Any:
            self.requests += requests
            return [Completion("two red\n\nleft", 4, "length", "it") for _ in requests]

    fixed = Fixed(engine.model, 0)
    lm = EngineLM(fixed, tokenizer, CONTEXT)
    prompt = "red apples " * 40
    arguments = {"until": ["\n\n", ""], "max_gen_toks": 10}
    [text] = lm.generate_until([asked(prompt, arguments, kind="generate_until")])
    assert text == "two red"
    [request] = fixed.requests
    assert list(request.token_ids) == tokenizer(prompt)["input_ids"][-(CONTEXT - 10) :]
    assert request == Request(request.token_ids, 0.0, 1.0, 10, 0, ("\n\n",))
    assert lm.counts["generate_until"].cut == 1
    with pytest.raises(EvaluationError, match="task tried, document 7") as caught:
        lm.generate_until([asked("two", {}, kind="generate_until", doc=7)])
    assert "max_gen_toks 256" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Sampling(0.0, 1.0, 256, ())),
        ({"until": "\n", "max_new_tokens": 8}, Sampling(0.0, 1.0, 8, ("\n",))),
        ({"do_sample": False, "temperature": 1.0}, Sampling(0.0, 1.0, 256, ())),
        ({"do_sample": True}, Sampling(1.0, 1.0, 256, ())),
        ({"do_sample": True, "temperature": 0.0}, Sampling(0.0, 1.0, 256, ())),
        ({"temperature": 0.5, "top_p": 0.9}, Sampling(0.5, 0.9, 256, ())),
        ({"num_beams": 1, "top_k": -1, "top_p": None}, Sampling(0.0, 1.0, 256, ())),
    ],
)
def test_generation_arguments(arguments: dict[str, Any], expected: Sampling) -> None:
    assert sampling_of(arguments, 256, "here") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "not supported"),
        ({"top_k": 50}, "top_k: 50"),
        ({"repetition_penalty": 1.1, "do_sample": True}, "repetition_penalty: 1.1"),
        ({"temperature": "warm"}, "wrong generation arguments"),
        ({"temperature": -1.0}, "wrong generation arguments"),
        ({"top_p": 0.0}, "wrong generation arguments"),
        ({"max_gen_toks": 0}, "wrong generation arguments"),
        ({"until": [3]}, "wrong generation arguments"),
        ({"until": 3}, "wrong generation arguments"),
    ],
)
def test_generation_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        sampling_of(arguments, 256, "task tried, document 3")
    assert "task tried, document 3" in str(caught.value)


def test_tokens_and_chat_templates(
    engine: TorchEngine, tokenizer: Any, tmp_path: Path, directory: Path
) -> None:
    lm = EngineLM(engine, tokenizer, CONTEXT)
    assert lm.tok_encode("") == []
    assert lm.tok_encode("red") == tokenizer("red")["input_ids"]
    assert lm.eot_token_id == lm.prefix_token_id == tokenizer.eos_token_id
    assert "/" not in lm.tokenizer_name
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "red"}]
    assert lm.apply_chat_template(messages) == "<|im_start|>system be<|im_end|>" + (
        "<|im_start|>user red<|im_end|>"
    )
    own = AutoTokenizer.from_pretrained(save_copy(tmp_path))
    own.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    lm = EngineLM(engine, own, CONTEXT)
    assert lm.apply_chat_template(messages) == "[red]"
    assert lm.dropped_system_messages == 1
    own.chat_template = "{{ raise_exception('nothing pleases me') }}"
    with pytest.raises(EvaluationError, match="nothing pleases me"):
        lm.apply_chat_template(messages)
    own.bos_token = "<|im_start|>"
    lm = EngineLM(engine, own, CONTEXT)
    assert lm.prefix_token_id == own.bos_token_id
    own.bos_token = own.eos_token = None
    with pytest.raises(EvaluationError, match="neither bos_token nor eos_token"):
        EngineLM(engine, own, CONTEXT)

    # Through the harness: prompts are rendered.
    lm = EngineLM(engine, tokenizer, CONTEXT)
    harness(lm, open_tasks(["answers"], str(directory)), apply_chat_template=True, limit=2)
    prompts = [tokenizer.decode(request.token_ids) for request in engine.requests[-2:]]
    assert all(p.startswith("<|im_start|>user ") and p.endswith("<|im_end|>") for p in prompts)


def save_copy(path: Path) -> Path:
    save_tokenizer(path)
    return path


# ---- tasks


def test_unknown_tasks_and_missing_directories_are_told(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no task 'arc_esy'") as caught:
        open_tasks(["choices", "arc_esy"], str(directory))
    assert "arc_easy" in str(caught.value)
    with pytest.raises(EvaluationError, match="--lm-eval-path"):
        open_tasks(["choicez"])
    with pytest.raises(EvaluationError, match="no directory"):
        open_tasks(["choices"], str(tmp_path / "nowhere"))
    with pytest.raises(EvaluationError, match=r"without \.yaml files"):
        open_tasks(["choices"], str(tmp_path))
    with pytest.raises(EvaluationError, match="no task of lm_eval is named"):
        open_tasks([])


def test_examples_must_exist(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="only the documents that are asked"):
        open_tasks(["answers"], str(directory), 2)
    with pytest.raises(EvaluationError, match="no 6 examples") as caught:
        open_tasks(["shots"], str(directory), 6)
    assert "5 examples" in str(caught.value)
    assert open_tasks(["shots"], str(directory), 5).notes == []
    # Whole texts have no prompts, and a task may insist on none.
    open_tasks(["texts"], str(directory), 2)
    root = write_tasks(tmp_path / "own")
    write_task(root, "answers", **read_task(root, "answers"), num_fewshot=0)
    assert "without examples" in open_tasks(["answers"], str(root), 2).notes[0]
    # The document that is asked is no example of its own.
    write_task(root, "shots", **{**read_task(root, "shots"), "fewshot_split": "test"})
    open_tasks(["shots"], str(root), 4)
    with pytest.raises(EvaluationError, match="6 or more"):
        open_tasks(["shots"], str(root), 5)


def read_task(root: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((root / f"{name}.yaml").read_text())
    return content


def test_tasks_that_run_foreign_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tasks(tmp_path / "own")
    answers = read_task(root, "answers")
    (root / "code.py").write_text("raise SystemExit('this was run')\n")
    (root / "unsafe.yaml").write_text(
        yaml.dump({**answers, "task": "unsafe", "unsafe_code": True})
        + "process_docs: !function code.anything\n"
    )
    (root / "grouped.yaml").write_text(
        yaml.dump({"group": "grouped", "task": ["choices", {"group": "in", "task": ["unsafe"]}]})
    )
    for name in ("unsafe", "grouped", "humaneval"):
        with pytest.raises(EvaluationError, match="runs code that the model wrote") as caught:
            open_tasks([name], str(root))
        assert "--tasks humaneval,mbpp" in str(caught.value)
    metrics = [{"metric": "bleurt", "aggregation": "mean", "higher_is_better": True}]
    write_task(root, "answers", **{**answers, "metric_list": metrics})
    with pytest.raises(EvaluationError, match="downloaded from the hub"):
        open_tasks(["answers"], str(root))
    metrics[0] = {**metrics[0], "metric": "exact_match", "hf_evaluate": True}
    write_task(root, "answers", **{**answers, "metric_list": metrics})
    with pytest.raises(EvaluationError, match="downloaded from the hub"):
        open_tasks(["answers"], str(root))
    write_task(root, "answers", **{**answers, "doc_to_image": "picture"})
    with pytest.raises(EvaluationError, match="images or sound"):
        open_tasks(["answers"], str(root))
    data = {**answers["dataset_kwargs"], "trust_remote_code": True}
    write_task(root, "answers", **{**answers, "dataset_kwargs": data})
    monkeypatch.setattr(lm_eval_tasks, "_datasets_version", lambda: 3)
    with pytest.raises(EvaluationError, match="code from its data set"):
        open_tasks(["answers"], str(root))


def test_tasks_that_cannot_be_loaded_say_why(directory: Path, tmp_path: Path) -> None:
    root = write_tasks(tmp_path / "own")
    (root / "data" / "answers-test.json").unlink()
    with pytest.raises(EvaluationError, match="cannot load the tasks") as caught:
        open_tasks(["answers"], str(root))
    assert "FileNotFoundError" in str(caught.value)
    assert "local data" in str(caught.value)


def test_the_digest_follows_definitions_and_documents(tmp_path: Path) -> None:
    root = write_tasks(tmp_path / "own")

    def digest(*names: str, limit: int | None = None) -> str:
        return open_tasks(names, str(root)).digest(limit)

    first = digest("answers", "choices")
    assert digest("answers", "choices") == first
    assert len({first, digest("answers"), digest("answers", "choices", limit=2)}) == 3
    answers = read_task(root, "answers")
    write_task(root, "answers", **{**answers, "doc_to_text": "{{question}}:"})
    second = digest("answers", "choices")
    rows = (root / "data" / "answers-test.json").read_text()
    (root / "data" / "answers-test.json").write_text(rows.replace('"answer": "', '"answer": "no '))
    assert len({first, second, digest("answers", "choices")}) == 3
