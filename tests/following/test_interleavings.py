"""A simulated trainer and the watcher, their file operations interleaved at random.

Nothing torn is ever taken, nothing raises, and what stayed complete over two looks is taken.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arm_ray.following.layouts import RunWatcher
from arm_ray.following.snapshots import Snapshot, changed, take
from tests.following.simulated_trainer import SHAPES, Trainer, missing

INTERLEAVINGS = 400
ROUNDS = 90


class TornError(Exception):
    """A snapshot holds what the trainer never meant."""


class LostError(Exception):
    """A checkpoint that stayed complete was not taken."""


class Session:
    """One interleaving."""

    def __init__(self, root: Path, name: str, seed: int) -> None:
        self.rng = random.Random(f"{name} {seed}")
        shape = SHAPES[name]
        self.trainer = Trainer(root / "run", shape, self.rng)
        self.ours = root / "ours"
        self.watcher = RunWatcher(root / "run", shape.layout, kind=shape.kind, missing=self.missing)
        self.known: dict[int, str] = {}
        self.held: list[tuple[Snapshot, dict[str, bytes]]] = []
        self.taken: set[tuple[int, int]] = set()
        self.count: Counter[str] = Counter()
        # Of a round: how often the trainer acts while the watcher does.
        self.haste = 0.0

    def pause(self) -> None:
        if self.rng.random() < self.haste:
            self.trainer.advance(self.rng.choice([1, 2, 3, 8, 25]))

    def missing(self, path: Path) -> str | None:
        self.pause()
        found = missing(path)
        self.pause()
        return found

    def run(self) -> Counter[str]:
        before: set[tuple[int, int, int]] = set()
        goes_on, quiet = True, 0
        for _ in range(ROUNDS):
            self.trainer.begin_round()
            goes_on = self.trainer.advance(self.rng.choice([0, 0, 1, 2, 5, 12, 30]))
            quiet = 0 if goes_on else quiet + 1
            if goes_on and self.trainer.restarts < 3 and self.rng.random() < 0.06:
                self.trainer.restart()
            self.haste = self.rng.choice([0.0, 0.0, 0.2, 0.6])
            whole = self.whole()
            self.look()
            stable = whole & self.whole()
            for step, attempt, _ in stable & before:
                self.count["stayed"] += 1
                if (step, attempt) not in self.taken:
                    raise LostError(f"step {step}, attempt {attempt}")
            before = stable
            if quiet > 3:
                break
        for snapshot, meant in self.held:
            if self.weights(snapshot) != meant:
                self.count["written into later"] += 1
                if changed(snapshot) is None:
                    raise TornError(f"step {snapshot.step}: written into, and nothing tells")
        self.count["restarts"] += self.trainer.restarts
        return self.count

    def whole(self) -> set[tuple[int, int, int]]:
        trainer = self.trainer
        return {
            (step, attempt, trainer.touched.get(step, 0))
            for step, attempt in trainer.whole.items()
            if trainer.shape.tracker is None or step <= trainer.tracked
        }

    def look(self) -> None:
        for found in self.watcher.scan():
            if not found.complete or self.known.get(found.step) == found.version:
                continue
            snapshot, reason = take(found, self.watcher, self.ours, pause=self.pause)
            if snapshot is None:
                assert reason
                self.count["given up"] += 1
                continue
            self.known[found.step] = found.version
            self.check(snapshot)

    def check(self, snapshot: Snapshot) -> None:
        """What was taken is what some attempt at the step meant, file by file."""
        self.count["taken"] += 1
        weights = self.weights(snapshot)
        finished = self.trainer.finished.get(snapshot.step, {})
        names = self.trainer.shape.weights
        whole = [a for a, meant in finished.items() if {n: meant.get(n) for n in names} == weights]
        if not whole:
            raise TornError(f"step {snapshot.step}: {self.trainer.shape.folder}")
        attempt = whole[0]
        for name in snapshot.files:
            is_ours = name != "notes.json" and not Path(name).name.startswith(".tmp-")
            if is_ours and (snapshot.path / name).read_bytes() != finished[attempt][name]:
                raise TornError(f"step {snapshot.step}: {name}")
        self.taken.add((snapshot.step, attempt))
        self.held.append((snapshot, weights))

    def weights(self, snapshot: Snapshot) -> dict[str, bytes]:
        names = self.trainer.shape.weights
        return {
            name: (snapshot.path / name).read_bytes()
            for name in names
            if (snapshot.path / name).exists()
        }


def interleave(root: Path, name: str, seeds: range) -> Counter[str]:
    count: Counter[str] = Counter()
    for seed in seeds:
        count += Session(root / f"{name}-{seed}", name, seed).run()
        shutil.rmtree(root / f"{name}-{seed}")
    return count


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_torn_is_taken_and_nothing_complete_is_lost(tmp_path: Path, name: str) -> None:
    count = interleave(tmp_path, name, range(INTERLEAVINGS // len(SHAPES)))
    # The interleavings are worth something.
    assert count["taken"] > 40
    assert count["stayed"] > 40
    assert count["restarts"] > 10
    assert count["given up"] > 0


def _nothing(*_: Any) -> None:
    return None


def _never(*_: Any) -> bool:
    return False


BREAKAGES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "no marker": ("_unmarked", _nothing, "hf-sharded"),
    "no memory of what was complete": ("_half_rewritten", _nothing, "verl-ppo"),
    "no rest": ("_needs_rest", _never, "verl-ppo"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_simulation_finds_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str
) -> None:
    method, broken, name = BREAKAGES[breakage]
    monkeypatch.setattr(RunWatcher, method, broken)
    with pytest.raises(TornError):
        interleave(tmp_path, name, range(100))


def _rewritten(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def _unmarked(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def _replaced(folder: Path) -> None:
    new = folder / "new"
    shutil.copy2(folder / "model.safetensors", new)
    new.replace(folder / "model.safetensors")


@pytest.mark.parametrize("happens", [_rewritten, _unmarked, _replaced, shutil.rmtree])
def test_what_changes_while_it_is_taken_is_given_up(
    tmp_path: Path, happens: Callable[[Path], object]
) -> None:
    trainer = Trainer(tmp_path / "run", SHAPES["hf"], random.Random(3), last=10)
    while trainer.advance(1):
        pass
    watcher = RunWatcher(trainer.run, "hf", missing=missing)
    found = watcher.scan()[0]
    assert found.complete
    calls = [0]

    def pause() -> None:
        calls[0] += 1
        # After the last file was linked.
        if calls[0] == len(found.files) + 1:
            happens(found.path)

    snapshot, reason = take(found, watcher, tmp_path / "ours", pause=pause)
    assert snapshot is None
    assert reason
    assert calls[0] == len(found.files) + 1
    assert not any(path.is_file() for path in (tmp_path / "ours").rglob("*"))
