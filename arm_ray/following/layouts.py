"""Where a trainer puts its checkpoints, and which of them are complete. Reads only.

| layout | checkpoint | complete when |
|---|---|---|
| `hf`, `trl` | `checkpoint-N/` | `trainer_state.json` parses and is of step N |
| `openrlhf`, kind `hf` | `global_stepN_hf/` | `tokenizer.json` is there, and nothing changes |
| `openrlhf`, kind `actor` | `_actor/global_stepN/` or `global_stepN/` | nothing changes, and \
`metric.json` is there where the run writes one |
| `verl` | `global_step_N/actor/` or `global_step_N/` | N <= the tracker's, nothing changes |
| `deepspeed` | `global_stepN/` | nothing changes |
| `peft` | any directory that ends in N | `adapter_config.json` is there, and nothing changes |
| `prime-rl` | `weights/step_N/` or `step_N/` | `STABLE` is there, and nothing changes |
| `nemo-rl` | `step_N/policy/weights/` | nothing changes; until then it is `tmp_step_N/` |
| `slime`, kind `hf` | any directory that ends in N and has a `config.json` | \
`model.safetensors.index.json` is there, and nothing changes |
| `slime`, kind `actor`, `megatron` | `iter_N/` | N <= the tracker's, nothing changes |
| `torchtitan` | `checkpoint/step-N/` or `step-N/` | `.metadata`, or the index of an export, is \
there, and nothing changes |

And always: every weight file is there and whole. "Nothing changes" compares two looks: files, sizes
and times are as they were at the look before. No clock is trusted.

A restarted trainer writes a step again, over the old files, which a marker of the old ones says are
complete. So a step that was complete is so again only with a new marker and with every weight file
new.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arm_ray.following import places
from arm_ray.following.places import Kind, Layout
from arm_ray.storage.regular import json_in, read_text

# What of a file tells that it is another one: inode, size, time of the last change.
Identity = tuple[int, int, int]
Missing = Callable[[Path], str | None]

TRAINER_STATE = "trainer_state.json"
_VERL_SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_NUMBERED_FILE = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_TOKENIZER = "tokenizer.json"
_INDEX = "model.safetensors.index.json"
_DCP_METADATA = ".metadata"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp")
# A link to a directory above would be walked for ever.
_DEEPEST = 4
# What a merge, and whoever loads its result, may want beside the weights.
_COMPANIONS = (
    "config.json", "generation_config.json", places.ADAPTER, TRAINER_STATE, places.METRIC, "latest",
    "latest_universal",
    "fsdp_config.json", _DCP_METADATA, places.STABLE, _TOKENIZER, "tokenizer_config.json",
    "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.json", "metadata.json",
)  # fmt: skip
_COMPANION_ENDINGS = (".index.json", ".model", ".jinja", ".tiktoken")
# Weights by their endings, but of the optimizer, or of no use for a merge.
_NEVER = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin",
    "exp_avg.pt", "exp_avg_sq.pt", "step.pt", "rng.pt", "common.pt",
)  # fmt: skip
_NEVER_PREFIXES = (
    "rng_state", "optim_world_size_", "extra_state_world_size_", "optimizer_0/",
    "sharded/",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run, as it was at one look.

    Attributes:
        step: Of the training.
        path: The directory with the weights.
        complete: Whether it is whole, and will stay so unless it is removed or written again.
        reason: What is missing; empty where it is complete.
        version: Digest of its weight files: another one means that they were written again.
        files: Of what a merge needs: name below `path` -> what it was.
    """

    step: int
    path: Path
    complete: bool
    reason: str
    version: str
    files: Mapping[str, Identity] = field(repr=False, default_factory=dict)


def identities(directory: Path) -> dict[str, Identity]:
    """What every file below a directory is; files that vanish meanwhile are left out."""
    return dict(_walk(directory, "", _DEEPEST))


