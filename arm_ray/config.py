"""The configuration of a merge: one YAML file with dotted overrides.

It is validated before anything is loaded. Nothing heavy is imported here, so that a wrong key is
reported in a fraction of a second.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from arm_ray.errors import ConfigError, StorageError
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.identity import MODEL, NOTHING, RESULT, Decides, flat, identity
from arm_ray.merging.settings import OPERATOR_NAMES, MethodSettings
from arm_ray.presets import PRESETS, merged
from arm_ray.storage.urls import checked, is_url

SectionT = TypeVar("SectionT", bound=BaseModel)
PositiveInt = Annotated[int, Field(ge=1)]
DTypeOrAuto = Literal["auto", "float32", "bfloat16", "float16"]


def _no_url(value: Any) -> Any:
    if isinstance(value, str) and is_url(value):
        raise ValueError("a URL is not taken here: name a directory on a disk (docs/storage.md)")
    return value


# Directories that are worked in, and cannot be behind a URL.
LocalStr = Annotated[str, BeforeValidator(_no_url)]
LocalPath = Annotated[Path, BeforeValidator(_no_url)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values keep their types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Where rows of text are, and which of their columns are used."""

    path: str
    """A JSON Lines or Parquet file (perhaps gzipped), a directory, glob pattern or URL of them, a
    directory written by `datasets.save_to_disk`, or a Hugging Face dataset id: `owner/name`,
    `owner/name/config`; each with an optional `:split`."""
    format: Literal["auto", "text", "prompt_completion", "messages"] = "auto"
    """What a row holds; auto: as its columns say."""
    prompt_column: str = "prompt"
    """Column of the prompt, for `format: prompt_completion`."""
    completion_column: str = "completion"
    """Column of the completion, for `format: prompt_completion`."""
    text_column: str = "text"
    """Column of plain text, for `format: text`."""
    messages_column: str = "messages"
    """Column of the chat's messages, for `format: messages`."""


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
    storage_dtype: DTypeOrAuto = "auto"
    """Of the final model; auto: each tensor as in the base."""
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


class RuntimeConfig(Section):
    """Where and with what the merge runs.

    Only `threads`, `micro_batch_tokens` and `device` have an influence on the bits.
    """

    DECIDES: ClassVar[Decides] = NOTHING

    layer_shards: Literal["auto"] | PositiveInt = "auto"
    """Actors that share the layers; auto: one per GPU, or one per CPU slot without GPUs."""
    layers_per_group: PositiveInt = 1
    """Decoder layers loaded, run, merged and written together."""
    device: Annotated[Literal["auto", "cpu", "cuda"], RESULT] = "auto"
    """auto: cuda where the cluster has GPUs."""
    balance: Literal["auto", "bytes", "work"] = "auto"
    """What the shards' layers are balanced by; auto: bytes on GPUs, work on CPUs."""
    residency: Literal["device", "host", "disk"] = "device"
    """Where the weights of a shard's layers live: `device`, host memory, or memory-mapped files."""
    transport: Literal["auto", "direct", "object_store"] = "auto"
    """How hidden states are sent: auto and direct take Ray's direct tensor transport."""
    lookahead: Annotated[int, Field(ge=0)] = 2
    """Iterations submitted before an earlier one is known not to be the last."""
    gpus_per_shard: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    """GPUs reserved for a shard; auto: 1 on cuda, 0 on cpu."""
    placement_strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = "SPREAD"
    """How the shards' placement group is laid over the nodes."""
    threads: Annotated[PositiveInt, RESULT] = 1
    """CPU threads of one shard. More threads sum in another order: it is part of the result."""
    micro_batch_tokens: Annotated[PositiveInt, RESULT] = 2048
    """Padded tokens in one forward pass: fewer leave less padding and fill the pipeline better."""
    max_weight_file_gb: Annotated[float, Field(gt=0.0)] = 5.0
    """Size of one weight file of the final model, 10^9 bytes."""
    placement_timeout_s: Annotated[float, Field(gt=0.0)] = 300.0
    """How long to wait for the cluster to place the actors."""
    memory_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Host memory of a shard, 10^9 bytes: reserved in Ray, and the merge does not start where it is
    planned to need more; null: neither."""
    disk_mb_per_s: Annotated[float, Field(gt=0.0)] | None = None
    """Most that all shards together read and write in a second, 10^6 bytes; null: no limit."""
    storage: Literal["auto", "shared", "per_node"] = "auto"
    """shared: all nodes see the output and the checkpoints under the same paths; per_node: each
    shard copies what its layers need to its own node, and the results are assembled at the output;
    auto: shared where every node turns out to see the output, else per_node."""
    scratch: LocalStr | None = None
    """Directory on each node's own disk, for copies of what lies elsewhere; null: one below the
    system's temporary directory."""
    resources: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    """Named Ray resources that each shard takes besides CPUs and GPUs, to bind shards to nodes."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Added to the niceness that Ray gives its workers (15): 4 has the shards' processes yield
    their CPUs to everything else on the node, a training job say."""
    max_recoveries: Annotated[int, Field(ge=0)] = 3
    """How often in a row lost shards are placed anew before the merge ends with an error; each
    finished iteration starts the count again."""
    elastic: bool = True
    """Whether shards are placed anew, between two iterations, once nodes have joined the cluster,
    and on fewer places than `layer_shards` once nodes have left."""

    @property
    def scratch_path(self) -> Path:
        """The scratch directory of the node that asks."""
        return scratch_path(self.scratch)


