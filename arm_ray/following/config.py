"""The configuration of `arm-ray attach`, and the merges that it makes of it. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from arm_ray.config import (
    LocalStr,
    MergeConfig,
    PositiveInt,
    RuntimeConfig,
    Section,
    TrackingConfig,
    parse_merge_config,
    read_yaml,
    validate,
)
from arm_ray.errors import ConfigError
from arm_ray.evaluation.settings import EvaluationSettings
from arm_ray.following.hooks import HookSettings, problems_of
from arm_ray.following.places import Kind, Layout
from arm_ray.identity import NOTHING, Decides

PositiveFloat = Annotated[float, Field(gt=0.0)]
# Keys that attach sets in every merge.
_OWN_KEYS = (
    "output",
    "initial_state",
    "keep_states",
    "evaluation",
    "output_format",
    "tracking",
    "push_to_hub",
)
# Of `merge.schedule`, where the arrivals are the iterations.
_STREAM_KEYS = ("window_divisor", "tolerance", "step", "step_limit", "step_blocks")


class RunConfig(Section):
    """The training run that is followed. Nothing is ever written below its directory."""

    path: LocalStr
    """Directory that the trainer writes its checkpoints to; it may not be there yet."""
    layout: Layout = "auto"
    """How the trainer lays its checkpoints out; auto: as the directory looks."""
    kind: Kind = "auto"
    """OpenRLHF: `global_stepN_hf` (with its moving average, if it keeps one) or `_actor` (the raw
    weights); slime: the exports of `--save-hf`, or `iter_N`; auto: the former where the run writes
    it. They are never mixed."""
    poll_s: PositiveFloat = 10.0
    """Time between two looks at the directory."""
    idle_timeout_s: PositiveFloat | None = 7200.0
    """End after so long without a new checkpoint; null: never."""
    start: Literal["latest", "all"] | Annotated[int, Field(ge=0)] = "latest"
    """Which of the checkpoints that are there at the start are merged: the newest, all of them one
    after another, or all from a step on."""
    incomplete_after_s: PositiveFloat = 600.0
    """Say what is missing of a checkpoint that has not become complete for so long."""
    max_held: PositiveInt = 8
    """Most checkpoints that are held while merges are behind; older ones that came since the start
    are let go, and their turn is skipped. What is held stays on the disk when the trainer removes
    it."""
    last_step: PositiveInt | None = None
    """Step that the run ends with; null: as the trainer's state says, where it says so."""
    copy_mb_per_s: PositiveFloat | None = None
    """Most that is copied in a second, 10^6 bytes, where files cannot be linked; null: no limit."""


class MeetingConfig(Section):
    """Which checkpoints meet when a new one arrives; all other keys are those of a merge."""

    model_config = ConfigDict(extra="allow")

    base: str
    """The model that the run began with."""
    candidates: PositiveInt = 2
    """How many models meet: checkpoints, or members of the window."""
    every: PositiveInt = 1
    """Merge at every so many checkpoints only."""
    mode: Literal["window", "anchored"] = "window"
    """window: the newest checkpoints; anchored: the first ones of the run, which stay, and the
    newest."""
    streaming: Literal["anchor", "window", "none"] = "anchor"
    """What becomes of the merged state of one arrival in the next: the anchor that the checkpoints
    are merged into (Eq. 4), a member of the window that the new checkpoint joins (Eq. 5), or
    nothing: each arrival is merged afresh into the base, over a whole schedule."""


class PublishConfig(Section):
    """Where merged models go."""

    dir: LocalStr
    """`step-000120/` and so on, and the links `best` and `latest`."""
    keep: PositiveInt = 3
    """Published models that stay, beside the best one."""
    promote: Literal["best", "always"] = "best"
    """What `best` points to: the model with the best score, if it also beats the checkpoint that it
    was made at; or always the newest."""
    hook: HookSettings = HookSettings()
    """Whom to tell about a published model."""


