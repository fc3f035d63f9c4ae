"""The configuration of a merge: one YAML file with dotted overrides.

It is validated before anything is loaded. Nothing heavy is imported here, so that a wrong key is
reported in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from arm_ray.config.candidates import with_ranges
from arm_ray.config.parts import with_parts
from arm_ray.config.reading import nearest, overridden, read_yaml, to_yaml, validate
from arm_ray.config.runtime import RuntimeConfig
from arm_ray.config.sections import (
    DataConfig,
    DTypeOrAuto,
    PositiveInt,
    Section,
    StorageDType,
    TrackingConfig,
)
from arm_ray.errors import ConfigError
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.identity import MODEL, NOTHING, Decides, differences, flat, identity
from arm_ray.merging.settings import OPERATOR_NAMES, MethodSettings
from arm_ray.presets import PRESETS, merged


class CalibrationConfig(DataConfig):
    """Where the calibration samples come from and how they become mini-batches."""

    batch_size: PositiveInt = 64
    """Samples in an iteration's mini-batch (N)."""
    max_length: PositiveInt = 1024
    """Tokens; longer samples are cut."""
    shuffle: bool = True
    """False: the mini-batches are the rows in file order."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order of the rows."""


class ScheduleConfig(Section):
    """Which states meet in which iteration."""

    initial: Literal["base", "last_candidate", "given"] = "base"
    """State 0 of the anchored iterations; given: the model `initial_state`."""
    offset: Annotated[int, Field(ge=0)] = 0
    """Iterations before the first one, where this continues an earlier merge: they have used up as
    many mini-batches and random draws."""
    anchor_iterations: Annotated[int, Field(ge=0)] = 3
    """The first iterations, which merge the candidates into the state before (Eq. 4); the others
    merge a sliding window of states (Eq. 5). 0: the window begins with the candidates."""
    window_size: Annotated[int, Field(ge=2)] = 2
    """States in the sliding window, n; the oldest of them is the reference."""
    window_divisor: Literal["n", "n_minus_1"] = "n"
    """What the sum over the window is divided by: n, as in Eq. 5, or the number of task vectors,
    which is n - 1 because the reference's own is zero."""
    max_iterations: PositiveInt = 6
    """Iterations in all; `tolerance` may end them earlier."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 1.0e-4
    """Stop once 1 - cos(W_t - W_base, W_(t-1) - W_base) is at most this; 0 never stops early."""
    step: Literal["auto", "fixed", "backtracking", "line_search", "subspace"] = "auto"
    """How long a step is. fixed: `method.coefficient`, as in the paper. The others try lengths, by
    the loss of calibration samples that found no direction: backtracking halves
    `method.coefficient` until a step makes the loss smaller; line_search looks for the best
    coefficient; subspace looks for one coefficient for each contributor. They stop once the next
    step gains nothing beyond its error. auto: subspace for ARM and task arithmetic without an edit,
    where there is `calibration`; else fixed. See docs/steps.md."""
    step_limit: Annotated[float, Field(gt=0.0)] = 4.0
    """Most that the task vector of any contributor is multiplied by, where a step is searched: with
    the mean of k task vectors, `method.coefficient` multiplies each by its k-th part."""
    step_blocks: PositiveInt = 1
    """Blocks of layers that subspace looks for coefficients of by themselves, once those of the
    whole model are found."""

    @property
    def searches_step(self) -> bool:
        """Whether the length of a step is chosen by losses."""
        return self.step not in ("auto", "fixed")

    @property
    def has_window(self) -> bool:
        """Whether any iteration merges a sliding window."""
        return self.max_iterations > self.anchor_iterations


class PrecisionConfig(Section):
    """Number formats.

    States between iterations, and updates, are always float32: bfloat16 would lose most of a late
    update.
    """

    compute_dtype: DTypeOrAuto = "auto"
    """Of the forward pass; auto: the base's where the devices multiply it by themselves, else
    float32. A run that goes on elsewhere keeps it."""
    storage_dtype: Annotated[StorageDType, MODEL] = "auto"
    """Of the final model; auto: each tensor as in the base, and bfloat16 for what that has in FP8.
    float8_e4m3fn: the weights that the base has in FP8 with a scale for each block are quantised so
    again, and the others are as in the base."""
    masters: bool = True
    """Read float32 masters where a checkpoint has them, as DeepSpeed's and FSDP's shards do; false:
    the weights in the model's own dtype."""

    @model_validator(mode="before")
    @classmethod
    def _without_merge_dtype(cls, content: Any) -> Any:
        """Take the configuration of a run that began when this key, of one value, was there."""
        if isinstance(content, dict) and content.get("merge_dtype") == "float32":
            return {key: value for key, value in content.items() if key != "merge_dtype"}
        return content