def scratch_path(given: str | None) -> Path:
    """What `runtime.scratch` stands for on the node that asks."""
    if given is not None:
        return Path(given).expanduser()
    return Path(tempfile.gettempdir()) / f"arm_ray-{os.getuid()}"


class MlflowConfig(Section):
    """A run in MLflow: needs the extra `mlflow`."""

    experiment: str = "arm_ray"
    """Name of the experiment that the run belongs to."""
    tracking_uri: str | None = None
    """Address of the server; null: MLFLOW_TRACKING_URI, else MLflow's own default."""


class WandbConfig(Section):
    """A run in Weights & Biases: needs the extra `wandb`."""

    project: str = "arm_ray"
    """Name of the project that the run belongs to."""
    entity: str | None = None
    """User or team; null: the default of whoever is logged in."""
    mode: Literal["online", "offline"] = "online"
    """offline: kept in `wandb/` of the run's directory, for `wandb sync`."""


class TrackingConfig(Section):
    """Who is told numbers of the run, beside Ray's metrics and TensorBoard: see docs/metrics.md."""

    run: str | None = None
    """Name of the run in all of them; null: the name of its directory."""
    mlflow: MlflowConfig | None = None
    wandb: WandbConfig | None = None


class MergeConfig(Section):
    """Everything `arm-ray merge` needs."""

    base: str
    """A directory, hub id or URL, as all checkpoints: of any format, perhaps as `FORMAT:PATH`."""
    candidates: Annotated[list[str], Field(min_length=1)]
    """The checkpoints that are merged, in the order of the training."""
    output: Annotated[str, NOTHING]
    """The run directory, or the URL that it is uploaded to: see docs/storage.md."""
    initial_state: str | None = None
    """Directory of the model that `schedule.initial: given` starts from, such as a merged state."""
    keep_states: Annotated[Literal["all", "last", "none"], NOTHING] = "all"
    """Merged states kept on disk; `last` removes those that no later iteration needs, `none` also
    the last one once the final model is written."""
    output_format: Annotated[Literal["model", "adapter"], MODEL] = "model"
    """What `model/` is: the whole model, or a LoRA adapter over the base, for a merge of adapters
    whose difference from the base is of low rank."""
    adapter_rank: Annotated[PositiveInt | None, MODEL] = None
    """Rank of the adapter, filled up with zeros; null: the smallest that fits, at most 256."""
    tokenizer: Literal["auto", "base", "last_candidate"] = "auto"
    """Whose tokenizer, chat template and generation settings the merged model gets; auto: the
    base's, unless it lacks a tokenizer or chat template that the last candidate has."""
    preset: Annotated[str | None, NOTHING] = None
    """Where keys that are not given come from, instead of the defaults: see `arm_ray.presets`."""
    calibration: CalibrationConfig | None = None
    method: MethodSettings = MethodSettings()
    """Which operator merges; see `arm_ray.merging.settings`."""
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    evaluation: Annotated[EvaluationSettings | None, Decides("model", only=("select",))] = None
    """What the checkpoints and merged states are scored on, beside the merge."""
    tracking: Annotated[TrackingConfig, NOTHING] = TrackingConfig()

    def with_compute_dtype(self, dtype: str) -> MergeConfig:
        """The same with `precision.compute_dtype` settled."""
        precision = self.precision.model_copy(update={"compute_dtype": dtype})
        return self.model_copy(update={"precision": precision})

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every key written out."""
        content = self.model_dump(mode="json")
        return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False))


class EvaluateConfig(Section):
    """Everything `arm-ray evaluate` needs."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Name in the results -> directory of a model, of a LoRA adapter, or of a trainer's shards."""
    output: str
    """Directory of the results, or their URL."""
    adapter_base: str | None = None
    """The base of models that are adapters, or shards without a configuration."""
    tokenizer: str | None = None
    """Directory of the tokenizer for all models; null: each model's own."""
    scratch: LocalStr | None = None
    """Directory on the nodes of engines for copies of models that are not there, as
    `runtime.scratch` of a merge; null: below the system's directory for temporary files."""
    evaluation: EvaluationSettings
    tracking: TrackingConfig = TrackingConfig()

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every key written out."""
        return str(yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False))


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
    content = copy.deepcopy(content)
    for text in overrides:
        apply_override(content, text)
    config = validate(MergeConfig, _with_preset(content, source), source=source)
    _check_combinations(config, source)
    return config


def _with_preset(content: dict[str, Any], source: str) -> dict[str, Any]:
    """The content with the keys of its preset below its own."""
    name = content.get("preset")
    # What is no text is told with all the other problems.
    if not isinstance(name, str):
        return content
    if name not in PRESETS:
        nearest = _nearest(name, list(PRESETS))
        raise ConfigError(
            f"there is no preset {name!r}" + (f"; {nearest}" if nearest else ""),
            where=f"{source}: preset",
            got=name,
            expected="one of " + ", ".join(PRESETS),
        )
    return merged(PRESETS[name], content)


def validate(
    model: type[SectionT], content: dict[str, Any], overrides: Sequence[str] = (), *, source: str
) -> SectionT:
    """Apply overrides to parsed content and validate it against any configuration model.

    Raises:
        ConfigError: All problems, one line each, with the nearest known key.
    """
    content = copy.deepcopy(content)
    for text in overrides:
        apply_override(content, text)
    content = {key: _plain_paths(value, f"{source}: {key}") for key, value in content.items()}
    try:
        # As JSON: there the strict reading of values admits mappings as dataclasses.
        return model.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ConfigError(
            _describe_all(model, error),
            where=source,
            hint="correct the keys above; nothing was started",
        ) from None


def _plain_paths(value: Any, where: str) -> Any:
    """Content with paths in place of `file://` URLs; URLs that carry credentials are refused."""
    if isinstance(value, dict):
        return {key: _plain_paths(child, f"{where}.{key}") for key, child in value.items()}
    if isinstance(value, list):
        return [_plain_paths(child, f"{where}.{index}") for index, child in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        return checked(value)
    except StorageError as error:
        raise ConfigError(
            error.what, where=where, got=error.where, expected=error.expected, hint=error.hint
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping; duplicate keys are errors and `1e-4` is a number.

    Raises:
        ConfigError: The file is missing, is no YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the configuration file cannot be read",
            where=path,
            got=error,
            expected="a readable YAML file in UTF-8",
            hint="check the path",
        ) from None
    try:
        content = _parse_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(
            "the configuration file is not valid YAML", where=path, got=" ".join(str(error).split())
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            "the configuration file does not hold keys and values",
            where=path,
            got=type(content).__name__,
            expected="a mapping with base, candidates, output, …",
        )
    return content


def apply_override(content: dict[str, Any], text: str) -> None:
    """Set one `section.key=value` in parsed configuration content, in place.

    Raises:
        ConfigError: `text` is not of that form, or a part of its path is not a section.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"the override {text!r} is not understood",
            got=text,
            expected="section.key=value, for example schedule.max_iterations=4",
        )
    section = content
    for part in parts[:-1]:
        # An empty section (`runtime:` with nothing below) parses as null.
        child = section.get(part)
        if child is None:
            child = section[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"the override {text!r} does not fit the file",
                where=part,
                got=f"{part} is {child!r}",
                expected=f"{part} to be a section",
            )
        section = child
    try:
        section[parts[-1]] = _parse_yaml(value)
    except _YAML_ERRORS as error:
        raise ConfigError(
            f"the value of the override {text!r} is not valid YAML",
            got=value,
            expected=" ".join(str(error).split()),
        ) from None


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
        dict(flat(identity(MergeConfig, c.model_dump(mode="json"), with_model=published)))
        for c in (old, new)
    )
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, ...) != after.get(key, ...)
        # What `auto` came to is looked at where it is recorded.
        and not (key == "precision.compute_dtype" and "auto" in (before[key], after[key]))
    ]


