"""Settings of an evaluation: plain values with their ranges.

The section `evaluation` of a merge and of `arm-ray evaluate` is `EvaluationSettings`. The ranges in
the annotations are checked where a configuration is read. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from arm_ray.identity import NOTHING, identity

GraderName = Literal["math", "exact", "number", "python"]
Metric = Literal["strict", "qwen_compat", "pass@1", "loss"]
# What the reader of a configuration does with these: no unknown keys, no changed types.
_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn. The defaults are the paper's (Section 4.1)."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    temperature: Annotated[float, Ge(0.0)] = 0.7
    """0 is greedy; then one completion a problem is drawn, whatever `repeats` says."""
    top_p: Annotated[float, Gt(0.0), Le(1.0)] = 0.8
    """Tokens are drawn from the likeliest ones whose probabilities add up to this."""
    max_tokens: Annotated[int, Ge(1)] = 4096
    """Longest completion, in tokens."""
    repeats: Annotated[int, Ge(1)] = 5
    """Completions of each problem; their verdicts are averaged."""
    seed: Annotated[int, Ge(0)] = 0
    """Every state gets the same seeds, so that states can be compared problem by problem."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, beside the end tokens of the tokenizer and the model."""


@dataclass(frozen=True)
class TaskSettings:
    """One benchmark, or data of one's own. What is null is as the benchmark has it."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    name: Annotated[str, MinLen(1)]
    """A benchmark that is known, or a name for one's own data: files are called by it."""
    path: str | None = None
    """The data: a file, or a data set id; null: `data_dir/<name>/…`, then the hub."""
    type: Literal["benchmark", "questions", "loss"] | None = None
    """What it is, where the name is not known: `questions` are completed and graded, `loss` is the
    negative log-likelihood of held-out samples, without generation."""
    limit: Annotated[int, Ge(1)] | None = None
    """The first problems alone, for a quick look."""
    question_column: str = "question"
    """Column of the question, of one's own data."""
    answer_column: str = "answer"
    """Column of the right answer, of one's own data."""
    grader: GraderName | None = None
    """For one's own questions; default: `math`."""
    scorer: str | None = None
    """`path/to/file.py:function`, for `grader: python`: called with the completion and the row,
    returns a number from 0 to 1. It runs with your rights."""
    system: str | None = None
    """System message; an empty text is none."""
    template: str | None = None
    """The user message; `{question}` is replaced."""
    few_shot: Annotated[int, Ge(0)] = 0
    """Solved examples before the question, from `few_shot_path`. Without a chat template
    completions then end where a further question begins."""
    few_shot_path: str | None = None
    """File of the same columns that the examples are taken from, from its beginning."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """Whether the prompt goes through the tokenizer's chat template; auto: where it has one, and
    the benchmark does not say otherwise."""
    temperature: Annotated[float, Ge(0.0)] | None = None
    """As in `sampling`, for this task."""
    top_p: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    """As in `sampling`, for this task."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """As in `sampling`, for this task."""
    repeats: Annotated[int, Ge(1)] | None = None
    """As in `sampling`, for this task."""
    stop: tuple[str, ...] | None = None
    """As in `sampling`, for this task."""
    pass_at: tuple[Annotated[int, Ge(1)], ...] = (1,)
    """k of pass@k, for code; each at most `repeats`."""


@dataclass(frozen=True)
class EngineSettings:
    """The vLLM engines."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    replicas: Annotated[int, Ge(1), NOTHING] = 1
    """Engines that share the prompts. It has no influence on the result."""
    tensor_parallel: Annotated[int, Ge(1)] = 1
    """GPUs that share one model."""
    gpus_per_engine: Annotated[Literal["auto"] | Annotated[float, Ge(0.0)], NOTHING] = "auto"
    """GPUs reserved for an engine; auto: `tensor_parallel` where the cluster has GPUs, else 0."""
    cpus_per_engine: Annotated[int, Ge(1)] = 1
    """CPU slots and threads of an engine. On CPUs, threads are part of the result."""
    resources: Annotated[Mapping[str, float], NOTHING] = field(default_factory=dict)
    """Custom Ray resources, to place the engines on nodes of your choice."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and computation; auto: as the first model says, and float32 as bfloat16, where the
    devices multiply that by themselves; else float32. What is scored in one directory is scored in
    the format that the first scores there were made in."""
    max_model_len: Annotated[int, Ge(16)] | None = None
    """Longest prompt and completion together, in tokens; null: the model's, at most 8192."""
    gpu_memory_utilization: Annotated[float, Gt(0.0), Le(1.0)] = 0.9
    """Share of a GPU's memory that an engine takes."""
    kv_cache_gb: Annotated[float, Gt(0.0)] = 1.0
    """On CPUs: size of the key-value cache, 10^9 bytes."""
    max_num_seqs: Annotated[int, Ge(1)] = 64
    """Completions that an engine works on at once."""
    chunk_size: Annotated[int, Ge(1)] = 256
    """Completions that an engine is given at once. It decides what runs side by side, and so it is
    part of the result."""
    enforce_eager: bool = False
    """Whether to do without graph capture and compilation; on CPUs that is so anyway."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine."""
    placement_timeout_s: Annotated[float, Gt(0.0), NOTHING] = 300.0
    """Longest time that the cluster may take to have room for the engines."""
    timeout_s: Annotated[float, Gt(0.0), NOTHING] = 3600.0
    """Longest time for one chunk, a start or a reload; an engine that is silent for longer is
    started anew."""

    def identity(self) -> dict[str, Any]:
        """The keys that decide what an engine says, with their values."""
        return identity(EngineSettings, asdict(self))


