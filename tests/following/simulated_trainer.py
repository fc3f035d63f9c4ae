"""A trainer that only writes, removes and breaks off, one small file operation at a time."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arm_ray.following.layouts import needed
from arm_ray.following.places import Kind, Layout

# Each file of weights says how many there are and how long it is, as real ones do; what a
# preallocated one holds beyond that is zeros, and nothing tells.
_HEADER = 6
_BODY = 48


@dataclass(frozen=True)
class Shape:
    """What one kind of trainer writes.

    Attributes:
        layout, kind: What the watcher is told.
        folder: Of a step, below the run; `{n}` is the step.
        weights: Names of the weight files, below the folder's part that is watched.
        before, after: Other files, written before and after the weights; the last is the marker.
        how: In what ways weights are written.
        others_how: In what ways the other files are.
        sibling: Another folder of each step, with other weights, written first.
        tracker: Name of the file of the run that names the newest step.
        rotates_first: Whether old steps are removed before the new one is written.
        unfinished: What a step's folder is called until it is whole.
    """

    layout: Layout
    folder: str
    weights: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    how: tuple[str, ...] = ("rename", "grow", "preallocate")
    others_how: tuple[str, ...] = ("grow", "rename")
    kind: Kind = "auto"
    sibling: str | None = None
    tracker: str | None = None
    rotates_first: bool = False
    unfinished: str | None = None


_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_ZERO = tuple(f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2))
_VERL = tuple(f"model_world_size_2_rank_{r}.pt" for r in range(2))
_STATE = "trainer_state.json"
SHAPES = {
    "hf": Shape(
        "auto", "checkpoint-{n}", ("model.safetensors",),
        ("config.json",), ("tokenizer.json", "optimizer.pt", _STATE),
    ),
    "hf-sharded": Shape(
        "trl", "checkpoint-{n}", _SHARDS,
        ("config.json",), ("model.safetensors.index.json", "tokenizer.json", _STATE),
    ),
    "hf-zero": Shape(
        "hf", "checkpoint-{n}", tuple(f"global_step7/{name}" for name in _ZERO),
        ("config.json",), ("latest", _STATE),
    ),
    "hf-fsdp": Shape(
        "hf", "checkpoint-{n}", tuple(f"pytorch_model_fsdp_0/__{r}_0.distcp" for r in range(2)),
        (), ("pytorch_model_fsdp_0/.metadata", _STATE),
    ),
    "hf-lora": Shape(
        "auto", "checkpoint-{n}", ("adapter_model.safetensors",),
        (), ("adapter_config.json", _STATE),
    ),
    "openrlhf-hf": Shape(
        "auto", "global_step{n}_hf", _SHARDS,
        ("config.json",), ("model.safetensors.index.json", "tokenizer.json"),
        sibling="_actor/global_step{n}", rotates_first=True,
    ),
    "openrlhf-actor": Shape(
        "openrlhf", "_actor/global_step{n}", _ZERO, (), ("metric.json",),
        how=("grow",), kind="actor", rotates_first=True,
    ),
    "openrlhf-sft": Shape(
        "openrlhf", "global_step{n}", _ZERO, (), ("metric.json",),
        how=("grow",), kind="actor", rotates_first=True,
    ),
    "verl-ppo": Shape(
        "auto", "global_step_{n}/actor", _VERL, (), ("fsdp_config.json", "huggingface/config.json"),
        how=("grow",), tracker="latest_checkpointed_iteration.txt", rotates_first=True,
    ),
    "verl-sft": Shape(
        "verl", "global_step_{n}", _VERL, (), ("huggingface/config.json",),
        how=("grow",), tracker="latest_checkpointed_iteration.txt",
    ),
    "deepspeed": Shape("auto", "global_step{n}", _ZERO, how=("grow", "rename")),
    "prime-rl": Shape(
        "auto", "weights/step_{n}", _SHARDS,
        ("config.json",), ("model.safetensors.index.json", "tokenizer.json", "STABLE"),
    ),
    "nemo-rl": Shape(
        "auto", "step_{n}/policy/weights", ("__0_0.distcp", "__1_0.distcp"), (), (".metadata",),
        unfinished="tmp_step_{n}/policy/weights",
    ),
    "slime-hf": Shape(
        "slime", "rollout-{n}", _SHARDS, ("config.json", "tokenizer.json"),
        ("model.safetensors.index.json",), kind="hf",
    ),
    "slime-fsdp": Shape(
        "auto", "iter_{n:07d}", ("__0_0.distcp", "__1_0.distcp"), (), (".metadata", "meta.json"),
        how=("grow",), tracker="latest_checkpointed_iteration.txt",
    ),
    "megatron": Shape(
        "auto", "iter_{n:07d}", ("__0_0.distcp", "__1_0.distcp"),
        (), ("common.pt", ".metadata", "metadata.json"),
        how=("grow",), tracker="latest_checkpointed_iteration.txt",
    ),
    "verl-megatron": Shape(
        "auto", "global_step_{n}/actor", ("dist_ckpt/__0_0.distcp", "dist_ckpt/__1_0.distcp"),
        (), ("dist_ckpt/.metadata", "dist_ckpt/metadata.json", "huggingface/config.json"),
        how=("grow",), tracker="latest_checkpointed_iteration.txt", rotates_first=True,
    ),
    # torch itself renames its table into place.
    "torchtitan": Shape(
        "auto", "checkpoint/step-{n}", ("__0_0.distcp", "__1_0.distcp"), (), (".metadata",),
        how=("grow",), others_how=("rename",),
    ),
    "torchtitan-hf": Shape(
        "torchtitan", "step-{n}", _SHARDS, (), ("model.safetensors.index.json",), how=("grow",)
    ),
    "peft": Shape(
        "auto", "adapter-{n}", ("adapter_model.safetensors",), (), ("adapter_config.json",)
    ),
}  # fmt: skip


def missing(path: Path) -> str | None:
    """What is missing of the weights, by their headers."""
    names = [n for n in needed(path) if n.endswith((".safetensors", ".pt", ".distcp"))]
    if not names:
        return "no weights"
    for name in names:
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if len(content) < _HEADER or len(content) != int.from_bytes(content[2:_HEADER], "little"):
            return f"{name} is truncated"
        if content[1] != len(names):
            return f"{len(names)} of {content[1]} files"
    return None


class Trainer:
    """Writes steps 10, 20, …; `advance` does its next small operation.

    Attributes:
        whole: Step -> number of the attempt that it holds, while it is whole and left alone.
        touched: Step -> how often something was done to it that is no damage.
        finished: Step -> attempt -> name -> content, of what was written to its end.
    """

    def __init__(self, run: Path, shape: Shape, rng: random.Random, last: int = 50) -> None:
        self.run, self.shape, self.rng, self.last = run, shape, rng, last
        self.whole: dict[int, int] = {}
        self.touched: dict[int, int] = {}
        self.finished: dict[int, dict[int, dict[str, bytes]]] = {}
        self.tracked = last
        self._attempts: dict[int, int] = {}
        self._limit = rng.choice([1, 2, 3, 9])
        self._clock, self._skew, self._is_odd = 0, 0, rng.random() < 0.2
        self._how = rng.choice(shape.how)
        self._steps: Iterator[None] = self._train(10)
        self._idle = 0
        self.restarts = 0

    def begin_round(self) -> None:
        """A restart takes longer than two looks."""
        self._idle = max(0, self._idle - 1)

    def advance(self, count: int) -> bool:
        """Do so many operations; returns whether there are more."""
        for _ in range(count):
            if self._idle:
                return True
            if next(self._steps, "end") == "end":
                return False
        return True

    def restart(self) -> None:
        """Break off, and go on from some step that was written, on a machine with another clock."""
        self.restarts += 1
        self._idle = 4
        self._skew = self.rng.randrange(-(10**15), 10**15)
        self._how = self.rng.choice(self.shape.how)
        step = self.rng.choice([*self._attempts, 10])
        self._steps = self._train(step, clears=self.rng.random() < 0.3)

    def _train(self, first: int, clears: bool = False) -> Iterator[None]:
        for step in range(first, self.last + 1, 10):
            if clears and step == first:
                yield from self._remove(step)
            if self.shape.rotates_first:
                yield from self._rotate(step)
            yield from self._save(step)
            if not self.shape.rotates_first:
                yield from self._rotate(step)
            for _ in range(self.rng.randrange(12)):
                yield

    def _folder(self, step: int) -> Path:
        return self.run / self.shape.folder.format(n=step)

    def _save(self, step: int) -> Iterator[None]:
        shape, folder = self.shape, self._folder(step)
        whole = folder
        if shape.unfinished is not None:
            folder = self.run / shape.unfinished.format(n=step)
            shutil.rmtree(folder.parents[1], ignore_errors=True)
            yield
        attempt = self._attempts[step] = self._attempts.get(step, 0) + 1
        self.whole.pop(step, None)
        if shape.sibling is not None:
            for name in _ZERO:
                yield from self._put(
                    self.run / shape.sibling.format(n=step) / name, self._weights("other"), "grow"
                )
        meant: dict[str, bytes] = {}
        names = (*shape.before, *shape.weights, *shape.after)
        # Shards are whole without what describes them: the marker is elsewhere, or not always.
        has_marker = shape.tracker is None and shape.kind != "actor"
        last = names[-1] if has_marker else shape.weights[-1]
        for name in names:
            meant[name] = self._content(name, step, attempt)
            if name == last:
                # With the last file's last byte it is whole, before we are asked for more.
                self.finished.setdefault(step, {})[attempt] = meant
            how = self._how if name in shape.weights else self.rng.choice(shape.others_how)
            yield from self._put(folder / name, meant[name], how)
        if folder != whole:
            shutil.rmtree(whole.parents[1], ignore_errors=True)
            yield
            folder.parents[1].rename(whole.parents[1])
        if shape.tracker is not None:
            tracker = self.run / shape.tracker
            tracker.write_bytes(b"")
            # Until it names a step again, it says of none that it is whole.
            self.tracked = -1
            self._date(tracker)
            yield
            tracker.write_text(str(step))
            self._date(tracker)
            self.tracked = step
        self.whole[step] = attempt
        yield
        if shape.layout in ("hf", "trl", "auto") and self.rng.random() < 0.3:
            # A callback of the user's.
            (whole / "notes.json").write_text("{}")
            self._date(whole / "notes.json")
            self.touched[step] = self.touched.get(step, 0) + 1
            yield

    def _weights(self, seed: str) -> bytes:
        body = random.Random(seed).randbytes(_BODY)
        header = b"W" + bytes([len(self.shape.weights)])
        return header + (_HEADER + _BODY).to_bytes(4, "little") + body

    def _content(self, name: str, step: int, attempt: int) -> bytes:
        if name in self.shape.weights:
            return self._weights(f"{name} {step} {attempt}")
        if name == _STATE:
            return json.dumps({"global_step": step, "max_steps": self.last, "a": attempt}).encode()
        if Path(name).name == "config.json":
            # It says what the model is, which no step changes.
            return json.dumps({"hidden_size": 64, "num_hidden_layers": 2}).encode()
        return json.dumps({"name": name, "step": step, "attempt": attempt}).encode()

    def _put(self, path: Path, content: bytes, how: str) -> Iterator[None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        if how == "rename":
            partial = path.with_name(f".tmp-{path.name}")
            partial.write_bytes(content)
            self._date(partial)
            yield
            partial.replace(path)
            yield
            return
        with path.open("wb", buffering=0) as file:
            yield
            if how == "preallocate":
                file.write(content[:_HEADER] + bytes(len(content) - _HEADER))
                self._date(path)
                yield
                file.seek(0)
            half = len(content) // 2
            for part in (content[:half], content[half:]):
                file.write(part)
                self._date(path)
                yield

    def _date(self, path: Path) -> None:
        """Never the same time twice, whatever the clock."""
        self._clock += 1
        jump = self.rng.randrange(-(10**9), 10**9) * 10**4 if self._is_odd else 0
        base = 1_700_000_000 * 10**9
        os.utime(path, ns=(0, base + self._skew + jump + self._clock * 1_000_003))

    def _rotate(self, newest: int) -> Iterator[None]:
        steps = sorted(s for s in self._attempts if s < newest and self._folder(s).exists())
        for step in steps[: max(0, len(steps) - self._limit)]:
            yield from self._remove(step)

    def _remove(self, step: int) -> Iterator[None]:
        folder = self._folder(step)
        self.whole.pop(step, None)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.rng.shuffle(paths)
        for path in paths:
            path.unlink()
            yield
        folders = sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True)
        for path in [*folders, folder]:
            if path.is_dir():
                path.rmdir()
                yield
