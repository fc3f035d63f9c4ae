"""The tasks of lm-evaluation-harness, put to our engines.

`EngineLM` is the harness's model class over `generate` and `log_likelihoods` of our engine.
Prompts, rolling windows, cuts from the left and metrics are the harness's, so that its numbers stay
what they are elsewhere. Importing this module imports lm_eval, which is an optional dependency.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from arm_ray.errors import EvaluationError
from arm_ray.evaluation.encode import completion_seed
from arm_ray.evaluation.engine import Completion, Request

_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_KEYS = {"until", "do_sample", "temperature", "top_p", *_MAX_TOKENS_KEYS}
# Other keys are allowed with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


class Scorer(Protocol):
    """What of an engine the bridge needs; see `arm_ray.evaluation.engine.Engine`."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete prompts, in their order."""

    def log_likelihoods(
        self, samples: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, int, bool] | None]:
        """Sums of log-probabilities in nats, numbers of tokens, and whether they are greedy."""


@dataclass(frozen=True)
class Sampling:
    """Generation arguments of a harness task, as our engines take them."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]


@dataclass
class RequestCount:
    """Requests of one kind.

    Attributes:
        requests: Prompts or, for `loglikelihood_rolling`, windows that documents were split into.
        cut: How many of them lost tokens on the left because the context does not hold them.
    """

    requests: int = 0
    cut: int = 0


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """A model of lm_eval whose computation is done by one of our engines.

    Args:
        engine: The engine, with a model loaded.
        tokenizer: A tokenizer of transformers.
        max_length: Longest prompt and completion together, in tokens: the engine's.
        seed: Of sampled completions.
        chunk_size: Requests that the engine is given at once.
        max_gen_toks: Longest completion in tokens, where a task does not say.
        progress: Called with what is done, done requests and all requests, after each chunk.

    Raises:
        EvaluationError: The tokenizer has neither a token for the beginning nor one for the end.
    """

    def __init__(
        self,
        engine: Scorer,
        tokenizer: Any,
        max_length: int,
        *,
        seed: int = 0,
        chunk_size: int = 256,
        max_gen_toks: int = 256,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self._engine, self.tokenizer, self._max_length = engine, tokenizer, max_length
        self._seed, self._chunk_size, self._max_gen_toks = seed, chunk_size, max_gen_toks
        self._progress = progress
        self.counts: dict[str, RequestCount] = {}
        self.dropped_system_messages = 0
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise EvaluationError(
                "the tokenizer has no token to put before a text",
                where=self.tokenizer_name,
                got="neither bos_token nor eos_token",
                expected="one of them",
                hint="name another tokenizer (tokenizer, --tokenizer)",
            )

    @property
    def eot_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return int(first if first is not None else self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Longest completion in tokens, where a task does not say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, without slashes."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any
    ) -> list[int]:
        """Token ids; a beginning token that the text brings itself is not added once more."""
        if not string:
            return []
        adds: dict[str, bool] = {}
        if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            adds = {"add_special_tokens": False}
        elif add_special_tokens is not None:
            adds = {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **adds)["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as text, by the tokenizer's chat template.

        As in the harness, system messages are left out for a template that refuses them;
        `dropped_system_messages` counts them.

        Raises:
            EvaluationError: There is no template, or it does not accept the messages.
        """

        def render(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        try:
            return render(chat_history)
        except Exception as error:  # templates raise what they like
            others = [m for m in chat_history if m["role"] != "system"]
            failure = error
            if len(others) < len(chat_history):
                try:
                    text = render(others)
                except Exception as second:  # as above
                    failure = second
                else:
                    self.dropped_system_messages += len(chat_history) - len(others)
                    return text
        raise EvaluationError(
            "the chat template does not accept a prompt of lm_eval",
            where=self.tokenizer_name,
            got=f"{type(failure).__name__}: {failure}",
            hint="name a tokenizer with a fitting template, or do without the template",
        )

    def loglikelihood(
        self,
        requests: list[Any],
        disable_tqdm: bool = True,  # noqa: ARG002 -- our own progress lines
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations in nats, and whether they are greedy."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._log_likelihoods([(c, k) for _, c, k in requests], "loglikelihood")

    def loglikelihood_rolling(
        self,
        requests: list[Any],
        disable_tqdm: bool = True,  # noqa: ARG002 -- our own progress lines
    ) -> list[float]:
        """Log-likelihoods of whole texts in nats.

        Texts that are longer than the context are split into windows, each token predicted once;
        a window has room for the prefix token and the one token that vLLM draws.
        """
        windows: list[tuple[list[int], list[int]]] = []
        ends = []
        for instance in requests:
            (text,) = instance.args
            windows += map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 2,
                    context_len=1,
                ),
            )
            ends.append(len(windows))
        values = self._log_likelihoods(windows, "loglikelihood_rolling")
        return [
            sum((value for value, _ in values[start:end]), 0.0)
            for start, end in itertools.pairwise([0, *ends])
        ]

    def generate_until(
        self,
        requests: list[Any],
        disable_tqdm: bool = True,  # noqa: ARG002 -- our own progress lines
    ) -> list[str]:
        """Completions. A sampled one depends on its task, document and repeat, not on the others.

        Raises:
            EvaluationError: A task asks for generation arguments that our engines do not know, or
                for more new tokens than the context has.
        """
        count = self.counts.setdefault("generate_until", RequestCount())
        seen: Counter[str] = Counter()
        asked = []
        for instance in requests:
            context, arguments = instance.args[:2]
            where = f"task {instance.task_name}, document {instance.doc_id}"
            sampling = sampling_of(arguments, self.max_gen_toks, where)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise EvaluationError(
                    "a task of lm_eval asks for longer completions than the context holds",
                    where=where,
                    got=f"max_gen_toks {sampling.max_tokens}",
                    expected=f"less than the {self.max_length} tokens of the context",
                    hint="raise evaluation.engine.max_model_len, if the model has a longer "
                    "context, or lower max_gen_toks in a task file of your own",
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            count.cut += len(ids) > room
            key = f"{instance.task_name}/{instance.doc_id}/{instance.idx}"
            seed = completion_seed(self._seed, key, seen[key]) if sampling.temperature else 0
            seen[key] += 1
            asked.append(
                Request(
                    tuple(ids[-room:]),
                    sampling.temperature,
                    sampling.top_p,
                    sampling.max_tokens,
                    seed,
                    sampling.stop,
                )
            )
        count.requests += len(asked)
        texts = []
        for chunk in self._chunks(asked, "completions"):
            for request, completion in zip(chunk, self._engine.generate(chunk), strict=True):
                if completion.finish == "too_long":
                    raise self._disagreement(len(request.token_ids))
                text = completion.text
                for stop in request.stop:
                    text = text.split(stop)[0]
                texts.append(text)
        return texts

    def _log_likelihoods(
        self, pairs: Sequence[tuple[list[int], list[int]]], kind: str
    ) -> list[tuple[float, bool]]:
        """Of continuations after contexts, both as token ids."""
        count = self.counts.setdefault(kind, RequestCount())
        samples = []
        for context, continuation in pairs:
            ids, first, is_cut = self._sample(context, continuation)
            count.cut += is_cut
            samples.append((ids, first))
        count.requests += len(samples)
        found = []
        for chunk in self._chunks(samples, "log-likelihoods"):
            for (ids, _), value in zip(chunk, self._engine.log_likelihoods(chunk), strict=True):
                if value is None:
                    raise self._disagreement(len(ids))
                found.append((value[0], value[2]))
        return found

    def _sample(
        self, context: list[int], continuation: list[int]
    ) -> tuple[tuple[int, ...], int, bool]:
        """Token ids cut from the left, the first that counts, and whether any were cut."""
        if not context:
            # A context of nothing but spaces: the harness moves them into the continuation.
            context = [self.prefix_token_id]
            if continuation[:1] == context:
                continuation = continuation[1:]
        # vLLM has to draw one token after the prompt.
        room = self.max_length - 1
        if len(continuation) >= room:
            raise EvaluationError(
                "an answer to be scored by lm_eval is longer than the context",
                got=f"{len(continuation)} tokens",
                expected=f"at most {room - 1}, so that one token can stand before it",
                hint="raise evaluation.engine.max_model_len, if the model has a longer context",
            )
        cut = max(0, len(context) + len(continuation) - room)
        return tuple([*context, *continuation][cut:]), len(context) - cut, cut > 0

    def _chunks(self, items: Sequence[Any], what: str) -> Iterator[list[Any]]:
        for start in range(0, len(items), self._chunk_size):
            chunk = list(items[start : start + self._chunk_size])
            yield chunk
            if self._progress is not None:
                self._progress(what, start + len(chunk), len(items))

    def _disagreement(self, length: int) -> EvaluationError:
        return EvaluationError(
            "the engine's context is shorter than lm_eval was told",
            got=f"a prompt of {length} tokens is too long for the engine",
            expected=f"a context of {self.max_length} tokens",
            hint="set evaluation.engine.max_model_len",
        )


def sampling_of(arguments: Mapping[str, Any], max_gen_toks: int, where: object) -> Sampling:
    """Generation arguments of a task, with the meanings that the harness gives them.

    `do_sample: false` is greedy, whatever the temperature; `do_sample: true` without a temperature
    is temperature 1, as in transformers; without both it is greedy.

    Args:
        arguments: The task's `generation_kwargs`.
        max_gen_toks: Longest completion in tokens, if they do not say.
        where: The task, for errors.

    Raises:
        EvaluationError: An argument is unknown here, or its value is wrong.
    """
    unknown = [
        f"{key}: {value}"
        for key, value in arguments.items()
        if key not in _SAMPLING_KEYS and value is not None and value not in _NEUTRAL.get(key, ())
    ]
    if unknown:
        raise EvaluationError(
            "a task of lm_eval asks for generation arguments that are not supported",
            where=where,
            got=", ".join(unknown),
            expected=", ".join(sorted(_SAMPLING_KEYS)),
            hint="leave them out in a task file of your own (--lm-eval-path)",
        )
    does_sample = arguments.get("do_sample")
    given = arguments.get("temperature")
    until = arguments.get("until") or []
    try:
        texts = [until] if isinstance(until, str) else list(until)
        temperature = float(given if given is not None else bool(does_sample))
        top_p = arguments.get("top_p")
        lengths = [arguments[key] for key in _MAX_TOKENS_KEYS if arguments.get(key) is not None]
        found = Sampling(
            0.0 if does_sample is False else temperature,
            1.0 if top_p is None else float(top_p),
            int(lengths[0] if lengths else max_gen_toks),
            tuple(text for text in texts if text),
        )
        right = (
            found.temperature >= 0.0
            and 0.0 < found.top_p <= 1.0
            and found.max_tokens >= 1
            and all(isinstance(text, str) for text in texts)
        )
    except (TypeError, ValueError):
        right = False
    if not right:
        raise EvaluationError(
            "a task of lm_eval has wrong generation arguments",
            where=where,
            got=dict(arguments),
            expected="temperature 0 or more, top_p above 0 and at most 1, max_gen_toks 1 or more, "
            "texts in until",
        )
    return found


# ---- tasks