def is_needed(name: str, files: Collection[str]) -> bool:
    """Whether a merge needs a file of a checkpoint: not the optimizer's, unless it has the weights.

    Args:
        name: Of the file, below the checkpoint's directory.
        files: All of them.
    """
    base = name.rsplit("/", 1)[-1]
    # Writers put a file together under a hidden name, and one that broke off leaves it behind.
    is_weights = base.endswith(_WEIGHTS) and not base.startswith(".")
    if not (is_weights or base in _COMPANIONS or base.endswith(_COMPANION_ENDINGS)):
        return False
    if base in _NEVER or name.startswith(_NEVER_PREFIXES) or base.startswith(_NEVER_PREFIXES):
        return False
    has_export = any("/" not in other and other.endswith(".safetensors") for other in files)
    return not (has_export and name.startswith("global_step"))


def needed(directory: Path) -> dict[str, Identity]:
    """The files of a checkpoint that a merge needs, as they are now."""
    files = identities(directory)
    return {name: identity for name, identity in files.items() if is_needed(name, files)}


def _walk(directory: Path, prefix: str, depth: int) -> Iterator[tuple[str, Identity]]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name = prefix + entry.name
        try:
            if entry.is_dir():
                if depth > 1:
                    yield from _walk(Path(entry.path), f"{name}/", depth - 1)
            else:
                status = os.stat(entry.path)
                # What has no end, a pipe say, is no file of a checkpoint.
                if stat.S_ISREG(status.st_mode):
                    yield name, (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            continue


def version_of(files: Mapping[str, Identity]) -> str:
    """A digest of the weight files, and of nothing that is added to them later."""
    return hashlib.sha256(repr(sorted(_weights(files).items())).encode()).hexdigest()[:16]


def _weights(files: Mapping[str, Identity]) -> dict[str, Identity]:
    return {name: identity for name, identity in files.items() if name.endswith(_WEIGHTS)}


class RunWatcher:
    """Looks at a run's directory, and remembers what it saw the time before.

    Args:
        path: The run's directory; it may not be there yet.
        layout: How the trainer lays checkpoints out; auto: as it looks.
        kind: Of OpenRLHF's two kinds of checkpoints; auto: `_hf` where the run writes it.
        missing: What is missing of a checkpoint's weight files, in words; None: nothing.
    """

    def __init__(
        self, path: Path, layout: Layout = "auto", *, kind: Kind = "auto", missing: Missing
    ) -> None:
        self._path, self._missing = path, missing
        self._layout: Layout = "hf" if layout == "trl" else layout
        self._is_auto = layout == "auto"
        self._kind: Kind = kind
        self._before: dict[int, Mapping[str, Identity]] = {}
        # Step -> its marker, and what its files were, when it was last complete.
        self._complete: dict[int, tuple[Identity | None, Mapping[str, Identity]]] = {}
        self._writes_metrics = False
        self._tracked = -1
        self._shards_seen: set[int] = set()

    @property
    def layout(self) -> Layout:
        """The layout; `auto` as long as nothing is there."""
        return self._layout

    def scan(self) -> list[Found]:
        """All checkpoints that are there, by step.

        Raises:
            ConfigError: The directory holds something else than a run's checkpoints.
        """
        if self._is_auto and not self._complete:
            # The first files of OpenRLHF look like DeepSpeed's.
            self._layout = places.find_layout(self._path)
        if self._layout == "auto":
            return []
        if self._layout == "slime" and self._kind == "auto":
            # Whichever comes first: exports and shards are never mixed.
            self._kind = places.slime_kind(self._path)
            if self._kind == "auto":
                reason = (
                    "shards of Megatron's older form (mp_rank_…) are not read; save with "
                    "--ckpt-format torch_dist, or have slime export with --save-hf"
                )
                return _waiting(places.slime_shards(self._path), reason)
        if self._layout == "openrlhf" and self._kind == "auto":
            self._kind = self._find_kind()
            if self._kind == "auto":
                reason = (
                    "whether the run writes global_stepN_hf as well shows with its second step; "
                    "set run.kind to actor or hf"
                )
                return _waiting(places.openrlhf_shards(self._path), reason)
        self._read_tracker()
        directories = places.directories(self._path, self._layout, self._kind)
        # What was removed may come back as something else.
        self._complete = {s: known for s, known in self._complete.items() if s in directories}
        found = [self._look(step, path) for step, path in sorted(directories.items())]
        self._before = {item.step: item.files for item in found}
        return found

    def again(self, found: Found) -> str | None:
        """Look at one checkpoint once more; what is wrong with it by now, None: nothing."""
        files = needed(found.path)
        if files != found.files:
            gone = sorted(set(found.files) - set(files))
            return f"{gone[0]} vanished" if gone else "it was written to meanwhile"
        reason = self._unmarked(found.step, found.path, files)
        return reason or _half_written(found.path, files) or self._missing(found.path)

    def is_last(self, found: Found) -> bool:
        """Whether a checkpoint's own files say that the run ends with it; few layouts' do."""
        if self._layout != "hf":
            return False
        state = _json_object(found.path / TRAINER_STATE) or {}
        last = state.get("max_steps")
        return isinstance(last, int) and 0 < last <= found.step

    def _look(self, step: int, path: Path) -> Found:
        files = needed(path)
        marker = self._marker(files)
        reason = self._unmarked(step, path, files) or self._half_rewritten(step, marker, files)
        if reason is None and self._needs_rest(marker, files) and self._before.get(step) != files:
            reason = "its files may still be changing"
        if reason is None and self._complete.get(step) != (marker, files):
            reason = _half_written(path, files) or self._missing(path)
            if needed(path) != files:
                reason = "its files are changing"
        if reason is None:
            self._complete[step] = (marker, files)
        return Found(step, path, reason is None, reason or "", version_of(files), files)

    def _needs_rest(self, marker: Identity | None, files: Mapping[str, Identity]) -> bool:
        """Whether the marker proves too little."""
        if self._layout != "hf" or marker is None:
            return True
        # A marker that is older than the weights may be that of earlier ones.
        return any(marker[2] < changed for _, _, changed in _weights(files).values())

    def _marker(self, files: Mapping[str, Identity]) -> Identity | None:
        """What the file is that the trainer writes after the weights."""
        if self._is_tracked:
            try:
                status = (self._path / places.VERL_TRACKER).stat()
            except OSError:
                return None
            return status.st_ino, status.st_size, status.st_mtime_ns
        names = {
            "hf": TRAINER_STATE,
            "peft": places.ADAPTER,
            "openrlhf": places.METRIC,
            "prime-rl": places.STABLE,
        }
        if self._layout == "torchtitan":
            return files.get(_DCP_METADATA) or files.get(_INDEX)
        exported = {"openrlhf": _TOKENIZER, "slime": _INDEX}
        known = {**names, **exported} if self._kind == "hf" else names
        return files.get(known.get(self._layout, ""))

    @property
    def _is_tracked(self) -> bool:
        """Whether a file of the run says which step is complete."""
        is_slime = self._layout == "slime" and self._kind != "hf"
        return self._layout in ("verl", "megatron") or is_slime

    def _half_rewritten(
        self, step: int, marker: Identity | None, files: Mapping[str, Identity]
    ) -> str | None:
        """Whether a step that was complete is being written again, or removed."""
        if step not in self._complete:
            return None
        known_marker, known = self._complete[step]
        changed = {name for name, identity in known.items() if files.get(name) != identity}
        if not changed:
            return None
        if marker == known_marker:
            if gone := sorted(changed - set(files)):
                return f"{gone[0]} vanished"
            if marker is not None:
                return "it is being written again"
        old = sorted(set(_weights(known)) - changed)
        if old and changed & set(_weights(known)):
            return f"it is being written again, and {old[0]} is still the old one"
        return None

    def _unmarked(self, step: int, path: Path, files: Mapping[str, Identity]) -> str | None:
        """What the layout's marker, and the files' names, say is missing."""
        if self._layout == "hf":
            state = _json_object(path / TRAINER_STATE)
            if state is None:
                return f"no {TRAINER_STATE} that can be read"
            if state.get("global_step") != step:
                return f"{TRAINER_STATE} is of step {state.get('global_step')}"
        elif self._layout == "peft" and places.ADAPTER not in files:
            return f"no {places.ADAPTER}"
        elif self._layout == "prime-rl" and places.STABLE not in files:
            return f"no {places.STABLE}"
        elif self._layout == "torchtitan" and not {_DCP_METADATA, _INDEX} & files.keys():
            return f"no {_DCP_METADATA}"
        elif self._layout == "slime" and self._kind == "hf" and _INDEX not in files:
            return f"no {_INDEX}"
        elif self._is_tracked:
            self._read_tracker()
            if step > self._tracked:
                return f"{places.VERL_TRACKER} does not name it yet"
        elif self._layout == "openrlhf" and self._kind == "hf" and _TOKENIZER not in files:
            return f"no {_TOKENIZER}"
        elif self._layout == "openrlhf" and self._kind == "actor":
            self._writes_metrics = self._writes_metrics or places.METRIC in files
            if self._writes_metrics and places.METRIC not in files:
                return f"no {places.METRIC}"
        # What torchtitan exports at the end has no configuration: it is read with the base's.
        return _unnamed(files, needs_config=self._layout != "torchtitan")

    def _read_tracker(self) -> None:
        """Read the tracker, which may be empty for a moment; it never goes back."""
        if not self._is_tracked:
            return
        try:
            text = read_text(self._path / places.VERL_TRACKER).strip()
            self._tracked = int(text)
        except (OSError, ValueError):
            return

    def _find_kind(self) -> Kind:
        """`hf` where there is one; `auto` as long as there may still come one."""
        if places.openrlhf_exports(self._path):
            return "hf"
        # Of each step it is written after the shards: with shards of two steps, it would be there.
        self._shards_seen.update(places.openrlhf_shards(self._path))
        return "actor" if len(self._shards_seen) > 1 else "auto"


def _waiting(directories: Mapping[int, Path], reason: str) -> list[Found]:
    found = sorted(directories.items())
    return [Found(step, path, False, reason, "") for step, path in found]


def _unnamed(files: Mapping[str, Identity], *, needs_config: bool) -> str | None:
    """What the names of the files that are there say is missing."""
    for name in files:
        if match := _VERL_SHARD.fullmatch(name):
            for rank in range(int(match[1])):
                expected = f"model_world_size_{match[1]}_rank_{rank}.pt"
                if expected not in files:
                    return f"no {expected}"
        elif match := _NUMBERED_FILE.fullmatch(name):
            for number in range(1, int(match[3]) + 1):
                expected = f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}"
                if expected not in files:
                    return f"no {expected}"
            if f"{match[1]}{match[4]}.index.json" not in files:
                return f"no {match[1]}{match[4]}.index.json"
    if not needs_config:
        return None
    models = [n for n in files if "/" not in n and n.endswith(".safetensors")]
    if any("adapter" not in name for name in models) and "config.json" not in files:
        return "no config.json"
    return None


def _half_written(path: Path, files: Collection[str]) -> str | None:
    """Whether a JSON file breaks off, as a trainer that died leaves it; no marker tells that."""
    for name in files:
        if name.endswith(".json") and _json_object(path / name) is None:
            return f"{name} cannot be read"
    return None


def _json_object(file: Path) -> dict[str, object] | None:
    """Content of a JSON file; None where it is not there, or not whole yet."""
    try:
        content = json_in(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