# Besides its own errors the library lets those of nested text and impossible dates through.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (as YAML 1.2 does) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    # The class attribute is shared with the base class: copy it before adding to it.
    _class.yaml_implicit_resolvers = {
        first: list(resolvers) for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


_UNION_MEMBERS = ("constrained-int", "constrained-float", "literal['auto']", "TaskSettings")


def _describe_all(model: type[BaseModel], error: ValidationError) -> str:
    by_key: dict[tuple[str, ...], list[Any]] = {}
    found = error.errors()
    for item in found:
        if item["type"] == "string_type" and item["loc"][-1] == "str":
            # A task may also be a name alone; what is wrong with it as a section says more.
            continue
        if item["type"] == "too_short" and any(
            other["loc"][: len(item["loc"])] == item["loc"] and other is not item for other in found
        ):
            # Pydantic counts the entries that are right.
            continue
        # Pydantic names the members of a union in the location; they are no keys.
        location = tuple(str(p) for p in item["loc"] if str(p) not in _UNION_MEMBERS)
        by_key.setdefault(location, []).append(item)
    problems = [_describe(model, location, items) for location, items in by_key.items()]
    head = f"the configuration has {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return "\n".join([head, *(f"  - {problem}" for problem in problems)])


def _describe(model: type[BaseModel], location: Sequence[str], items: Sequence[Any]) -> str:
    item, key = items[0], ".".join(location)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, name = location
        known = _known_keys(model, parents)
        if "." in name:
            return (
                f"{key}: unknown key; in a file, sections are nested: {name.split('.')[0]}: {{…}}"
            )
        return f"{key}: unknown key; {_nearest(name, known) or 'known here: ' + ', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: required, but absent"
    value = item["input"]
    messages = " or ".join(i["msg"][0].lower() + i["msg"][1:] for i in items)
    text = f"{key}: got {value!r} ({type(value).__name__}); {messages}"
    choices = re.findall(r"'([^']+)'", item.get("ctx", {}).get("expected", ""))
    nearest = _nearest(value, choices) if isinstance(value, str) else ""
    return f"{text}; {nearest}" if nearest else text


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def _known_keys(model: Any, location: Sequence[str]) -> list[str]:
    for part in location:
        if part.isdigit():
            # The entries of a list have the keys that their section has.
            continue
        if issubclass(model, BaseModel):
            annotation = model.model_fields[part].annotation
        else:
            annotation = get_type_hints(model)[part]
        model = next(o for o in _members(annotation) if isinstance(o, type) and _is_section(o))
    return [*model.model_fields] if issubclass(model, BaseModel) else _field_names(model)


def _members(annotation: Any) -> Iterator[Any]:
    """The classes that an annotation names, inside of unions and tuples too."""
    arguments = getattr(annotation, "__args__", None)
    if arguments is None:
        yield annotation
    for argument in arguments or ():
        yield from _members(argument)


def _is_section(value: type) -> bool:
    return issubclass(value, BaseModel) or dataclasses.is_dataclass(value)


def _field_names(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]


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
        nearest = _nearest(operator, known)
        return [
            f"method.operator: got {operator!r}; known are {', '.join(known)}"
            + (f"; {nearest}" if nearest else "")
        ]
    if config.method.needs_calibration and config.calibration is None:
        reason = "rotates by activations" if config.method.rotates else "measures activations"
        return [
            f"calibration: required by method.operator: {operator}, which {reason}; "
            "name a dataset in calibration.path"
        ]
    return []


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