@dataclass(frozen=True)
class GradingSettings:
    """The processes that grade."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    workers: Annotated[int, Ge(1)] = 1
    """CPU actors that grade, or run code in the sandbox."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources, to place the graders on nodes of your choice."""
    limit_s: Annotated[float, Gt(0.0)] = 10.0
    """Longest time for one answer of a math problem; what takes longer is wrong."""
    timeout_s: Annotated[float, Gt(0.0)] = 3600.0
    """Longest time for one chunk of answers; a grader that is silent for longer is started anew."""
    sandbox: Literal["bubblewrap", "unsafe_subprocess"] = "bubblewrap"
    """How model-written code is run. `unsafe_subprocess` does not isolate it from your files and
    network: only for models and machines that you would trust with a shell."""
    interpreter: str = "/usr/bin/python3"
    """Python that runs the code, as the sandbox sees it."""


@dataclass(frozen=True)
class SelectSettings:
    """Which merged state becomes `model/`."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    by: str = "last"
    """`last`; the name of a task; or `average`, over all tasks but losses."""
    metric: Metric | None = None
    """Which number of the task; null: `strict` for math, `pass@1` for code, `loss` for losses."""
    patience: Annotated[int, Ge(1)] | None = None
    """Stop merging after so many states in a row that are not better than the best before."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is scored, and by what."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    tasks: Annotated[tuple[str | TaskSettings, ...], MinLen(1)]
    """Names of benchmarks, or tasks in full."""
    data_dir: str | None = None
    """Directory with the benchmarks' files, one folder each."""
    sampling: SamplingSettings = SamplingSettings()
    engine: EngineSettings = EngineSettings()
    grading: GradingSettings = GradingSettings()
    select: SelectSettings = SelectSettings()
    base: bool = True
    """Whether the base is scored."""
    candidates: bool = True
    """Whether the candidates are scored."""
    every: Annotated[int, Ge(1)] = 1
    """Every how many iterations the merged state is scored; the last one always is."""
    wait: bool = False
    """Whether the merge waits for a state's scores before it goes on."""
    confidence: Annotated[float, Gt(0.0), Lt(1.0)] = 0.95
    """Of the intervals."""
    resamples: Annotated[int, Ge(100)] = 10_000
    """Of the bootstrap and of the permutation test."""

    @property
    def task_settings(self) -> tuple[TaskSettings, ...]:
        """The tasks, in full."""
        return tuple(TaskSettings(t) if isinstance(t, str) else t for t in self.tasks)

    def is_due(self, iteration: int, last: int) -> bool:
        """Whether the state of an iteration is scored, given the last one of the schedule."""
        return iteration % self.every == 0 or iteration == last