class SharingConfig(Section):
    """How the cluster is shared with the trainer."""

    use_gpus: bool = False
    """Whether merges and engines may take GPUs that Ray holds for free. A trainer that was not
    started by this Ray has GPUs that Ray knows nothing of."""
    keep_shards: bool = True
    """Whether layer shards, with the base's weights in host memory, stay between merges, so that
    the next one begins at once. They hold their CPUs, and a GPU's context, meanwhile."""
    when_full: Literal["wait", "cpu", "labelled", "skip"] = "wait"
    """What to do where the engines cannot be placed within their time: wait on, use CPUs, use the
    nodes with `resources`, or publish without scores."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources of the nodes that `labelled` means."""


class AttachConfig(Section):
    """Everything `arm-ray attach` needs."""

    DECIDES: ClassVar[Decides] = NOTHING

    run: Annotated[RunConfig, Decides("result", only=("path", "kind"))]
    merge: Annotated[MeetingConfig, Decides("result", but=("runtime",))]
    publish: Annotated[PublishConfig, Decides("result", only=("dir",))]
    evaluation: Annotated[
        EvaluationSettings | None, Decides("result", only=("select", "tasks"))
    ] = None
    """What each new checkpoint and its merge are scored on, with the same prompts and seeds."""
    sharing: SharingConfig = SharingConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: LocalStr | None = None
    """Directory of snapshots, merges and records; null: `work/` in `publish.dir`. On the trainer's
    file system snapshots are links, and take no room."""

    @property
    def merge_runtime(self) -> RuntimeConfig:
        """Where and how the merges run."""
        return RuntimeConfig.model_validate((self.merge.model_extra or {}).get("runtime") or {})

    @property
    def trusted_families(self) -> tuple[str, ...]:
        """Families whose own code in the base's directory may be run."""
        return tuple((self.merge.model_extra or {}).get("trust_remote_code") or ())

    @property
    def work(self) -> Path:
        """Directory of snapshots, merges and records."""
        given = self.output or str(Path(self.publish.dir) / "work")
        return Path(given).expanduser().resolve()

    @property
    def published(self) -> Path:
        """Directory of the published models."""
        return Path(self.publish.dir).expanduser().resolve()

    @property
    def name(self) -> str:
        """What this is called in metrics."""
        return self.tracking.run or self.followed.name

    @property
    def followed(self) -> Path:
        """The run's directory."""
        return Path(self.run.path).expanduser().resolve()


def load_attach_config(path: str | Path, overrides: Sequence[str] = ()) -> AttachConfig:
    """Read a YAML file, apply dotted overrides and validate the whole, the merges included.

    Raises:
        ConfigError: The file cannot be read, or its content is wrong; all problems are listed.
    """
    return parse_attach_config(read_yaml(Path(path)), overrides, source=str(path))