class SelectConfig(Section):
    """Which model is published: the last merged state, or the best of all by its loss.

    Where `evaluation.select` names a task, that task is asked in place of a loss.
    """

    DECIDES: ClassVar[Decides] = MODEL

    promise: bool | None = None
    """Whether base, candidates and merged states are compared on samples that chose no step, and
    the best becomes the model, also where that is a checkpoint; null: where `schedule.step` is not
    fixed."""
    samples: Annotated[int, Field(ge=8)] | None = None
    """Samples that they are compared on; null: 128, or a quarter of the rows where that is less."""
    final_samples: Annotated[int, Field(ge=0)] | None = None
    """Further samples, which chose nothing, for the losses that are reported at the end; null: as
    many as those."""
    path: str | None = None
    """Data of the samples that they are compared on, of the calibration's format; null: rows of the
    calibration data that are held back."""
    final_path: str | None = None
    """The same of the further samples."""

    def sizes(self, rows: int) -> tuple[int, int]:
        """How many samples compare models, and how many are for the final losses.

        Args:
            rows: Of the calibration data.
        """
        samples = min(128, rows // 4) if self.samples is None else self.samples
        return samples, samples if self.final_samples is None else self.final_samples

    def held_back(self, rows: int) -> int:
        """Rows of the calibration data that no mini-batch uses."""
        samples, final = self.sizes(rows)
        return samples * (self.path is None) + final * (self.final_path is None)


class PushConfig(Section):
    """The repository on the Hugging Face hub that the merged model is put into at the end."""

    DECIDES: ClassVar[Decides] = NOTHING

    repo: str
    """`owner/name`. Whether it can be written is checked before the merge; the token is that of
    HF_TOKEN, or of `hf auth login`."""
    private: bool = True
    """Whether a repository that is made for it is private."""
    update: bool = False
    """Whether there may be a repository of that name, which then gets another commit."""


class MergeConfig(Section):
    """Everything `arm-ray merge` needs."""

    base: str
    """A directory, hub id or URL, as all checkpoints: of any format, perhaps as `FORMAT:PATH`."""
    candidates: Annotated[list[str], Field(min_length=1)]
    """The checkpoints that are merged, in the order of the training; for those of a run by their
    steps, `{run: DIR, from: 100, to: 400, every: 50}`."""
    output: Annotated[str, NOTHING]
    """The run directory, or the URL that it is uploaded to: see docs/storage.md."""
    initial_state: str | None = None
    """Directory of the model that `schedule.initial: given` starts from, such as a merged state."""
    keep_states: Annotated[Literal["all", "last", "none"], NOTHING] = "none"
    """Merged states kept on disk beside the model, float32: all, the last one, or none. A state
    that is not kept is written only where an evaluation or `runtime.recovery_every` asks for it."""
    output_format: Annotated[Literal["model", "adapter"], MODEL] = "model"
    """What `model/` is: the whole model, or a LoRA adapter over the base, for a merge of adapters
    whose difference from the base is of low rank."""
    adapter_rank: Annotated[PositiveInt | None, MODEL] = None
    """Rank of the adapter, filled up with zeros; null: the smallest that fits, at most 256."""
    tokenizer: Literal["auto", "base", "last_candidate"] = "auto"
    """Whose tokenizer, chat template and generation settings the merged model gets; auto: the
    base's, unless it lacks a tokenizer or chat template that the last candidate has."""
    vocabulary: Literal["refuse", "common"] = "refuse"
    """What becomes of candidates that all have the same number of rows more than the base in their
    embedding and head, because tokens were added. common: the rows in common are merged, the others
    are the candidates' mean (in place of the base they have that mean). Sets `tokenizer: auto` to
    the last candidate's."""
    unknown_tensors: Literal["merge", "base", "refuse"] = "merge"
    """What becomes of tensors that the model's class does not have, such as vision towers, layers
    that predict several tokens, and counters. merge: those that all checkpoints have, in floating
    point and of one shape, are merged without activations, and the base's others are carried over.
    base: all of the base's are carried over. refuse: there must be none. What only a candidate has
    is left out. What was done is said before the merge."""
    trust_remote_code: tuple[str, ...] = ()
    """Families (`model_type`) that transformers does not have, whose code in the base's directory
    may be run: without it their checkpoints are merged without activations. It runs with all that
    the job itself may do, in the driver and in every layer shard."""
    preset: Annotated[str | None, NOTHING] = None
    """Where keys that are not given come from, instead of the defaults: see `arm_ray.presets`."""
    calibration: CalibrationConfig | None = None
    method: MethodSettings = MethodSettings()
    """Which operator merges; see `arm_ray.merging.settings`."""
    schedule: ScheduleConfig = ScheduleConfig()
    select: SelectConfig = SelectConfig()
    precision: PrecisionConfig = PrecisionConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    evaluation: Annotated[EvaluationSettings | None, Decides("model", only=("select",))] = None
    """What the checkpoints and merged states are scored on, beside the merge."""
    tracking: Annotated[TrackingConfig, NOTHING] = TrackingConfig()
    push_to_hub: Annotated[PushConfig | None, NOTHING] = None
    """Where on the Hugging Face hub the model is put, beside `output`; null: nowhere."""

    @property
    def promises(self) -> bool:
        """Whether the model is the best of all states and checkpoints; see `select.promise`."""
        given = self.select.promise
        return self.schedule.searches_step if given is None else given

    @property
    def compares_losses(self) -> bool:
        """Whether the promise is kept by losses; else by the task of `evaluation.select`."""
        return self.promises and not self.selects_by_task

    @property
    def selects_by_task(self) -> bool:
        """Whether the scores of the evaluation choose the model."""
        return self.evaluation is not None and self.evaluation.select.by != "last"

    @property
    def runs_forward(self) -> bool:
        """Whether calibration samples are run through the models."""
        return self.method.needs_calibration or self.schedule.searches_step or self.compares_losses

    def with_compute_dtype(self, dtype: str) -> MergeConfig:
        """The same with `precision.compute_dtype` settled."""
        precision = self.precision.model_copy(update={"compute_dtype": dtype})
        return self.model_copy(update={"precision": precision})

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every key written out."""
        return to_yaml(self)


def load_merge_config(path: str | Path, overrides: Sequence[str] = ()) -> MergeConfig:
    """Read a YAML file, apply dotted overrides and validate the whole.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; values are parsed as YAML.

    Raises:
        ConfigError: The file cannot be read, or its content is wrong; all problems are listed.
    """
    return parse_merge_config(read_yaml(Path(path)), overrides, source=str(path))


def parse_merge_config(
    content: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> MergeConfig:
    """Validate configuration content that is already parsed. See `load_merge_config`."""
    content = overridden(content, overrides)
    content = with_parts(with_ranges(_with_preset(content, source), source), source, overrides)
    config = validate(MergeConfig, content, source=source)
    config = _with_step(config)
    _check_combinations(config, source)
    return config


def _with_step(config: MergeConfig) -> MergeConfig:
    """The configuration with what `schedule.step: auto` comes to."""
    if config.schedule.step != "auto":
        return config
    searches = config.calibration is not None and config.method.gains_by_search
    step = "subspace" if searches else "fixed"
    schedule = config.schedule.model_copy(update={"step": step})
    return config.model_copy(update={"schedule": schedule})


def _with_preset(content: dict[str, Any], source: str) -> dict[str, Any]:
    """The content with the keys of its preset below its own."""
    name = content.get("preset")
    # What is no text is told with all the other problems.
    if not isinstance(name, str):
        return content
    if name not in PRESETS:
        like = nearest(name, list(PRESETS))
        raise ConfigError(
            f"there is no preset {name!r}" + (f"; {like}" if like else ""),
            where=f"{source}: preset",
            got=name,
            expected="one of " + ", ".join(PRESETS),
        )
    return merged(PRESETS[name], content)


def state_settings(config: MergeConfig) -> dict[str, Any]:
    """Keys that decide what the merged states are, with their values."""
    return dict(flat(identity(MergeConfig, config.model_dump(mode="json"))))


def config_difference(old: MergeConfig, new: MergeConfig, *, published: bool = False) -> list[str]:
    """Keys that decide the result and differ, one line each: `key: old -> new`.

    Args:
        old: The configuration of the run.
        new: The one that it would go on with.
        published: Whether the final model is there. Before, it may still become an adapter or not,
            and be another state; one that is published was chosen by its scores.
    """
    before, after = (
        identity(MergeConfig, c.model_dump(mode="json"), with_model=published) for c in (old, new)
    )
    if "auto" in (old.precision.compute_dtype, new.precision.compute_dtype):
        # What it came to is looked at where it is recorded.
        before["precision"]["compute_dtype"] = after["precision"]["compute_dtype"]
    return differences(before, after)


def _check_combinations(config: MergeConfig, source: str) -> None:
    schedule, count = config.schedule, len(config.candidates)
    available = schedule.anchor_iterations + 1 if schedule.anchor_iterations else 1 + count
    problems = []
    if schedule.has_window and schedule.window_size > available:
        where = (
            f"the initial state and {schedule.anchor_iterations} anchored"
            if schedule.anchor_iterations
            else f"base and {count} candidate(s)"
        )
        problems.append(
            f"schedule.window_size: got {schedule.window_size}, but only {available} states exist "
            f"when the window starts ({where}); use at most {available}, or more anchor_iterations"
        )
    if schedule.initial == "last_candidate" and schedule.anchor_iterations == 0:
        problems.append(
            "schedule.initial: last_candidate needs anchored iterations, anchor_iterations is 0 "
            "(a window alone starts from base and the candidates in order)"
        )
    elif schedule.initial == "last_candidate" and count == 1:
        problems.append(
            "schedule.initial: last_candidate with a single candidate merges it with itself; "
            "add a candidate or start from base"
        )
    if (schedule.initial == "given") != (config.initial_state is not None):
        problems.append(
            f"schedule.initial: got {schedule.initial!r}, with initial_state "
            f"{config.initial_state!r}; one needs the other"
        )
    elif config.initial_state is not None and schedule.anchor_iterations == 0:
        problems.append("initial_state: needs anchored iterations, anchor_iterations is 0")
    problems += _method_problems(config)
    problems += _adapter_problems(config)
    problems += _promise_problems(config)
    if problems:
        raise ConfigError(
            "\n".join(
                ["the configuration asks for what cannot be", *(f"  - {p}" for p in problems)]
            ),
            where=source,
        )


def _method_problems(config: MergeConfig) -> list[str]:
    operator = config.method.operator
    known = [*OPERATOR_NAMES, *sorted(e.name for e in entry_points(group="arm_ray.operators"))]
    if operator not in known:
        like = nearest(operator, known)
        return [
            f"method.operator: got {operator!r}; known are {', '.join(known)}"
            + (f"; {like}" if like else "")
        ]
    if config.method.needs_calibration and config.calibration is None:
        reason = "rotates by activations" if config.method.rotates else "measures activations"
        return [
            f"calibration: required by method.operator: {operator}, which {reason}; "
            "name a dataset in calibration.path"
        ]
    return []


def _promise_problems(config: MergeConfig) -> list[str]:
    """What the promise needs to compare, and does not get."""
    evaluation = config.evaluation
    if evaluation is None or not config.promises or config.compares_losses:
        return []
    missing = [name for name in ("base", "candidates") if not getattr(evaluation, name)]
    return [
        f"evaluation.{name}: is false, but select.promise compares the merged states with them; "
        "set it to true, or select.promise to false"
        for name in missing
    ]


def _adapter_problems(config: MergeConfig) -> list[str]:
    """What makes a result that is never of low rank over the base, or asks for what is not read."""
    method = config.method
    if config.output_format == "model":
        if config.adapter_rank is None:
            return []
        return ["adapter_rank: is set, but output_format is 'model'; remove it, or ask for adapter"]
    problems = [
        f"output_format: {reason}, or use output_format: model"
        for reason in method.full_rank_reasons
    ]
    if config.precision.storage_dtype != "auto":
        problems.append(
            "precision.storage_dtype: an adapter is written in float32; leave it at auto"
        )
    return problems
