"""attach beside a run of a thousand checkpoints, whose events are ten thousand."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from arm_ray.events import read_events
from arm_ray.following import publish
from arm_ray.following.config import AttachConfig, parse_attach_config
from arm_ray.following.journal import open_journal
from arm_ray.runtime.attach.run import attach
from tests.builders.figures import guarantee
from tests.builders.models import fine_tuned, save, save_tokenizer, tiny_model
from tests.load.footprint import footprint

pytestmark = pytest.mark.usefixtures("shards_in_process", "report_pages")

EVENTS = 10_000


def make_run(root: Path, last: int) -> AttachConfig:
    """A run of so many checkpoints of five different models, by links."""
    model = tiny_model("smollm2", seed=1, num_layers=2)
    save_tokenizer(save(model, root / "base"))
    made = [save(fine_tuned(model, seed=seed), root / f"model-{seed}") for seed in range(5)]
    for step in range(1, last + 1):
        path = root / "train" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        for file in made[step % 5].iterdir():
            os.link(file, path / file.name)
        shutil.copy(root / "base" / "tokenizer.json", path)
        state = {"global_step": step, "max_steps": last}
        (path / "trainer_state.json").write_text(json.dumps(state))
    content = {
        "run": {"path": str(root / "train"), "poll_s": 5.0, "idle_timeout_s": 300.0},
        "merge": {
            "base": str(root / "base"),
            "method": {"operator": "task_arithmetic"},
            "runtime": {"layer_shards": 1},
        },
        "publish": {"dir": str(root / "published"), "promote": "always"},
    }
    return parse_attach_config({**content, "run": {**content["run"], "start": "all"}}, [])


@pytest.mark.parametrize(
    "last", [20, pytest.param(1000, marks=pytest.mark.minutes)], ids=["twenty", "a thousand"]
)
def test_a_run_of_many_checkpoints(tmp_path: Path, last: int) -> None:
    config = make_run(tmp_path, last)
    config.work.mkdir(parents=True)
    # What a run has told before: the log is read again for every report.
    with (config.work / "events.jsonl").open("w") as file:
        for number in range(EVENTS - last):
            line = {"event": "warning", "time": 1.0, "message": f"nothing of note, {number}"}
            file.write(json.dumps(line) + "\n")
    before, started = footprint(), time.monotonic()
    outcome = attach(config, console=Console(quiet=True))
    after, seconds = footprint(), time.monotonic() - started
    assert outcome.reason == "finished"
    arrivals = open_journal(config.work).arrivals
    # The first checkpoint alone is nothing to merge.
    assert [arrival.step for arrival in arrivals if arrival.outcome == "published"] == [
        *range(2, last + 1)
    ]
    assert max(publish.published(config.published)) == last
    events = sum(1 for _ in read_events(config.work / "events.jsonl"))
    guarantee(
        f"checkpoints of a run that is followed: {last} of {last}, {events} events, "
        f"{seconds / last:.2f} s each; {before} -> {after}"
    )
    assert events >= EVENTS
    assert after.open_files <= before.open_files + 2
    assert (config.work / "report.html").is_file()
