"""An engine of transformers alone behind the interface of the vLLM engines.

vLLM takes 15 seconds to start. What is done with engines (queues, retries, caching, statistics,
selection) learns nothing from that, and can be tested with one that starts in a second. It draws
each completion by itself, so that its numbers depend on the weights and the request alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.engine import Canary, Completion, Engine, LoadReport, ModelSource, Request
from arm_ray.evaluation.settings import EngineSettings
from arm_ray.evaluation.vllm_worker import all_tensors, open_weights
from arm_ray.runtime.scoring.evaluator import EngineActor


class _Tokens:
    """What `Engine` asks vLLM's object for, beside completions."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def get_tokenizer(self) -> Any:
        return self._tokenizer


class PlainEngine(Engine):
    """See the module."""

    def __init__(self, model: str, tokenizer: str, settings: EngineSettings) -> None:
        started = time.monotonic()
        torch.set_num_threads(settings.cpus_per_engine)
        config = AutoConfig.from_pretrained(model)
        self.max_model_len = settings.max_model_len or int(config.max_position_embeddings)
        self._model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self._llm = _Tokens(AutoTokenizer.from_pretrained(tokenizer))
        self.version = ""
        self._end_ids = self._all_end_ids(Path(model))
        self.start_seconds = time.monotonic() - started

    def load(self, source: ModelSource, version: str) -> LoadReport:
        started = time.monotonic()
        self.version = ""
        opened = open_weights(Path(source.path), source.weights, source.base, source.masters)
        found = {name: tensor.float() for name, tensor in all_tensors(opened)}
        left = self._model.load_state_dict(found, strict=False)
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        if set(left.missing_keys) - tied or left.unexpected_keys:
            raise EvaluationError("the engine did not take in the weights", got=left)
        self._end_ids = self._all_end_ids(Path(source.path))
        canary = self.sing()
        self.version = version
        return LoadReport(version, time.monotonic() - started, canary)

    def log_likelihoods(
        self, samples: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, int, bool] | None]:
        self._check_loaded()
        result: list[tuple[float, int, bool] | None] = []
        for ids, first in samples:
            if len(ids) >= self.max_model_len:
                result.append(None)
                continue
            begin = max(1, first)
            found = self._log_probabilities(ids)[begin - 1 : -1]
            wanted = torch.tensor(list(ids[begin:]))
            chosen = found.gather(1, wanted[:, None])
            is_greedy = bool((found.argmax(dim=1) == wanted).all())
            result.append((float(chosen.double().sum()), len(wanted), is_greedy))
        return result

    def sing(self) -> Canary:
        ids = list(self._llm.get_tokenizer()("The answer is")["input_ids"])
        total = 0.0
        drawn: list[int] = []
        for _ in range(8):
            row = self._log_probabilities([*ids, *drawn])[-1]
            drawn.append(int(row.argmax()))
            total += float(row[drawn[-1]])
        return Canary(tuple(drawn), round(total, 6))

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        self._check_loaded()
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        generator = torch.Generator().manual_seed(request.seed)
        tokenizer = self._llm.get_tokenizer()
        room = min(request.max_tokens, self.max_model_len - len(request.token_ids))
        drawn: list[int] = []
        while len(drawn) < room:
            row = self._log_probabilities([*request.token_ids, *drawn])[-1]
            drawn.append(_draw(row, request, generator))
            text = tokenizer.decode(drawn, skip_special_tokens=True)
            ends = [text.index(stop) for stop in request.stop if stop in text]
            if ends or drawn[-1] in self._end_ids:
                return Completion(text[: min(ends, default=None)], len(drawn), "stop", self.version)
        return Completion(
            tokenizer.decode(drawn, skip_special_tokens=True), len(drawn), "length", self.version
        )

    @torch.no_grad()
    def _log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """[tokens, vocabulary]: of what follows each token."""
        logits = self._model(torch.tensor([list(ids)]), use_cache=False).logits
        return torch.log_softmax(logits[0].float(), dim=-1)


def _draw(row: Tensor, request: Request, generator: torch.Generator) -> int:
    if request.temperature == 0.0:
        return int(row.argmax())
    shares, order = torch.softmax(row / request.temperature, dim=-1).sort(descending=True)
    kept = torch.where(shares.cumsum(0) - shares < request.top_p, shares, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


class PlainEngineActor(EngineActor):
    """An engine actor whose engine is a plain one."""

    engine_class: ClassVar[type[Engine]] = PlainEngine


class _TellingEngine(PlainEngine):
    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        names = os.environ["TELLING_ENGINE"].split(",")
        raise RuntimeError(" ".join(f"{name}={os.environ[name]}" for name in names))


class TellingEngineActor(EngineActor):
    """An engine actor whose engine tells in an error, once asked for text, what variables hold.

    Their names are in `TELLING_ENGINE`, with commas between.
    """

    engine_class: ClassVar[type[Engine]] = _TellingEngine
