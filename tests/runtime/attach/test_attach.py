"""Following a run that is going on: what is merged, published, kept, and gone on with."""

from __future__ import annotations

import json
import shutil
import threading
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from arm_ray.errors import (
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
    RunDirectoryError,
)
from arm_ray.events import read_events
from arm_ray.following import publish
from arm_ray.following.config import AttachConfig, parse_attach_config
from arm_ray.following.journal import open_journal
from arm_ray.hardware import Units
from arm_ray.runtime.attach import processing, publication, run
from arm_ray.runtime.attach.run import AttachOutcome, attach
from tests.builders.boards import tensorboard
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.models import fine_tuned, save, save_tokenizer, tiny_model, write_texts
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("shards_in_process")

Weights = dict[str, torch.Tensor]
COEFFICIENT = 0.7


class Trainer:
    """Writes a run as the Hugging Face trainer does: weights, then its state, then rotation."""

    def __init__(self, root: Path, limit: int | None = None, last: int = 60) -> None:
        self.root, self.limit, self.last = root, limit, last
        self.run, self.base = root / "train", root / "base"
        model = tiny_model("smollm2", seed=1, num_layers=2)
        save_tokenizer(save(model, self.base))
        self.models = {step: fine_tuned(model, seed=step) for step in range(10, last + 1, 10)}
        self.weights = {
            step: {name: value.clone() for name, value in given.state_dict().items()}
            for step, given in self.models.items()
        }
        self.base_weights = load_all(self.base)

    def write(self, step: int) -> Path:
        path = self.run / f"checkpoint-{step}"
        save(self.models[step], path)
        shutil.copy(self.base / "tokenizer.json", path)
        (path / "optimizer.pt").write_bytes(b"moments")
        state = {"global_step": step, "max_steps": self.last}
        (path / "trainer_state.json").write_text(json.dumps(state))
        if self.limit is not None:
            kept = sorted(self.run.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
            for old in kept[: -self.limit]:
                shutil.rmtree(old)
        return path

    def write_all(self, steps: list[int] | None = None) -> None:
        for step in steps or self.models:
            self.write(step)

    def config(self, *overrides: str, **sections: Any) -> AttachConfig:
        content: dict[str, Any] = {
            "run": {"path": str(self.run), "poll_s": 0.1, "idle_timeout_s": 120.0, "start": "all"},
            "merge": {
                "base": str(self.base),
                "method": {"operator": "task_arithmetic", "coefficient": COEFFICIENT},
                "runtime": {"layer_shards": 1},
            },
            "publish": {"dir": str(self.root / "published"), "promote": "always"},
            **sections,
        }
        return parse_attach_config(content, overrides)

    def anchored(self, steps: list[tuple[int, ...]]) -> Weights:
        """The merged state after arrivals at which these checkpoints met, by the formula."""
        state = {name: value.double() for name, value in self.base_weights.items()}
        for members in steps:
            state = {
                name: value
                + COEFFICIENT
                / len(members)
                * sum(self.weights[step][name].double() - value for step in members)
                for name, value in state.items()
            }
        return state


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def follow(config: AttachConfig) -> tuple[AttachOutcome, str]:
    output = StringIO()
    found = attach(config, console=Console(file=output, width=200))
    return found, output.getvalue()


def steps_of(config: AttachConfig) -> list[int]:
    return [arrival.step for arrival in open_journal(config.work).arrivals]


def assert_close(found: Weights, expected: Weights) -> None:
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name], rtol=0, atol=1e-6), name


