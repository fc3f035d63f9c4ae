"""Fine-tuning on Ray Train: the curve of a plain loop, whatever the workers and interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from arm_ray.checkpoints.formats import find_format, open_source
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.checkpoints.peft import open_adapter
from arm_ray.errors import (
    ArmRayError,
    CalibrationError,
    ConfigError,
    NotACheckpointError,
    NumericalError,
    PlacementError,
    RunDirectoryError,
)
from arm_ray.events import read_events
from arm_ray.runtime.output.claim import claimed
from arm_ray.runtime.train import workers as training
from arm_ray.runtime.train.run import run_sft
from arm_ray.training import memory
from tests.builders.boards import tensorboard
from tests.builders.paths import ROOT
from tests.builders.training import content, logged, make_base, make_config, make_rows, plain_losses

# Sums in another order, in float32, over six steps.
TOLERANCE = 2e-5
# What does not depend on who starts the worker.
IN_PROCESS = pytest.mark.parametrize("trainers", ["in process"], indirect=True)
# What only several workers show.
ON_RAY_TRAIN = pytest.mark.parametrize("trainers", ["ray train"], indirect=True)
pytestmark = pytest.mark.usefixtures("trainers")


class Job:
    """A run in a directory of its own."""

    def __init__(self, folder: Path, base: Path, data: Path) -> None:
        self.output, self.base, self.data = folder / "out", base, data
        self.console = Console(file=StringIO(), width=200)

    def values(self) -> dict[str, Any]:
        return content(self.base, self.data, self.output)

    def run(self, *overrides: str) -> list[Path]:
        return run_sft(make_config(self.values(), *overrides), console=self.console)

    @property
    def told(self) -> str:
        assert isinstance(self.console.file, StringIO)
        return self.console.file.getvalue()

    @property
    def losses(self) -> list[float]:
        log = logged(self.output)
        assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
        return [entry["loss"] for entry in log]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_base(folder / "base"), make_rows(folder / "rows.jsonl")


@pytest.fixture
def job(tmp_path: Path, inputs: tuple[Path, Path]) -> Job:
    return Job(tmp_path, *inputs)


@pytest.fixture(scope="module")
def plain(inputs: tuple[Path, Path]) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses, model = plain_losses(make_config(content(*inputs, Path("none"))))
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def assert_same_model(checkpoint: Path, expected: Mapping[str, torch.Tensor]) -> None:
    assert_same_tensors(weights(checkpoint), expected)


def assert_same_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_one_worker_gives_the_plain_loops_curve(job: Job, plain: Any, local_ray: None) -> None:
    # Rounded checkpoints, from which the run goes on exactly all the same.
    first = job.run("stop_after=4", "save_dtype=bfloat16")
    assert [path.name for path in first] == ["checkpoint-3", "checkpoint-4"]
    assert job.losses == pytest.approx(plain[0][:4], abs=TOLERANCE)
    assert {t.dtype for t in load_file(first[0] / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((first[0] / "config.json").read_text())["dtype"] == "bfloat16"
    # What a killed run leaves: half a checkpoint.
    shutil.rmtree(first[1])
    (job.output / "checkpoint-6").mkdir()
    (job.output / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    both = job.run("save_dtype=bfloat16")
    assert [path.name for path in both] == ["checkpoint-3", "checkpoint-6"]
    assert "going on after step 3" in job.told
    assert "step 6/6  loss" in job.told
    assert job.losses == pytest.approx(plain[0], abs=TOLERANCE)
    rates = [entry["learning_rate"] / 3e-3 for entry in logged(job.output)]
    assert rates == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    # Rounded, which is up to 2^-9 of a weight.
    for name, tensor in weights(both[1]).items():
        torch.testing.assert_close(tensor, plain[1][name], rtol=5e-3, atol=1e-4)
    assert json.loads((both[1] / "trainer_state.json").read_text())["global_step"] == 6
    assert AutoTokenizer.from_pretrained(both[1]).chat_template
    assert not (job.output / ".ray_train").exists()
    events = [event["event"] for event in read_events(job.output / "events.jsonl")]
    assert events == ["training_started", "training_finished"] * 2
    curves = tensorboard(job.output / "tensorboard")
    assert curves["training/loss"] == pytest.approx(dict(enumerate(job.losses, start=1)))
    assert list(curves["training/gradient_norm"]) == [1, 2, 3, 4, 5, 6]
    # And then there is nothing left to do, and no other run may come here.
    assert job.run("save_dtype=bfloat16") == both
    assert "nothing to do" in job.told
    with pytest.raises(RunDirectoryError, match=r"another configuration(?s:.*)seed: 0 -> 1"):
        job.run("save_dtype=bfloat16", "seed=1")


def _killed_once(settings: Mapping[str, Any]) -> None:
    """The training function, in which worker 1 dies during step 5, the first time."""
    from arm_ray.training import trainer

    marker = settings["job"].output.parent / "killed"
    own = trainer.StepCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and os.environ["RANK"] == "1" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        own(self, args, state, control, **kwargs)

    trainer.StepCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    training.run_worker(settings)


@ON_RAY_TRAIN
def test_two_workers_of_which_one_is_killed(
    job: Job, plain: Any, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = training.fit.__globals__["run_worker"]
    assert worker is training.run_worker
    monkeypatch.setitem(training.fit.__globals__, "run_worker", _killed_once)
    found = job.run("runtime.workers=2", "micro_batch_size=2", "runtime.max_failures=1")
    assert (job.output.parent / "killed").exists()
    assert "going on after step 3" in job.told
    assert job.losses == pytest.approx(plain[0], abs=TOLERANCE)
    assert_same_model(found[-1], plain[1])


@pytest.mark.minutes
@ON_RAY_TRAIN
def test_zero_3_gives_the_same_curve_and_goes_on(job: Job, plain: Any, local_ray: None) -> None:
    pytest.importorskip("deepspeed")
    zero = ("runtime.workers=2", "runtime.zero_stage=3", "micro_batch_size=2")
    job.run(*zero, "stop_after=3")
    with pytest.raises(RunDirectoryError, match=r"1 workers, and optimizer shards of 2"):
        job.run("runtime.workers=1", "runtime.zero_stage=3")
    found = job.run(*zero)
    assert "going on after step 3" in job.told
    assert job.losses == pytest.approx(plain[0], abs=TOLERANCE)
    assert_same_model(found[-1], plain[1])


@pytest.mark.minutes
@ON_RAY_TRAIN
def test_zero_3_without_gathering_leaves_shards(job: Job, local_ray: None) -> None:
    pytest.importorskip("deepspeed")
    found = job.run(
        "runtime.workers=2", "runtime.zero_stage=3", "runtime.zero_gather=false", "save_steps=2",
        "steps=2",
    )  # fmt: skip
    assert not list(found[-1].glob("*.safetensors"))
    assert (found[-1] / "config.json").is_file()
    assert (found[-1] / "tokenizer.json").is_file()
    (shards,) = found[-1].glob("global_step*")
    assert {path.name for path in shards.iterdir()} == {
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
        for rank in (0, 1)
        for kind in ("model", "optim")
    }
    # A merge reads them: the float32 weights of the plain loop.
    assert find_format(found[-1])[0] == "zero"
    settings = {**content(job.base, job.data, Path("none")), "steps": 2, "save_steps": 2}
    _, model = plain_losses(make_config(settings))
    opened = open_source(found[-1])
    assert_same_tensors(opened.read(opened.tensors), model.state_dict())


def test_lora_leaves_an_adapter(job: Job, local_ray: None) -> None:
    peft = pytest.importorskip("peft")
    lora = ("lora.rank=2", "lora.alpha=4", "learning_rate=0.03", "precision=bfloat16")
    job.run(*lora, "stop_after=3")
    found = job.run(*lora)
    assert job.losses[-1] < job.losses[0]
    base: Any = AutoModelForCausalLM.from_pretrained(job.base)
    before = base(torch.tensor([[5, 6, 7]])).logits
    adapted = peft.PeftModel.from_pretrained(base, found[-1])
    assert not torch.equal(adapted(torch.tensor([[5, 6, 7]])).logits, before)
    adapter = open_adapter(found[-1], open_checkpoint(job.base))
    assert adapter.fingerprint


@IN_PROCESS
def test_the_moments_of_another_run_are_taken_over(
    job: Job, tmp_path: Path, local_ray: None
) -> None:
    # All rows in every step, so that the order does not matter: the second run is the rest of the
    # first one.
    job.data = make_rows(tmp_path / "rows.jsonl", 8)
    same = ["schedule=constant", "warmup_steps=0"]
    whole = job.run(*same)
    rest = Job(tmp_path / "rest", whole[0], job.data)
    first = f"optimizer_from={whole[0]}"
    rest.run(*same, first, "steps=3", "save_steps=[3]", "learning_rate=3e-3")
    assert rest.losses == pytest.approx(job.losses[3:], abs=TOLERANCE)
    assert_same_model(rest.output / "checkpoint-3", weights(whole[1]))
    # With moments of zero it is another run, as it is with another learning rate.
    for name, changed in {"new": [], "slower": [first, "learning_rate=1e-3"]}.items():
        other = Job(tmp_path / name, whole[0], job.data)
        other.run(*same, *changed, "steps=3", "save_steps=[3]")
        assert other.losses[0] == pytest.approx(rest.losses[0], abs=TOLERANCE)
        assert abs(other.losses[2] - rest.losses[2]) > 10 * TOLERANCE


@IN_PROCESS
def test_moments_of_other_parameters_are_refused(job: Job, tmp_path: Path, local_ray: None) -> None:
    whole = job.run("stop_after=3")
    other = Job(tmp_path / "other", make_base(tmp_path / "qwen", "qwen2.5"), job.data)
    with pytest.raises(RunDirectoryError, match="moments of the optimizer are of another model"):
        other.run(f"optimizer_from={whole[0]}")


def test_a_diverging_run_is_told_as_what_it_is(job: Job, local_ray: None) -> None:
    with pytest.raises(NumericalError, match=r"diverged(?s:.*)learning_rate"):
        job.run("learning_rate=1e38", "warmup_steps=0", "gradient_clip=1e30")
    assert read_events(job.output / "events.jsonl")[-1]["error"] == "NumericalError"


def test_too_little_memory_is_refused_at_once(
    job: Job, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2**29)
    with pytest.raises(
        PlacementError, match=r"0\.50 GiB free(?s:.*)weights(?s:.*)micro_batch_size"
    ):
        job.run()


def test_more_workers_than_the_cluster_holds_are_refused(job: Job, local_ray: None) -> None:
    with pytest.raises(PlacementError, match="8 workers of 1 CPU"):
        job.run("runtime.workers=8")
    with pytest.raises(PlacementError, match="1 GPU"):
        job.run("runtime.device=cuda")


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (["data.prompt_column=question"], CalibrationError, "no column 'question'"),
        (["max_length=2"], CalibrationError, "max_length = 2"),
        (["max_length=12", "too_long=error"], CalibrationError, "at most 12"),
        (["data.path=/none.jsonl"], CalibrationError, r"/none\.jsonl"),
        (["model=/none"], NotACheckpointError, "/none"),
        (["optimizer_from=/none"], ConfigError, "no optimizer.pt in /none"),
        (["optimizer_from=/x", "lora.rank=2"], ConfigError, "a new adapter has no moments"),
        (["optimizer_from=/x", "runtime.zero_stage=3"], ConfigError, "runtime.zero_stage: 3"),
    ],
)
def test_wrong_inputs_start_nothing(
    job: Job, overrides: list[str], kind: type[ArmRayError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        job.run(*overrides)
    assert not job.output.exists()


def test_an_empty_split_is_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CalibrationError, match="no rows"):
        job.run(f"data.path={tmp_path / 'empty.jsonl'}")


def test_something_else_in_the_output_is_left_alone(job: Job) -> None:
    job.output.mkdir()
    (job.output / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"something else(?s:.*)thesis\.tex"):
        job.run()
    assert [path.name for path in job.output.iterdir()] == ["thesis.tex"]


def test_relative_output_of_a_submitted_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ArmRayError, match="relative"):
        job.run("output=out")


def test_memory_estimates_count_what_there_is(job: Job) -> None:
    config = make_config(job.values())
    parameters = sum(t.numel() for t in load_file(job.base / "model.safetensors").values())
    needed = memory.estimate(job.base, config, workers=1, micro_batch=8, length=20)
    assert (needed.weights, needed.gradients, needed.optimizer) == (
        4 * parameters, 4 * parameters, 8 * parameters,
    )  # fmt: skip
    shared = make_config(job.values(), "runtime.zero_stage=3")
    sharded = memory.estimate(job.base, shared, workers=2, micro_batch=4, length=20)
    assert sharded.optimizer == 4 * parameters
    lora = memory.estimate(
        job.base, make_config(job.values(), "lora.rank=2"), workers=1, micro_batch=8, length=20
    )
    assert lora.optimizer < needed.optimizer / 10
    assert memory.free_host_bytes() > 0


def test_command_line(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(job.values()))

    def call(*arguments: str) -> Any:
        command = [sys.executable, "-m", "arm_ray.jobs.sft", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    bad = call(str(file), "stepz=1")
    assert bad.returncode == 1
    assert "stepz: unknown key; did you mean 'steps'?" in bad.stderr
    assert call().returncode == call(str(file), "--steps").returncode == 2
    assert "usage" in call("--help").stdout


def test_two_runs_do_not_work_in_one_directory(job: Job) -> None:
    job.output.mkdir()
    (job.output / "config.yaml").write_text(make_config(job.values()).to_yaml())
    with (
        claimed(job.output, "training"),
        pytest.raises(RunDirectoryError, match="another training is working"),
    ):
        job.run()
