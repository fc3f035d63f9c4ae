"""Following real trainers on the cluster that they train on, from their first checkpoint on."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from arm_ray.events import read_events
from arm_ray.following import publish
from tests.builders.checkpoints import load_all
from tests.builders.models import SERVED, save, save_tokenizer, tiny_model, write_texts
from tests.builders.training import content, make_rows
from tests.cluster.common import local_cluster, processes_with, submit

pytestmark = pytest.mark.minutes
ENGINE = {"kv_cache_gb": 0.05, "max_model_len": 64, "dtype": "float32", "chunk_size": 16}
# Slow enough for several merges meanwhile; and while nobody follows, the trainer rests.
REWARDS = """
import pathlib, time

REST = pathlib.Path(__file__).with_name("rest")

def length(completion, row):
    time.sleep(0.2)
    while REST.exists():
        time.sleep(0.2)
    return len(completion) / 100
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    # Ray's sockets have a length limit that pytest's directories exceed.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        with local_cluster(Path(folder) / "c", ARM_RAY_LOCAL_CPUS="5") as env:
            yield env
        assert processes_with(folder) == []


class Jobs:
    """The jobs of one run on the cluster: its trainer, and who follows it."""

    def __init__(self, env: dict[str, str], root: Path) -> None:
        self.env, self.root = env, root
        self.base, self.run, self.published = root / "base", root / "run", root / "published"
        save_tokenizer(save(tiny_model("smollm2", seed=1, num_layers=2, sizes=SERVED), self.base))

    def write(self, name: str, values: dict[str, Any]) -> Path:
        file = self.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def attach_config(self, **sections: Any) -> dict[str, Any]:
        return {
            "run": {
                "path": str(self.run),
                "poll_s": 0.2,
                "idle_timeout_s": 200.0,
                "start": "all",
                "max_held": 20,
            },
            "merge": {
                "base": str(self.base),
                "method": {"operator": "task_arithmetic"},
                "runtime": {"layer_shards": 1},
            },
            "publish": {"dir": str(self.published), "promote": "always"},
            **sections,
        }

    def start(self, name: str, config: Path, *overrides: str) -> str:
        """Submit a job and leave it running; gives its id."""
        job = f"{self.root.name}-{name}-{time.monotonic_ns()}"
        done = submit(
            self.env, "python", "-m", f"jobs.{name}", str(config), *overrides,
            options=("--no-wait", "--submission-id", job),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return job

    def follow(self, config: Path) -> str:
        """Start attach, and wait until it looks at the run."""
        job = self.start("attach", config)
        self.wait_for(lambda: f"following {self.run}" in self.logs(job), job)
        return job

    def ask(self, job: str, what: str = "", method: str = "GET") -> dict[str, Any]:
        """Ray's interface for jobs, which takes less of the machine than its command line."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        request = urllib.request.Request(
            f"{self.env['RAY_API_SERVER_ADDRESS']}/api/jobs/{job}{what}",
            headers={"Authorization": f"Bearer {token}"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def status(self, job: str) -> str:
        return str(self.ask(job)["status"])

    def logs(self, job: str) -> str:
        return str(self.ask(job, "/logs")["logs"])

    def stop(self, job: str) -> None:
        self.ask(job, "/stop", "POST")

    def wait_for(self, happens: Callable[[], object], *jobs: str, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not happens():
            for job in jobs:
                assert self.status(job) != "FAILED", self.logs(job)
            assert time.monotonic() < deadline, "\n".join(self.logs(job) for job in jobs)
            time.sleep(1)

    def wait(self, *jobs: str) -> None:
        self.wait_for(lambda: all(self.status(job) == "SUCCEEDED" for job in jobs), *jobs)
        for job in jobs:
            print(self.logs(job))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [
            e for e in read_events(self.published / "work" / "events.jsonl") if e["event"] == name
        ]

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.run.glob("checkpoint-*"))


@pytest.fixture
def jobs(cluster: dict[str, str], tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


def test_grpo_is_followed_scored_and_the_better_model_published(jobs: Jobs) -> None:
    pytest.importorskip("trl")
    root = jobs.root
    (root / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{i} red apples and", "answer": "5"} for i in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = 16
    grpo = {
        "model": str(jobs.base), "output": str(jobs.run),
        "data": {"path": str(root / "rows.jsonl")},
        "reward": f"{root / 'rewards.py'}:length", "learning_rate": 1e-3, "steps": steps,
        "save_steps": 1, "save_total_limit": 2, "batch_size": 8, "num_generations": 4,
        "max_completion_length": 8, "save_dtype": "float32", "save_optimizer": False,
        "runtime": {"device": "cpu", "max_failures": 0, "cpus_per_worker": 1},
    }  # fmt: skip
    texts = write_texts(root / "texts.jsonl")
    attach = jobs.attach_config(
        evaluation={
            "tasks": [{"name": "held", "type": "loss", "path": str(texts)}],
            "engine": ENGINE,
            "resamples": 200,
            "select": {"by": "held"},
        },
        publish={"dir": str(jobs.published), "promote": "best", "keep": 20},
    )
    attach["merge"] |= {
        "method": {"operator": "arm"},
        "calibration": {"path": str(texts), "batch_size": 8, "max_length": 32},
        "schedule": {"step": "fixed"},
    }
    follower_config = jobs.write("attach", attach)
    follower = jobs.follow(follower_config)
    trainer = jobs.start("grpo", jobs.write("grpo", grpo))
    jobs.wait_for(lambda: publish.published(jobs.published), trainer, follower)
    # Stopped in the middle, and gone on with.
    (root / "rest").touch()
    jobs.stop(follower)
    jobs.wait_for(lambda: jobs.status(follower) == "STOPPED")
    before = {path: load_all(path) for path in publish.published(jobs.published).values()}
    assert not list(jobs.published.glob(".*partial"))
    follower = jobs.follow(follower_config)
    (root / "rest").unlink()
    jobs.wait(trainer, follower)

    assert jobs.kept() == [f"checkpoint-{steps - 1}", f"checkpoint-{steps}"]
    taken = [event["step"] for event in jobs.events("checkpoint_taken")]
    # From the first to the last; most of what was taken is gone from the run by now.
    assert taken == sorted(set(taken))
    assert taken[0] == 1
    assert taken[-1] == steps
    assert len(taken) > steps // 2
    done = jobs.events("arrival_published")
    assert done[-1]["step"] == steps
    assert len(done) >= 2
    # What was published before the stop is as it was.
    for path, weights in before.items():
        now = load_all(path)
        assert all((now[name] == weights[name]).all() for name in weights)
    for event in done:
        path = jobs.published / f"step-{event['step']:06d}"
        evidence = publish.evidence(path)
        name = f"{evidence['arrival']:04d}-step-{event['step']:06d}"
        assert evidence["models"].keys() == {"base", f"checkpoint-{name}", f"merged-{name}"}
        assert evidence["value"] == event["value"]
        is_better = event["value"] < event["checkpoint_value"]
        assert not event["is_best"] or is_better
    best = [event for event in done if event["is_best"]]
    pointed = publish.best(jobs.published)
    assert (pointed is None) == (not best)
    if pointed is not None:
        assert pointed.name == f"step-{best[-1]['step']:06d}"
        AutoModelForCausalLM.from_pretrained(pointed)


def test_sft_on_two_deepspeed_workers_is_followed_by_its_shards(jobs: Jobs) -> None:
    pytest.importorskip("deepspeed")
    data = make_rows(jobs.root / "rows.jsonl", count=160)
    sft = content(jobs.base, data, jobs.run)
    steps = 10
    sft |= {"steps": steps, "save_steps": 1, "save_total_limit": 2, "batch_size": 64}
    # Slow enough to be looked at.
    sft["micro_batch_size"] = 1
    sft["runtime"] |= {"workers": 2, "zero_stage": 3, "zero_gather": False}
    follower = jobs.follow(jobs.write("attach", jobs.attach_config()))
    trainer = jobs.start("sft", jobs.write("sft", sft))
    jobs.wait(trainer, follower)
    assert jobs.kept() == ["checkpoint-10", "checkpoint-9"]
    assert not list(jobs.run.glob("checkpoint-*/*.safetensors"))
    taken = [event["step"] for event in jobs.events("checkpoint_taken")]
    assert taken[0] == 1
    assert taken[-1] == steps
    assert len(taken) > steps // 2
    done = jobs.events("arrival_published")
    assert done[-1]["step"] == steps
    assert done[-1]["members"] == ["step-000009", "step-000010"]
    AutoModelForCausalLM.from_pretrained(publish.best(jobs.published))