def parse_attach_config(
    content: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> AttachConfig:
    """Validate configuration content that is already parsed. See `load_attach_config`."""
    config = validate(AttachConfig, content, overrides, source=source)
    _check_directories(config, source)
    problems = _problems(config)
    if problems:
        lines = ["the configuration asks for what cannot be", *(f"  - {p}" for p in problems)]
        raise ConfigError("\n".join(lines), where=source)
    # A wrong key of the merges is told now, not at the first arrival.
    merge_config(
        config, 1, "step-000000", ["checkpoint"] * _num_checkpoints(config.merge), (), source
    )
    return config


def merge_config(
    config: AttachConfig,
    number: int,
    name: str,
    checkpoints: Sequence[str],
    states: Sequence[str],
    source: str = "config",
) -> MergeConfig:
    """The merge of one arrival.

    Args:
        config: Of attach.
        number: Of the arrival, from 1; also of its mini-batch, where the merges are one stream.
        name: Of the arrival's directory.
        checkpoints: The ones that meet, the newest last.
        states: Merged states of the arrivals before, the newest last; as many as there are.
        source: File of the configuration, for errors.

    Raises:
        ConfigError: The merge's keys are wrong.
    """
    merge = config.merge
    content: dict[str, Any] = copy.deepcopy(dict(merge.model_extra or {}))
    content |= {
        "base": merge.base,
        "candidates": list(checkpoints),
        "output": str(config.work / "merges" / name),
        "keep_states": "last",
    }
    # The merged state and the checkpoint are compared by the scores of both, once it is published;
    # and the next arrival goes on from the state, however it compares.
    content["select"] = {"promise": False, **_section(content, "select")}
    if merge.streaming != "none":
        schedule = {"max_iterations": 1, "offset": number - 1, **_section(content, "schedule")}
        schedule["anchor_iterations"] = 1 if merge.streaming == "anchor" else 0
        if merge.streaming == "window":
            window = [*states[max(0, len(states) - merge.candidates + 1) :], checkpoints[-1]]
            content["candidates"] = window
            # Until there are enough states, the base is the first member.
            schedule["window_size"] = min(merge.candidates, 1 + len(window))
        elif states:
            schedule["initial"] = "given"
            content["initial_state"] = states[-1]
        content["schedule"] = schedule
    if not config.sharing.use_gpus:
        content["runtime"] = {**_section(content, "runtime"), "device": "cpu"}
    return parse_merge_config(content, source=f"{source}: merge")


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section as the configuration has it.

    Raises:
        ConfigError: It is no section.
    """
    found = content.get(name)
    if found is None or isinstance(found, dict):
        return found or {}
    raise ConfigError(
        "the configuration asks for what cannot be",
        where=f"merge.{name}",
        got=repr(found),
        expected=f"a section; see `arm-ray config {name}`",
    )


def _num_checkpoints(merge: MeetingConfig) -> int:
    """How many checkpoints an arrival needs."""
    return 1 if merge.streaming == "window" else merge.candidates


def _check_directories(config: AttachConfig, source: str) -> None:
    for key, path in (("publish.dir", config.published), ("output", config.work)):
        if path == config.followed or config.followed in path.parents:
            raise ConfigError(
                "nothing may be written below the directory of the run",
                where=f"{source}: {key}",
                got=path,
                expected=f"a directory outside {config.followed}",
                hint="a file there changes what the trainer removes or resumes from",
            )


def _problems(config: AttachConfig) -> list[str]:
    merge = config.merge
    problems = [f"publish.hook: {problem}" for problem in problems_of(config.publish.hook)]
    extra = merge.model_extra or {}
    problems += [
        f"merge.{key}: is set by attach; remove it here" for key in _OWN_KEYS if key in extra
    ]
    schedule = extra.get("schedule") or {}
    if merge.streaming != "none" and isinstance(schedule, dict):
        fixed = [key for key in schedule if key not in _STREAM_KEYS]
        problems += [
            f"merge.schedule.{key}: the arrivals are the iterations of the stream "
            f"(merge.streaming: {merge.streaming}); remove it, or set merge.streaming to none"
            for key in fixed
        ]
    if merge.streaming == "window":
        if merge.mode == "anchored":
            problems.append(
                "merge.mode: anchored has no meaning with merge.streaming: window, where only the "
                "new checkpoint joins the merged states; use mode: window, or streaming: anchor"
            )
        if merge.candidates < 2:
            problems.append("merge.candidates: a window has at least 2 members")
    runtime = extra.get("runtime")
    takes_gpus = isinstance(runtime, dict) and runtime.get("device") == "cuda"
    if takes_gpus and not config.sharing.use_gpus:
        problems.append("merge.runtime.device: cuda needs sharing.use_gpus: true")
    if config.publish.promote == "best":
        if config.evaluation is None:
            problems.append(
                "publish.promote: best needs scores; add the section `evaluation`, or set it to "
                "always"
            )
        elif config.evaluation.select.by == "last":
            problems.append(
                "publish.promote: best needs evaluation.select.by, the name of a task or average"
            )
    if config.sharing.when_full == "labelled" and not config.sharing.resources:
        problems.append("sharing.when_full: labelled needs sharing.resources")
    return problems