def listing(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a directory: inode, size, time of the last change."""
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def test_a_run_is_followed_from_its_first_checkpoint_to_its_last(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, limit=2)
    config = trainer.config("run.start=latest")

    def is_held(step: int) -> bool:
        return any((config.work / "checkpoints").glob(f"step-{step:06d}*"))

    def is_published(step: int) -> bool:
        return step in publish.published(config.published)

    def train() -> None:
        for step in trainer.models:
            trainer.write(step)
            # The trainer removes what is old: it has to be held by then.
            wait_for(partial(is_held, step), "a snapshot")
            if step % 20 == 0:
                wait_for(partial(is_published, step), "a publication")

    thread = threading.Thread(target=train)
    thread.start()
    outcome, told = follow(config)
    thread.join()
    assert outcome.reason == "finished"
    done = [arrival for arrival in outcome.arrivals if arrival.outcome == "published"]
    assert done == list(outcome.arrivals)
    assert steps_of(config)[-1] == trainer.last
    # What was passed over was a member all the same.
    members = [
        tuple(int(name.removeprefix("step-")) for name in arrival.members) for arrival in done
    ]
    assert all(second - first == 10 for first, second in members)
    assert outcome.best == config.published / "step-000060"
    published = publish.published(config.published)
    assert list(published) == sorted(published)[-3:]
    assert_close(load_all(published[60]), trainer.anchored(members))
    AutoModelForCausalLM.from_pretrained(outcome.best)
    assert "following" in told
    # One curve over the arrivals, and none of each merge's own.
    curves = tensorboard(config.work / "tensorboard")
    lags, seconds = curves["attach/lag_seconds"], curves["attach/publication_seconds"]
    assert list(lags) == list(seconds) == [arrival.step for arrival in done]
    assert all(lags[step] >= seconds[step] - 0.01 > 0.0 for step in lags)
    assert list(curves["cosine/weights"]) == list(lags)
    assert not list((config.work / "merges").glob("*/tensorboard"))


def test_its_report_tells_of_all_arrivals(trainer: Trainer, report_pages: None) -> None:
    trainer.write_all()
    config = trainer.config()
    outcome, told = follow(config)
    page = (config.work / "report.html").read_text(encoding="utf-8")
    assert f"report: {config.work / 'report.html'}" in told
    for arrival in outcome.arrivals:
        assert f'<td class="n">{arrival.step}</td>' in page
    # Merges within have no page of their own.
    assert not list((config.work / "merges").rglob("report.html"))


@pytest.mark.parametrize("streaming", ["anchor", "window", "none"])
def test_every_form_of_streaming_gives_its_formula(trainer: Trainer, streaming: str) -> None:
    trainer.last = 40
    trainer.write_all([10, 20, 30, 40])
    extra = ["merge.schedule.anchor_iterations=1", "merge.schedule.max_iterations=1"]
    config = trainer.config(
        f"merge.streaming={streaming}", *(extra if streaming == "none" else []), "publish.keep=9"
    )
    before = listing(trainer.run)
    outcome, told = follow(config)
    # Nothing was written there: the same files, of the same times.
    assert listing(trainer.run) == before
    assert [arrival.outcome for arrival in outcome.arrivals] == ["published"] * len(
        outcome.arrivals
    )
    found = load_all(config.published / "step-000040")
    if streaming == "anchor":
        assert steps_of(config) == [20, 30, 40]
        assert_close(found, trainer.anchored([(10, 20), (20, 30), (30, 40)]))
    elif streaming == "none":
        assert steps_of(config) == [20, 30, 40]
        assert_close(found, trainer.anchored([(30, 40)]))
    else:
        # W_t = W_(t-1) + λ/2 (C_t - W_(t-1))
        assert steps_of(config) == [10, 20, 30, 40]
        state = {name: value.double() for name, value in trainer.base_weights.items()}
        for step in (10, 20, 30, 40):
            state = {
                name: value + COEFFICIENT / 2 * (trainer.weights[step][name].double() - value)
                for name, value in state.items()
            }
        assert_close(found, state)
    evidence = publish.evidence(config.published / "step-000040")
    assert evidence["step"] == 40
    assert evidence["members"]
    assert "merged and published" in told


class StoppedError(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[int, Weights]:
    """What is published of a run of three checkpoints that is followed without a stop."""
    trainer = Trainer(tmp_path_factory.mktemp("whole"), last=30)
    trainer.write_all()
    config = trainer.config()
    follow(config)
    return {step: load_all(path) for step, path in publish.published(config.published).items()}


@pytest.mark.parametrize("place", ["merge", "publish", "run_hook"])
def test_it_goes_on_after_a_stop_with_the_same_bits(
    tmp_path: Path, whole: dict[int, Weights], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    trainer = Trainer(tmp_path, last=30)
    trainer.write_all()
    config = trainer.config()
    holder: Any = {
        "merge": processing,
        "run_hook": publication,
        "publish": publish,
    }[place]
    original, calls = getattr(holder, place), [0]

    def stops(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        result = original(*arguments, **named) if calls[0] == 2 else None
        if calls[0] == 2:
            raise StoppedError
        return original(*arguments, **named) if result is None else result

    with monkeypatch.context() as patch:
        patch.setattr(holder, place, stops)
        with pytest.raises(StoppedError):
            follow(config)
    # The trainer has gone on and removed what the merge still needs.
    shutil.rmtree(trainer.run / "checkpoint-20")
    outcome, _ = follow(config)
    assert steps_of(config) == [20, 30]
    assert [arrival.outcome for arrival in outcome.arrivals] == ["published"] * 2
    assert list(whole) == [20, 30]
    for step in (20, 30):
        assert_same_bits(load_all(config.published / f"step-{step:06d}"), whole[step])
    # A further start has nothing to do.
    again, _ = follow(config)
    assert again.arrivals == outcome.arrivals


def test_only_what_later_arrivals_need_is_kept(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, last=50)
    trainer.write_all()
    config = trainer.config("publish.keep=2")
    follow(config)
    assert sorted(publish.published(config.published)) == [40, 50]
    assert sorted(p.name for p in (config.work / "checkpoints").iterdir()) == [
        "step-000040",
        "step-000050",
    ]
    kept = [path.parent.name for path in (config.work / "merges").glob("*/states")]
    assert kept == ["0004-step-000050"]
    assert not list((config.work / "merges").glob("*/model"))
    names = {event["event"] for event in read_events(config.work / "events.jsonl")}
    assert {"checkpoint_taken", "arrival_published"} <= names


def test_a_run_of_another_architecture_is_told_at_once(trainer: Trainer, tmp_path: Path) -> None:
    trainer.write_all([10, 20])
    other = tmp_path / "other"
    save_tokenizer(save(tiny_model("smollm2", seed=1, num_layers=3), other))
    with pytest.raises(MismatchError, match="candidate-1"):
        follow(trainer.config(f"merge.base={other}"))


def test_a_broken_checkpoint_is_left_out(trainer: Trainer) -> None:
    trainer.write_all([10, 20])
    weights = dict(trainer.models[30].state_dict())
    next(iter(weights.values())).fill_(float("nan"))
    trainer.models[30].load_state_dict(weights)
    trainer.last = 50
    trainer.write_all([30, 40, 50])
    config = trainer.config()
    outcome, told = follow(config)
    assert [(a.step, a.outcome) for a in outcome.arrivals] == [
        (20, "published"), (30, "failed"), (40, "published"), (50, "published"),
    ]  # fmt: skip
    assert "NaN" in told
    # The stream goes on from the last good state, without the broken one.
    expected = trainer.anchored([(10, 20), (20, 40), (40, 50)])
    assert_close(load_all(config.published / "step-000050"), expected)
    assert sorted(p.name for p in (config.work / "checkpoints").iterdir()) == [
        "step-000040", "step-000050",
    ]  # fmt: skip


def test_an_anchor_that_is_broken_is_replaced(trainer: Trainer) -> None:
    weights = dict(trainer.models[10].state_dict())
    next(iter(weights.values())).fill_(float("nan"))
    trainer.models[10].load_state_dict(weights)
    trainer.last = 30
    trainer.write_all([10, 20, 30])
    config = trainer.config("merge.mode=anchored")
    outcome, told = follow(config)
    # 20 is now the first good one: there is nothing for it to meet.
    assert [(a.step, a.outcome) for a in outcome.arrivals] == [
        (20, "repeated"), (30, "published"),
    ]  # fmt: skip
    assert "merging it without that one" in told
    assert_close(load_all(config.published / "step-000030"), trainer.anchored([(20, 30)]))


def test_a_base_that_is_not_there_is_told_before_anything(trainer: Trainer) -> None:
    config = trainer.config(f"merge.base={trainer.root / 'nothing'}")
    with pytest.raises(NotACheckpointError, match=r"merge\.base"):
        follow(config)
    assert open_journal(config.work).arrivals == []


def test_a_broken_base_ends_it(trainer: Trainer) -> None:
    trainer.write_all([10, 20])
    broken = trainer.root / "broken"
    model = tiny_model("smollm2", seed=1, num_layers=2)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    save_tokenizer(save(model, broken))
    with pytest.raises(CorruptCheckpointError, match="NaN"):
        follow(trainer.config(f"merge.base={broken}"))


def test_a_backlog_is_gone_on_with_in_order(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.last = 40
    trainer.write_all([10, 20, 30, 40])
    config = trainer.config()
    original, calls = processing.merge, [0]

    def stops(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise StoppedError
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(processing, "merge", stops)
        with pytest.raises(StoppedError):
            follow(config)
    outcome, _ = follow(config)
    assert [arrival.step for arrival in outcome.arrivals] == [20, 30, 40]


def test_a_checkpoint_that_is_written_to_in_place_is_not_published(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.write_all([10, 20])
    original = processing.merge

    def merge_and_write(*arguments: Any, **named: Any) -> Any:
        outcome = original(*arguments, **named)
        # A trainer that was started again writes into the file that our link shares with it.
        with (trainer.run / "checkpoint-20" / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
        return outcome

    monkeypatch.setattr(processing, "merge", merge_and_write)
    config = trainer.config("run.idle_timeout_s=0.5")
    outcome, told = follow(config)
    assert [arrival.outcome for arrival in outcome.arrivals] == ["failed"]
    assert "the trainer wrote into model.safetensors" in told
    assert not publish.published(config.published)
    assert [p.name for p in (config.work / "checkpoints").iterdir()] == ["step-000010"]


def test_a_run_that_is_done_needs_no_ray(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.write_all([50, 60])
    config = trainer.config()
    first, _ = follow(config)

    def refuse(*_: object) -> Any:
        raise AssertionError("there is nothing to do")

    for name in ("ray_session", "telemetry", "ArrivalScoring"):
        monkeypatch.setattr(run, name, refuse)
    again, told = follow(config)
    assert again == first
    assert (first.reason, steps_of(config)) == ("finished", [60])
    assert "the run is over" in told


def test_nothing_for_long_ends_it(trainer: Trainer) -> None:
    outcome, told = follow(trainer.config("run.idle_timeout_s=0.5"))
    assert outcome.reason == "idle"
    assert "nothing new" in told


def test_what_is_missing_of_a_checkpoint_is_told(trainer: Trainer) -> None:
    trainer.write_all([10, 20])
    (trainer.run / "checkpoint-20" / "trainer_state.json").unlink()
    _, told = follow(
        trainer.config("run.idle_timeout_s=1.5", "run.incomplete_after_s=0.5", "run.poll_s=0.2")
    )
    assert "step 20: still not complete" in told
    assert "trainer_state.json" in told


def test_a_directory_that_is_no_run_is_told(trainer: Trainer) -> None:
    shutil.copytree(trainer.base, trainer.run)
    with pytest.raises(ConfigError, match="not the directory of a run"):
        follow(trainer.config())


def test_a_used_directory_of_another_run_is_refused(trainer: Trainer) -> None:
    follow(trainer.config("run.idle_timeout_s=0.3"))
    with pytest.raises(RunDirectoryError, match=r"merge\.precision\.\w+: absent -> "):
        follow(trainer.config("merge.precision.masters=false", "run.idle_timeout_s=0.3"))
    with pytest.raises(RunDirectoryError, match=r"merge\.candidates: 2 -> 3"):
        follow(trainer.config("run.idle_timeout_s=0.3", "merge.candidates=3"))


def test_all_arrivals_are_merged_in_the_format_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path, last=40)
    save(tiny_model("smollm2", seed=1, num_layers=2), trainer.base, torch.bfloat16)
    merge = {
        "base": str(trainer.base),
        "method": {"operator": "arm"},
        "calibration": {"path": str(write_texts(tmp_path / "texts.jsonl")), "batch_size": 4},
        "runtime": {"layer_shards": 1},
    }
    config = trainer.config("run.idle_timeout_s=0.3", merge=merge)
    # On a machine without units first, then on one that has them.
    for steps, formats in (([10, 20], {"float32"}), ([30], {"float32", "bfloat16"})):
        units = Units(frozenset(formats), "this CPU")
        monkeypatch.setattr(
            "arm_ray.runtime.merge.run.units_of", lambda _device, found=units: found
        )
        trainer.write_all(steps)
        follow(config)
    assert steps_of(config) == [20, 30]
    for step in (20, 30):
        [run] = (config.work / "merges").glob(f"*{step}*")
        started = [e for e in read_events(run / "events.jsonl") if e["event"] == "run_started"]
        assert [e["compute_dtype"] for e in started] == ["float32"]
